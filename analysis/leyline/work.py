"""What a piece of work took: bytes, parameters, seconds, memory. It lies outside every digest, key and decision."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from threading import Lock
from typing import Any, cast

from pydantic import Field

from leyline.model import Value
from leyline.store import ObjectStore


class Work(Value):
    """One worker's, of one task; or the sum over many."""

    seconds: float = Field(default=0.0, ge=0)
    """Of one worker: those of several are added up."""
    bytes_read: int = Field(default=0, ge=0)
    """Asked of the store; what was read twice counts twice."""
    parameters: int = Field(default=0, ge=0)
    """Weights that were looked at, or copied."""
    peak_rss: int = Field(default=0, ge=0)
    """Bytes of memory that the process had held at most by then."""


def add_up(parts: Iterable[Work]) -> Work:
    """The sum; of memory the largest."""
    found = list(parts)
    return Work(
        seconds=sum(part.seconds for part in found),
        bytes_read=sum(part.bytes_read for part in found),
        parameters=sum(part.parameters for part in found),
        peak_rss=max((part.peak_rss for part in found), default=0),
    )


class Meter:
    """Measures work that reads from a store through it."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store
        self._lock = Lock()
        self._begun = time.monotonic()
        self.bytes_read = 0

    @property
    def store(self) -> ObjectStore:
        """The store that counts."""
        return cast(ObjectStore, self)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def get_range(self, key: str, start: int, stop: int, *, pin: str | None = None) -> bytes:
        data = self._store.get_range(key, start, stop, pin=pin)
        with self._lock:  # two ranges are in flight
            self.bytes_read += len(data)
        return data

    def done(self, *, parameters: int) -> Work:
        """What it took so far."""
        seconds = round(time.monotonic() - self._begun, 6)
        return Work(seconds=seconds, bytes_read=self.bytes_read, parameters=parameters, peak_rss=peak_rss())


def peak_rss() -> int:
    """Bytes of memory that this process held at most.

    From VmHWM where there is /proc: ru_maxrss of a child begins at what its parent held when it was started.
    """
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
