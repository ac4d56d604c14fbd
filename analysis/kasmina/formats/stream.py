"""An object's bytes once, from front to back, each chunk checked in passing."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

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
