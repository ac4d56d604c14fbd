"""The accuracy gate's truth table (Agresti-Min, paired)."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from urabrask.gate import gate, samples_needed, sentence, upper_bound


def answers(n: int, lost: int, gained: int) -> tuple[np.ndarray, np.ndarray]:
    """Reference and candidate on n samples, otherwise both right."""
    reference, candidate = np.ones(n, np.bool_), np.ones(n, np.bool_)
    candidate[:lost] = False
    reference[lost : lost + gained] = False
    return reference, candidate


@pytest.mark.parametrize(
    ("n", "lost", "gained", "outcome"),
    [
        (80, 0, 0, "INCONCLUSIVE"),
        (81, 0, 0, "PASS"),
        (1000, 0, 0, "PASS"),
        (1000, 10, 10, "PASS"),
        (1000, 5, 0, "PASS"),
        (1000, 14, 0, "INCONCLUSIVE"),
        (1000, 20, 0, "INCONCLUSIVE"),
        (1000, 21, 0, "FAIL"),
        (1000, 60, 39, "FAIL"),
        (1000, 0, 100, "PASS"),
        (10, 1, 0, "FAIL"),
    ],
)
def test_truth_table_at_two_points(n: int, lost: int, gained: int, outcome: str) -> None:
    result = gate("base", *answers(n, lost, gained), 0.02)
    assert result.outcome == outcome
    assert (result.lost, result.gained, result.n) == (lost, gained, n)
    assert result.right_reference - result.right_candidate == lost - gained


@pytest.mark.parametrize(("lost", "gained", "needed"), [(0, 0, 81), (1, 1, 171), (2, 1, 834)])
def test_samples_needed_at_percentages(lost: int, gained: int, needed: int) -> None:
    assert samples_needed(100, lost, gained, 0.02) == needed


def test_an_inconclusive_gate_says_how_many_samples_it_needs() -> None:
    result = gate("base", *answers(50, 0, 0), 0.02)
    assert result.needed == 81
    assert "it would take 81 samples" in sentence(result)


def test_a_drop_of_exactly_the_allowance_can_never_pass() -> None:
    result = gate("baseline", *answers(1000, 20, 0), 0.02)
    assert (result.outcome, result.needed) == ("INCONCLUSIVE", 0)
    assert "no number of samples" in sentence(result)


@given(st.integers(20, 2000), st.integers(0, 40), st.integers(0, 40))
def test_the_number_needed_is_the_smallest_that_passes(n: int, lost: int, gained: int) -> None:
    needed = samples_needed(n, lost, gained, 0.02)
    if needed == 0:
        assert lost - gained >= 0.02 * n
        return
    assert upper_bound(needed, lost * needed / n, gained * needed / n) <= 0.02
    smaller = needed - 1
    assert smaller == 0 or upper_bound(smaller, lost * smaller / n, gained * smaller / n) > 0.02


def test_different_samples_are_no_pair() -> None:
    with pytest.raises(ValueError, match="same samples"):
        gate("base", np.ones(3, np.bool_), np.ones(4, np.bool_), 0.02)
