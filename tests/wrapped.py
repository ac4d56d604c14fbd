"""Stores around a store: one that counts, one that dies at a write, one that answers with an error."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime

from leyline.store import Data, Exists, Head, NotFound, ObjectStore


class Killed(BaseException):
    """The process ended here. Not an Exception: nothing may catch it and go on."""


class Memory:
    """A store in a dictionary, for simulations of thousands of writes."""

    uri = "memory://run"

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}

    def head(self, key: str) -> Head:
        return Head(key=key, size=len(self.get(key)), pin=key, modified=self.now())

    def get(self, key: str) -> bytes:
        if key not in self.objects:
            raise NotFound(f"{key} does not exist")
        return self.objects[key]

    def get_range(self, key: str, start: int, stop: int, *, pin: str | None = None) -> bytes:
        return self.get(key)[start:stop]

    def put_if_absent(self, key: str, data: Data) -> bool:
        made = key not in self.objects
        if self.objects.setdefault(key, bytes(data)) != data:
            raise Exists(f"{key} exists with other content")
        return made

    def put_stream(self, key: str, chunks: Iterable[Data], *, size: int, digests: Sequence[str] | None = None) -> bool:
        return self.put_if_absent(key, b"".join(chunks))

    def list(self, prefix: str, *, after: str = "") -> Iterator[Head]:
        return (self.head(key) for key in sorted(self.objects) if key.startswith(prefix) and key > after)

    def delete(self, key: str) -> None:
        self.objects.pop(key, None)

    def now(self) -> datetime:
        return datetime.fromtimestamp(0, UTC)

    def where(self, key: str) -> str:
        return key


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

    def put_stream(self, key: str, chunks: Iterable[Data], *, size: int, digests: Sequence[str] | None = None) -> bool:
        return self._written(key, lambda: self.inner.put_stream(key, chunks, size=size, digests=digests))

    def list(self, prefix: str, *, after: str = "") -> Iterator[Head]:
        return self.inner.list(prefix, after=after)

    def delete(self, key: str) -> None:
        self.inner.delete(key)

    def now(self) -> datetime:
        return self.inner.now()

    def where(self, key: str) -> str:
        return self.inner.where(key)


class Mortal(Wrapped):
    """Killed at the k-th write (1, 2, …), just before or just after it takes effect; 0: never."""

    def __init__(self, inner: ObjectStore, *, at: int, before: bool) -> None:
        super().__init__(inner)
        self.arm(at, before=before)

    def arm(self, at: int, *, before: bool) -> None:
        """Count writes from here."""
        self.seen.clear()
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
