"""The same result whoever works and whoever dies: `emrakul run` and its workers as processes, killed by SIGKILL."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from pathlib import Path

import pytest

from commands import Command, appears, emrakul_run
from emrakul.settings import Settings
from leyline.local import LocalStore
from leyline.log import Log
from leyline.records import Kind
from runs import SETTINGS, asked, contents, drive, published_run

MOMENTS = (
    "log/0/3.json",  # admitted
    "cycles/*/requests-0.json",
    "cycles/*/attempts/0-*/0",
    "cycles/*/decision.json",
    "cycles/*/attempts/apply-*/0",
    "cycles/*/on-2/validation.json",
)
"""When `emrakul run` is killed: as soon as this exists. Each is later in the cycle than the one before."""
WORKERS = {
    "elesh": "cycles/*/attempts/0-*/0",
    "kasmina.apply": "cycles/*/started/apply-0",
    "urabrask": "cycles/*/started/validate-0",
}
"""When a worker is killed."""


@pytest.fixture
def run(tmp_path: Path) -> Path:
    published_run(LocalStore(tmp_path / "run"))
    return tmp_path / "run"


@pytest.fixture(scope="session")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, bytes]:
    """The run after a cycle whose workers were functions in one process."""
    store = published_run(LocalStore(tmp_path_factory.mktemp("golden") / "run"))
    drive(store, asked(store))
    return contents(store)


def assert_same(run: Path, golden: Mapping[str, bytes]) -> None:
    found = contents(LocalStore(run))
    assert sorted(found) == sorted(golden)
    assert not [key for key in found if found[key] != golden[key]]
    kinds = [record.kind for record in Log(LocalStore(run)).since(-1)]
    assert kinds.count(Kind.ADMIT) == kinds.count(Kind.PRUNE) == 1


@pytest.mark.parametrize("workers", [1, 3, 7])
def test_any_number_of_workers_gives_the_same_bytes(run: Path, golden: Mapping[str, bytes], workers: int) -> None:
    ended = emrakul_run(run.parent, str(run), "--workers", str(workers)).end()
    assert (ended["exit"], ended["outcome"]) == (0, "Committed"), ended["said"]
    assert_same(run, golden)


def test_single_weights_are_the_same_too(run: Path, tmp_path: Path) -> None:
    """In basic pruning the masks lie in answers: whose, must not matter."""
    chosen = Settings.from_yaml(SETTINGS.replace("structured_pruning:", "structured_pruning:\n  enabled: false"))
    alone = published_run(LocalStore(tmp_path / "alone"))
    drive(alone, asked(alone, chosen), workers=1)
    ended = emrakul_run(run.parent, str(run), "--workers", "3", structured=False).end()
    assert (ended["exit"], ended["outcome"]) == (0, "Committed"), ended["said"]
    assert_same(run, contents(alone))


def test_the_command_killed_at_six_moments_ends_like_one_that_never_was(run: Path, golden: Mapping[str, bytes]) -> None:
    for moment in MOMENTS:
        command = emrakul_run(run.parent, str(run), "--workers", "2")
        appears(run, moment)
        assert command.process.poll() is None, f"it had ended before {moment}"
        command.kill()
    ended = emrakul_run(run.parent, str(run)).end()
    assert (ended["exit"], ended["outcome"]) == (0, "Committed"), ended["said"]
    assert_same(run, golden)


def kill(command: Command, module: str) -> None:
    os.kill(command.worker(module), signal.SIGKILL)


def test_killed_workers_do_not_end_the_cycle(run: Path, golden: Mapping[str, bytes]) -> None:
    command = emrakul_run(run.parent, str(run), "--workers", "3")
    kill(command, "elesh")  # before it has written anything
    for module, moment in WORKERS.items():
        appears(run, moment)
        kill(command, module)
    ended = command.end()
    assert (ended["exit"], ended["outcome"]) == (0, "Committed"), ended["said"]
    assert_same(run, golden)


@pytest.mark.parametrize("asked_to_stop", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_leaves_a_run_that_the_same_command_finishes(
    run: Path, golden: Mapping[str, bytes], asked_to_stop: signal.Signals
) -> None:
    # tests that a shell runs in the background have it ignored, and so would the command
    signal.signal(signal.SIGINT, signal.default_int_handler)
    command = emrakul_run(run.parent, str(run), "--workers", "2")
    appears(run, "cycles/*/attempts/*/0")
    workers = command.workers()
    command.process.send_signal(asked_to_stop)
    stopped = command.end()
    assert stopped["exit"] == 130
    assert "the same command goes on from here" in stopped["said"]
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)
    ended = emrakul_run(run.parent, str(run)).end()
    assert (ended["exit"], ended["outcome"]) == (0, "Committed"), ended["said"]
    assert_same(run, golden)
