"""Whatever write of a cycle is the last one of a process, the next process ends where nobody would have died."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from functools import cache
from itertools import count
from pathlib import Path

import pytest

from emrakul.settings import Settings
from leyline.local import LocalStore
from leyline.log import Log
from leyline.records import Kind
from leyline.s3 import S3Store
from leyline.store import ObjectStore
from runs import asked, contents, drive, published_run, settings
from servers import S3Server, seaweedfs
from wrapped import Killed, Mortal, Wrapped

STRUCTURED = settings()
BASIC = Settings.from_yaml(
    "{enable_checkpoint_pruning: true, conservative_threshold: 0.01, structured_pruning: {enabled: false,"
    " progressive_schedule: {phase_1_epochs: 1, phase_2_start_epoch: 2}}}"
)
WRITES = 30
"""A whole cycle makes at least so many: fewer would mean that the loops below ended too early."""
EACH = 7
"""Of basic pruning's writes (three rounds of requests) only each so-manyth, to save time."""

New = Callable[[], ObjectStore]


@pytest.fixture(scope="session")
def seaweed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with seaweedfs(tmp_path_factory.mktemp("seaweed")) as server:
        yield server


@pytest.fixture
def local(tmp_path: Path) -> New:
    return lambda: LocalStore(tmp_path / uuid.uuid4().hex)


@pytest.fixture
def s3(seaweed: S3Server, monkeypatch: pytest.MonkeyPatch) -> New:
    for name, value in seaweed.environment.items():
        monkeypatch.setenv(name, value)
    return lambda: S3Store(seaweed.bucket, f"run-{uuid.uuid4().hex}", deadline=10)


@cache
def golden(chosen: Settings, masked: bool) -> tuple[dict[str, bytes], int]:
    """The run after a cycle that nothing disturbed, and the number of its writes."""
    store = Wrapped(published_run(LocalStore(GOLDEN / uuid.uuid4().hex), masked=masked))
    end = drive(store, asked(store, chosen)).end
    assert end is not None and end.kind is Kind.PRUNE
    return contents(store), store.seen["put"]


@pytest.fixture(scope="session", autouse=True)
def _golden_folder(tmp_path_factory: pytest.TempPathFactory) -> None:
    global GOLDEN
    GOLDEN = tmp_path_factory.mktemp("golden")


def killed_and_resumed(new: New, chosen: Settings, k: int, *, before: bool, masked: bool) -> bool:
    """Whether there was a k-th write to be killed at; all that must hold afterwards is asserted."""
    store = published_run(new(), masked=masked)
    ask = asked(store, chosen)
    mortal = Mortal(store, at=k, before=before)
    try:
        drive(mortal, ask)
    except Killed:
        pass
    else:
        return False
    stood = {head.key: (head.pin, head.modified) for head in store.list("")}

    drive(store, ask)

    found, wanted = contents(store), golden(chosen, masked)[0]
    where = f"killed {'before' if before else 'after'} write {k}"
    assert found.keys() == wanted.keys(), f"{where}: {sorted(found.keys() ^ wanted.keys())}"
    assert not [key for key in found if found[key] != wanted[key]], where
    now = {head.key: (head.pin, head.modified) for head in store.list("")}
    assert {key: now.get(key) for key in stood} == stood, f"{where}: what stood was written again"
    records = [(record.kind, record.id) for record in Log(store).since(-1)]
    assert len(records) == len(set(records)), where
    return True


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
def test_every_write_may_be_the_last_of_a_process(local: New, before: bool) -> None:
    done = next(k for k in count(1) if not killed_and_resumed(local, STRUCTURED, k, before=before, masked=True)) - 1
    assert done == golden(STRUCTURED, True)[1] >= WRITES


def test_every_write_may_be_the_last_on_s3(s3: New) -> None:
    """Killed after each: a process that dies before write k+1 leaves what one leaves that dies after write k."""
    done = next(k for k in count(1) if not killed_and_resumed(s3, STRUCTURED, k, before=False, masked=False)) - 1
    assert done == golden(STRUCTURED, False)[1] >= WRITES


@pytest.mark.parametrize("new", ["local", "s3"])
def test_basic_pruning_too(request: pytest.FixtureRequest, new: str) -> None:
    for k in range(1, golden(BASIC, False)[1] + 1, EACH):
        assert killed_and_resumed(request.getfixturevalue(new), BASIC, k, before=False, masked=False)
