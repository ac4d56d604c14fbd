"""Answers the three rounds of basic pruning: histogram, refinement, and the mask bits of the threshold found."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from elesh import single
from elesh.importance import Importance
from elesh.scoring import Scoring
from elesh.single import Bits, Keys, Sparse
from elesh.squares import Floats
from elesh.weights import Segment, Weights
from leyline import bits
from leyline.masks import Masks
from leyline.messages import Slice, StructuralAnalysisRequest, Tie

Arrays = dict[str, NDArray[Any]]


def uses_fisher(scorers: Sequence[str]) -> bool:
    """Whether w^2 F / 2 is preferred to magnitude: unless magnitude stands first."""
    return next((name for name in scorers if name in ("fisher", "magnitude")), "fisher") == "fisher"


def answer(
    request: StructuralAnalysisRequest,
    weights: Weights,
    scoring: Scoring,
    fisher: Importance | None,
    inherited: Masks | None,
) -> Arrays:
    """The arrays of one round; weights that are pruned already are left out. Malformed names what is not finite."""
    slices = weights.as_they_lie(read_by(request))
    match request.method:
        case "histogram":
            return _counts(slices, weights, scoring, fisher, inherited, None)
        case "refine":
            return _counts(slices, weights, scoring, fisher, inherited, request.buckets)
        case "select":
            others = [one for one in request.slices if one.key not in request.ties]
            untouched = {f"{one.key}/mask": bits.ones(one.stop - one.start) for one in others}
            return untouched | _select(slices, request.ties, weights, scoring, fisher, inherited)
    raise ValueError(f"{request.method} is no round of basic pruning")


def read_by(request: StructuralAnalysisRequest) -> list[Slice]:
    """The slices whose weights a request has to see."""
    of: dict[str, Collection[str]] = {"refine": request.buckets, "select": request.ties}
    wanted = of.get(request.method)
    return [one for one in request.slices if wanted is None or one.key in wanted]


def _counts(
    slices: Sequence[Slice],
    weights: Weights,
    scoring: Scoring,
    fisher: Importance | None,
    inherited: Masks | None,
    buckets: dict[str, int] | None,
) -> Arrays:
    def score(segment: Segment, values: Floats, factors: Floats | None) -> Sparse:
        keys = _keys(segment, values, factors)
        live = _live(segment, inherited)
        keys = keys if live is None else keys[live]
        return single.histogram(keys) if buckets is None else single.refine(keys, buckets[segment.slice.key])

    segments = {slice_.key: weights.segments(slice_) for slice_ in slices}
    results = scoring.run([segment for found in segments.values() for segment in found], score, fisher)
    arrays: Arrays = {}
    for key, found in segments.items():
        counted = single.added([next(results) for _ in found])
        arrays[f"{key}/bucket"], arrays[f"{key}/count"] = counted
        if buckets is None and fisher is None and found[0].dtype in single.UPPER_ONLY:
            arrays[f"{key}/whole"] = np.zeros(0, dtype=np.uint8)
    return arrays


def _select(
    slices: Sequence[Slice],
    ties: Mapping[str, Tie],
    weights: Weights,
    scoring: Scoring,
    fisher: Importance | None,
    inherited: Masks | None,
) -> Arrays:
    def score(segment: Segment, values: Floats, factors: Floats | None) -> tuple[Keys, Bits]:
        live = _live(segment, inherited)
        return _keys(segment, values, factors), np.ones(len(values), dtype=np.bool_) if live is None else live

    segments = {slice_.key: weights.segments(slice_) for slice_ in slices}
    results = scoring.run([segment for found in segments.values() for segment in found], score, fisher)
    arrays: Arrays = {}
    for slice_ in slices:
        active = bits.ones(slice_.stop - slice_.start)
        taken = 0
        for segment in segments[slice_.key]:
            keys, live = next(results)
            gone, taken = single.select(keys, live, ties[slice_.key], taken)
            bits.clear(active, segment.start - slice_.start, ~gone)
        arrays[f"{slice_.key}/mask"] = active
    return arrays


def _keys(segment: Segment, values: Floats, factors: Floats | None) -> Keys:
    name = segment.slice.parameter
    if factors is None:
        return single.magnitude_keys(values, parameter=name, start=segment.start)
    return single.fisher_keys(values, factors, parameter=name, start=segment.start)


def _live(segment: Segment, inherited: Masks | None) -> Bits | None:
    """Weights of the segment that no inherited mask prunes; None where that is all of them."""
    dead = inherited.dead(segment.slice.parameter) if inherited else None
    if dead is None:
        return None
    return ~dead.range(segment.start, segment.stop)
