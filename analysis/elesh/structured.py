"""Answers a structured request: gate scores of its groups, and partial sums over its slices."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from elesh.importance import Importance
from elesh.scorers import FROM_WEIGHTS, SCORERS, GateStatistics
from elesh.scoring import Scoring
from elesh.squares import Axis, Floats, Sums, Vector, add_segments, require_finite, sum_squares
from elesh.weights import Segment, Weights
from leyline.masks import Masks
from leyline.messages import Slice
from leyline.partial import Part, Parts, rows
from leyline.redundancy import similarity
from leyline.topology import Group, Topology

Arrays = dict[str, NDArray[np.float64]]


def gate_scores(
    topology: Topology, groups: Sequence[str], scorers: Sequence[str], importance: Importance, inherited: Masks | None
) -> Arrays:
    """`gate/<group>/…` for every group that was tracked, by every scorer that suits it and has its statistics."""
    arrays: Arrays = {}
    for id_ in groups:
        group = topology.group(id_)
        gone = inherited.pruned(id_) if inherited else None
        live = np.ones(group.units, dtype=np.bool_) if gone is None else ~gone
        stats = importance.group(group, live)
        if stats is not None:
            arrays |= {f"gate/{id_}/{name}": array for name, array in _of_group(group, scorers, stats).items()}
    return arrays


def needs_statistics(scorers: Sequence[str]) -> bool:
    """Whether any of these reads the importance file; ValueError for a name that is no scorer."""
    if unknown := [name for name in scorers if name not in SCORERS and name not in FROM_WEIGHTS]:
        raise ValueError(f"{unknown[0]} is no scorer; known are {', '.join(sorted({*SCORERS, *FROM_WEIGHTS}))}")
    return any(name != "magnitude" for name in scorers)


def _of_group(group: Group, scorers: Sequence[str], stats: GateStatistics) -> Arrays:
    arrays: Arrays = {}
    for name in scorers:
        kinds, formula = SCORERS.get(name, (frozenset(), None))
        scores = formula(stats) if formula is not None and group.kind in kinds else None
        if scores is None:
            continue
        arrays[name], arrays[f"{name}/se"] = scores.score, scores.error
        if scores.odd is not None and scores.even is not None:
            arrays[f"{name}/odd"], arrays[f"{name}/even"] = scores.odd, scores.even
    if stats.inputs is not None and "wanda" in scorers:
        arrays["input"] = np.sqrt(stats.inputs)
    if stats.gram is not None:
        arrays["redundancy"] = similarity(stats.gram, group.units)
    return arrays


def slice_sums(
    weights: Weights, parts: Parts, slices: Sequence[Slice], scoring: Scoring, fisher: Importance | None
) -> Arrays:
    """`norm/<slice>/…` for every slice, and with `fisher` also `fisher/<slice>/…`, as leyline.partial names them.

    Malformed names the parameter that is not finite.
    """
    slices = weights.as_they_lie(slices)
    wanted = {slice_.key: parts.of(slice_) for slice_ in slices}
    shapes = {slice_.parameter: weights.refs[slice_.parameter].shape for slice_ in slices}

    def score(segment: Segment, values: Floats, factors: Floats | None) -> tuple[Sums, Sums | None]:
        shape = shapes[segment.slice.parameter]
        axes = {axis for part in wanted[segment.slice.key] if (axis := _axis(part)).axis}
        norm = sum_squares(values, segment.start, shape, axes)
        require_finite(values, norm, parameter=segment.slice.parameter, start=segment.start)
        if factors is None:
            return norm, None
        return norm, sum_squares(values, segment.start, shape, axes, factors)

    segments = {slice_.key: weights.segments(slice_) for slice_ in slices}
    results = scoring.run([segment for found in segments.values() for segment in found], score, fisher)
    arrays: Arrays = {}
    for slice_ in slices:
        found = [(segment.start, next(results)) for segment in segments[slice_.key]]
        shape = shapes[slice_.parameter]
        kinds = {"norm": [(start, norm) for start, (norm, _) in found]}
        if fisher is not None:
            kinds["fisher"] = [(start, other) for start, (_, other) in found if other is not None]
        for kind, sums in kinds.items():
            by_row, by_column = add_segments(sums, slice_.start, slice_.stop, shape)
            for part in wanted[slice_.key]:
                arrays[part.name(kind, slice_)] = _per_unit(part, by_row, by_column, slice_, shape)
    return arrays


def _axis(part: Part) -> Axis:
    member = part.group.members[part.member]
    return Axis(1, member.groups) if member.groups > 1 else Axis(member.axis)


def _per_unit(
    part: Part, by_row: Vector, by_column: dict[tuple[Axis, int], Vector], slice_: Slice, shape: tuple[int, ...]
) -> Vector:
    """Sums per row or column -> sums per unit of the part."""
    member = part.group.members[part.member]
    first_row, last_row = rows(slice_, shape)
    if member.groups > 1:
        first = part.first // shape[1]
        axis = _axis(part)
        return np.concatenate([by_column[axis, first + k] for k in range(part.units // shape[1])])
    if member.axis:
        along = by_column[_axis(part), 0]
        return _blocks(along[member.start : member.start + part.units * member.block], 0, member.block)
    low = max(first_row, member.start)
    high = min(last_row, member.start + member.block * part.group.units)
    return _blocks(by_row[low - first_row : high - first_row], (low - member.start) % member.block, member.block)


def _blocks(sums: Vector, offset: int, block: int) -> Vector:
    """Sums of consecutive blocks; the first block lacks its first `offset` elements, the last may be cut too."""
    if block == 1:
        return sums
    starts = np.maximum(np.arange(-offset, len(sums), block), 0)
    return np.asarray(np.add.reduceat(sums, starts))
