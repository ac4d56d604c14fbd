"""Checked bytes of a checkpoint: an object once, from front to back, or ranges of several in any order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock
from typing import TypeVar

from leyline.digest import ObjectDigest, verified_range
from leyline.store import CHUNK, ObjectStore

T = TypeVar("T")


def stream(
    store: ObjectStore,
    key: str,
    digest: ObjectDigest,
    *,
    pin: str | None = None,
    ahead: int = 2,
    numbers: Sequence[int] | None = None,
) -> Iterator[bytes]:
    """The chunks of the object in order, or those of `numbers`; `ahead` of them are read and checked while one is used.

    At most ahead + 1 chunks are held. Damaged if a chunk is not what `digest` says, Changed if the object is not the
    pinned one.
    """
    wanted = range(len(digest.chunks)) if numbers is None else numbers

    def read(number: int) -> bytes:
        return verified_range(store, key, digest, number * CHUNK, min((number + 1) * CHUNK, digest.size), pin)

    return in_order(read, wanted, ahead=ahead)


def in_order(work: Callable[[int], T], numbers: Iterable[int], *, ahead: int) -> Iterator[T]:
    """`work` of each number, in order; that of the next `ahead` is done in threads while one is in use."""
    if ahead < 1:
        yield from map(work, numbers)
        return
    with ThreadPoolExecutor(ahead) as pool:
        waiting: deque[Future[T]] = deque()
        try:
            for number in numbers:
                waiting.append(pool.submit(work, number))
                if len(waiting) > ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:  # the reader may stop early; what was not begun is not read
            for future in waiting:
                future.cancel()


_KEPT = 4
"""Chunks that are held at least."""


class Chunks:
    """Checked ranges of a checkpoint's objects. Of each object a chunk is held, so that neighbours share a read.

    `most`: chunks that may be held; what lies in pieces in more objects than that is read again and again.
    """

    def __init__(
        self,
        store: ObjectStore,
        prefix: str,
        digests: Mapping[str, ObjectDigest],
        pins: Mapping[str, str],
        *,
        most: int = 32,
    ) -> None:
        self._store, self._prefix, self._digests, self._pins = store, prefix, digests, pins
        self.keep = max(_KEPT, min(len(digests), most))
        """Chunks that are held."""
        self._held: dict[tuple[str, int], Future[bytes]] = {}
        self._lock = Lock()

    def read(self, path: str, start: int, stop: int) -> bytes | memoryview:
        """Bytes [start, stop) of the object. Raises Damaged, Changed and what the store raises."""
        pieces = [
            memoryview(self._chunk(path, number))[max(start - number * CHUNK, 0) : stop - number * CHUNK]
            for number in range(start // CHUNK, -(-stop // CHUNK))
        ]
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _chunk(self, path: str, number: int) -> bytes:
        with self._lock:  # who comes second waits for the first instead of reading it again
            found = self._held.pop((path, number), None)
            future = found or Future()
            self._held[path, number] = future
            while len(self._held) > self.keep:
                del self._held[next(iter(self._held))]
        if found is None:
            digest = self._digests[path]
            stop = min((number + 1) * CHUNK, digest.size)
            try:
                pin = self._pins.get(path)
                future.set_result(verified_range(self._store, self._prefix + path, digest, number * CHUNK, stop, pin))
            except BaseException as error:
                future.set_exception(error)
                with self._lock:
                    self._held.pop((path, number), None)
        return future.result()
