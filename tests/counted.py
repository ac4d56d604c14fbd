"""A store that counts how often each chunk is read."""

from __future__ import annotations

from collections import Counter
from threading import Lock
from typing import Any

from leyline.store import CHUNK, ObjectStore


class Counted:
    """Passes everything on to `store`, and remembers the ranges that were read of safetensors objects."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store
        self._lock = Lock()
        self._seen: list[tuple[str, int, int]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def get_range(self, key: str, start: int, stop: int, *, pin: str | None = None) -> bytes:
        with self._lock:
            self._seen.append((key, start, stop))
        return self._store.get_range(key, start, stop, pin=pin)

    def forget(self) -> None:
        self._seen.clear()

    def chunks(self, folder: str) -> Counter[tuple[str, int]]:
        """How often each chunk of the large objects in `folder` was read; their headers, read apart, are not."""
        return Counter(
            (key, start // CHUNK)
            for key, start, stop in self._seen
            if key.startswith(folder) and start % CHUNK == 0 and stop - start > CHUNK // 4
        )
