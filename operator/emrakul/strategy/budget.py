"""How many units of a kind may go in one cycle, and which: exact fractions, one global order, hard caps.

x = rate * live + carry, k = floor(x); the lowest k of the eligible go, groups at their cap are skipped. The fraction
left is carried; what margin or caps refused is not.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from emrakul.finding import Finding
from emrakul.settings import SafetyConstraints, Settings
from emrakul.strategy.aggregate import GroupScores
from leyline.masks import Masks
from leyline.messages import Budget, GroupDecision
from leyline.reasons import Reason
from leyline.topology import Group, Kind, Topology

RATE = "rate"
MARGIN = "margin"
RETENTION = "retention"
HEADS = "min_attention_heads"
LAYERS = "max_layer_removal"
REDUNDANCY = "redundancy"
RELIABILITY = "reliability"


def budget_key(domain: str, kind: Kind) -> str:
    """How carries, limits and reliabilities are named in the log: "host/channel"."""
    return f"{domain}/{kind.value}"


@dataclass(frozen=True, kw_only=True)
class Allowance:
    """What rate and carry give one kind in one domain."""

    allowed: int
    """k = floor(rate * live + carry), never above ceil(rate * live)."""
    carry_out: Fraction
    """In [0, 1)."""


def allowance(*, rate: Fraction, live: int, carry: Fraction) -> Allowance:
    """The integer rule. `carry` in [0, 1) is the fraction of a unit that earlier cycles left."""
    if not 0 <= carry < 1:
        raise ValueError(f"a carry of {carry} is no fraction of one unit; it must lie in [0, 1)")
    x = rate * live + carry
    k = math.floor(x)
    return Allowance(allowed=min(k, math.ceil(rate * live)), carry_out=x - k)


@dataclass(frozen=True)
class Room:
    """How many units a group can still give, and the constraint that says so."""

    units: int
    constraint: str


def room(group: Group, pruned: int, constraints: SafetyConstraints) -> Room:
    """Units that may still go from a group of which `pruned` are gone.

    Channels keep their share of the original count, heads their minimum of query heads. A layer's limit is not its
    own: see layer_room.
    """
    left = group.units - pruned
    if group.kind is Kind.HEAD:
        keep = math.ceil(Fraction(constraints.min_attention_heads, group.heads_per_unit))
        return Room(max(left - keep, 0), HEADS)
    if group.kind is Kind.LAYER:
        return Room(left, LAYERS)
    return Room(max(left - math.ceil(constraints.min_channel_retention * group.units), 0), RETENTION)


def layer_room(layers: int, pruned: int, constraints: SafetyConstraints) -> int:
    """Layers that may still go: floor(max_layer_removal * original layers) in all."""
    return max(math.floor(constraints.max_layer_removal * layers) - pruned, 0)


def eligibility_limit(scores: Sequence[GroupScores], margin: Fraction) -> float | None:
    """(1 - margin) times the median score of the live units; None where there are none."""
    live = [one.score[one.live] for one in scores]
    values = np.concatenate(live) if live else np.empty(0)
    return float(np.median(values)) * float(1 - margin) if values.size else None


@dataclass(frozen=True, kw_only=True)
class Share:
    """What one kind in one domain gives in this cycle."""

    budget: Budget
    pruned: tuple[GroupDecision, ...]
    limit: float | None
    """Largest upper bound that was eligible."""
    full: bool
    """Every group was at its cap before the cycle."""


def spend(
    scores: Sequence[GroupScores],
    *,
    domain: str,
    kind: Kind,
    layers: int = 0,
    removed: int = 0,
    rate: Fraction,
    carry: Fraction,
    settings: Settings,
) -> Share:
    """Choose the units of one kind in one domain. `scores` are its groups in topology order.

    Of kind layer, `layers` is the number of original layers in the domain, of which `removed` are masked: also those
    that have no score.
    """
    live = sum(int(one.live.sum()) for one in scores)
    given = allowance(rate=rate, live=live, carry=carry)
    limit = eligibility_limit(scores, settings.safety_margin)
    order = sorted(
        (float(one.score[unit]), position, unit)
        for position, one in enumerate(scores)
        for unit in np.flatnonzero(one.live & (one.upper <= (-math.inf if limit is None else limit))).tolist()
    )
    rooms = _Rooms(scores, kind, layers, removed, settings)
    full = rooms.all_full
    chosen: dict[int, list[int]] = {}
    refused: Counter[str] = Counter()
    achieved = 0
    for _, position, unit in order:
        if achieved == given.allowed:
            break
        if reason := rooms.refuse(position, unit, chosen.get(position, ())):
            refused[reason] += 1
            continue
        rooms.take(position)
        chosen.setdefault(position, []).append(unit)
        achieved += 1
    budget = Budget(
        domain=domain,
        kind=kind,
        live=live,
        original=sum(one.group.units for one in scores),
        requested=float(rate),
        carry_in=str(carry),
        allowed=given.allowed,
        eligible=len(order),
        achieved=achieved,
        carry_out=str(given.carry_out),
        bound=_bound(achieved, given.allowed, refused, rooms.tightest if full else None),
    )
    pruned = tuple(
        GroupDecision(group=scores[position].group.id, pruned=tuple(sorted(units)))
        for position, units in sorted(chosen.items())
    )
    return Share(budget=budget, pruned=pruned, limit=limit, full=full)


class _Rooms:
    """The caps of all groups while the walk takes units from them."""

    def __init__(
        self, scores: Sequence[GroupScores], kind: Kind, layers: int, removed: int, settings: Settings
    ) -> None:
        constraints = settings.constraints
        self._kind = kind
        self._threshold = float(settings.head_redundancy)
        self._scores = scores
        found = [room(one.group, one.pruned, constraints) for one in scores]
        self._left = [one.units for one in found]
        self._constraint = [one.constraint for one in found]
        gone = sum(one.pruned for one in scores)
        self._layers = layer_room(layers, max(gone, removed), constraints)

    @property
    def all_full(self) -> bool:
        return self._layers == 0 if self._kind is Kind.LAYER else not any(self._left)

    @property
    def tightest(self) -> str:
        """The constraint of most groups."""
        return Counter(sorted(self._constraint)).most_common(1)[0][0] if self._constraint else RATE

    def refuse(self, position: int, unit: int, taken: Sequence[int]) -> str | None:
        """The constraint that keeps this unit, or None."""
        if self._left[position] <= 0 or (self._kind is Kind.LAYER and self._layers <= 0):
            return self._constraint[position]
        alike = self._scores[position].alike
        if alike is not None and any(alike[unit, other] >= self._threshold for other in taken):
            return REDUNDANCY
        return None

    def take(self, position: int) -> None:
        self._left[position] -= 1
        self._layers -= 1


def _bound(achieved: int, allowed: int, refused: Counter[str], full: str | None) -> str:
    if full is not None and allowed:
        return full
    if achieved == allowed:
        return RATE
    return sorted(refused.items(), key=lambda item: (-item[1], item[0]))[0][0] if refused else MARGIN


def check_constraints(
    topology: Topology, inherited: Masks, groups: Sequence[GroupDecision], constraints: SafetyConstraints
) -> Finding | None:
    """Why a decision, whoever made it, breaks a hard constraint, or None. No cap is loosened for a person."""
    known = {group.id: group for group in topology.groups}
    pruned: dict[str, int] = {}
    for each in topology.groups:
        before = inherited.pruned(each.id)
        pruned[each.id] = 0 if before is None else int(before.sum())
    seen: set[str] = set()
    layers: Counter[str] = Counter()
    for one in groups:
        group = known.get(one.group)
        if group is None:
            return _broken(f"the decision names group {one.group}, which the checkpoint does not have")
        before = inherited.pruned(group.id)
        if one.group in seen or len(set(one.pruned)) != len(one.pruned):
            return _broken(f"the decision names group {group.id} or one of its units twice")
        seen.add(one.group)
        for unit in one.pruned:
            if not 0 <= unit < group.units:
                return _broken(f"group {group.id} has {group.units} units; the decision names unit {unit}")
            if before is not None and before[unit]:
                return _broken(f"unit {unit} of group {group.id} is masked already")
        if group.kind is Kind.LAYER:
            layers[group.domain] += len(one.pruned)
            continue
        left = room(group, pruned[group.id], constraints)
        if len(one.pruned) > left.units:
            return _broken(
                f"group {group.id} may give {left.units} more of its {group.units} units "
                f"({pruned[group.id]} are masked, {_limit(left.constraint, constraints)}); "
                f"the decision takes {len(one.pruned)}"
            )
    for domain, taken in layers.items():
        mine = [group for group in topology.groups if group.kind is Kind.LAYER and group.domain == domain]
        gone = sum(pruned[group.id] for group in mine)
        if taken > (may := layer_room(len(mine), gone, constraints)):
            return _broken(
                f"domain {domain} may give {may} more of its {len(mine)} layers ({gone} are masked, "
                f"{_limit(LAYERS, constraints)}); the decision takes {taken}"
            )
    return None


def _broken(message: str) -> Finding:
    return Finding(Reason.CONSTRAINT, message)


def _limit(constraint: str, constraints: SafetyConstraints) -> str:
    values: Mapping[str, object] = {
        RETENTION: f"min_channel_retention is {float(constraints.min_channel_retention)}",
        HEADS: f"min_attention_heads is {constraints.min_attention_heads}",
        LAYERS: f"max_layer_removal is {float(constraints.max_layer_removal)}",
    }
    return str(values[constraint])
