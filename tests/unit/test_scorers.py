"""Every scorer against its definition, written out in plain float64."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from builders import toy_topology
from elesh import gate, single
from elesh.scorers import SCORERS, GateStatistics, Half
from elesh.squares import BLOCK, SEGMENT, Axis, add_segments, segments, sum_squares
from leyline.messages import Slice, Tie
from leyline.model import Malformed
from leyline.partial import Parts, add_up, fisher, magnitude, wanda
from leyline.redundancy import similarity
from leyline.topology import Group, Kind, Member, Topology

RANDOM = np.random.default_rng(5)
ALL = np.ones(6, dtype=np.bool_)


def half(q: NDArray[np.float64], weights: NDArray[np.float64]) -> Half:
    """EMA sums of q [samples, units]."""
    return Half(
        np.array([weights.sum(), (weights**2).sum()]),
        weights @ np.abs(q),
        weights @ q**2,
        weights @ (q**2 + 1),
    )


def sampled(units: int = 6, samples: int = 400) -> tuple[NDArray[np.float64], NDArray[np.float64], GateStatistics]:
    q = RANDOM.normal(size=(samples, units)) * np.arange(1, units + 1)
    weights = 0.97 ** np.arange(samples)[::-1]
    odd, even = slice(0, None, 2), slice(1, None, 2)
    stats = GateStatistics(
        units, np.ones(units, dtype=np.bool_), half(q[odd], weights[odd]), half(q[even], weights[even])
    )
    return q, weights, stats


def test_taylor_is_the_weighted_mean_amplitude_with_its_standard_error() -> None:
    q, weights, stats = sampled()
    found = SCORERS["taylor"][1](stats)
    assert found is not None
    expected = np.average(np.abs(q), axis=0, weights=weights)
    variance = np.average((np.abs(q) - expected) ** 2, axis=0, weights=weights)
    effective = weights.sum() ** 2 / (weights**2).sum()
    assert found.score == pytest.approx(expected, rel=1e-12)
    assert found.error == pytest.approx(np.sqrt(variance / (effective - 1)), rel=1e-9)
    assert found.odd == pytest.approx(np.average(np.abs(q[::2]), axis=0, weights=weights[::2]))
    assert found.even == pytest.approx(np.average(np.abs(q[1::2]), axis=0, weights=weights[1::2]))


def test_the_standard_error_is_that_of_repeated_experiments() -> None:
    means, errors = [], []
    for _ in range(400):
        q = np.abs(RANDOM.normal(size=(100, 1)))
        one = half(q, np.ones(100))
        means.append(gate.taylor(one.absolute, one.weights)[0])
        errors.append(gate.taylor_error(one.absolute, one.squares, one.weights)[0])
    assert np.mean(errors) == pytest.approx(np.std(means), rel=0.15)


def test_one_sample_says_nothing_of_the_spread() -> None:
    one = half(np.array([[1.0, 2.0]]), np.ones(1))
    assert np.isinf(gate.taylor_error(one.absolute, one.squares, one.weights)).all()
    scores = SCORERS["contribution"][1](GateStatistics(2, np.ones(2, dtype=np.bool_), odd=one))
    assert scores is not None
    assert np.isinf(scores.error).all()
    assert scores.even is None


def test_squares_and_contribution_are_means_of_squares() -> None:
    q, weights, stats = sampled()
    squares, contribution = SCORERS["taylor_squares"][1](stats), SCORERS["contribution"][1](stats)
    assert squares is not None
    assert contribution is not None
    assert squares.score == pytest.approx(np.average(q**2, axis=0, weights=weights))
    assert contribution.score == pytest.approx(np.sqrt(np.average(q**2 + 1, axis=0, weights=weights)))
    assert (squares.error > 0).all()
    assert (squares.error < squares.score).all()


def test_heads_are_normalised_within_their_layer_over_the_live_ones() -> None:
    q, weights, stats = sampled()
    live = ALL.copy()
    live[5] = False
    found = SCORERS["michel"][1](GateStatistics(6, live, stats.odd, stats.even))
    assert found is not None
    raw = np.average(np.abs(q), axis=0, weights=weights)
    assert found.score == pytest.approx(raw / np.sqrt((raw[:5] ** 2).sum()))
    assert (found.score[:5] ** 2).sum() == pytest.approx(1)
    assert found.odd is not None
    assert (found.odd[:5] ** 2).sum() == pytest.approx(1)


def test_a_layer_that_turns_nothing_has_no_influence() -> None:
    inputs = RANDOM.normal(size=(50, 8))
    outputs = inputs + 0.3 * RANDOM.normal(size=(50, 8))
    cosines = (inputs * outputs).sum(1) / np.linalg.norm(inputs, axis=1) / np.linalg.norm(outputs, axis=1)
    sums = np.array([cosines.sum(), 50.0])
    found = SCORERS["block_influence"][1](GateStatistics(1, np.ones(1, dtype=np.bool_), cosines=sums))
    assert found is not None
    assert found.score[0] == pytest.approx(np.mean(1 - cosines))
    assert found.error[0] >= np.std(cosines) / math.sqrt(50)
    assert gate.block_influence(np.array([7.0, 7.0]))[0] == 0
    assert gate.block_influence_error(np.array([7.0, 7.0]))[0] == 0


def test_what_was_not_measured_is_not_scored() -> None:
    nothing = GateStatistics(6, ALL)
    assert all(formula(nothing) is None for _, formula in SCORERS.values())
    forward = GateStatistics(6, ALL, odd=Half(np.array([1.0, 1.0]), activity=np.ones(6)))
    assert SCORERS["taylor"][1](forward) is None
    assert SCORERS["contribution"][1](forward) is not None


def test_heads_that_say_the_same_are_alike_whatever_their_size() -> None:
    outputs = RANDOM.normal(size=(4, 100))
    outputs[1] = 2 * outputs[0] + 0.05 * RANDOM.normal(size=100)
    alike = similarity(outputs @ outputs.T, 4)
    assert alike == pytest.approx(np.corrcoef(outputs), abs=0.2)
    assert np.diag(alike) == pytest.approx(1)
    assert alike[0, 1] > 0.9


def test_a_unit_of_two_heads_adds_their_sum() -> None:
    outputs = RANDOM.normal(size=(6, 50))
    units = outputs.reshape(3, 2, 50).sum(1)
    assert similarity(outputs @ outputs.T, 3) == pytest.approx(similarity(units @ units.T, 3))


# --- from weights -----------------------------------------------------------------------------------------------------

SHAPES = [(7, 5, 3, 3), (300, 700), (3, BLOCK + 17), (2, SEGMENT + 5), (40,), ()]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sums_of_squares_are_those_of_plain_float64(shape: tuple[int, ...]) -> None:
    w = RANDOM.normal(size=shape).astype(np.float32) * np.float32(1e-3)
    f = RANDOM.random(size=shape)
    flat = w.reshape(-1)
    axes = {Axis(axis) for axis in range(1, len(shape))}
    parts = [(a, sum_squares(flat[a:b], a, shape, axes, f.reshape(-1)[a:b])) for a, b in segments(0, w.size, shape)]
    rows, columns = add_segments(parts, 0, w.size, shape)
    exact = (w.astype(np.float64) ** 2 * f / 2).reshape(shape or (1,))
    assert rows == pytest.approx(exact.sum(tuple(range(1, exact.ndim))), rel=1e-12)
    for axis in axes:
        others = tuple(other for other in range(len(shape)) if other != axis.axis)
        np.testing.assert_allclose(columns[axis, 0], exact.sum(others), rtol=1e-12)


def test_segments_cover_a_slice_once_in_order() -> None:
    for shape in SHAPES:
        size = int(np.prod(shape))
        cuts = segments(0, size, shape)
        assert [a for a, _ in cuts] == [0, *(b for _, b in cuts[:-1])]
        assert cuts[-1][1] == size
        assert max(b - a for a, b in cuts) <= 2 * SEGMENT


def scores_of(topology: Topology, weights: dict[str, NDArray[np.float32]], cuts: int, kind: str = "norm") -> dict:
    """Partial sums of every slice as a worker makes them, here from the definition."""
    parts, answers = Parts(topology), []
    for name, parameter in topology.parameters.items():
        rows = parameter.shape[0] if parameter.shape else 1
        width = parameter.size // rows
        bounds = sorted({*range(0, rows, max(1, rows // cuts)), rows})
        for first, last in itertools.pairwise(bounds):
            slice_ = Slice(parameter=name, start=first * width, stop=last * width)
            arrays = {}
            for part in parts.of(slice_):
                member = part.group.members[part.member]
                only = np.zeros(parameter.shape)
                only[first:last] = weights[name][first:last]
                total = [(take(only, member, unit) ** 2).sum() for unit in range(part.group.units)]
                arrays[part.name(kind, slice_)] = np.array(total)[part.first : part.first + part.units]
            answers.append((slice_, arrays))
    return dict(add_up(topology, answers, kind))


def take(values: NDArray[np.float64], member: Member, unit: int) -> NDArray[np.float64]:
    """A member's weights of one unit, as topology.Member defines them."""
    if member.groups > 1:
        per = values.shape[1]
        rows = values.shape[0] // member.groups
        return values[unit // per * rows : (unit // per + 1) * rows, unit % per]
    begin = member.start + unit * member.block
    return np.take(values, range(begin, begin + member.block), axis=member.axis)


def normal(topology: Topology) -> dict[str, NDArray[np.float32]]:
    return {name: RANDOM.normal(size=p.shape).astype(np.float32) for name, p in topology.parameters.items()}


@pytest.mark.parametrize("cuts", [1, 3, 5])
def test_group_magnitude_is_over_the_norm_or_else_the_producers(cuts: int) -> None:
    topology = toy_topology()
    w = normal(topology)
    sums = scores_of(topology, w, cuts)
    conv, attn = topology.groups
    assert magnitude(conv, sums) == pytest.approx(np.hypot(w["norm1.weight"], w["norm1.bias"]))
    qkv = np.stack([w[f"attn.{name}.weight"].reshape(4, -1) for name in "qkv"])
    assert magnitude(attn, sums) == pytest.approx(np.sqrt((qkv.astype(np.float64) ** 2).sum((0, 2))))
    assert fisher(attn, sums) == pytest.approx((qkv.astype(np.float64) ** 2).sum((0, 2)))


def test_channel_wanda_is_the_consumers_columns_times_their_input() -> None:
    topology = toy_topology()
    w = normal(topology)
    inputs = RANDOM.random(8)
    expected = np.linalg.norm(w["fc.weight"].astype(np.float64), axis=0) * inputs
    assert wanda(topology.groups[0], scores_of(topology, w, 2), inputs) == pytest.approx(expected)


def test_a_group_without_norms_or_consumers_says_so() -> None:
    topology = toy_topology()
    sums = scores_of(topology, normal(topology), 1)
    lone = Group(
        id="conv1", kind=Kind.CHANNEL, units=8, gates=("a",), members=(Member(parameter="x", role="producer", axis=0),)
    )
    with pytest.raises(Malformed, match="no consumer"):
        wanda(lone, sums, np.ones(8))
    del sums["conv1", 2]
    with pytest.raises(Malformed, match=r"no sums of norm1\.weight"):
        magnitude(topology.groups[0], sums)


@pytest.mark.parametrize(("start", "stop"), [(3, 80), (0, 80 * 7), (20, 20)])
def test_slices_that_are_no_whole_rows_are_refused(start: int, stop: int) -> None:
    with pytest.raises(Malformed, match="no whole rows"):
        Parts(toy_topology()).of(Slice(parameter="attn.out.weight", start=start, stop=stop))


def test_a_hole_between_slices_and_a_part_that_is_missing_are_refused() -> None:
    topology = toy_topology()
    late = Slice(parameter="norm1.weight", start=4, stop=8)
    with pytest.raises(Malformed, match="hole or overlap at element 4"):
        add_up(topology, [(late, {})])
    with pytest.raises(Malformed, match=r"no tensor norm/norm1\.weight@0/conv1/2/0 of 4 sums"):
        add_up(topology, [(late, {}), (Slice(parameter="norm1.weight", start=0, stop=4), {})])
    first = Slice(parameter="norm1.weight", start=0, stop=4)
    with pytest.raises(Malformed, match="end at element 4 of 8"):
        add_up(topology, [(first, {"norm/norm1.weight@0/conv1/2/0": np.ones(4)})])


# --- single weights ---------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=60))
def test_keys_order_like_scores(values: list[float]) -> None:
    w = np.array(values, dtype=np.float32)
    keys = single.magnitude_keys(w, parameter="w", start=0)
    order = np.argsort(keys, kind="stable")
    assert order.tolist() == np.argsort(np.abs(w), kind="stable").tolist()
    scored = single.fisher_keys(w, np.full(len(w), 2.0), parameter="w", start=0)
    expected = np.minimum(w.astype(np.float64) ** 2, np.finfo(np.float32).max).astype(np.float32)
    assert scored.view(np.float32).tolist() == expected.tolist()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_weight_that_is_not_finite_is_named(bad: float, dtype: type) -> None:
    w = np.ones(10, dtype=dtype)
    w[7] = bad
    with pytest.raises(Malformed, match=r"fc\.weight holds -?(nan|inf) at element 107"):
        single.magnitude_keys(w, parameter="fc.weight", start=100)
    with pytest.raises(Malformed, match="at element 107"):
        single.fisher_keys(w, np.ones(10), parameter="fc.weight", start=100)


def test_a_float64_beyond_float32_is_the_largest_key_not_infinity() -> None:
    keys = single.magnitude_keys(np.array([1e300, 1.0]), parameter="w", start=0)
    assert keys.view(np.float32).tolist() == [float(np.finfo(np.float32).max), 1.0]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=40), st.data())
def test_selection_takes_all_below_and_the_first_that_are_equal(scores: list[int], data: st.DataObject) -> None:
    keys = single.magnitude_keys(np.array(scores, dtype=np.float32), parameter="w", start=0)
    live = np.array(data.draw(st.lists(st.booleans(), min_size=len(scores), max_size=len(scores))))
    order = [i for i in np.argsort(keys, kind="stable") if live[i]]
    k = data.draw(st.integers(0, len(order)))
    tie = Tie(below=int(keys[order[k]]) if k < len(order) else 0xFFFFFFFF)
    tie = Tie(below=tie.below, equal=k - int((keys[live] < np.uint32(tie.below)).sum()))
    middle = len(scores) // 2
    first, taken = single.select(keys[:middle], live[:middle], tie, 0)
    second, _ = single.select(keys[middle:], live[middle:], tie, taken)
    assert np.flatnonzero(np.concatenate([first, second])).tolist() == sorted(order[:k])
