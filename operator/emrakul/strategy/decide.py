"""The decision: which units go, or why none does. Pure: the same answers, in any order, give the same bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from emrakul.settings import Settings
from emrakul.strategy import evidence
from emrakul.strategy.aggregate import GroupScores, aggregate
from emrakul.strategy.basic import WeightShare
from emrakul.strategy.budget import HEADS, LAYERS, RELIABILITY, RETENTION, Share, budget_key, room, spend
from leyline import layout
from leyline.answers import Answer
from leyline.masks import Masks
from leyline.messages import (
    Budget,
    CheckpointMetadata,
    Decision,
    MaskRef,
    Stage,
    StructuralAnalysisRequest,
    WeightDecision,
)
from leyline.reasons import Reason
from leyline.topology import Group, Kind, Topology

STRUCTURED = (Kind.CHANNEL, Kind.HEAD, Kind.LAYER)


@dataclass(frozen=True, kw_only=True)
class Case:
    """What a decision is made about and from, answers apart."""

    cycle: str
    base: int
    """Record of the base pair."""
    checkpoint: CheckpointMetadata
    topology: Topology
    inherited: Masks
    inherited_ref: MaskRef | None
    stage: Stage
    rate: Fraction
    """Of the stage, after guidance."""
    settings: Settings
    carry: Mapping[str, str]
    """The policy state's carries, by domain/kind."""
    policy_state: str
    """Digest of that state."""

    def carried(self, domain: str, kind: Kind) -> Fraction:
        return Fraction(self.carry.get(budget_key(domain, kind), "0"))


Answers = Sequence[tuple[StructuralAnalysisRequest, Answer]]
"""Every request of a round with the answer that counts."""


def score(case: Case, answers: Answers) -> tuple[GroupScores, ...]:
    """The scores that `decide` ranks; also what `explain` reads."""
    statistics = case.checkpoint.statistics
    return aggregate(
        case.topology,
        case.inherited,
        [(request, answer.arrays) for request, answer in answers],
        settings=case.settings,
        source=statistics.source if statistics else None,
    )


def decide(case: Case, answers: Answers) -> Decision:
    """Which units go. `declined` names the reason where none does."""
    scores = score(case, answers)
    draft = _draft(case, "structured", {request.id: answer.message.result for request, answer in answers})
    if not scores:
        return _declined(draft, Reason.NO_IMPORTANCE, "no group has the statistics that its scores need")
    kinds = _kinds(case)
    if not any(one.group.kind in kinds for one in scores):
        wanted = ", ".join(kind.value for kind in kinds)
        return _declined(
            draft,
            Reason.NO_IMPORTANCE,
            f"no group of the kinds that structured_pruning.kinds allows ({wanted}) has statistics",
        )
    shares: list[Share] = []
    reliability: dict[str, float] = {}
    for domain in case.topology.domains:
        for kind in kinds:
            mine = [one for one in scores if (one.group.domain, one.group.kind) == (domain, kind)]
            if not mine:
                continue
            found = evidence.reliability(mine)
            if found is not None:
                reliability[budget_key(domain, kind)] = found
            if found is not None and found < case.settings.importance_reliability:
                shares.append(_unreliable(case, mine, domain, kind))
                continue
            shares.append(_spend(case, mine, domain, kind))
    decision = draft.model_copy(
        update={
            "groups": tuple(one for share in shares for one in share.pruned),
            "budgets": tuple(share.budget for share in shares),
            "reliability": reliability,
            "limits": {_key(share.budget): share.limit for share in shares if share.limit is not None},
        }
    )
    return decision if decision.groups else _nothing(decision, shares)


def decide_basic(
    case: Case, shares: Sequence[WeightShare], selected: Answers, *, used: Mapping[str, str], fallback: str = ""
) -> Decision:
    """Which single weights go: the masks lie in the answers of the select round.

    `used` has the result digests of the earlier rounds; `fallback` says why structured pruning was not possible.
    """
    weights = tuple(
        WeightDecision(slice=piece, answer=layout.responses(case.cycle, request.id), result=answer.message.result)
        for request, answer in sorted(selected, key=lambda item: _order(item[0].id))
        for piece in request.slices
        if f"{piece.key}/mask" in answer.arrays
    )
    results = {**used, **{request.id: answer.message.result for request, answer in selected}}
    decision = _draft(case, "basic", results).model_copy(
        update={"weights": weights, "budgets": tuple(share.budget for share in shares), "fallback": fallback}
    )
    if any(share.budget.achieved for share in shares):
        return decision
    return _nothing(decision, shares)


def _kinds(case: Case) -> tuple[Kind, ...]:
    """The kinds that may go in this cycle."""
    return tuple(kind for kind in STRUCTURED if kind.value in case.settings.structured_pruning.kinds)


def _spend(case: Case, scores: Sequence[GroupScores], domain: str, kind: Kind) -> Share:
    layers = [group.id for group in case.topology.groups if (group.domain, group.kind) == (domain, Kind.LAYER)]
    masked = [pruned for id_ in layers if (pruned := case.inherited.pruned(id_)) is not None]
    return spend(
        scores,
        domain=domain,
        kind=kind,
        layers=len(layers),
        removed=sum(int(pruned.sum()) for pruned in masked),
        rate=case.rate,
        carry=case.carried(domain, kind),
        settings=case.settings,
    )


def _unreliable(case: Case, scores: Sequence[GroupScores], domain: str, kind: Kind) -> Share:
    carry = case.carried(domain, kind)
    budget = Budget(
        domain=domain,
        kind=kind,
        live=sum(int(one.live.sum()) for one in scores),
        original=sum(one.group.units for one in scores),
        requested=float(case.rate),
        carry_in=str(carry),
        allowed=0,
        eligible=0,
        achieved=0,
        carry_out=str(carry),
        bound=RELIABILITY,
    )
    return Share(budget=budget, pruned=(), limit=None, full=False)


def _draft(case: Case, method: str, used: Mapping[str, str]) -> Decision:
    return Decision.model_validate(
        {
            "cycle": case.cycle,
            "base": case.base,
            "checkpoint": case.checkpoint.name,
            "stage": case.stage,
            "method": method,
            "policy_state": case.policy_state,
            "settings": case.settings.digest(),
            "inherited": case.inherited_ref,
            "used": dict(sorted(used.items())),
        }
    )


def _nothing(decision: Decision, shares: Sequence[Share | WeightShare]) -> Decision:
    """Why not one unit goes: what a person could change comes first."""
    judged = [share for share in shares if share.budget.bound != RELIABILITY]
    if not judged:
        found = ", ".join(f"{key} {value:.2f}" for key, value in decision.reliability.items())
        return _declined(decision, Reason.UNRELIABLE, f"the halves of the statistics agree too little ({found})")
    open_ = [share for share in judged if not share.full]
    parts = "; ".join(_sentence(share.budget, full=share.full) for share in shares)
    if not open_:
        return _declined(decision, Reason.RETENTION_REACHED, parts)
    if any(share.budget.allowed and not share.budget.eligible for share in open_):
        return _declined(decision, Reason.MARGIN, parts)
    if any(share.budget.allowed for share in open_):
        return _declined(decision, Reason.RETENTION_REACHED, parts)
    return _declined(decision, Reason.BELOW_ONE_UNIT, parts)


def _sentence(budget: Budget, *, full: bool) -> str:
    where = f"{budget.domain}/{budget.kind.value}"
    if budget.bound == RELIABILITY:
        return f"{where}: the halves of the statistics disagree"
    if full:
        return f"{where}: every one of {budget.live} units is kept by {budget.bound}"
    if budget.allowed:
        return f"{where}: {budget.allowed} may go and none of {budget.eligible} eligible can ({budget.bound})"
    return f"{where}: {budget.requested:g} of {budget.live} units with the carry is {_decimal(budget.carry_out)} of one"


def _decimal(fraction: str) -> str:
    return f"{float(Fraction(fraction)):.4g}"


def _declined(decision: Decision, reason: Reason, message: str) -> Decision:
    return decision.model_copy(update={"declined": reason.value, "message": message})


def _key(budget: Budget) -> str:
    return budget_key(budget.domain, budget.kind)


def _order(request: str) -> tuple[int, ...]:
    """Requests in the order of their numbers: 1-10 comes after 1-9."""
    return tuple(int(part) for part in request.split("-"))


def explain(case: Case, decision: Decision, scores: Sequence[GroupScores], group: str, unit: int) -> str:
    """Why a unit went or stayed, as a sentence. KeyError says which groups there are."""
    found = next((one for one in case.topology.groups if one.id == group), None)
    if found is None:
        return _no_group(case.topology, group)
    if not 0 <= unit < found.units:
        raise KeyError(f"group {group} has units 0 to {found.units - 1}, not {unit}")
    name = f"{found.kind.value} {unit} of {group}"
    before = case.inherited.pruned(group)
    if before is not None and before[unit]:
        return f"{name} was masked by an earlier cycle."
    taken = next((one.pruned for one in decision.groups if one.group == group), ())
    if decision.method == "forced":
        return f"{name} {'went' if unit in taken else 'stayed'}: a person forced this decision."
    if decision.method == "basic":
        return f"{name} stayed: this cycle pruned single weights ({decision.fallback or 'as the settings say'})."
    if found.kind not in _kinds(case):
        return f"{name} stayed: structured_pruning.kinds leaves out {found.kind.value}s."
    key = budget_key(found.domain, found.kind)
    budget = next((one for one in decision.budgets if _key(one) == key), None)
    one = next((one for one in scores if one.group.id == group), None)
    if one is None or budget is None or not one.live[unit]:
        return f"{name} stayed: the statistics have no score for it."
    if budget.bound == RELIABILITY:
        return f"{name} stayed: the halves of the statistics agree by {decision.reliability[key]:.2f} only."
    ranked = _rank(scores, one, unit)
    limit = decision.limits[key]
    said = (
        f"{one.scorer} {one.score[unit]:.4g} (upper bound {one.upper[unit]:.4g}) is the {ranked} of {budget.live} live"
    )
    if unit in taken:
        return f"{name} went: {said}, within the limit {limit:.4g}, and {budget.allowed} could go."
    if one.upper[unit] > limit:
        return f"{name} stayed: {said}, and the upper bound is above the limit {limit:.4g} that safety_margin sets."
    if reason := _kept(case, found, one, unit, taken, budget):
        return f"{name} stayed: {said}, eligible, but {reason}."
    return f"{name} stayed: {said}, eligible, but {budget.allowed} could go and others scored lower."


def _no_group(topology: Topology, group: str) -> str:
    for declined in topology.declined:
        if declined.name == group:
            return f"{group} was declined when the model was traced: {declined.reason}."
    if not topology.groups:
        raise KeyError(f"no group {group}: of this checkpoint no groups are known, its cycles prune single weights")
    raise KeyError(f"no group {group}; there are {', '.join(one.id for one in topology.groups[:8])}")


def _rank(scores: Sequence[GroupScores], one: GroupScores, unit: int) -> str:
    """The unit's place in the global order of its kind and domain, counted from the lowest."""
    mine = [s for s in scores if (s.group.domain, s.group.kind) == (one.group.domain, one.group.kind)]
    value = one.score[unit]
    below = sum(int((s.score[s.live] < value).sum()) for s in mine)
    for other in mine:
        ties = other.live & (other.score == value)
        if other is one:
            return _ordinal(below + int(ties[:unit].sum()) + 1)
        below += int(ties.sum())
    raise AssertionError("the unit's own group is among the scores")


def _ordinal(n: int) -> str:
    suffix = "th" if 10 <= n % 100 <= 20 else {1: "st", 2: "nd", 3: "rd"}.get(n % 10, "th")
    return "lowest" if n == 1 else f"{n}{suffix} lowest"


def _kept(
    case: Case,
    group: Group,
    one: GroupScores,
    unit: int,
    taken: Sequence[int],
    budget: Budget,
) -> str:
    """The constraint that kept an eligible unit, in words, or ""."""
    constraints = case.settings.constraints
    if group.kind is Kind.LAYER:
        return "max_layer_removal allows no more layers" if budget.bound == LAYERS else ""
    left = room(group, one.pruned + len(taken), constraints)
    if left.units == 0 and left.constraint == RETENTION:
        return "min_channel_retention keeps the rest of its group"
    if left.units == 0 and left.constraint == HEADS:
        return "min_attention_heads keeps the rest of its layer"
    if one.alike is not None:
        threshold = float(case.settings.head_redundancy)
        same = [other for other in taken if one.alike[unit, other] >= threshold]
        if same:
            return f"it says the same as {same[0]}, which went in this cycle"
    return ""
