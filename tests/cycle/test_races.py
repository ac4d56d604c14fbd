"""What others do to a run while a cycle works on it: operators, the trainer, a person."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import drafts
from commands import emrakul_run
from emrakul.core import ending
from emrakul.core.snapshot import Snapshot
from emrakul.finding import Finding
from leyline import layout
from leyline.local import LocalStore
from leyline.log import Log, NotAllowed
from leyline.messages import Candidate, Decision
from leyline.reasons import Reason
from leyline.records import Kind, Outcome, Prune, Record
from leyline.store import ObjectStore
from runs import Trainer, asked, contents, drive, published_run, trainer
from wrapped import Wrapped


class Disturbed(Wrapped):
    """Calls `act` just before the first write (or each) of a key that matches."""

    def __init__(self, inner: ObjectStore, pattern: str, act: Callable[[], object], *, times: int = 1) -> None:
        super().__init__(inner)
        self._pattern, self._act, self._times = re.compile(pattern), act, times

    def _written(self, key: str, write: Callable[[], bool]) -> bool:
        if self._times and self._pattern.fullmatch(key):
            self._times -= 1
            self._act()
        return super()._written(key, write)


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    published_run(LocalStore(tmp_path / "run"))
    return LocalStore(tmp_path / "run")


@pytest.fixture
def masked(tmp_path: Path) -> LocalStore:
    """A run that was pruned before (record 4), and published again (record 5)."""
    published_run(LocalStore(tmp_path / "masked"), masked=True)
    return LocalStore(tmp_path / "masked")


def records(store: ObjectStore, *kinds: Kind) -> list[Record]:
    return [record for record in Log(store).since(-1) if record.kind in kinds]


def decision(store: ObjectStore, snapshot: Snapshot) -> Decision:
    key = layout.decision(snapshot.cycle)
    return Decision.parse(store.get(key), name=key)


# --- two operators ----------------------------------------------------------------------------------------------------


def test_two_commands_at_once_commit_once_and_say_the_same(store: LocalStore, tmp_path: Path) -> None:
    golden = published_run(LocalStore(tmp_path / "golden"))
    drive(golden, asked(golden))
    both = [emrakul_run(tmp_path, store.uri, "--workers", "2") for _ in range(2)]
    ended = [command.end() for command in both]
    assert [one["exit"] for one in ended] == [0, 0], ended
    assert ended[0]["outcome"] == ended[1]["outcome"] == "Committed"
    assert (ended[0]["cycle"], ended[0]["ended"]) == (ended[1]["cycle"], ended[1]["ended"])
    assert contents(store) == contents(golden)


def test_two_settings_at_once_are_two_cycles_one_after_the_other(store: LocalStore, tmp_path: Path) -> None:
    both = [emrakul_run(tmp_path, store.uri, more=more) for more in ("", '    safetyMargin: "0.6"\n')]
    ended = [command.end() for command in both]
    outcomes = sorted((one["exit"], one["outcome"], one["reason"]) for one in ended)
    # who comes second finds the masks of the first on its base
    assert outcomes == [(0, "Committed", "Pruned"), (6, "Skipped", "Superseded")], ended
    order = [(r.kind is Kind.ADMIT, r.id) for r in records(store, Kind.ADMIT, Kind.PRUNE, Kind.OUTCOME)]
    first, second = order[0][1], order[2][1]
    assert order == [(True, first), (False, first), (True, second), (False, second)]
    assert {first, second} == {one["cycle"] for one in ended}


# --- the trainer ------------------------------------------------------------------------------------------------------


def publish(training: Trainer, step: int) -> None:
    """A checkpoint of other weights."""
    with torch.no_grad():
        training.model.fc.bias.add_(0.001)
    training.publish(step)


def test_a_publish_while_a_cycle_runs_rebases_it(store: LocalStore) -> None:
    ask = asked(store)
    training = trainer(store)
    snapshot = drive(Disturbed(store, r"cycles/.*/verdict\.json", lambda: publish(training, 200)), ask)
    (newest,) = records(store, Kind.PUBLISH)[1:]
    assert snapshot.end is not None and isinstance(snapshot.end.body, Prune)
    assert snapshot.end.body.base == newest.n != ask.base
    assert snapshot.end.checkpoint == newest.checkpoint
    assert snapshot.end.body.candidate == layout.candidate(snapshot.cycle, newest.n)
    kept = decision(store, snapshot)
    assert (kept.base, kept.checkpoint) == (ask.base, records(store, Kind.PUBLISH)[0].checkpoint)
    manifests = [Candidate.parse(store.get(k), name=k) for k in _manifests(store, snapshot)]
    assert len(manifests) == 2
    assert len({one.masks.digest for one in manifests}) == len({one.decision for one in manifests}) == 1
    assert len({one.objects for one in manifests}) == 2  # the weights are each checkpoint's own
    found = training.run.sync()
    assert found.masks == snapshot.end.masks


def _manifests(store: ObjectStore, snapshot: Snapshot) -> list[str]:
    return [head.key for head in store.list(f"cycles/{snapshot.cycle}/on-") if head.key.endswith("MANIFEST.json")]


def test_a_trainer_that_never_stops_is_told_how_often_would_fit(store: LocalStore) -> None:
    ask = asked(store)
    training = trainer(store)
    steps = iter(range(200, 2000, 100))
    disturbed = Disturbed(store, r"cycles/.*/verdict\.json", lambda: publish(training, next(steps)), times=99)
    end = drive(disturbed, ask).end
    assert end is not None
    assert (end.kind, end.reason) == (Kind.OUTCOME, Reason.TOO_FREQUENT)
    assert len(records(store, Kind.PUBLISH)) == 1 + 4  # its own base, three rebases, and one more
    every = re.search(r"every: (\d+) would fit", end.message)
    assert every and int(every[1]) >= 2, end.message
    assert Log(store).tail().state.tip == records(store, Kind.PUBLISH)[-1].n


def test_three_publishes_are_followed(store: LocalStore) -> None:
    ask = asked(store)
    training = trainer(store)
    steps = iter(range(200, 2000, 100))
    disturbed = Disturbed(store, r"cycles/.*/verdict\.json", lambda: publish(training, next(steps)), times=3)
    end = drive(disturbed, ask).end
    assert end is not None and isinstance(end.body, Prune)
    assert end.body.base == records(store, Kind.PUBLISH)[-1].n


# --- a person ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "moment",
    [r"cycles/.*/requests-0\.json", r"cycles/.*/MANIFEST\.json", r"cycles/.*/verdict\.json", r"log/0/7\.json"],
    ids=["analysis", "apply", "validation", "commit"],
)
@pytest.mark.parametrize("to", [4, 5], ids=["to-the-pair-before", "to-the-base-itself"])
def test_a_rollback_in_the_middle_ends_the_cycle_and_nothing_is_committed(
    masked: LocalStore, moment: str, to: int
) -> None:
    ask = asked(masked)
    assert ask.base == 5

    def roll_back() -> None:
        Log(masked).append(drafts.rolled_back(to), base=5)

    end = drive(Disturbed(masked, moment, roll_back), ask).end
    assert end is not None
    assert (end.kind, end.reason) == (Kind.OUTCOME, Reason.ROLLED_BACK_MEANWHILE)
    assert Log(masked).tail().state.tip == to
    assert len(records(masked, Kind.PRUNE)) == 1  # the one before


def test_a_late_prune_of_a_cycle_that_somebody_ended_is_refused(store: LocalStore) -> None:
    ask = asked(store)

    def abandon() -> None:
        """Somebody else ends the cycle at the very moment when it would commit."""
        other = Log(store)
        finding = Finding(Reason.ABANDONED, "no process drives it any more")
        other.append(ending.abandoned(other.tail().state, finding), base=ask.base)

    snapshot = drive(Disturbed(store, r"log/0/4\.json", abandon), ask)
    assert snapshot.end is not None and isinstance(snapshot.end.body, Outcome)
    assert snapshot.end.reason == Reason.ABANDONED
    assert Log(store).tail().state.tip == ask.base
    assert not records(store, Kind.PRUNE)
    key = layout.manifest(snapshot.cycle, ask.base)
    prune = ending.prune(snapshot, Candidate.parse(store.get(key), name=key))
    log = Log(store)
    with pytest.raises(NotAllowed, match="has ended"):
        log.append(prune, base=log.tail().record.n)  # a writer that looks for its own end nowhere
    assert not records(store, Kind.PRUNE)
