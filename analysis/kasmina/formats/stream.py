"""Checked bytes of a checkpoint: an object once, from front to back, or ranges of several in any order."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock

from leyline.digest import ObjectDigest, verified_range
from leyline.store import CHUNK, ObjectStore


def stream(
    store: ObjectStore, key: str, digest: ObjectDigest, *, pin: str | None = None, ahead: int = 2
) -> Iterator[bytes]:
    """The chunks of the object in order; `ahead` of them are being read and checked while one is in use.

    At most ahead + 1 chunks are held. Damaged if a chunk is not what `digest` says, Changed if the object is not the
    pinned one.
    """
    ranges = [(start, min(start + CHUNK, digest.size)) for start in range(0, digest.size, CHUNK)]
    if ahead < 1:
        for start, stop in ranges:
            yield verified_range(store, key, digest, start, stop, pin)
        return
    with ThreadPoolExecutor(ahead) as pool:
        waiting: deque[Future[bytes]] = deque()
        try:
            for start, stop in ranges:
                waiting.append(pool.submit(verified_range, store, key, digest, start, stop, pin))
                if len(waiting) > ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:  # the reader may stop early; what was not begun is not read
            for future in waiting:
                future.cancel()


class Chunks:
    """Checked ranges of a checkpoint's objects. The last `keep` chunks are held, so that neighbours share a read."""

    def __init__(
        self,
        store: ObjectStore,
        prefix: str,
        digests: Mapping[str, ObjectDigest],
        pins: Mapping[str, str],
        *,
        keep: int = 4,
    ) -> None:
        self._store, self._prefix, self._digests, self._pins, self._keep = store, prefix, digests, pins, keep
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
            while len(self._held) > self._keep:
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
