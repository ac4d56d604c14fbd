"""Ranges of checkpoint objects as checked bytes, read ahead while others are scored.

Objects are read in whole chunks, because only a whole chunk can be checked; what spans two is stitched together.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, Protocol

from kasmina.formats import Chunks, TensorRef, gather
from leyline.digest import ObjectDigest, verified_range
from leyline.store import CHUNK, ObjectStore

AHEAD = 2
"""Chunks in flight: more made all workers of a machine slower, not faster."""


class Source(Protocol):
    """An object's plain bytes."""

    @property
    def size(self) -> int: ...

    def read(self, start: int, stop: int) -> bytes:
        """Bytes [start, stop), checked. Raises Damaged, Changed and what the store raises."""
        ...


class PlainObject:
    """An object that is stored as it is, checked against its digest."""

    def __init__(self, store: ObjectStore, key: str, digest: ObjectDigest, *, pin: str | None = None) -> None:
        self._store, self._key, self._digest, self._pin = store, key, digest, pin

    @property
    def size(self) -> int:
        return self._digest.size

    def read(self, start: int, stop: int) -> bytes:
        return verified_range(self._store, self._key, self._digest, start, stop, self._pin)


class GatheredTensor:
    """A tensor that does not lie in one piece, as if it did."""

    def __init__(self, ref: TensorRef, chunks: Chunks) -> None:
        self._ref, self._chunks = ref, chunks

    @property
    def size(self) -> int:
        return self._ref.nbytes

    def read(self, start: int, stop: int) -> bytes:
        width = self._ref.boxes[0].itemsize
        return gather(self._ref, start // width, stop // width, self._chunks.read)


class Extent(NamedTuple):
    """Bytes [start, stop) of an object."""

    source: Source
    start: int
    stop: int

    @property
    def chunks(self) -> range:
        """Numbers of the chunks it touches."""
        return range(self.start // CHUNK, -(-self.stop // CHUNK))


Place = tuple[Source, int]
"""A source, and the number of one of its chunks."""


class Reader:
    """Reads extents in order, `ahead` chunks before they are needed; keeps the last chunk for a neighbour."""

    def __init__(self, *, ahead: int = AHEAD) -> None:
        self._pool = ThreadPoolExecutor(AHEAD, thread_name_prefix="read")
        self.ahead = ahead
        self._last: tuple[Source, int, bytes] | None = None
        self._begun: deque[tuple[Place, Future[bytes]]] = deque()

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)

    def stream(self, extents: Sequence[Extent], following: Sequence[Extent] = ()) -> Iterator[memoryview]:
        """The bytes of each extent, in their order. A chunk that neighbours share is read once.

        `following` are the extents that will probably be asked for next: their first chunks are read while the last
        ones of these are used.
        """
        fetched = self._fetch(self._missing([*extents, *following]))
        for extent in extents:
            pieces = []
            for number in extent.chunks:
                if self._last is None or (self._last[0], self._last[1]) != (extent.source, number):
                    self._last = None  # let go before the next one is taken
                    place, chunk = next(fetched)
                    if place != (extent.source, number):
                        raise AssertionError("two streams of one reader at once")
                    self._last = (extent.source, number, chunk)
                at = number * CHUNK
                pieces.append(memoryview(self._last[2])[max(extent.start - at, 0) : extent.stop - at])
            yield pieces[0] if len(pieces) == 1 else memoryview(b"".join(pieces))

    def _missing(self, extents: Sequence[Extent]) -> list[Place]:
        """The chunks to read, in order; now, as long as the last one is known."""
        held = self._last[:2] if self._last else None
        wanted = []
        for extent in extents:
            for number in extent.chunks:
                if held != (extent.source, number):
                    held = (extent.source, number)
                    wanted.append(held)
        return wanted

    def _fetch(self, wanted: Sequence[Place]) -> Iterator[tuple[Place, bytes]]:
        """Chunks in order; those after the one that is asked for are begun before it is given."""
        self._keep(wanted[: self.ahead])
        for place in wanted[len(self._begun) :]:
            self._begun.append((place, self._pool.submit(_chunk, *place)))
            if len(self._begun) > self.ahead:
                yield self._taken()
        while self._begun:
            yield self._taken()

    def _taken(self) -> tuple[Place, bytes]:
        place, future = self._begun.popleft()
        try:
            return place, future.result()
        except BaseException:  # what was not begun is not read, if one chunk was bad
            self._keep(())
            raise

    def _keep(self, wanted: Sequence[Place]) -> None:
        """Of what was begun, what is wanted now; the rest was begun for somebody who did not come."""
        begun, self._begun = self._begun, deque()
        for place, future in begun:
            if place in wanted[len(self._begun) : len(self._begun) + 1]:
                self._begun.append((place, future))
            else:
                future.cancel()


def read_ahead(memory_bytes: int, scale: float, held: int = 0) -> int:
    """Chunks to read ahead within a third of the memory limit, at the scale that dead attempts have left.

    Beside those in flight two are held: the one in use, and one that spans to the next; and `held` besides.
    """
    return max(0, min(AHEAD, int(memory_bytes * scale / 3) // CHUNK - 2 - held))


def _chunk(source: Source, number: int) -> bytes:
    return source.read(number * CHUNK, min((number + 1) * CHUNK, source.size))
