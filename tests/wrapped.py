"""Stores around a store: one that counts, one that dies at a write, one that answers with an error."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime

from leyline.store import Data, Head, ObjectStore


class Killed(BaseException):
    """The process ended here. Not an Exception: nothing may catch it and go on."""


class Wrapped:
    """Passes everything on and counts it."""

    def __init__(self, inner: ObjectStore) -> None:
        self.inner = inner
        self.seen: Counter[str] = Counter()

    @property
    def uri(self) -> str:
        return self.inner.uri

    def _read(self, operation: str, key: str) -> None:
        self.seen[operation] += 1

    def _written(self, key: str, write: Callable[[], bool]) -> bool:
        self.seen["put"] += 1
        return write()

    def head(self, key: str) -> Head:
        self._read("head", key)
        return self.inner.head(key)

    def get(self, key: str) -> bytes:
        self._read("get", key)
        return self.inner.get(key)

    def get_range(self, key: str, start: int, stop: int, *, pin: str | None = None) -> bytes:
        self._read("get_range", key)
        return self.inner.get_range(key, start, stop, pin=pin)

    def put_if_absent(self, key: str, data: Data) -> bool:
        return self._written(key, lambda: self.inner.put_if_absent(key, data))

    def put_stream(self, key: str, chunks: Iterable[Data], *, size: int) -> bool:
        return self._written(key, lambda: self.inner.put_stream(key, chunks, size=size))

    def list(self, prefix: str, *, after: str = "") -> Iterator[Head]:
        return self.inner.list(prefix, after=after)

    def delete(self, key: str) -> None:
        self.inner.delete(key)

    def now(self) -> datetime:
        return self.inner.now()


class Mortal(Wrapped):
    """Killed at the k-th write (1, 2, …), just before or just after it takes effect; 0: never."""

    def __init__(self, inner: ObjectStore, *, at: int, before: bool) -> None:
        super().__init__(inner)
        self._at, self._before = at, before

    def _written(self, key: str, write: Callable[[], bool]) -> bool:
        self.seen["put"] += 1
        last = self.seen["put"] == self._at
        if last and self._before:
            raise Killed
        try:
            return write()
        finally:
            if last:
                raise Killed


class Failing(Wrapped):
    """Reads of keys that begin with `prefix` end in `error`; so do writes where `writes`. Done `times` times."""

    def __init__(
        self, inner: ObjectStore, error: Exception, *, prefix: str = "", writes: bool = False, times: int = 10**9
    ) -> None:
        super().__init__(inner)
        self._error, self._prefix, self._writes, self.times = error, prefix, writes, times

    def _fail(self, key: str) -> None:
        if key.startswith(self._prefix) and self.times > 0:
            self.times -= 1
            raise self._error

    def _read(self, operation: str, key: str) -> None:
        super()._read(operation, key)
        if not self._writes:
            self._fail(key)

    def _written(self, key: str, write: Callable[[], bool]) -> bool:
        if not self._writes:
            return super()._written(key, write)
        made = super()._written(key, write)  # the work is done, and its answer is lost
        self._fail(key)
        return made
