"""The object-store port: the few operations the protocol needs, and the errors they may end in.

Every object is written by put-if-absent and never changed, so `get_range` needs a pin only against people
who overwrite checkpoints by hand, and a lost response is repaired by reading back (see `put_if_absent`).
Keys are relative to the run: "log/0/0.json". An adapter knows its prefix; nobody else does.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

from leyline.model import printable

CHUNK = 16 * 1024 * 1024
"""Bytes in a chunk. Digests, reads, encryption frames and multipart parts all align to it."""

Data = bytes | bytearray
"""What may be written."""


class StoreError(Exception):
    """Something the store answered, as a sentence that names the object and the remedy."""

    def __init__(self, sentence: str) -> None:
        super().__init__(printable(sentence))


class NotFound(StoreError):
    """The object does not exist."""


class Exists(StoreError):
    """Another object of other content stands under this key."""


class Refused(StoreError):
    """403, a missing or expired credential, a read-only folder. Never a reason to roll back."""


class NotLent(Refused):
    """This run may not read objects there: they lie outside of the prefixes that it is held to."""


class Unreachable(StoreError):
    """The store did not answer inside the retries. Never a reason to roll back."""


class Changed(StoreError):
    """The object is not the one that was pinned (another ETag, version or size)."""


class Damaged(StoreError):
    """The bytes are there but are not what their digest, frame or envelope says."""


class Unsuitable(StoreError):
    """The store ignores conditional writes (or cannot make them), so the protocol would be unsafe on it."""


@dataclass(frozen=True, kw_only=True)
class Head:
    """What the store says of one object."""

    key: str
    size: int
    pin: str
    """Names exactly this content to `get_range`: the ETag, or inode, size and mtime of a file."""
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
        """Bytes [start, stop) of the object, all of them: a range behind its end is Changed, never shortened.

        With `pin`, Changed also if the object is another one now. Ranges above CHUNK are the caller's memory.
        """
        ...

    def put_if_absent(self, key: str, data: Data) -> bool:
        """Write the object; True if this call made it, False if the same bytes stood there already.

        A response may be lost after the write succeeded, and a retry then sees "exists": so "exists" is read
        back, equal bytes are success, and other bytes raise Exists. 409 and 5xx are retried. After a lost
        response the answer may be False although this call made the object: False means "it stands".
        """
        ...

    def put_stream(self, key: str, chunks: Iterable[Data], *, size: int, digests: Sequence[str] | None = None) -> bool:
        """Like put_if_absent for `size` bytes that come in chunks of CHUNK bytes (the last may be shorter).

        At most three chunks are held, so `chunks` must not reuse a buffer it has given away. Nothing is visible
        before the last byte; a failure in `chunks` leaves nothing behind. On "exists" the object is read back
        in ranges and compared. A conflict (409) at the end of a multipart upload can be redone only if
        `chunks` can be iterated again; a generator cannot, and ends in Unreachable.

        `digests`: SHA-256 of each chunk, for callers who take them anyway; it may fill while the chunks pass.
        """
        ...

    def list(self, prefix: str, *, after: str = "") -> Iterator[Head]:
        """Objects whose key starts with `prefix`, from behind `after`.

        Names in one folder come in order of their UTF-8 bytes. Across folders do not rely on it where one name
        begins another ("a/" and "a-b"): SeaweedFS sorts these by folder, S3 by whole keys.
        """
        ...

    def delete(self, key: str) -> None:
        """Remove one object; removing what is not there is no error. Only gc calls this."""
        ...

    def abort_stale(self, older_than: datetime) -> int:
        """Throw away unfinished uploads that began before `older_than`; how many there were. Only gc calls this."""
        ...

    def now(self) -> datetime:
        """The store's clock (UTC)."""
        ...

    def where(self, key: str) -> str:
        """The object as people find it: with the store that it lies in, for what is borrowed the lender."""
        ...

    def ancestors(self) -> Iterator[ObjectStore]:
        """The folders above this one: a run in one of them would contain this one."""
        ...

    def lender(self, uri: str) -> ObjectStore:
        """Another folder of the same kind of store, reached in the same way: an imported checkpoint lies there.

        StoreError if `uri` is no such folder, NotLent if this run may not read there.
        """
        ...

    def borrow(self, uri: str, keys: Mapping[str, str]) -> None:
        """From now on `head`, `get` and `get_range` find each of `keys` in the lender at `uri`, by its path there.

        Only read_ready calls this, for what a checkpoint's own READY.json says. Nothing else follows: what is written,
        listed and deleted is always the run's own.
        """
        ...


def checked_key(key: str) -> str:
    """`key` if it names an object inside the run: relative, printable, without empty, "." or ".." segments."""
    segments = key.split("/")
    if not key.isprintable() or "\\" in key or any(segment in ("", ".", "..") for segment in segments):
        raise StoreError(f"{key!r} is no object key; give a path inside the run such as log/0/0.json")
    return key


def in_chunks(pieces: Iterable[bytes | memoryview]) -> Iterator[bytearray]:
    """The same bytes in chunks of CHUNK, each a buffer of its own: the store may hold it for a while."""
    held = bytearray()
    for piece in pieces:
        rest = memoryview(piece)
        while len(rest):
            part = rest[: CHUNK - len(held)]
            held += part
            rest = rest[len(part) :]
            if len(held) == CHUNK:
                yield held
                held = bytearray()
    if held:
        yield held


def checked_chunks(key: str, chunks: Iterable[Data], *, size: int) -> Iterator[Data]:
    """`chunks` as they are, but an error as soon as they cannot become `size` bytes in chunks of CHUNK."""
    done = 0
    for chunk in chunks:
        expected = min(CHUNK, size - done)
        if len(chunk) != expected or not chunk:
            raise StoreError(
                f"{key}: a chunk of {len(chunk):,} bytes came at byte {done:,} of {size:,} where {expected:,} "
                f"were due; nothing was written; cut the stream into chunks of {CHUNK:,} bytes"
            )
        done += len(chunk)
        yield chunk
    if done != size:
        raise StoreError(f"{key}: the stream ended after {done:,} of {size:,} bytes; nothing was written")
