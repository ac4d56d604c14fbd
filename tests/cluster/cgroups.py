"""The cgroup below which all pods of the node run: where to find every process of theirs, even after a crash."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

from cluster.places import NAME
from cluster.processes import wait_until

_ROOT = Path("/sys/fs/cgroup")


def make() -> None:
    for tree in _trees():
        (tree / NAME).mkdir(exist_ok=True)


def remove() -> None:
    """Ends every process of the pods, by its id, and removes their cgroups."""
    wait_until("the pods' processes have ended", _killed, seconds=30)
    for tree in _trees():
        for folder in reversed(list(_folders(tree / NAME))):
            wait_until(f"{folder} is empty", partial(_removed, folder), seconds=10)


def _killed() -> bool:
    found = False
    for tree in _trees():
        for folder in _folders(tree / NAME):
            for pid in (folder / "cgroup.procs").read_text().split():
                found = True
                with suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
    return not found


def _removed(folder: Path) -> bool:
    try:
        folder.rmdir()
    except OSError:  # the last process is still on its way out
        return False
    return True


def _trees() -> Iterator[Path]:
    """One tree with version 2; with version 1 one for each controller."""
    if (_ROOT / "cgroup.controllers").exists():
        yield _ROOT
        return
    for tree in _ROOT.iterdir():
        if not tree.is_symlink() and (tree / "cgroup.procs").exists():
            yield tree


def _folders(top: Path) -> Iterator[Path]:
    """`top` and every folder below it, parents first."""
    if top.is_dir():
        for folder, _, _ in os.walk(top):
            yield Path(folder)
