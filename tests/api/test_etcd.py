"""The cluster's own data goes back in time, in the middle of a cycle. The run's store does not: it is right."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from api.apiclient import CYCLES, POLICIES, Api, Body
from api.operators import wait_for
from api.stage import Stage
from cluster.alone import api_server
from servers import S3Server

EQUAL_SECONDS = 60.0


@pytest.fixture
def own(s3: S3Server, tmp_path: Path) -> Iterator[Stage]:
    """On an API server of its own, which may lose what it knows."""
    with api_server() as server:
        api = Api(server)
        api.apply_crds()
        wait_for(lambda: api.serves(CYCLES) and api.serves(POLICIES))
        stage = Stage(server, api, s3, tmp_path)
        stage.publish()
        yield stage
        stage.end()
        api.close()


def older_than_the_store(stage: Stage, folder: Path) -> Path:
    """The cycle has committed since this snapshot."""
    stage.jobs.hold = lambda job: job["metadata"]["labels"]["emrakul.dev/phase"] == "validate"
    stage.begin()
    stage.policy()
    stage.launched("validate")
    snapshot = stage.server.snapshot(folder / "etcd.db")
    stage.jobs.hold = lambda _: False
    stage.reached("Committed")
    for number in range(30):  # more than are made between the restore and the operator's next look
        stage.api.create("api/v1/{}configmaps", stage.namespace, {"metadata": {"name": f"after-{number}"}})
    return snapshot


def equal(stage: Stage) -> bool:
    """Whether status says what the log says, in the cycle and in the policy."""
    try:
        cycle: Body = stage.status()
        policy = stage.status("digits", kind=POLICIES)
    except OSError:
        return False
    last = stage.records()[-1]
    return (
        cycle.get("outcome") == "Committed"
        and cycle["record"] == last.n
        and cycle["masks"]["digest"] == last.masks.digest
        and policy["tip"]["record"] == last.n
    )


def test_a_restore_as_etcd_advises_it_is_made_good_within_a_minute(own: Stage, tmp_path: Path) -> None:
    snapshot = older_than_the_store(own, tmp_path)
    records = len(own.records())
    own.operator.kept()
    own.server.restore(snapshot, bump_revision=1_000_000)
    began = time.monotonic()
    wait_for(lambda: equal(own), seconds=EQUAL_SECONDS)
    print(f"equal after {time.monotonic() - began:.1f} s; the operator was started {own.operator.starts} times")
    assert len(own.records()) == records


@pytest.mark.timeout(400)
def test_resource_versions_that_are_handed_out_twice_end_the_operator(own: Stage, tmp_path: Path) -> None:
    """A plain restore: what the watch waits for was told already, with other contents."""
    snapshot = older_than_the_store(own, tmp_path)
    records = len(own.records())
    own.server.restore(snapshot)
    code = wait_for(lambda: own.operator.process.poll(), seconds=150)
    assert code != 0
    said = own.operator.log.read_text()
    assert "went back" in said, said[-2000:]
    own.operator.start()
    wait_for(lambda: equal(own), seconds=EQUAL_SECONDS)
    assert len(own.records()) == records
