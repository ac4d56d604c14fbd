"""consensus.replicas: 3: a worker that lies is outvoted, and where no majority is nothing is committed."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np
import pytest

from commands import appears, emrakul_run
from elesh.worker import Analysis
from emrakul.control import Controller, Scale
from emrakul.core.snapshot import Phase, Snapshot
from inprocess import InProcess
from leyline import answers, exits, layout
from leyline.local import LocalStore
from leyline.log import Log
from leyline.messages import Requests
from leyline.records import Kind
from leyline.store import ObjectStore
from runs import asked, contents, drive, published_run, settings

CONSENSUS = settings("consensus: {replicas: 3}\n")


def lie(store: ObjectStore, cycle: str, *, worker: int) -> None:
    """Answer every request of a cycle under this worker's number: as asked, well formed, and wrong.

    The scores are turned round, so that the best units would go; no two workers lie alike.
    """
    name = layout.requests(cycle, 0)
    requests = Requests.parse(store.get(name), name=name)
    analysis = Analysis(store, requests)
    for request in requests.requests:
        message, truth = analysis.answer(request)
        arrays = {key: np.ascontiguousarray(array[::-1]) * (2.0 + worker) for key, array in truth.items()}
        said = message.model_copy(update={"worker": worker, "attempt": 90 + worker})
        store.put_if_absent(answers.path(cycle, request.id, worker, 90 + worker), answers.pack(said, arrays))


class WithLiars(InProcess):
    """Workers in this process, some of which lie."""

    liars: Collection[int] = ()

    def _work(self, phase: Phase, launch: int, step: int, worker: int, of: int) -> int:
        if phase is Phase.ANALYSE and worker in self.liars:
            lie(self._store, self._cycle, worker=worker)
            return exits.DONE
        return super()._work(phase, launch, step, worker, of)


def cycle_with(store: ObjectStore, *liars: int) -> tuple[Snapshot, set[int]]:
    """The cycle's end, and the workers that the majority contradicts."""
    dissenters: set[int] = set()

    def runtime(uri: str) -> WithLiars:
        made = WithLiars(store, uri)
        made.liars = liars
        return made

    controller = Controller(store, Log(store), asked(store, CONSENSUS), runtime, scale=Scale(cores=2))
    snapshot, _ = controller.run(watch=lambda s, _: dissenters.update(*(r.dissenters for r in s.rounds)))
    return snapshot, dissenters


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    published_run(LocalStore(tmp_path / "run"))
    return LocalStore(tmp_path / "run")


@pytest.fixture(scope="session")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, bytes]:
    """What a cycle without consensus makes, the log apart: its settings are others."""
    store = published_run(LocalStore(tmp_path_factory.mktemp("golden") / "run"))
    drive(store, asked(store))
    return made(store)


def made(store: ObjectStore) -> dict[str, bytes]:
    """Decision, masks, candidate, verdict."""
    kinds = ("decision.json", "verdict.json")
    return {k: v for k, v in contents(store).items() if k.endswith(kinds) or "/candidate/" in k}


def test_three_who_agree_decide_what_one_does(store: LocalStore, golden: Mapping[str, bytes]) -> None:
    _, dissenters = cycle_with(store)
    assert made(store) == golden
    assert not dissenters


@pytest.mark.parametrize("liar", [0, 2])
def test_one_who_lies_is_outvoted(store: LocalStore, golden: Mapping[str, bytes], liar: int) -> None:
    _, dissenters = cycle_with(store, liar)
    assert made(store) == golden
    assert dissenters == {liar}


def test_a_lie_alone_would_be_believed(store: LocalStore, golden: Mapping[str, bytes]) -> None:
    """The lie is a good one: without consensus the cycle decides by it."""
    runtime = WithLiars(store, "")
    cycle = ""

    def start(uri: str) -> WithLiars:
        nonlocal runtime, cycle
        runtime, cycle = WithLiars(store, uri), uri.rpartition("/")[2]
        runtime.liars = (0,)
        return runtime

    Controller(store, Log(store), asked(store), start).run()
    assert store.get(layout.decision(cycle)) != golden[layout.decision(cycle)]


def test_two_who_lie_of_three_leave_no_majority_and_nothing_is_committed(store: LocalStore) -> None:
    before = Log(store).tail().state.tip
    snapshot, _ = cycle_with(store, 0, 1)
    assert snapshot.end is not None
    assert (snapshot.end.kind, snapshot.end.reason) == (Kind.OUTCOME, "WorkersFailed")
    assert "no majority" in snapshot.end.message
    assert Log(store).tail().state.tip == before
    assert not [head for head in store.list("cycles/") if "/candidate/" in head.key]


def test_processes_reach_consensus_over_a_liar(store: LocalStore, tmp_path: Path, golden: Mapping[str, bytes]) -> None:
    run = tmp_path / "run"
    command = emrakul_run(tmp_path, str(run), "--workers", "3", more="    consensus: {replicas: 3}\n")
    (requests,) = appears(run, "cycles/*/requests-0.json")
    lie(store, requests.parent.name, worker=1)
    ended = command.end()
    assert (ended["exit"], ended["outcome"]) == (0, "Committed"), ended["said"]
    assert made(store) == golden
