"""Basic pruning: the threshold from two histograms is the one that a full sort would find, caps and ties included."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import models
from emrakul.settings import SafetyConstraints, Settings, StructuredPruning
from emrakul.strategy.basic import WeightShare, counts_of, refine_buckets, spend_weights, ties
from emrakul.strategy.requests import basic_requests, slices_of
from leyline.messages import Slice, Tie
from leyline.model import Malformed
from leyline.topology import Topology

Weights = dict[str, NDArray[np.float32]]


def model(shapes: list[tuple[int, int]], *, domains: tuple[str, ...] = ("host",)) -> Topology:
    parameters = {
        f"w{i}": models.parameter(f"w{i}", *shape, domain=domains[i % len(domains)]) for i, shape in enumerate(shapes)
    }
    return Topology(model_id=models.MODEL, parameters=parameters)


def keys(values: NDArray[np.float32]) -> NDArray[np.uint32]:
    return values.astype(np.float32).view(np.uint32)


def histogram(piece: Slice, found: NDArray[np.uint32]) -> dict[str, NDArray[np.int64]]:
    bucket, count = np.unique(found, return_counts=True)
    return {f"{piece.key}/bucket": bucket.astype(np.uint32), f"{piece.key}/count": count.astype(np.int64)}


def coarse_pass(slices: dict[str, tuple[Slice, ...]], scores: Weights, live: dict[str, NDArray[np.bool_]]) -> dict:
    found = {}
    for name, pieces in slices.items():
        for piece in pieces:
            part = keys(scores[name][piece.start : piece.stop])[live[name][piece.start : piece.stop]]
            found |= histogram(piece, part >> 16)
    return found


def fine_pass(slices, scores: Weights, live, buckets: dict[str, int]) -> dict:
    found = {}
    for name, pieces in slices.items():
        for piece in pieces:
            if piece.key in buckets:
                part = keys(scores[name][piece.start : piece.stop])[live[name][piece.start : piece.stop]]
                found |= histogram(piece, part[part >> 16 == buckets[piece.key]] & 0xFFFF)
    return found


def select(slices, scores: Weights, live, thresholds: dict[str, Tie]) -> dict[str, NDArray[np.bool_]]:
    """What a worker does with its ties: pruned weights, flat."""
    gone = {name: np.zeros(len(values), dtype=np.bool_) for name, values in scores.items()}
    for name, pieces in slices.items():
        for piece in pieces:
            if (tie := thresholds.get(piece.key)) is None:
                continue
            part = keys(scores[name][piece.start : piece.stop])
            alive = live[name][piece.start : piece.stop]
            mine = gone[name][piece.start : piece.stop]
            mine |= alive & (part < tie.below)
            equal = np.flatnonzero(alive & (part == tie.below))
            assert len(equal) >= tie.equal
            mine[equal[: tie.equal]] = True
    return gone


def by_sorting(share: WeightShare, scores: Weights, live) -> dict[str, NDArray[np.bool_]]:
    """The same by one full sort: lowest first, ties by (UUID, flat index), parameters skipped at their cap."""
    gone = {quota.name: np.zeros(quota.parameter.size, dtype=np.bool_) for quota in share.quotas}
    left = {quota.name: quota.cap for quota in share.quotas}
    order = sorted(
        (float(scores[quota.name][index]), quota.parameter.uuid, index, quota.name)
        for quota in share.quotas
        for index in np.flatnonzero(live[quota.name])
    )
    taken = 0
    for _, _, index, name in order:
        if taken == share.budget.achieved:
            break
        if left[name]:
            left[name] -= 1
            gone[name][index] = True
            taken += 1
    return gone


def rounds(topology: Topology, scores: Weights, live, rate: Fraction, config: Settings | None = None, take=None):
    """All three rounds; `take` is the share of what the caps leave that goes, whatever rate and margin say."""
    config = config or Settings()
    slices = slices_of(basic_requests(models.subject(topology), "histogram"))
    coarse = coarse_pass(slices, scores, live)
    shares = spend_weights(topology, slices, coarse, rate=rate, carry={}, settings=config)
    if take is not None:
        shares = tuple(
            replace(share, budget=share.budget.model_copy(update={"achieved": int(take * possible(share))}))
            for share in shares
        )
    fine = fine_pass(slices, scores, live, refine_buckets(shares, coarse))
    return shares, select(slices, scores, live, ties(shares, coarse, fine))


def possible(share: WeightShare) -> int:
    return sum(min(quota.live, quota.cap) for quota in share.quotas)


@settings(deadline=None, max_examples=120)
@given(
    st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), min_size=1, max_size=5),
    st.sampled_from([1, 3, 8, 40]),
    st.fractions(0, 1, max_denominator=12),
    st.fractions(0, 1, max_denominator=6).map(lambda f: Fraction(round(f * 10), 10)),
    st.integers(0, 2**31),
)
def test_the_threshold_is_that_of_a_full_sort_with_caps_and_ties(
    shapes: list[tuple[int, int]], levels: int, take: Fraction, retention: Fraction, seed: int
) -> None:
    random = np.random.default_rng(seed)
    topology = model(shapes)
    sizes = {name: p.size for name, p in topology.parameters.items()}
    # few levels make ties; their spread puts them into one bucket or into many
    spread = random.choice([1.0, 1e-4])
    scores = {n: (1 + spread * random.integers(0, levels, size)).astype(np.float32) for n, size in sizes.items()}
    scores = {n: v * np.float32(random.choice([0.1, 1.0])) for n, v in scores.items()}
    live = {n: random.random(size) > 0.1 for n, size in sizes.items()}
    constraints = SafetyConstraints(min_channel_retention=retention)
    config = Settings(structured_pruning=StructuredPruning(safety_constraints=constraints))
    shares, gone = rounds(topology, scores, live, Fraction(0), config, take)
    assert sum(int(g.sum()) for g in gone.values()) == sum(share.budget.achieved for share in shares)
    for share in shares:
        expected = by_sorting(share, scores, live)
        for name, bits in expected.items():
            assert np.array_equal(gone[name], bits), name


def test_no_parameter_loses_more_than_a_fifth_of_its_original_weights() -> None:
    topology = model([(10, 10), (30, 10)])
    scores = {"w0": np.full(100, 0.1, np.float32), "w1": np.linspace(0.2, 2, 300, dtype=np.float32)}
    live = {"w0": np.arange(100) >= 15, "w1": np.ones(300, np.bool_)}
    shares, gone = rounds(topology, scores, live, Fraction(1, 20), Settings(importance=("magnitude",)))
    assert gone["w0"].sum() == 5, "15 of its 20 went before"
    assert np.flatnonzero(gone["w0"]).tolist() == [15, 16, 17, 18, 19], "ties go in flat order"
    assert gone["w1"].sum() == 14
    assert shares[0].budget.achieved == shares[0].budget.allowed == 19


def test_domains_have_budgets_of_their_own() -> None:
    topology = model([(10, 10), (10, 10)], domains=("host", "seed"))
    scores = {"w0": np.linspace(1, 2, 100, dtype=np.float32), "w1": np.linspace(1e-6, 2e-6, 100, dtype=np.float32)}
    live = {name: np.ones(100, np.bool_) for name in scores}
    scores = {name: np.concatenate([values[:5] / 100, values[5:]]) for name, values in scores.items()}
    _, gone = rounds(topology, scores, live, Fraction(1, 20))
    assert {name: np.flatnonzero(bits).tolist() for name, bits in gone.items()} == {
        "w0": [0, 1, 2, 3, 4],
        "w1": [0, 1, 2, 3, 4],
    }


def test_the_margin_keeps_weights_near_the_median() -> None:
    topology = model([(10, 10)])
    slices = slices_of(basic_requests(models.subject(topology), "histogram"))
    values = np.ones(100, np.float32)
    values[:2], values[2:4] = 0.4, 0.6
    live = {"w0": np.ones(100, np.bool_)}
    coarse = coarse_pass(slices, {"w0": values}, live)
    by_magnitude = Settings(importance=("magnitude",))
    (share,) = spend_weights(topology, slices, coarse, rate=Fraction(1, 20), carry={}, settings=by_magnitude)
    budget = share.budget
    assert (budget.allowed, budget.eligible, budget.achieved, budget.bound) == (5, 2, 2, "margin")
    (share,) = spend_weights(topology, slices, coarse, rate=Fraction(1, 20), carry={}, settings=Settings())
    assert share.budget.eligible == 0, "half the amplitude is a quarter of w^2 F, the keys that are preferred"


def test_the_carry_of_weights_is_kept_like_any_other() -> None:
    topology = model([(5, 3)])
    slices = slices_of(basic_requests(models.subject(topology), "histogram"))
    coarse = coarse_pass(slices, {"w0": np.ones(15, np.float32)}, {"w0": np.ones(15, np.bool_)})
    (share,) = spend_weights(
        topology, slices, coarse, rate=Fraction(1, 100), carry={"host/weight": "9/10"}, settings=Settings()
    )
    assert (share.budget.allowed, share.budget.carry_out) == (1, "1/20")


def test_all_parameters_at_their_cap_is_said() -> None:
    topology = model([(10, 10)])
    slices = slices_of(basic_requests(models.subject(topology), "histogram"))
    live = {"w0": np.arange(100) >= 20}
    coarse = coarse_pass(slices, {"w0": np.linspace(0, 1, 100, dtype=np.float32)}, live)
    (share,) = spend_weights(topology, slices, coarse, rate=Fraction(1, 20), carry={}, settings=Settings())
    assert (share.full, share.budget.achieved, share.budget.bound) == (True, 0, "retention")
    assert refine_buckets([share], coarse) == {}
    assert ties([share], coarse, {}) == {}


@pytest.mark.parametrize(
    "arrays",
    [
        {},
        {"w@0/bucket": np.array([1, 2], np.uint32), "w@0/count": np.array([1])},
        {"w@0/bucket": np.array([1], np.uint32), "w@0/count": np.array([-1])},
        {"w@0/bucket": np.array([1], np.uint32), "w@0/count": np.array([11])},
    ],
)
def test_an_answer_without_a_proper_histogram_is_refused(arrays: dict[str, NDArray[np.int64]]) -> None:
    with pytest.raises(Malformed, match="w@0"):
        counts_of([Slice(parameter="w", start=0, stop=10)], arrays)
