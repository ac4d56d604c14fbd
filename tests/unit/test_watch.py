"""Which checkpoint is due for a cycle."""

from __future__ import annotations

from emrakul.watch import due
from leyline.fold import LiveCycle, PairState, RunState
from leyline.messages import MaskRef


def pair(record: int, **changes: object) -> PairState:
    values = {"record": record, "checkpoint": f"{record}-1-00000000", "step": record, "epoch": 1, "parent": None}
    return PairState.model_validate({**values, **changes})


def run(*pairs: PairState, **changes: object) -> RunState:
    values = {"n": pairs[-1].record, "run_id": "r", "model_id": "m", "tip": pairs[-1].record, "pairs": pairs}
    return RunState.model_validate({**values, **changes})


def test_the_newest_checkpoint_is_due_and_those_before_it_are_passed_over() -> None:
    found = due(run(pair(2), pair(3), pair(4)))
    assert found is not None
    assert found.base == 4


def test_a_checkpoint_is_due_once() -> None:
    assert due(run(pair(2), cycled=2)) is None


def test_every_third_checkpoint() -> None:
    assert due(run(pair(2), pair(5), pair(6), cycled=2), every=3) is None
    assert due(run(pair(2), pair(5), pair(6), pair(7), cycled=2), every=3) is not None


def test_what_is_no_base_is_not_due() -> None:
    masks = MaskRef(path="m", digest="0" * 64)
    assert due(run(pair(2), pair(4, candidate="cycles/c/on-2/candidate/", masks=masks))) is None
    assert due(run(pair(2), pair(4, provisional=True, masks=masks))) is None
    assert due(run(pair(2), pair(4, condemned=True))) is None


def test_nothing_is_due_while_a_cycle_is_live() -> None:
    live = LiveCycle(id="c2", base=2, admitted=3, settings_digest="", runtime="local")
    assert due(run(pair(2), pair(4), live=live)) is None
