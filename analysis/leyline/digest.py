"""SHA-256 of an object chunk by chunk, so that any range can be checked without reading the whole object."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from leyline.store import CHUNK, Damaged, ObjectStore

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


def sha256_hex(data: bytes | bytearray | memoryview) -> str:
    return hashlib.sha256(data).hexdigest()


class ObjectDigest(BaseModel):
    """What an object's bytes are: its size, the SHA-256 of each chunk of CHUNK bytes, and one over the list."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    size: int = Field(ge=0)
    chunks: tuple[Sha256, ...]
    root: Sha256
    """SHA-256 over the raw chunk digests, one after the other: the object's name in records."""

    @model_validator(mode="after")
    def _belongs_together(self) -> Self:
        if len(self.chunks) != -(-self.size // CHUNK):
            raise ValueError(f"{self.size} bytes do not make {len(self.chunks)} chunks of {CHUNK}")
        if self.root != _root(self.chunks):
            raise ValueError("root is not the SHA-256 of the chunk digests")
        return self


class Digester:
    """Takes an object's bytes in pieces of any length, in order, and gives its ObjectDigest."""

    def __init__(self) -> None:
        self._size = 0
        self._chunks: list[str] = []
        self._chunk = hashlib.sha256()

    def update(self, data: bytes | bytearray | memoryview) -> None:
        view = memoryview(data)
        while len(view):
            piece = view[: CHUNK - self._size % CHUNK]
            self._chunk.update(piece)
            self._size += len(piece)
            view = view[len(piece) :]
            if self._size % CHUNK == 0:
                self._close_chunk()

    def finish(self) -> ObjectDigest:
        if self._size % CHUNK:
            self._close_chunk()
        return digest_of_chunks(self._size, self._chunks)

    def _close_chunk(self) -> None:
        self._chunks.append(self._chunk.hexdigest())
        self._chunk = hashlib.sha256()


def digest_of_chunks(size: int, chunks: Sequence[str]) -> ObjectDigest:
    """Of an object whose chunks were hashed one by one."""
    return ObjectDigest(size=size, chunks=tuple(chunks), root=_root(tuple(chunks)))


def digest_bytes(data: bytes | bytearray | memoryview) -> ObjectDigest:
    digester = Digester()
    digester.update(data)
    return digester.finish()


def stored_chunks(store: ObjectStore, key: str) -> Iterator[bytes]:
    """A whole object, one chunk after the other, unchecked: for who takes its digest. Changed if it is exchanged."""
    head = store.head(key)
    for start in range(0, head.size, CHUNK):
        yield store.get_range(key, start, min(start + CHUNK, head.size), pin=head.pin)


def verified_range(
    store: ObjectStore, key: str, digest: ObjectDigest, start: int, stop: int, pin: str | None = None
) -> bytes:
    """Bytes [start, stop) of the object, after every chunk they touch has been read and checked.

    Damaged if a chunk is not what `digest` says, or the range lies outside of it. One chunk is held at a time
    beside the answer; a range of exactly one chunk is not copied.
    """
    if not 0 <= start <= stop <= digest.size:
        raise Damaged(f"{key}: bytes {start:,} to {stop:,} were asked for, but its digest covers {digest.size:,}")
    pieces = []
    for number in range(start // CHUNK, -(-stop // CHUNK)):
        begin = number * CHUNK
        chunk = store.get_range(key, begin, min(begin + CHUNK, digest.size), pin=pin)
        if sha256_hex(chunk) != digest.chunks[number]:
            raise Damaged(
                f"{store.where(key)}: chunk {number} of {len(digest.chunks)} is not what its SHA-256 says; "
                "the object was damaged or exchanged; restore it"
            )
        if start <= begin and begin + len(chunk) <= stop:
            pieces.append(memoryview(chunk))
        else:
            pieces.append(memoryview(chunk)[max(start - begin, 0) : stop - begin])
    if len(pieces) == 1 and isinstance(whole := pieces[0].obj, bytes) and len(whole) == stop - start:
        return whole
    return b"".join(pieces)


def _root(chunks: tuple[str, ...]) -> str:
    return sha256_hex(b"".join(bytes.fromhex(chunk) for chunk in chunks))
