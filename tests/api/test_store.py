"""The run's store goes away under the operator, hangs, or is put back to an older copy, wherever its cycle stands."""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from api.apiclient import POLICIES, Api, Body
from api.operators import wait_for
from api.stage import SETTINGS, Stage, condition
from cluster.apiserver import ApiServer
from leyline import layout
from leyline.records import Kind
from servers import S3Server, free_ports, seaweedfs

PHASES = ("analyse", "apply", "validate")


class Store:
    """A server that comes back on its own ports, with its own data."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._ports = folder, free_ports(10)
        self._running = ExitStack()

    def start(self) -> S3Server:
        self.server = self._running.enter_context(seaweedfs(self._folder, numbers=self._ports))
        return self.server

    def stop(self) -> None:
        self._running.close()

    def hang(self) -> None:
        """It takes every connection and answers none."""
        os.kill(self.server.pid, signal.SIGSTOP)

    def go_on(self) -> None:
        os.kill(self.server.pid, signal.SIGCONT)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    found = Store(tmp_path / "store")
    found.start()
    yield found
    found.stop()


@pytest.fixture
def own(server: ApiServer, api: Api, store: Store, tmp_path: Path) -> Iterator[Stage]:
    """A tenant whose store is nobody else's: while it does not answer, none does."""
    stage = Stage(server, api, store.server, tmp_path)
    stage.publish()
    yield stage
    stage.end()


def held(phase: str) -> Callable[[Body], bool]:
    return lambda job: job["metadata"]["labels"]["emrakul.dev/phase"] == phase


def becomes_ready(stage: Stage, *, seconds: float = 100.0) -> None:
    lives(stage, lambda: stage.operator.health("readyz") == "ok\n", seconds=seconds)


def becomes_unready(stage: Stage, *, seconds: float = 60.0) -> None:
    said = lives(
        stage, lambda: (text := stage.operator.health("readyz") or "").startswith("no store") and text, seconds=seconds
    )
    assert f"the store at {stage.s3.endpoint} does not answer" in said, said


def lives(stage: Stage, found: Callable[[], object], *, seconds: float) -> str:
    """What it found, with a process that was alive all the time."""

    def look() -> object:
        assert stage.operator.process is not None and stage.operator.process.poll() is None
        assert stage.operator.health("healthz") == "ok\n"
        return found()

    return str(wait_for(look, seconds=seconds, told=lambda: [stage.operator.health(), stage.status()]))


def ready(stage: Stage) -> Body:
    """The policy's condition."""
    return condition(stage.status("digits", kind=POLICIES), "Ready")


def names_its_store(stage: Stage, message: str) -> bool:
    return f"the store at {stage.s3.endpoint} does not answer" in message


def commits_once(stage: Stage, name: str | None = None) -> None:
    stage.reached("Committed", name, seconds=120)
    records = Counter(record.kind for record in stage.records())
    assert (records[Kind.ADMIT], records[Kind.PRUNE], records[Kind.OUTCOME]) == (1, 1, 0)
    made = Counter(name for name, _ in stage.jobs.made)
    assert len(made) == len(PHASES) and set(made.values()) == {1}, made
    assert stage.operator.starts == 1
    assert stage.errors() == []
    assert stage.jobs.trouble == []


def test_a_store_that_is_away_before_a_cycle_begins(own: Stage, store: Store) -> None:
    """Nothing of the run was ever read: only its name is known."""
    checkpoint = own.checkpoint
    store.stop()
    own.begin(defaults={"store": own.store_spec, "settings": SETTINGS})
    own.apply("PruningCycle", "by-hand", {"checkpoint": checkpoint})
    becomes_unready(own)
    status = own.reached("Waiting", "by-hand")
    assert names_its_store(own, status["message"]), status

    store.start()
    becomes_ready(own)
    commits_once(own, "by-hand")
    assert own.operator.health()["store"]["failing"] == 0


@pytest.mark.timeout(600)
def test_a_store_that_goes_away_in_each_phase(own: Stage, store: Store) -> None:
    own.jobs.hold = held("analyse")
    own.begin()
    own.policy()
    for phase, then in zip(PHASES, [*PHASES[1:], "none"], strict=True):
        own.launched(phase)
        store.stop()
        becomes_unready(own)
        assert names_its_store(own, own.reached("Waiting")["message"])
        if phase == PHASES[0]:  # one looks at the run's log at a time: the policy has its turn after the cycle
            lives(own, lambda: ready(own)["reason"] == "StoreUnreachable", seconds=90)
            assert names_its_store(own, ready(own)["message"])
        store.start()
        becomes_ready(own)
        own.jobs.hold = held(then)
    commits_once(own)
    own.wait(lambda: ready(own)["status"] == "True", seconds=90)


@pytest.mark.timeout(400)
def test_a_store_that_hangs(own: Stage, store: Store) -> None:
    own.jobs.hold = held("apply")
    own.begin()
    own.policy()
    own.launched("apply")
    store.hang()
    try:
        becomes_unready(own, seconds=90)
        assert names_its_store(own, own.reached("Waiting", seconds=90)["message"])
    finally:
        store.go_on()
    becomes_ready(own)
    own.jobs.hold = held("none")
    commits_once(own)


@pytest.mark.timeout(400)
def test_an_older_copy_of_the_log_stops_everything_until_it_is_put_back(own: Stage) -> None:
    """Its newest record alone is gone: nothing but what was seen before says that there was one."""
    own.jobs.hold = held("validate")
    own.begin()
    own.policy()
    own.launched("validate")
    own.trains_on(200)
    newest = own.records()[-1].n
    own.wait(lambda: own.status("digits", kind=POLICIES)["seen"]["record"] == newest)
    key = layout.record(newest)
    record = own.store.get(key)
    own.store.delete(key)
    own.jobs.hold = held("none")

    def stopped() -> bool:
        return own.status(first)["state"] == ready(own)["reason"] == "StoreReverted"

    (first,) = [one["metadata"]["name"] for one in own.cycles()]
    lives(own, stopped, seconds=90)
    assert f"record {newest} was seen before and is gone" in own.status(first)["message"]
    assert own.operator.health("readyz") == "ok\n", "the store answers"
    assert 'emrakul_store_errors_total{kind="reverted"} 0.0' not in own.operator.health("metrics")

    # a new process knows it from the statuses alone
    own.operator.kill()
    own.operator.start()
    own.wait(lambda: 'emrakul_store_errors_total{kind="reverted"} 0.0' not in (own.operator.health("metrics") or ""))
    assert stopped()
    assert own.records()[-1].n == newest - 1, "nothing was appended"

    own.store.put_if_absent(key, record)
    own.reached("Committed", first, seconds=150)
    assert own.store.get(key) == record
    assert own.errors() == []
