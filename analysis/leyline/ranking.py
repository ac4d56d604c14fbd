"""How well one set of scores agrees with another: rank correlation, ranking of the lowest, relative error.

Used for the cycle's own reliability (odd against even halves) and for measuring importance against the exact one.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray


def kendall_tau(x: ArrayLike, y: ArrayLike) -> float:
    """Kendall's tau-b of two score vectors [n], ties included; in [-1, 1], O(n log n).

    tau_b = (C - D) / sqrt((n0 - n1)(n0 - n2)), n0 = n(n-1)/2 pairs, n1 and n2 those tied in x and in y (Kendall 1945).
    0.0 where one side is constant or n < 2: there is no order to agree on, and a NaN would pass every "less than".
    """
    a, b = _pair(x, y)
    n = len(a)
    order = np.lexsort((b, a))
    a, b = a[order], b[order]
    pairs = n * (n - 1) // 2
    tied_x, tied_y = _tied(a), _tied(np.sort(b))
    both = _tied_runs((a[1:] == a[:-1]) & (b[1:] == b[:-1]))
    if tied_x == pairs or tied_y == pairs:
        return 0.0
    ranks = np.unique(b, return_inverse=True)[1]
    difference = pairs - tied_x - tied_y + both - 2 * _inversions(ranks)
    return difference / math.sqrt(pairs - tied_x) / math.sqrt(pairs - tied_y)


def spearman_brown(half: float) -> float:
    """Reliability of the whole from the correlation of its two halves: 2r / (1 + r) (Spearman 1910, Brown 1910).

    Halves that disagree (r <= 0) have no reliability: 0.0.
    """
    return 2 * half / (1 + half) if half > 0 else 0.0


def auc_lowest(exact: ArrayLike, estimate: ArrayLike, *, share: float = 0.05, at_least: int = 10) -> float:
    """Area under the ROC curve of `estimate` [n] for finding the lowest `share` of `exact` [n].

    Positives are the ceil(share * n) lowest exact scores, but at least `at_least`; ties in the estimate count half
    (the Mann-Whitney statistic). ValueError where nothing would be left as a negative.
    """
    a, b = _pair(exact, estimate)
    count = max(math.ceil(share * len(a)), at_least)
    if count >= len(a):
        raise ValueError(f"{len(a)} scores leave no negatives beside the lowest {count}; give more units")
    positive = np.zeros(len(a), dtype=np.bool_)
    positive[np.argsort(a, kind="stable")[:count]] = True
    negatives = np.sort(b[~positive])
    above = len(negatives) - np.searchsorted(negatives, b[positive], side="right")
    equal = len(negatives) - np.searchsorted(negatives, b[positive], side="left") - above
    return float((above + equal / 2).sum() / (count * len(negatives)))


def mape(exact: ArrayLike, estimate: ArrayLike) -> float:
    """Mean absolute percentage error, as a fraction: mean of |estimate - exact| / |exact| where exact is not 0."""
    a, b = _pair(exact, estimate)
    known = a != 0
    if not known.any():
        raise ValueError("every exact score is 0, so no relative error is defined")
    return float(np.mean(np.abs(b[known] - a[known]) / np.abs(a[known])))


def _pair(x: ArrayLike, y: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    a, b = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if a.ndim != 1 or a.shape != b.shape:
        raise ValueError(f"scores of shape {a.shape} and {b.shape} cannot be compared; give two vectors of one length")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError("scores that are NaN or infinite have no rank")
    return a, b


def _tied(values: NDArray[np.float64]) -> int:
    """Pairs of equal values in a sorted vector."""
    return _tied_runs(values[1:] == values[:-1])


def _tied_runs(same: NDArray[np.bool_]) -> int:
    """Pairs within runs, from whether each element equals the one before it."""
    starts = np.flatnonzero(np.concatenate(([True], ~same, [True])))
    runs = np.diff(starts)
    return int((runs * (runs - 1) // 2).sum())


def _inversions(ranks: NDArray[np.intp]) -> int:
    """Pairs i < j with ranks[i] > ranks[j].

    Bit by bit from the top: of two ranks that agree in the higher bits, the earlier is greater exactly where it has
    this bit and the later has not. The vector is kept stably sorted by the bits already seen.
    """
    found = 0
    for bit in reversed(range(int(ranks.max(initial=0)).bit_length())):
        ones = (ranks >> bit) & 1
        prefix = ranks >> (bit + 1)
        before = np.cumsum(ones) - ones
        starts = np.flatnonzero(np.concatenate(([True], prefix[1:] != prefix[:-1])))
        lengths = np.diff(np.append(starts, len(ranks)))
        found += int(((before - np.repeat(before[starts], lengths)) * (1 - ones)).sum())
        ranks = ranks[np.argsort(ranks >> bit, kind="stable")]
    return found
