"""An object's bytes once, from front to back, each chunk checked in passing."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from leyline.digest import ObjectDigest, verified_range
from leyline.store import CHUNK, ObjectStore


def stream(
    store: ObjectStore,
    key: str,
    digest: ObjectDigest,
    *,
    pin: str | None = None,
    ahead: int = 2,
    numbers: Sequence[int] | None = None,
) -> Iterator[bytes]:
    """The chunks of the object in order, or those of `numbers`; `ahead` of them are being read and checked while one
    is in use.

    At most ahead + 1 chunks are held. Damaged if a chunk is not what `digest` says, Changed if the object is not the
    pinned one.
    """
    wanted = range(len(digest.chunks)) if numbers is None else numbers
    ranges = [(number * CHUNK, min((number + 1) * CHUNK, digest.size)) for number in wanted]
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
