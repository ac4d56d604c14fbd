"""Count-Min sketch of a parameter's statistics: an over-estimate, in less memory than one number a weight.

Cormode and Muthukrishnan (2005), with the conservative update of Estan and Varghese (2002) made for the whole
parameter at once: a cell keeps the largest of the estimates that fall on it, not their sum. An estimate is never below
the truth, so a weight can only look more important than it is. Needs no torch: tables are arrays or tensors.
"""

from __future__ import annotations

import math
from typing import Any

from leyline.sketch import VERSION, cells_of, estimate, seeds

__all__ = ["DELTA", "EPSILON", "VERSION", "cells_of", "estimate", "seeds", "size", "update"]

EPSILON = 1e-5
DELTA = 0.01
_CHUNK = 1 << 20


def size(weights: int, *, epsilon: float = EPSILON, delta: float = DELTA) -> tuple[int, int] | None:
    """(rows, cells a row) for a parameter of `weights` elements; None where a dense array is not bigger.

    With plain sums an estimate is within epsilon * ||F||_1 with probability 1 - delta for e / epsilon cells (rounded
    up to a power of two, which the hash needs) in ln(1 / delta) rows; the conservative update only lowers it.
    """
    if not (0 < epsilon < 1 and 0 < delta < 1):
        raise ValueError(f"epsilon {epsilon} and delta {delta} must lie between 0 and 1")
    rows = max(1, math.ceil(math.log(1 / delta)))
    cells = 1 << math.ceil(math.log2(math.e / epsilon))
    return (rows, cells) if rows * cells < weights else None


def update(table: Any, values: Any, index: Any, uuid: str, *, decay: float) -> None:
    """In place: the sketch of decay * F + values. Torch tensors: table [rows, cells], values and index flat, int64.

    Every element is added in one update, so cells that nothing falls on stay zero.
    """
    rows, cells = table.shape
    constants = seeds(uuid, rows)
    fresh = table.new_zeros(table.shape)
    for start in range(0, len(values), _CHUNK):
        part = index[start : start + _CHUNK]
        places = [cells_of(part, seed, cells) for seed in constants]
        estimate = table[0][places[0]]
        for row in range(1, rows):
            estimate = estimate.minimum(table[row][places[row]])
        estimate = estimate * decay + values[start : start + _CHUNK]
        for row in range(rows):
            fresh[row].scatter_reduce_(0, places[row], estimate, "amax")
    table.copy_(fresh)
