"""Reading a Count-Min sketch: where an element's cells are, and what they say of it. Written by kasmina.sketch.

Cormode and Muthukrishnan (2005). An estimate is never below the truth, so a weight can only look more important than
it is. Pure; tables are arrays, or tensors of whoever writes them.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

VERSION = 1
"""Of the hash below; part of every seed, so that a change cannot misread stored tables."""


def seeds(uuid: str, rows: int) -> list[tuple[int, int]]:
    """The hash functions' constants (an odd a, any b; signed 64 bit), from the parameter's UUID: the same anywhere."""
    found = []
    for row in range(rows):
        digest = hashlib.blake2b(f"count-min {VERSION} {uuid} {row}".encode(), digest_size=16).digest()
        a, b = int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")
        found.append((_signed(a | 1), _signed(b)))
    return found


def cells_of(index: Any, seed: tuple[int, int], cells: int) -> Any:
    """Cell of each element index (int64 array or tensor): multiply-shift (Dietzfelbinger 1996), wrapping at 64 bit."""
    a, b = seed
    bits = cells.bit_length() - 1
    return ((index * a + b) >> (64 - bits)) & (cells - 1)


def estimate(table: NDArray[Any], start: int, stop: int, uuid: str) -> NDArray[Any]:
    """Estimates of elements [start, stop), never below the truth; `table` as stored, [rows, cells]."""
    index = np.arange(start, stop, dtype=np.int64)
    constants = seeds(uuid, len(table))
    found = [table[row][cells_of(index, seed, table.shape[1])] for row, seed in enumerate(constants)]
    return np.asarray(np.min(found, axis=0))


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value
