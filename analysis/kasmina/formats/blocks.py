"""Small reads of one object: what is known to be needed is fetched in blocks, several at a time."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

from leyline.model import Malformed
from leyline.store import Head, ObjectStore

_NEAR = 16 * 1024
"""Bytes between two spans below which they are read as one block."""
_LARGEST = 1024 * 1024
"""Bytes of a block, about."""
_AT_ONCE = 8
"""Requests in flight: they are small, and each waits for the store."""


class Bytes:
    """One pinned object's bytes."""

    def __init__(self, store: ObjectStore, key: str, head: Head) -> None:
        self._store, self.key, self._head = store, key, head
        self._starts: list[int] = []
        self._blocks: list[bytes] = []

    @property
    def size(self) -> int:
        return self._head.size

    def fetch(self, spans: Iterable[tuple[int, int]]) -> None:
        """Read these, and the little between them, in place of what was fetched before; unless it is there already."""
        joined: list[tuple[int, int]] = []
        clipped = sorted((max(start, 0), min(stop, self.size)) for start, stop in spans)
        if all(self._held(*span) is not None for span in clipped):
            return
        for start, stop in clipped:
            if joined and start - joined[-1][1] < _NEAR and stop - joined[-1][0] < _LARGEST:
                joined[-1] = (joined[-1][0], max(joined[-1][1], stop))
            elif start < stop:
                joined.append((start, stop))
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            self._blocks = list(pool.map(lambda span: self._get(*span), joined))
        self._starts = [start for start, _ in joined]

    def read(self, start: int, stop: int) -> bytes:
        """Bytes [start, stop). Malformed if the object does not have them."""
        if not 0 <= start <= stop <= self.size:
            raise Malformed(f"{self.key} speaks of bytes {start} to {stop}, it has {self.size:,}; it is truncated")
        held = self._held(start, stop)
        return self._get(start, stop) if held is None else held

    def _held(self, start: int, stop: int) -> bytes | None:
        block = bisect_right(self._starts, start) - 1
        if block < 0 or stop > self._starts[block] + len(self._blocks[block]):
            return None
        return self._blocks[block][start - self._starts[block] : stop - self._starts[block]]

    def _get(self, start: int, stop: int) -> bytes:
        return self._store.get_range(self.key, start, stop, pin=self._head.pin)
