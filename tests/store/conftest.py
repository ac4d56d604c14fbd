from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from faults import Faults
from leyline.local import LocalStore
from leyline.s3 import S3Store
from leyline.store import ObjectStore
from servers import S3Server, seaweedfs


@pytest.fixture(scope="session")
def seaweed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with seaweedfs(tmp_path_factory.mktemp("seaweed")) as server:
        yield server


@pytest.fixture
def s3(seaweed: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Store:
    for name, value in seaweed.environment.items():
        monkeypatch.setenv(name, value)
    return S3Store(seaweed.bucket, f"run-{uuid.uuid4().hex}", deadline=10)


@pytest.fixture
def local(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "run")


@pytest.fixture(params=["local", "s3"])
def store(request: pytest.FixtureRequest) -> ObjectStore:
    return request.getfixturevalue(request.param)


@pytest.fixture
def faults(s3: S3Store) -> Iterator[Faults]:
    faults = Faults(s3)
    yield faults
    faults.remove()
