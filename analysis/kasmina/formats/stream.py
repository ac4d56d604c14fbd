"""An object's bytes once, from front to back, each chunk checked in passing."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
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
    """The chunks of the object in order, or those of `numbers`; `ahead` of them are being read and checked while one
    is in use.

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
