"""The object-store port: the few operations the protocol needs, and the errors they may end in.

Every object is written by put-if-absent and never changed, so `get_range` needs a pin only against people
who overwrite checkpoints by hand, and a lost response is repaired by reading back (see `put_if_absent`).
Keys are relative to the run: "log/0/0.json". An adapter knows its prefix; nobody else does.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

CHUNK = 16 * 1024 * 1024
"""Bytes in a chunk. Digests, reads, encryption frames and multipart parts all align to it."""


class StoreError(Exception):
    """Something the store answered, as a sentence that names the object and the remedy."""


class NotFound(StoreError):
    """The object does not exist."""


class Exists(StoreError):
    """Another object of other content stands under this key."""


class Refused(StoreError):
    """403, a missing or expired credential, a read-only folder. Never a reason to roll back."""


class Unreachable(StoreError):
    """The store did not answer inside the retries. Never a reason to roll back."""


class Changed(StoreError):
    """The object is not the one that was pinned (another ETag, version or size)."""


class Unsuitable(StoreError):
    """The store ignores conditional writes (or cannot make them), so the protocol would be unsafe on it."""


@dataclass(frozen=True, kw_only=True)
class Head:
    """What the store says of one object. `pin` names exactly this content to `get_range` (ETag, or inode+mtime)."""

    key: str
    size: int
    pin: str
    modified: datetime
    """By the store's clock: ages across processes are differences of these."""


class ObjectStore(Protocol):
    """One run's prefix in an object store."""

    @property
    def uri(self) -> str:
        """The run URI this store was opened with, without a trailing slash."""
        ...

    def head(self, key: str) -> Head:
        """Raises NotFound, Refused, Unreachable."""
        ...

    def get(self, key: str) -> bytes:
        """The whole object; for small ones (records, manifests, responses)."""
        ...

    def get_range(self, key: str, start: int, stop: int, *, pin: str | None = None) -> bytes:
        """Bytes [start, stop) of the object; Changed if `pin` is given and the object is another one now."""
        ...

    def put_if_absent(self, key: str, data: bytes) -> bool:
        """Write the object; True if this call made it, False if the same bytes stood there already.

        A response may be lost after the write succeeded, and a retry then sees "exists": so "exists" is read
        back, equal bytes are success, and other bytes raise Exists. 409 and 5xx are retried.
        """
        ...

    def put_stream(self, key: str, chunks: Iterable[bytes], *, size: int) -> bool:
        """Like put_if_absent for `size` bytes that come in chunks of CHUNK bytes (the last may be shorter).

        At most two chunks are held. Nothing is visible before the last byte; a failure in `chunks` leaves
        nothing behind. On "exists" the object is read back in ranges and compared by its chunks' SHA-256.
        """
        ...

    def list(self, prefix: str, *, after: str = "") -> Iterator[Head]:
        """Objects whose key starts with `prefix`, in key order, from behind `after`."""
        ...

    def delete(self, key: str) -> None:
        """Remove one object; removing what is not there is no error. Only gc calls this."""
        ...

    def now(self) -> datetime:
        """The store's clock (UTC)."""
        ...
