"""From the answers to one score a unit: which scorer decides, its upper bound, its halves, and the others beside it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from emrakul.settings import Settings
from leyline import partial
from leyline.bits import Bits
from leyline.masks import Masks
from leyline.messages import StructuralAnalysisRequest
from leyline.model import Malformed
from leyline.topology import Group, Kind, Topology

Vector = NDArray[np.float64]
Arrays = Mapping[str, NDArray[Any]]
Source = Literal["tracked", "refreshed", "forward"]

ONE_SIDED_95 = 1.645
"""Standard errors between a mean and its upper 95 % bound."""

SUITS: dict[Kind, tuple[str, ...]] = {
    Kind.CHANNEL: ("taylor", "contribution", "wanda", "fisher", "magnitude"),
    Kind.HEAD: ("michel", "contribution", "fisher", "magnitude"),
    Kind.LAYER: ("block_influence", "magnitude"),
}
"""Scorers that make sense for a kind of unit. Block Influence also needs no gradients."""
_GRADIENTS = frozenset({"taylor", "michel", "fisher"})
_COMPARABLE = frozenset({"taylor", "michel", "block_influence"})
"""Scores whose size means the same in every group; all others are divided by their group's mean (pruning.md 2.2)."""


@dataclass(frozen=True, kw_only=True)
class GroupScores:
    """One group's units, low meaning prunable."""

    group: Group
    scorer: str
    score: Vector
    """[units]; NaN where nothing was sampled."""
    upper: Vector
    """[units] upper 95 % bound of the score; equal to it for scores without sampling error."""
    live: Bits
    """[units] not masked yet, and scored."""
    pruned: int
    """Units that earlier cycles masked."""
    halves: tuple[Vector, Vector] | None = None
    """The same score from the odd and the even mini-batches, [units] each."""
    alike: Vector | None = None
    """[units, units] similarity of heads."""
    beside: Mapping[str, Vector] = field(default_factory=dict)
    """What the other scorers say, for the report."""


def primary(kind: Kind, settings: Settings, source: Source | None) -> str:
    """The scorer that decides for a kind: the first that suits it. Forward passes alone give no gradients."""
    fit = SUITS[kind]
    without = _GRADIENTS if source == "forward" else frozenset()
    return next(name for name in settings.scorers if name in fit and name not in without)


def aggregate(
    topology: Topology,
    inherited: Masks,
    answers: Iterable[tuple[StructuralAnalysisRequest, Arrays]],
    *,
    settings: Settings,
    source: Source | None,
) -> tuple[GroupScores, ...]:
    """Scores of every group that has them, in topology order, whatever the order of the answers.

    A group without its deciding score is left out, and so left alone. Malformed if answers do not cover their slices
    or an array has another shape than its group.
    """
    known = list(answers)
    arrays: dict[str, NDArray[Any]] = {}
    for _, found in known:
        arrays |= found
    pieces = [(piece, found) for request, found in known for piece in request.slices]
    sums = partial.add_up(topology, pieces)
    has_fisher = any(name.startswith("fisher/") for name in arrays)
    fisher = partial.add_up(topology, pieces, "fisher") if has_fisher else {}
    scored = (_group(g, inherited, arrays, sums, fisher, settings, source) for g in topology.groups)
    return tuple(one for one in scored if one is not None)


def _group(
    group: Group,
    inherited: Masks,
    arrays: Arrays,
    sums: partial.Sums,
    fisher: partial.Sums,
    settings: Settings,
    source: Source | None,
) -> GroupScores | None:
    pruned = inherited.pruned(group.id)
    live = np.ones(group.units, dtype=np.bool_) if pruned is None else ~pruned
    every = {name: _score(name, group, arrays, sums, fisher) for name in SUITS[group.kind]}
    scorer = primary(group.kind, settings, source)
    raw = every.pop(scorer)
    if raw is None:
        return None
    scale = _scale(scorer, raw, live)
    error = _array(f"gate/{group.id}/{scorer}/se", group, arrays)
    halves = [_array(f"gate/{group.id}/{scorer}/{half}", group, arrays) for half in ("odd", "even")]
    score = raw / scale
    alike = arrays.get(f"gate/{group.id}/redundancy")
    return GroupScores(
        group=group,
        scorer=scorer,
        score=score,
        upper=score if error is None else (raw + ONE_SIDED_95 * error) / scale,
        live=live & np.isfinite(score),
        pruned=int((~live).sum()),
        halves=None
        if halves[0] is None or halves[1] is None
        else (halves[0] / _scale(scorer, halves[0], live), halves[1] / _scale(scorer, halves[1], live)),
        alike=None if alike is None else _shaped(alike, (group.units, group.units), f"redundancy of group {group.id}"),
        beside={name: values for name, values in every.items() if values is not None},
    )


def _score(name: str, group: Group, arrays: Arrays, sums: partial.Sums, fisher: partial.Sums) -> Vector | None:
    """[units], or None where the statistics lack what it needs."""
    if name == "magnitude":
        return partial.magnitude(group, sums)
    if name == "fisher":
        scored = any((group.id, index) in fisher for index in range(len(group.members)))
        # w^2 F is a square: its root is an amplitude, as every other score is
        return np.sqrt(partial.fisher(group, fisher)) if scored else None
    if name == "wanda":
        inputs = _array(f"gate/{group.id}/input", group, arrays)
        consumed = any(member.role == "consumer" for member in group.members)
        return partial.wanda(group, sums, inputs) if inputs is not None and consumed else None
    return _array(f"gate/{group.id}/{name}", group, arrays)


def _scale(scorer: str, values: Vector, live: Bits) -> float:
    """What a score is divided by to be comparable between groups: the mean of its live units, or 1."""
    if scorer in _COMPARABLE:
        return 1.0
    known = values[live & np.isfinite(values)]
    return float(known.mean()) if known.size and known.mean() > 0 else 1.0


def _array(name: str, group: Group, arrays: Arrays) -> Vector | None:
    found = arrays.get(name)
    return None if found is None else _shaped(found, (group.units,), name)


def _shaped(values: NDArray[Any], shape: tuple[int, ...], name: str) -> Vector:
    if values.shape != shape:
        raise Malformed(f"{name} has shape {list(values.shape)}, its group needs {list(shape)}")
    return np.asarray(values, dtype=np.float64)
