"""A hard limit on the memory of a process: a cgroup of its own where one can be made, else RLIMIT_DATA."""

from __future__ import annotations

import resource
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_ROOT = Path("/sys/fs/cgroup")


@contextmanager
def memory_limit(size: int) -> Iterator[Callable[[], None]]:
    """A `preexec_fn` for one process that the kernel ends, or refuses more memory, beyond `size` bytes."""
    folder = _cgroup(size)
    if folder is None:
        yield lambda: resource.setrlimit(resource.RLIMIT_DATA, (size, size))
        return
    try:
        yield lambda: (folder / "cgroup.procs").write_text("0") and None
    finally:
        with suppress(OSError):
            folder.rmdir()


def _cgroup(size: int) -> Path | None:
    """The folder of a new cgroup with this limit; None where this machine lets us make none."""
    for line in Path("/proc/self/cgroup").read_text(encoding="ascii").splitlines():
        _, controllers, path = line.split(":", 2)
        old = controllers == "memory"
        if not old and controllers:
            continue
        folder = (_ROOT / "memory" if old else _ROOT) / path.lstrip("/") / f"emrakul-{uuid.uuid4().hex}"
        with suppress(OSError):
            folder.mkdir()
            with suppress(OSError):
                # no swap to hide in, where the kernel counts it
                limits = {"memory.limit_in_bytes": size} if old else {"memory.max": size, "memory.swap.max": 0}
                for name, value in limits.items():
                    (folder / name).write_text(str(value))
                return folder
            folder.rmdir()
    return None


def held(pid: int) -> int:
    """Bytes that a running process of ours held at most; 0 once it is gone."""
    with suppress(OSError, StopIteration):
        lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace").splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) * 1024
    return 0
