"""Agreement of scores: against definitions that count every pair."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from leyline.ranking import auc_lowest, kendall_tau, mape, spearman_brown


def naive_tau(x: list[int], y: list[int]) -> float:
    concordant = discordant = only_x = only_y = 0
    for i in range(len(x)):
        for j in range(i):
            dx, dy = x[i] - x[j], y[i] - y[j]
            if dx and dy:
                concordant += dx * dy > 0
                discordant += dx * dy < 0
            only_x += bool(dx)
            only_y += bool(dy)
    return (concordant - discordant) / math.sqrt(only_x * only_y) if only_x and only_y else 0.0


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.integers(-6, 6), st.integers(-6, 6)), max_size=40))
def test_tau_b_counts_every_pair_ties_included(pairs: list[tuple[int, int]]) -> None:
    x, y = [p[0] for p in pairs], [p[1] for p in pairs]
    assert kendall_tau(x, y) == pytest.approx(naive_tau(x, y), abs=1e-12)


def test_tau_b_is_scipys() -> None:
    rng = np.random.default_rng(3)
    x = rng.normal(size=5000)
    y = np.round(x + rng.normal(size=5000), 1)
    assert kendall_tau(x, y) == pytest.approx(float(stats.kendalltau(x, y).statistic), abs=1e-12)


def test_tau_of_a_third_of_a_million_units_is_quick_and_signed() -> None:
    x = np.random.default_rng(0).permutation(300_000).astype(np.float64)
    assert kendall_tau(x, x) == 1.0
    assert kendall_tau(x, -x) == -1.0


def test_no_order_has_no_agreement() -> None:
    assert kendall_tau([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]) == 0.0
    assert kendall_tau([], []) == 0.0
    assert kendall_tau([1.0], [2.0]) == 0.0


@pytest.mark.parametrize("bad", [[1.0, math.nan], [1.0, math.inf], [1.0]])
def test_scores_without_a_rank_are_refused(bad: list[float]) -> None:
    with pytest.raises(ValueError, match=r"rank|compared"):
        kendall_tau([1.0, 2.0], bad)


def test_spearman_brown() -> None:
    assert spearman_brown(0.5) == pytest.approx(2 / 3)
    assert spearman_brown(1.0) == 1.0
    assert spearman_brown(-0.4) == 0.0
    assert spearman_brown(-1.0) == 0.0


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8)), min_size=12, max_size=40))
def test_auc_is_the_share_of_pairs_in_the_right_order(pairs: list[tuple[int, int]]) -> None:
    exact, estimate = np.array(pairs, dtype=np.float64).T
    lowest = np.argsort(exact, kind="stable")[:10]
    others = np.setdiff1d(np.arange(len(exact)), lowest)
    wins = [(estimate[p] < estimate[o]) + 0.5 * (estimate[p] == estimate[o]) for p in lowest for o in others]
    assert auc_lowest(exact, estimate) == pytest.approx(float(np.mean(wins)))


def test_auc_needs_negatives() -> None:
    with pytest.raises(ValueError, match="no negatives"):
        auc_lowest(np.arange(10), np.arange(10))


def test_mape_leaves_out_what_is_exactly_zero() -> None:
    assert mape([2.0, 0.0, -4.0], [3.0, 1.0, -4.0]) == pytest.approx(0.25)
    with pytest.raises(ValueError, match="relative error"):
        mape([0.0], [1.0])
