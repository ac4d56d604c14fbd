"""The integer rule: exact fractions, one carry a kind over the whole model, hard caps that nothing loosens."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import models
from emrakul.settings import SafetyConstraints, Settings, StructuredPruning
from emrakul.strategy.aggregate import GroupScores
from emrakul.strategy.budget import Share, allowance, check_constraints, eligibility_limit, layer_room, room, spend
from leyline.messages import GroupDecision
from leyline.topology import HOST, Kind, Topology

PERCENT = Fraction(1, 100)
SETTINGS = Settings()
CONSTRAINTS = SETTINGS.constraints


def channels(scores: tuple[GroupScores, ...], rate: Fraction = PERCENT, carry: Fraction = Fraction(0)) -> Share:
    return spend(scores, domain=HOST, kind=Kind.CHANNEL, rate=rate, carry=carry, settings=SETTINGS)


def ramp(topology: Topology, *, seed: int = 0) -> list[list[float]]:
    """Scores of which three quarters are far below the rest."""
    random = np.random.default_rng(seed)
    return [(random.random(g.units) ** 3).tolist() for g in topology.groups]


def test_one_percent_of_336_units_over_ten_cycles_gives_the_measured_sequence() -> None:
    topology = models.chain([32] * 7 + [16] * 7)
    scores, pruned, carry = ramp(topology), {g.id: [] for g in topology.groups}, Fraction(0)
    sequence = []
    for _ in range(10):
        share = channels(models.scored(topology, scores, pruned=pruned), carry=carry)
        carry = Fraction(share.budget.carry_out)
        for one in share.pruned:
            pruned[one.group] += one.pruned
        sequence.append(share.budget.achieved)
    assert sequence == [3, 3, 3, 4, 3, 3, 3, 4, 3, 3]


def test_one_percent_of_72_heads_is_nothing_until_the_carry_makes_one() -> None:
    carry, sequence, live = Fraction(0), [], 72
    for _ in range(5):
        given = allowance(rate=PERCENT, live=live, carry=carry)
        carry, live = given.carry_out, live - given.allowed
        sequence.append((given.allowed, carry))
    assert sequence[0] == (0, Fraction(72, 100))
    assert [allowed for allowed, _ in sequence] == [0, 1, 1, 0, 1]


def test_a_carry_of_a_whole_unit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\)"):
        allowance(rate=PERCENT, live=10, carry=Fraction(1))


@settings(deadline=None)
@given(
    st.fractions(0, 1, max_denominator=200),
    st.lists(st.integers(0, 500), min_size=1, max_size=20),
)
def test_over_many_cycles_what_was_allowed_stays_within_one_unit_of_the_rate(rate: Fraction, lives: list[int]) -> None:
    carry, allowed, due = Fraction(0), 0, Fraction(0)
    for live in lives:
        given_ = allowance(rate=rate, live=live, carry=carry)
        assert given_.allowed <= math.ceil(rate * live)
        assert 0 <= given_.carry_out < 1
        carry, allowed, due = given_.carry_out, allowed + given_.allowed, due + rate * live
        assert 0 <= due - allowed < 1


sizes = st.lists(st.integers(1, 25), min_size=1, max_size=5)


@settings(deadline=None)
@given(sizes, st.fractions(0, 1, max_denominator=20), st.integers(0, 2**31), st.data())
def test_no_group_ever_goes_below_its_floor(sizes: list[int], rate: Fraction, seed: int, data: st.DataObject) -> None:
    topology = models.chain(sizes)
    random = np.random.default_rng(seed)
    gone = {g.id: list(range(data.draw(st.integers(0, g.units // 5)))) for g in topology.groups}
    scores = [np.round(random.random(n), 1).tolist() for n in sizes]
    share = channels(models.scored(topology, scores, pruned=gone), rate=rate)
    taken = {one.group: one.pruned for one in share.pruned}
    for index, group in enumerate(topology.groups):
        mine = taken.get(group.id, ())
        assert not set(mine) & set(gone[group.id])
        assert group.units - len(gone[group.id]) - len(mine) >= min(
            math.ceil(Fraction(8, 10) * group.units), group.units - len(gone[group.id])
        )
        if share.limit is not None:
            assert all(scores[index][unit] <= share.limit for unit in mine)
    assert share.budget.achieved <= share.budget.allowed <= math.ceil(rate * share.budget.live)
    assert (share.budget.bound == "rate") == (share.budget.achieved == share.budget.allowed) or share.full
    assert check_constraints(topology, models.masks(topology, gone), share.pruned, CONSTRAINTS) is None


def test_retention_counts_from_the_original_units() -> None:
    group = models.chain([10]).groups[0]
    assert [room(group, gone, CONSTRAINTS).units for gone in (0, 1, 2, 3)] == [2, 1, 0, 0]


def test_two_query_heads_stay_in_every_attention_layer() -> None:
    twelve = models.attention(1, 12).groups[0]
    assert [room(twelve, gone, CONSTRAINTS).units for gone in (0, 9, 10, 11)] == [10, 1, 0, 0]
    assert room(twelve, 0, CONSTRAINTS).constraint == "min_attention_heads"
    grouped = models.attention(1, 4, heads_per_unit=4).groups[0]
    assert room(grouped, 0, CONSTRAINTS).units == 3, "one KV group of four query heads is above the minimum of two"


def test_the_walk_stops_at_the_floor_of_two_heads() -> None:
    topology = models.attention(2, 12)
    gone = {"layer0": list(range(9))}
    scores = models.scored(topology, [[0.1] * 12, [9.0] * 12], pruned=gone)
    share = spend(scores, domain=HOST, kind=Kind.HEAD, rate=Fraction(1, 5), carry=Fraction(0), settings=SETTINGS)
    assert share.pruned == (GroupDecision(group="layer0", pruned=(9,)),)
    assert (share.budget.allowed, share.budget.achieved, share.budget.bound) == (3, 1, "min_attention_heads")


def test_a_quarter_of_the_layers_may_go_in_all() -> None:
    assert [layer_room(n, 0, CONSTRAINTS) for n in (3, 4, 7, 8)] == [0, 1, 1, 2]
    assert layer_room(7, 1, CONSTRAINTS) == 0
    topology = models.branches(7)
    scores = models.scored(topology, [[0.1], [0.2], [5], [5], [5], [5], [5]])
    share = spend(
        scores, domain=HOST, kind=Kind.LAYER, layers=7, rate=Fraction(3, 10), carry=Fraction(0), settings=SETTINGS
    )
    assert [one.group for one in share.pruned] == ["block0"]
    assert (share.budget.allowed, share.budget.achieved, share.budget.bound) == (2, 1, "max_layer_removal")


def test_the_walk_skips_a_full_group_and_goes_on_in_the_global_order() -> None:
    topology = models.chain([5, 10])
    low, high = [0.1, 0.1, 0.1, 9, 9], [0.3, 0.2, 9, 9, 9, 9, 9, 9, 9, 9]
    share = channels(models.scored(topology, [low, high]), rate=Fraction(1, 5))
    assert share.pruned == (GroupDecision(group="fc0", pruned=(0,)), GroupDecision(group="fc1", pruned=(0, 1)))
    assert (share.budget.allowed, share.budget.achieved, share.budget.bound) == (3, 3, "rate")


def test_ties_go_by_group_and_index_and_never_overshoot() -> None:
    topology = models.chain([20, 20])
    share = channels(models.scored(topology, [[0.1] * 5 + [9] * 15] * 2), rate=Fraction(1, 10))
    assert share.pruned == (GroupDecision(group="fc0", pruned=(0, 1, 2, 3)),)


def test_the_margin_keeps_whatever_is_not_surely_below_half_the_median() -> None:
    topology = models.chain([10])
    score = [0.4, 0.4, 1, 1, 1, 1, 1, 1, 1, 1]
    sure = channels(models.scored(topology, [score]), rate=Fraction(1, 5))
    assert (sure.limit, sure.budget.achieved, sure.budget.eligible) == (0.5, 2, 2)
    unsure = models.scored(topology, [score], upper=[[0.4, 0.51, *score[2:]]])
    share = channels(unsure, rate=Fraction(1, 5), carry=Fraction(1, 2))
    assert (share.budget.achieved, share.budget.bound, share.budget.carry_out) == (1, "margin", "1/2")


def test_masked_units_are_left_out_of_the_median_and_of_the_live_count() -> None:
    topology = models.chain([10])
    scores = models.scored(topology, [[0.0, 0.0, 2, 2, 2, 2, 2, 2, 2, 2]], pruned={"fc0": [0, 1]})
    assert eligibility_limit(scores, Fraction(1, 2)) == 1.0
    share = channels(scores)
    assert (share.budget.live, share.budget.original, share.full) == (8, 10, True)


def test_a_unit_without_a_score_stays() -> None:
    topology = models.chain([10])
    scores = models.scored(topology, [[float("nan")] + [1.0] * 9])
    scores = tuple(GroupScores(**{**vars(one), "live": one.live & np.isfinite(one.score)}) for one in scores)
    assert channels(scores, rate=Fraction(1)).pruned == ()


def test_all_caps_full_is_said() -> None:
    topology = models.chain([10, 10])
    share = channels(
        models.scored(topology, [[0.1] * 3 + [9] * 7] * 2, pruned={"fc0": [0, 1], "fc1": [0, 1]}), rate=PERCENT * 10
    )
    assert (share.full, share.budget.achieved, share.budget.bound) == (True, 0, "retention")


def test_never_both_of_two_heads_that_say_the_same() -> None:
    topology = models.attention(1, 12)
    scores = models.scored(topology, [[0.1, 0.2, 0.3] + [9] * 9])
    alike = np.eye(12)
    alike[0, 1] = alike[1, 0] = 0.95
    scores = (GroupScores(**{**vars(scores[0]), "alike": alike}),)
    share = spend(scores, domain=HOST, kind=Kind.HEAD, rate=Fraction(2, 12), carry=Fraction(0), settings=SETTINGS)
    assert share.pruned == (GroupDecision(group="layer0", pruned=(0, 2)),)
    apart = (GroupScores(**{**vars(scores[0]), "alike": np.eye(12)}),)
    share = spend(apart, domain=HOST, kind=Kind.HEAD, rate=Fraction(2, 12), carry=Fraction(0), settings=SETTINGS)
    assert share.pruned == (GroupDecision(group="layer0", pruned=(0, 1)),)


# --- decisions that a person forces ----------------------------------------------------------------------------------


def test_a_fifth_of_all_units_taken_globally_without_caps_is_refused_by_retention() -> None:
    topology = models.chain([32] * 7 + [16] * 7)
    scores = ramp(topology)
    order = sorted((s, g, u) for g, row in enumerate(scores) for u, s in enumerate(row))[: 336 // 5]
    forced = [
        GroupDecision(group=group.id, pruned=tuple(u for _, g, u in order if g == index))
        for index, group in enumerate(topology.groups)
    ]
    finding = check_constraints(topology, models.masks(topology, {}), forced, CONSTRAINTS)
    assert finding is not None
    assert finding.reason == "ConstraintBroken"
    assert "min_channel_retention is 0.8" in finding.message


def test_floor_of_a_fifth_of_every_group_is_within_retention() -> None:
    topology = models.chain([32, 16, 9])
    forced = [GroupDecision(group=g.id, pruned=tuple(range(g.units // 5))) for g in topology.groups]
    assert check_constraints(topology, models.masks(topology, {}), forced, CONSTRAINTS) is None
    again = models.masks(topology, {"fc2": [8]})
    finding = check_constraints(topology, again, forced, CONSTRAINTS)
    assert finding is not None
    assert "group fc2 may give 0 more of its 9 units (1 are masked" in finding.message


@pytest.mark.parametrize(
    ("pruned", "inherited", "says"),
    [
        ({"block0": (0,)}, {}, None),
        ({"block0": (0,), "block1": (0,)}, {}, "may give 1 more of its 5 layers (0 are masked, max_layer_removal"),
        ({"block1": (0,)}, {"block0": [0]}, "may give 0 more of its 5 layers (1 are masked"),
        ({"block0": (0,)}, {"block0": [0]}, "unit 0 of group block0 is masked already"),
        ({"block9": (0,)}, {}, "names group block9, which the checkpoint does not have"),
        ({"block0": (1,)}, {}, "has 1 units; the decision names unit 1"),
        ({"block0": (0, 0)}, {}, "twice"),
    ],
)  # fmt: skip
def test_forced_layers(pruned: dict[str, tuple[int, ...]], inherited: dict[str, list[int]], says: str | None) -> None:
    topology = models.branches(5)
    forced = [GroupDecision(group=id_, pruned=units) for id_, units in pruned.items()]
    finding = check_constraints(topology, models.masks(topology, inherited), forced, CONSTRAINTS)
    assert (finding is None) == (says is None)
    if finding is not None:
        assert says is not None
        assert says in finding.message


def test_a_looser_setting_is_what_allows_more() -> None:
    topology = models.branches(5)
    forced = [GroupDecision(group="block0", pruned=(0,)), GroupDecision(group="block1", pruned=(0,))]
    loose = StructuredPruning(safety_constraints=SafetyConstraints(max_layer_removal=Fraction(4, 10)))
    assert check_constraints(topology, models.masks(topology, {}), forced, loose.safety_constraints) is None


def test_a_masked_layer_without_a_score_counts_against_max_layer_removal() -> None:
    scores = models.scored(models.branches(4), [[9.0], [0.1], [5.0], [5.0]])[1:]
    known = {"domain": HOST, "kind": Kind.LAYER, "layers": 4, "rate": Fraction(1, 2), "carry": Fraction(0)}
    assert [one.group for one in spend(scores, **known, settings=SETTINGS).pruned] == ["block1"]
    assert spend(scores, **known, removed=1, settings=SETTINGS).pruned == ()
