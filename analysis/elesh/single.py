"""Basic pruning: keys of single weights, their histograms, and the mask bits below an exact threshold. Pure.

A key is the bit pattern of a float32 score: floats that are not negative order like their bits. So the k-th lowest
of a whole model is found by counting the upper 16 bits, then the lower 16 within one bucket, and never by sorting.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from elesh.squares import Floats, not_finite
from leyline.messages import Tie
from leyline.model import Malformed

Keys = NDArray[np.uint32]
Bits = NDArray[np.bool_]
Counts = NDArray[np.int64]

BUCKETS = 2**16

UPPER_ONLY = frozenset({"BF16", "F8_E4M3", "F8_E5M2"})
"""Dtypes whose magnitudes have at most 7 bits behind the point: of their keys the lower 16 bits are zero."""

_LARGEST = np.finfo(np.float32).max


def magnitude_keys(values: Floats, *, parameter: str, start: int) -> Keys:
    """Keys [n] of |w| as float32. Malformed, naming the element, if a weight is NaN or infinite."""
    scores = np.abs(values)
    if not (scores < np.inf).all():
        at = int(np.argmin(np.isfinite(values)))
        raise Malformed(not_finite(parameter, start + at, float(values[at])))
    return _as_keys(scores)


def fisher_keys(values: Floats, fisher: Floats, *, parameter: str, start: int) -> Keys:
    """Keys [n] of w^2 F / 2 as float32, in units of the loss (LeCun et al. 1990: the loss that deleting w costs)."""
    magnitude_keys(values, parameter=parameter, start=start)
    scores = values.astype(np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        scores *= scores
        scores *= fisher
    scores *= 0.5
    return _as_keys(scores)


def _as_keys(scores: Floats) -> Keys:
    if scores.dtype != np.float32:
        scores = np.minimum(scores, _LARGEST).astype(np.float32)
    return scores.view(np.uint32)


class Sparse(NamedTuple):
    """A histogram over 16 bits without its zeros."""

    buckets: Keys
    """Rising."""
    counts: Counts


def histogram(keys: Keys) -> Sparse:
    """How many keys have each value of the upper 16 bits."""
    return _counted(keys >> np.uint32(16))


def refine(keys: Keys, bucket: int) -> Sparse:
    """How many keys with these upper 16 bits have each value of the lower 16."""
    return _counted(keys[(keys >> np.uint32(16)) == np.uint32(bucket)] & np.uint32(0xFFFF))


def added(parts: Sequence[Sparse]) -> Sparse:
    """The histograms of several segments together."""
    if len(parts) == 1:
        return parts[0]
    total = np.zeros(BUCKETS, dtype=np.int64)
    for part in parts:
        total[part.buckets] += part.counts
    return _filled(total)


def _counted(values: Keys) -> Sparse:
    if len(values) < BUCKETS // 16:  # of a small tensor the zeros would be nearly all
        buckets, counts = np.unique(values, return_counts=True)
        return Sparse(buckets, counts.astype(np.int64, copy=False))
    return _filled(np.bincount(values.astype(np.intp), minlength=BUCKETS).astype(np.int64, copy=False))


def _filled(counts: Counts) -> Sparse:
    filled = np.flatnonzero(counts)
    return Sparse(filled.astype(np.uint32), counts[filled])


def select(keys: Keys, live: Bits, tie: Tie, taken: int) -> tuple[Bits, int]:
    """Which weights go [n], and how many equal to the threshold have gone so far.

    All below tie.below, and of those equal to it the first tie.equal of the slice, `taken` of which lay before.
    """
    below = np.uint32(tie.below)
    gone = (keys < below) & live
    equal = np.flatnonzero((keys == below) & live)[: max(tie.equal - taken, 0)]
    gone[equal] = True
    return gone, taken + len(equal)
