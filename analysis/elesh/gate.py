"""Scores of a group's units from what the trainer measured at its gates. Pure; float64; low means prunable.

A gate xi_u = 1 multiplies the output of unit u. Per sample n the tracker keeps q_nu = dL_n/dxi_u (the batch factor
is in it), the sum over positions of activation times gradient. Sums carry EMA weights w_n, numerator and denominator
apart, so both halves of the mini-batches, and the parts of several workers, add up.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]


def mean(total: Vector, weights: Vector) -> Vector:
    """E over samples: total [units] = sum w_n x_n over weights[0] = sum w_n. NaN where nothing was sampled."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(total / weights[0], dtype=np.float64)


def effective_samples(weights: Vector) -> float:
    """n_eff = (sum w)^2 / sum w^2 (Kish 1965): as many equally weighted samples would tell as much."""
    return float(weights[0] ** 2 / weights[1]) if weights[1] > 0 else 0.0


def taylor(absolute: Vector, weights: Vector) -> Vector:
    """E|q_u| [units], in units of the loss: the first-order change of the loss without u (Molchanov et al. 2019,
    per sample and without the square). For heads it is the I_h of Michel et al. 2019, before normalising."""
    return mean(absolute, weights)


def taylor_error(absolute: Vector, squares: Vector, weights: Vector) -> Vector:
    """Standard error of E|q_u| [units]: sqrt((E q^2 - (E|q|)^2) / (n_eff - 1)).

    Infinite up to one effective sample: an unknown spread must prune nothing.
    """
    n = effective_samples(weights)
    if n <= 1:
        return np.full(absolute.shape, np.inf)
    variance = mean(squares, weights) - mean(absolute, weights) ** 2
    return np.sqrt(np.maximum(variance, 0.0) / (n - 1))


def taylor_squares(squares: Vector, weights: Vector) -> Vector:
    """E q_u^2 [units], in squared units of the loss (Molchanov et al. 2019, per sample)."""
    return mean(squares, weights)


def contribution(activity: Vector, weights: Vector) -> Vector:
    """sqrt(E ||a_u||^2) [units], in units of the activation: what the unit adds, from forward passes alone
    (the activation importance of Muralidharan et al. 2024, Minitron, as an l2 norm)."""
    return np.sqrt(mean(activity, weights))


def normalised(scores: Vector, live: NDArray[np.bool_]) -> Vector:
    """Scores over the l2 norm of the layer's live ones (Michel et al. 2019, after Molchanov et al. 2017): heads of
    different layers become comparable. Unchanged where all are zero."""
    return np.asarray(scores / layer_norm(scores, live), dtype=np.float64)


def layer_norm(scores: Vector, live: NDArray[np.bool_]) -> float:
    """l2 norm over the live units, or 1 where that is 0."""
    return float(np.sqrt((scores[live] ** 2).sum())) or 1.0


def half_error(odd: Vector, even: Vector, whole: Vector) -> Vector:
    """Standard error [units] of a score whose own spread was not kept, from its two halves.

    The half difference of two halves estimates the error of their mean, with one degree of freedom a unit; so the
    relative one is pooled over the group: se_u = s_u * sqrt(mean_v ((o_v - e_v) / (o_v + e_v))^2).
    """
    total = odd + even
    known = total > 0
    if not known.any():
        return np.full(whole.shape, np.inf)
    relative = np.sqrt(np.mean(((odd - even)[known] / total[known]) ** 2))
    return np.asarray(whole * relative, dtype=np.float64)


def block_influence(cosines: Vector) -> Vector:
    """BI = 1 - E cos(x_t, y_t) [1]: how much a residual block turns what passes through it (Men et al. 2024,
    ShortGPT). `cosines` [2] = (sum of cosines between the block's input and output, tokens)."""
    return np.array([1.0 - cosines[0] / cosines[1]]) if cosines[1] > 0 else np.array([np.nan])


def block_influence_error(cosines: Vector) -> Vector:
    """Upper bound [1] of BI's standard error: a cosine of mean m has at most the variance 1 - m^2 (Bhatia and Davis
    2000). Tokens are taken as independent, those of one sample are not quite."""
    if cosines[1] <= 0:
        return np.array([np.inf])
    m = cosines[0] / cosines[1]
    return np.array([np.sqrt(max(1.0 - m * m, 0.0) / cosines[1])])
