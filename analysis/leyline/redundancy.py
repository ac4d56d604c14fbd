"""Heads that say the same: how alike their outputs are, and which of a pair may go."""

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


def redundant(
    alike: Matrix, importance: NDArray[np.float64], live: NDArray[np.bool_], threshold: float
) -> NDArray[np.bool_]:
    """Units [units] that a unit which stays stands in for.

    From the closest pair down, of two live units that are alike by at least `threshold` the less important is
    redundant (the first, if equal), unless either is so already: never both of a pair, and nothing is redundant to
    what goes itself.
    """
    found = np.zeros(len(alike), dtype=np.bool_)
    first, second = np.triu_indices(len(alike), k=1)
    close = (alike[first, second] >= threshold) & live[first] & live[second]
    first, second = first[close], second[close]
    for pair in np.lexsort((second, first, -alike[first, second])):
        u, v = int(first[pair]), int(second[pair])
        if not found[u] and not found[v]:
            found[u if importance[u] <= importance[v] else v] = True
    return found
