from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from api.apiclient import CYCLES, POLICIES, Api
from api.operators import wait_for
from api.stage import Stage
from cluster.alone import api_server
from cluster.apiserver import ApiServer
from cluster.builds import COMPONENTS, built
from servers import S3Server, seaweedfs

LONGEST = ("test_idle.py", "test_thousand.py", "test_restarts.py")


def pytest_runtestloop(session: pytest.Session) -> None:
    """Builds before the first test and not in a fixture: it takes minutes, and a fixture's time is its test's."""
    if not session.config.option.collectonly:
        built(COMPONENTS)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest begin a third of the tests each: three workers get them in stretches, and start on them at once."""
    longest = [next((item for item in items if item.path.name == name), None) for name in LONGEST]
    found = [item for item in longest if item is not None]
    others = [item for item in items if item not in found]
    third = -(-len(items) // len(LONGEST))
    for number, item in enumerate(found):
        others.insert(number * third, item)
    items[:] = others


@pytest.fixture(scope="session")
def server() -> Iterator[ApiServer]:
    """One API server for all tests of a process: each test makes its own namespace."""
    with api_server() as server:
        yield server


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with seaweedfs(tmp_path_factory.mktemp("seaweedfs")) as s3:
        yield s3


@pytest.fixture(scope="session")
def api(server: ApiServer) -> Iterator[Api]:
    """An administrator's requests, once both CRDs are there."""
    api = Api(server)
    api.apply_crds()
    wait_for(lambda: api.serves(CYCLES) and api.serves(POLICIES))
    yield api
    api.close()


@pytest.fixture
def stage(server: ApiServer, api: Api, s3: S3Server, tmp_path: Path) -> Iterator[Stage]:
    """A tenant with a published run; the test begins it."""
    stage = Stage(server, api, s3, tmp_path)
    stage.publish()
    yield stage
    stage.end()


@pytest.fixture
def other(server: ApiServer, api: Api, s3: S3Server, tmp_path: Path) -> Iterator[Stage]:
    """A second tenant."""
    stage = Stage(server, api, s3, tmp_path / "other")
    stage.publish()
    yield stage
    stage.end()
