"""The operator is killed before and after each of its writes to the API: nobody can tell from what becomes of it.

A run without a fault says how many writes a story has; then the story is told again for each of them, once with the
write never sent, and once with its answer lost. Several are told at the same time, each in a namespace of its own.
"""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from api.apiclient import CYCLES, JOBS, POLICIES, Api, Body
from api.history import History
from api.operators import wait_for
from api.proxy import Proxy, proxy
from api.stage import SETTINGS, Stage
from cluster.apiserver import ApiServer
from servers import S3Server

AT_ONCE = 4
POINTS = 50
POINT_SECONDS = 8 * 60 / POINTS
"""What a point may take on a machine of two cores that has nothing else to do."""
BESIDE = 2.0
"""Times as much, since other tests run beside it."""


@dataclass(frozen=True)
class Place:
    """Where stories are told."""

    server: ApiServer
    api: Api
    s3: S3Server
    folder: Path


@dataclass(frozen=True)
class Told:
    """What became of a story."""

    end: object
    """Every object's status and the run's records, without what differs from run to run."""
    made: dict[str, int]
    events: list[str]
    faults: list[str]
    """What must never be."""
    writes: int
    at: str
    """The write at which the operator was killed; "" if it was not."""


Story = Callable[[Stage], None]


def commits(stage: Stage) -> None:
    stage.policy()
    ends(stage, "Committed")


def is_refused(stage: Stage) -> None:
    """A margin that no validation can prove: the candidate is written and thrown away."""
    constraints = {"accuracyDropThreshold": "0.0001"}
    structured = {**SETTINGS["structuredPruning"], "safetyConstraints": constraints}
    stage.policy(settings={**SETTINGS, "structuredPruning": structured})
    ends(stage, "RolledBack")


def is_suspended(stage: Stage) -> None:
    stage.jobs.hold = lambda job: job["metadata"]["labels"]["emrakul.dev/phase"] == "apply"
    stage.policy()
    wait_for(lambda: [one for one in jobs(stage) if "-w" in one])
    (name,) = [one["metadata"]["name"] for one in stage.cycles()]
    stage.change(CYCLES, name, suspend=True)
    stage.reached("Suspended")
    wait_for(lambda: not [one for one in jobs(stage) if "-w" in one])
    stage.jobs.hold = lambda _: False
    stage.change(CYCLES, name, suspend=False)
    ends(stage, "Committed")


def is_rolled_back(stage: Stage) -> None:
    commits(stage)
    stage.change(POLICIES, "digits", rollback={"id": "oops"})
    wait_for(lambda: stage.status("digits", kind=POLICIES).get("rollback", {}).get("record"))
    wait_for(lambda: stage.status().get("rollback") and not jobs(stage), seconds=90)


def ends(stage: Stage, outcome: str) -> None:
    """With everything cleaned up and told."""
    stage.reached(outcome, seconds=90)
    wait_for(lambda: not jobs(stage))
    wait_for(lambda: stage.status("digits", kind=POLICIES).get("cycles"))


def jobs(stage: Stage) -> list[str]:
    return [one["metadata"]["name"] for one in stage.api.list(JOBS, stage.namespace)]


@contextmanager
def staged(place: Place, name: str) -> Iterator[tuple[Stage, Proxy]]:
    stage = Stage(place.server, place.api, place.s3, place.folder / name)
    stage.folder.mkdir()
    with proxy(place.server, stage.folder) as between:
        stage.kubeconfig = between.kubeconfig
        stage.publish()
        try:
            stage.begin()
            yield stage, between
        finally:
            stage.end(told=False)


def tell(place: Place, story: Story, *, write: int = 0, lost: bool = False) -> Told:
    with staged(place, f"{story.__name__}-{write}-{lost}") as (stage, between):
        history = History(place.api, stage.namespace)
        stage.operator.kept()
        fault = between.break_at(write, lost=lost, then=stage.operator.process.kill)
        faults = []
        try:
            story(stage)
        except AssertionError as error:
            faults.append(f"{str(error)[:2000]} {stage.operator.log.read_text()[-2000:]}")
        faults += [*stage.errors(), *(str(one) for one in stage.jobs.trouble)]
        faults += [f"{name} went {' '.join(values)}" for name, values in history.flapping().items()]
        writes = between.writes
        events = sorted(f"{one['reason']}: {one['message']}" for one in stage.events())
        return Told(masked(stage), dict(history.made), events, faults, writes, fault.at)


def masked(stage: Stage) -> object:
    """What must be the same, whoever was killed when."""
    found = {
        "cycles": [one["status"] for one in stage.cycles()],
        "policies": [one["status"] for one in stage.api.list(POLICIES, stage.namespace)],
        "jobs": jobs(stage),
        "records": [(record.kind, record.id, record.reason, record.message) for record in stage.records()],
    }
    text = json.dumps(found, sort_keys=True, default=str).replace(stage.namespace, "NAMESPACE")
    text = re.sub(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", "TIME", text)
    masked: Body = json.loads(text)
    for status in (*masked["cycles"], *masked["policies"]):
        for name in ("timings", "rates"):  # by the store's clock
            status.pop(name, None)
        (status.get("seen") or {}).pop("digest", None)  # of records with times in them
    return masked


@pytest.fixture(scope="module")
def place(server: ApiServer, api: Api, s3: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(server, api, s3, tmp_path_factory.mktemp("restarts"))


@pytest.mark.timeout(1500)
def test_nobody_can_tell_where_it_was_killed(place: Place) -> None:
    golden = {story: tell(place, story) for story in (commits, is_refused, is_suspended, is_rolled_back)}
    for story, once in golden.items():
        assert once.faults == [], story.__name__
        if story is not is_suspended:  # a Job that no worker began on is made again under its name
            assert set(once.made.values()) == {1}, story.__name__
    points = [
        (story, write, lost)
        for story, once in golden.items()
        # the others begin as the first one does: of them, some
        for write in range(once.writes, 0, -1 if story is commits else -8)
        for lost in (False, True)
    ]
    began = time.monotonic()
    with ThreadPoolExecutor(AT_ONCE) as threads:
        told = list(threads.map(lambda point: tell(place, point[0], write=point[1], lost=point[2]), points))
    point = (time.monotonic() - began) / len(points)
    killed = sum(bool(one.at) for one in told)
    writes = ", ".join(f"{story.__name__} {once.writes}" for story, once in golden.items())
    print(f"writes of a story: {writes}; killed at {killed} points, {point:.1f} s each")
    wrong = []
    for (story, write, lost), one in zip(points, told, strict=True):
        whole = golden[story]
        faults = [*one.faults, *differences(one.end, whole.end), *differences(one.made, whole.made)]
        # an event follows the status, and nobody waits for it: it may be lost, and is never told twice
        faults += [f"event {event}" for event in (Counter(one.events) - Counter(whole.events)).elements()]
        if faults:
            wrong.append(f"{story.__name__}, write {write} ({one.at}), {'its answer lost' if lost else 'not sent'}:")
            wrong += faults
    assert not wrong, "\n".join(wrong)
    assert killed >= POINTS
    assert point <= BESIDE * POINT_SECONDS, f"{point:.1f} s a point"


def differences(found: object, golden: object) -> list[str]:
    a, b = (json.dumps(one, indent=1, sort_keys=True).splitlines() for one in (found, golden))
    return [line for line in a if line not in b] + [f"missing: {line}" for line in b if line not in a]
