"""Heads that say the same: how alike their outputs are. Which of a pair may go, the budget decides."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]


def similarity(gram: Matrix, units: int) -> Matrix:
    """R_uv = sum_t <o_u,t , o_v,t> / (||o_u|| ||o_v||) [units, units], o_u being what unit u adds to the residual.

    `gram` [heads, heads] = sum over tokens of <o_h, o_k>; a unit of several heads (a KV group) adds their sum, so its
    products are sums of blocks. 0 for units that add nothing.
    """
    per = len(gram) // units
    blocks = gram.reshape(units, per, units, per).sum(axis=(1, 3))
    norms = np.sqrt(np.maximum(np.diag(blocks), 0.0))
    scale = np.outer(norms, norms)
    return np.asarray(np.divide(blocks, scale, out=np.zeros_like(blocks), where=scale > 0), dtype=np.float64)
