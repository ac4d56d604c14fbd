"""The tracker's cost, from a clock that is moved by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest
import torch
from torch import nn

from kasmina.cost import Cost, PairedCost, WallMark
from kasmina.topology import trace_topology
from kasmina.tracker import ImportanceTracker


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def mark(self) -> WallMark:
        mark = WallMark()
        mark.at = self.now
        return mark


def run(steps: Iterable[tuple[float, bool]]) -> PairedCost:
    clock = Clock()
    cost = PairedCost(clock.mark)
    for seconds, sampled in steps:
        cost.step(sampled)
        clock.now += seconds
    cost.step(False)
    return cost


def every(stride: int, steps: int, *, plain: float, sampled: Callable[[int], float]) -> list[tuple[float, bool]]:
    return [(sampled(i), True) if i % stride == 0 else (plain, False) for i in range(1, steps + 1)]


def test_share_is_what_sampled_steps_take_more_of_all_the_time() -> None:
    cost = run(every(10, 101, plain=1.0, sampled=lambda _: 1.05)).cost()
    assert isinstance(cost, Cost)
    assert cost.pairs == 10
    assert cost.sampled_step == pytest.approx(0.05)
    assert cost.share == pytest.approx(10 * 0.05 / 101.5)


def test_pauses_and_drift_are_no_cost() -> None:
    """Steps get slower all the time, and some lie beside an evaluation of fifty steps' length."""

    def seconds(i: int) -> float:
        return (1 + i / 1000) * (1.05 if i % 10 == 5 else 1) + (50 if i % 40 == 4 else 0)

    cost = run((seconds(i), i % 10 == 5) for i in range(300)).cost()
    assert cost is not None
    assert cost.sampled_step == pytest.approx(0.05, abs=0.01)


def test_nothing_is_said_before_it_could_be_compared() -> None:
    assert run([(1.0, False)] * 20).cost() is None
    assert run([(1.0, True)] * 20).cost() is None  # every step sampled: nothing to compare with


@pytest.mark.parametrize(("extra", "expected"), [(0.02, 4), (0.055, 6), (0.5, 50), (30.0, 1000)])
def test_the_stride_keeps_the_cost_under_the_limit(extra: float, expected: int) -> None:
    cost = run(every(11, 200, plain=1.0, sampled=lambda _: 1 + extra))
    assert cost.stride(0.01, default=11) == expected


def test_an_uncertain_cost_is_sampled_less() -> None:
    noisy = run(every(11, 200, plain=1.0, sampled=lambda i: 1.05 + (0.2 if i % 2 else -0.2)))
    steady = run(every(11, 200, plain=1.0, sampled=lambda _: 1.05))
    assert noisy.stride(0.01, default=11) > steady.stride(0.01, default=11)


def test_few_comparisons_leave_the_default() -> None:
    assert run(every(11, 44, plain=1.0, sampled=lambda _: 9.0)).stride(0.01, default=11) == 11


def test_the_tracker_reports_what_it_measured() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3))
    topology = trace_topology(model, torch.randn(2, 64), model_id="m")
    tracker = ImportanceTracker(model, topology, sample_every=4)
    for _ in range(30):
        with tracker.step(16):
            model(torch.randn(16, 64)).square().sum().backward()
    stats, _ = tracker.stats(checkpoint="c", run_id="r")
    cost = tracker.cost()
    assert cost is not None
    assert cost.pairs == 7
    assert stats.tracker_cost == cost.share
    assert 0 <= cost.share < 1
