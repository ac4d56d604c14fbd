"""A cycle's status from what its run's log and store say. Pure: the same facts give the same status."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

from pydantic import BaseModel
from pydantic.alias_generators import to_camel

from emrakul.api.cycle import (
    AccuracyStatus,
    BudgetStatus,
    CycleStatus,
    Evidence,
    MasksStatus,
    Rates,
    RequestCount,
    RollbackStatus,
    Timings,
)
from emrakul.api.policy import Seen
from emrakul.api.resource import Condition, ConditionStatus, ConditionType, set_condition
from emrakul.core.ending import accuracy
from emrakul.core.plan import Plan
from emrakul.core.snapshot import Phase, Snapshot
from emrakul.settings import Settings
from leyline import layout
from leyline.messages import Budget
from leyline.reasons import OUTCOME_OF, REMEDY, Outcome, Reason
from leyline.records import Admit, End, Prune
from leyline.work import Work

BUDGETS = 64
"""Of a decision, those that a status has room for; decision.json has all."""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What the status tells beside the look itself."""

    run: str
    seen: tuple[int, str] | None = None
    """Number and digest of the record that admitted or ended the cycle."""
    seconds: Mapping[str, float] | None = None
    """Of each phase, once the cycle has ended."""
    work: Mapping[Phase, Work] | None = None
    """Of each phase's workers, likewise."""
    workers: int | None = None


def cycle_status(
    before: CycleStatus, snapshot: Snapshot, plan: Plan, facts: Facts, *, generation: int, now: datetime
) -> CycleStatus:
    """The status that this look gives; of `before` only the times of conditions and what was frozen are kept."""
    end = snapshot.end
    outcome, reason = _outcome(snapshot, plan)
    message = _message(plan, reason)
    decision = snapshot.decision
    budgets = tuple(_budget(one) for one in decision.budgets[:BUDGETS]) if decision else ()
    newest = snapshot.rounds[-1] if snapshot.rounds else None
    admit = snapshot.admitted.body if snapshot.admitted else None
    masks = end.masks if end and isinstance(end.body, Prune) else None
    at = snapshot.here.base if snapshot.here else None
    return CycleStatus(
        observed_generation=generation,
        conditions=_conditions(before.conditions, snapshot, plan, message, generation=generation, now=now),
        state=outcome.value if outcome else plan.state,
        progress=f"{newest.answered}/{newest.requests} requests" if newest and not decision else None,
        pruned=_pruned(budgets),
        cycle=snapshot.cycle if snapshot.admitted else None,
        outcome=outcome,
        reason=reason,
        message=message[:4096] or None,
        stage=admit.stage if isinstance(admit, Admit) else None,
        run=facts.run,
        checkpoint=snapshot.pair.checkpoint if snapshot.pair else None,
        base=snapshot.ask.base,
        record=end.n if end else None,
        workers=facts.workers if facts.workers is not None else before.workers,
        requests=RequestCount(answered=newest.answered, total=newest.requests) if newest else None,
        budgets=budgets,
        counts=_counts(budgets),
        coverage=None if snapshot.coverage is None else format(snapshot.coverage, ".4f"),
        accuracy=_accuracy(snapshot),
        masks=MasksStatus(uri=f"{facts.run}/{masks.path}", digest=masks.digest, counts=masks.counts) if masks else None,
        decision=_evidence(snapshot, layout.decision(snapshot.cycle), facts.run) if decision else None,
        candidate=f"{facts.run}/{layout.candidate(snapshot.cycle, at)}"
        if at is not None and snapshot.here and snapshot.here.candidate
        else None,
        rollback=_rollback(snapshot),
        timings=_timings(facts.seconds),
        rates=_rates(facts.work, facts.seconds or {}),
        untrusted=snapshot.untrusted,
        images=dict(admit.images) if isinstance(admit, Admit) else {},
        seen=Seen(record=facts.seen[0], digest=facts.seen[1]) if facts.seen else before.seen,
        frozen=before.frozen,
    )


def unable(before: CycleStatus, state: str, message: str, *, run: str | None, generation: int) -> CycleStatus:
    """Nothing is known of the run now: all that was is kept, and why stands beside it."""
    return before.model_copy(
        update={
            "observed_generation": generation,
            "state": before.state if before.outcome else state,
            "message": message[:4096],
            "run": run or before.run,
        }
    )


def refused(
    before: CycleStatus, reason: Reason, message: str, *, run: str | None, generation: int, now: datetime
) -> CycleStatus:
    """The cycle is over before the run was even looked at."""
    outcome = OUTCOME_OF[reason]
    told = f"{message}. {REMEDY[reason]}"
    conditions = _set(before.conditions, ConditionType.ADMITTED, "False", reason.value, told, generation, now)
    conditions = _terminal(conditions, outcome, told, generation, now)
    return before.model_copy(
        update={
            "observed_generation": generation,
            "conditions": conditions,
            "state": outcome.value,
            "outcome": outcome,
            "reason": reason,
            "message": told[:4096],
            "run": run,
        }
    )


# --- parts ------------------------------------------------------------------------------------------------------------


def _outcome(snapshot: Snapshot, plan: Plan) -> tuple[Outcome | None, Reason | None]:
    if snapshot.end is not None and isinstance(snapshot.end.body, End):
        return Outcome(snapshot.end.body.outcome), Reason(snapshot.end.reason)
    if plan.refused is not None:
        return plan.refused.outcome, plan.refused.reason
    return None, None


def _message(plan: Plan, reason: Reason | None) -> str:
    if reason is None or REMEDY[reason] in plan.message:
        return in_resource_words(plan.message)
    return in_resource_words(f"{plan.message.rstrip('.')}. {REMEDY[reason]}")


def in_resource_words(text: str) -> str:
    """Settings as they are written in a resource: whoever reads a status has one in hand, and not a file."""
    return _KEYS.sub(lambda key: to_camel(key.group()), text)


def _keys(model: type[BaseModel]) -> set[str]:
    inner = [field.annotation for field in model.model_fields.values()]
    sections = [one for one in inner if isinstance(one, type) and issubclass(one, BaseModel)]
    return {name for name in model.model_fields if "_" in name}.union(*map(_keys, sections))


_KEYS = re.compile(rf"\b({'|'.join(sorted(_keys(Settings), key=len, reverse=True))})\b")


def _conditions(
    before: tuple[Condition, ...], s: Snapshot, plan: Plan, message: str, *, generation: int, now: datetime
) -> tuple[Condition, ...]:
    """Each condition from the facts alone: one that was True stays so, since the facts stay."""
    outcome, reason = _outcome(s, plan)
    found = before

    def add(type_: ConditionType, status: ConditionStatus, why: str, said: str = "") -> None:
        nonlocal found
        found = _set(found, type_, status, why, said, generation, now)

    if s.admitted is not None:
        add(ConditionType.ADMITTED, "True", "Admitted", f"record {s.admitted.n}, base record {s.ask.base}")
    else:
        add(ConditionType.ADMITTED, "False", reason.value if reason else plan.state, message)
    if s.decision is not None:
        add(ConditionType.ANALYZED, "True", s.decision.declined or "Decided", s.decision.message)
    elif reason is not None:
        add(ConditionType.ANALYZED, "False", reason.value, message)
    verdict = s.here.verdict if s.here else None
    if verdict is not None and verdict.outcome == "PASS":
        add(ConditionType.VALIDATED, "True", "Passed", verdict.message)
    elif reason is not None:
        add(ConditionType.VALIDATED, "False", reason.value, message)
    if outcome is not None and reason is not None:
        committed = outcome is Outcome.COMMITTED
        add(ConditionType.COMMITTED, "True" if committed else "False", reason.value, message)
        found = _terminal(found, outcome, message, generation, now)
    return found


def _terminal(
    conditions: tuple[Condition, ...], outcome: Outcome, message: str, generation: int, now: datetime
) -> tuple[Condition, ...]:
    found = _set(conditions, ConditionType.COMPLETE, "True", outcome.value, message, generation, now)
    failed: ConditionStatus = "True" if outcome is Outcome.FAILED else "False"
    return _set(found, ConditionType.FAILED, failed, outcome.value, message, generation, now)


def _set(
    conditions: tuple[Condition, ...],
    type_: ConditionType,
    status: ConditionStatus,
    reason: str,
    message: str,
    generation: int,
    now: datetime,
) -> tuple[Condition, ...]:
    return set_condition(conditions, type_, status, reason=reason, message=message, generation=generation, now=now)


def _budget(budget: Budget) -> BudgetStatus:
    return BudgetStatus.model_validate(
        budget.model_dump(include=set(BudgetStatus.model_fields)), by_alias=False, by_name=True
    )


def _pruned(budgets: tuple[BudgetStatus, ...]) -> str | None:
    """`10/10 channels, 0/1 heads`: achieved of allowed."""
    asked = [b for b in budgets if b.allowed]
    parts = [f"{b.achieved}/{b.allowed} {b.kind.value}s" for b in asked or budgets[:1]]
    return ", ".join(parts)[:256] or None


def _counts(budgets: tuple[BudgetStatus, ...]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for budget in budgets:
        counts[budget.kind.value] = counts.get(budget.kind.value, 0) + budget.achieved
    return counts


def _accuracy(s: Snapshot) -> AccuracyStatus | None:
    base, candidate = accuracy(s.here.verdict) if s.here and s.here.verdict else (None, None)
    if base is None or candidate is None:
        return None
    return AccuracyStatus(
        base=format(base, ".4f"), candidate=format(candidate, ".4f"), drop=format(base - candidate, ".4f")
    )


def _evidence(snapshot: Snapshot, key: str, run: str) -> Evidence | None:
    digest = snapshot.evidence.get(key)
    return Evidence(uri=f"{run}/{key}", digest=digest) if digest else None


def _rollback(s: Snapshot) -> RollbackStatus | None:
    """Whether the pair that this cycle committed was condemned since."""
    pair = s.state.pair(s.end.n) if s.end is not None and isinstance(s.end.body, Prune) else None
    if pair is None or not pair.condemned:
        return None
    return RollbackStatus(
        record=s.state.rolled_back,
        id=s.state.hold or "",
        message=f"the run was rolled back (record {s.state.rolled_back}); these masks are no longer used",
    )


def _timings(seconds: Mapping[str, float] | None) -> Timings | None:
    if not seconds:
        return None
    return Timings(
        analysis=_number(seconds.get("analyse")),
        apply=_number(seconds.get("apply")),
        validation=_number(seconds.get("validate")),
        total=_number(seconds.get("cycle")),
    )


def _rates(work: Mapping[Phase, Work] | None, seconds: Mapping[str, float]) -> Rates | None:
    """What the workers say that they read, over the time of the phase."""
    if not work:
        return None
    taken = {phase: seconds.get(phase, 0.0) for phase in work}
    if Phase.VALIDATE in work:  # its phase is the gate's time, for the most part
        taken[Phase.VALIDATE] = work[Phase.VALIDATE].seconds
    rate = {phase: int(one.bytes_read / taken[phase]) for phase, one in work.items() if taken[phase] > 0}
    scored = work.get(Phase.ANALYSE, Work())
    return Rates(
        analysis=rate.get(Phase.ANALYSE),
        apply=rate.get(Phase.APPLY),
        validation=rate.get(Phase.VALIDATE),
        calculation=int(scored.parameters / scored.seconds) if scored.seconds > 0 else None,
    )


def _number(value: float | None) -> str | None:
    return None if value is None else format(value, ".3f")
