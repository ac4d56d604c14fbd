"""How long the training stood still for a checkpoint, by a clock that is moved by hand, and in a real run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kasmina.held import HeldTime
from leyline import layout
from leyline.local import LocalStore
from leyline.log import Log
from leyline.messages import SystemStatePacket
from leyline.records import Publish
from trainers import Trainer, start
from wrapped import Wrapped


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_checkpoint_holds_from_its_publish_until_the_next_one() -> None:
    clock = Clock()
    held = HeldTime(clock)
    with held.hold():
        clock.now += 7
    assert held.seconds is None  # nothing was published yet
    with held.hold():
        clock.now += 3
        held.published()
        with held.hold():  # publish(wait=True)
            clock.now += 2
    assert held.seconds == 5
    clock.now += 100  # training
    with held.hold():
        clock.now += 1
    assert held.seconds == 6
    with held.hold():
        held.published()
        clock.now += 4
    assert held.seconds == 4


def test_what_raises_has_held_the_training_too() -> None:
    clock = Clock()
    held = HeldTime(clock)
    held.published()

    def publish() -> None:
        with held.hold():
            clock.now += 9
            raise OSError

    with pytest.raises(OSError):
        publish()
    with held.hold():
        clock.now += 1
    assert held.seconds == 10


class Slow(Wrapped):
    """A store in which each look at the log takes a second of a clock."""

    def __init__(self, inner: LocalStore, clock: Clock) -> None:
        super().__init__(inner)
        self.clock = clock

    def _read(self, operation: str, key: str) -> None:
        super()._read(operation, key)
        self.clock.now += key.startswith("log/")


def told(store: LocalStore, step: int, term: int = 1) -> SystemStatePacket:
    return SystemStatePacket.parse(store.get(layout.report(term, step)), name=f"report of step {step}")


def test_reports_say_what_publish_sync_wait_and_load_took(tmp_path: Path) -> None:
    store, clock = LocalStore(tmp_path / "run"), Clock()
    trainer = start(Slow(store, clock))
    trainer.run._held = HeldTime(clock)
    trainer.run.sync()
    trainer.run.report(step=0, epoch=0, loss=1.0)
    assert told(store, 0).held_seconds is None
    before = 0.0
    for step, call in enumerate(
        [lambda: trainer.publish(1), trainer.run.sync, lambda: trainer.run.wait(0.01), trainer.run.load], 1
    ):
        began = clock.now
        call()
        took = clock.now - began
        assert took >= 1
        clock.now += 1000  # training is no hold
        trainer.run.report(step=step, epoch=0, loss=1.0)
        assert told(store, step).held_seconds == before + took
        before += took
    trainer.train(1)
    began = clock.now
    trainer.publish(9)
    took = clock.now - began
    trainer.run.report(step=9, epoch=0, loss=1.0)
    assert told(store, 9).held_seconds == took < before


def sampled(store: LocalStore) -> Trainer:
    trainer = start(store)
    tracker = trainer.run._training.tracker
    assert tracker is not None
    for step in range(30):
        tracker._cost.step(step % 5 == 0)
    return trainer


def test_the_trackers_share_of_training_time_is_told(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "run")
    trainer = sampled(store)
    said = trainer.run.report(step=1, epoch=0, loss=1.0).packet.tracking_share
    assert said is not None
    assert 0 <= said <= 1
    assert told(store, 1).tracking_share == said


def test_times_are_in_no_record_and_the_same_report_twice_is_one_object(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "run")
    trainer = sampled(store)
    trainer.publish(1)
    first = trainer.run.report(step=2, epoch=0, loss=1.0, state="stable")
    trainer.run.wait(0.01)
    again = trainer.run.report(step=2, epoch=0, loss=1.0, state="stable")
    assert (again.error, again.packet) == ("", first.packet)
    assert first.packet.held_seconds is not None
    trainer.train(1)
    trainer.publish(2)
    body = Log(store).tail().record.body
    assert isinstance(body, Publish)
    assert body.report is not None
    assert body.report.step == 2
    assert (body.report.held_seconds, body.report.tracking_share) == (None, None)
    assert json.loads(store.get(layout.report(1, 2)))["held_seconds"] == first.packet.held_seconds
