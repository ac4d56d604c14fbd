"""Importance statistics at rest: AES-256-GCM in frames, so that any range can be read and checked by itself.

    header | frame 0 | frame 1 | … | last frame        each frame: up to 1 MiB of data, and its 16-byte tag

The header holds the id of the data key, the object's own key wrapped by it (RFC 3394), the nonce prefix and the
size of the plaintext. A frame's nonce is prefix, number and a flag for the last one (the STREAM construction);
header, object key and checkpoint name are authenticated with every frame. So a frame that was changed, moved,
cut off or taken from another object or checkpoint does not open.

Nothing is random. Object key and nonce prefix are derived by HKDF from the data key and from the plaintext's
digest, the object key and the checkpoint's name, because put-if-absent needs a restarted writer to produce the
same bytes. This is safe for the reason that SIV modes are: two different plaintexts have different digests,
hence independent keys, so no (key, nonce) pair ever encrypts two messages; and the same plaintext at the same
place gives the same ciphertext, which tells an observer only that it was written twice. `encrypt` checks each
chunk against the digest before it encrypts it, or a wrong digest would break exactly this.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Self

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.keywrap import InvalidUnwrap, aes_key_unwrap, aes_key_wrap

from leyline.digest import ObjectDigest, sha256_hex
from leyline.store import CHUNK, Damaged, Data, ObjectStore, StoreError, checked_chunks, in_chunks

DATA_KEY = "EMRAKUL_DATA_KEY"
"""Environment: 32 bytes in base64, or a file that holds them; see KeyRing.from_environment."""

FRAME = 1024 * 1024
"""Bytes of plaintext in a frame: 16 frames are a CHUNK."""

_TAG = 16
_MAGIC = b"EMRKAES1"
_HEADER = struct.Struct(">8s16s40s7sxQ")  # magic, data key id, wrapped object key, nonce prefix, size


class WrongKey(StoreError):
    """The object is encrypted under a data key that we do not have. Never a reason to roll back."""


@dataclass(frozen=True)
class DataKey:
    """32 secret bytes that wrap the keys of objects."""

    secret: bytes = field(repr=False)

    def __post_init__(self) -> None:
        if len(self.secret) != 32:
            raise WrongKey(f"a data key has 32 bytes, this one {len(self.secret)}; make one: openssl rand -base64 32")

    @cached_property
    def id(self) -> bytes:
        return hashlib.sha256(b"emrakul data key id\0" + self.secret).digest()[:16]


@dataclass(frozen=True)
class KeyRing:
    """The data key that encrypts, and older ones that may still decrypt."""

    current: DataKey
    older: tuple[DataKey, ...] = ()

    @classmethod
    def from_environment(cls) -> Self | None:
        """From EMRAKUL_DATA_KEY: keys in base64, or a file of them, separated by white space; the first encrypts.

        None if the variable is not set. To rotate, put the new key first and keep the old one behind it for as
        long as objects under it are read.
        """
        text = os.environ.get(DATA_KEY)
        if not text:
            return None
        if text.startswith(("/", "./")):
            try:
                text = Path(text).read_text(encoding="ascii")
            except (OSError, UnicodeDecodeError) as error:
                raise WrongKey(f"{DATA_KEY}: {text} cannot be read: {error}") from error
        try:
            keys = [DataKey(base64.b64decode(word, validate=True)) for word in text.split()]
        except binascii.Error as error:
            raise WrongKey(f"{DATA_KEY} is neither base64 nor a path: {error}") from error
        if not keys:
            raise WrongKey(f"{DATA_KEY} names a file without a key; make one: openssl rand -base64 32")
        return cls(keys[0], tuple(keys[1:]))

    def named(self, key_id: bytes) -> DataKey | None:
        return next((key for key in (self.current, *self.older) if key.id == key_id), None)


def sealed_size(size: int) -> int:
    """Bytes of the encrypted object for `size` bytes of plaintext."""
    return _HEADER.size + size + _frames(size) * _TAG


def encrypt(
    chunks: Iterable[Data], *, digest: ObjectDigest, key: str, checkpoint: str, ring: KeyRing
) -> Iterator[bytearray]:
    """The encrypted object, cut for `put_stream(key, …, size=sealed_size(digest.size))`.

    `chunks` are the plaintext in chunks of CHUNK bytes, and `digest` is theirs: Damaged before a chunk that does
    not match is encrypted. Give put_stream an object that calls this anew when it is iterated again.
    """
    derived = HKDF(SHA256(), 39, salt=None, info=_context(key, checkpoint) + bytes.fromhex(digest.root))
    secret = derived.derive(ring.current.secret)
    object_key, prefix = secret[:32], secret[32:]
    wrapped = aes_key_wrap(ring.current.secret, object_key)
    header = _HEADER.pack(_MAGIC, ring.current.id, wrapped, prefix, digest.size)
    cipher = _Cipher(key, checkpoint, header, object_key)

    def pieces() -> Iterator[bytes]:
        yield header
        if not digest.size:
            yield cipher.seal(0, memoryview(b""))
        for number, chunk in enumerate(checked_chunks(key, chunks, size=digest.size)):
            if sha256_hex(chunk) != digest.chunks[number]:
                raise Damaged(f"{key}: chunk {number} changed between its digest and its encryption; write it again")
            view = memoryview(chunk)
            for at in range(0, len(chunk), FRAME):
                yield cipher.seal((number * CHUNK + at) // FRAME, view[at : at + FRAME])

    return in_chunks(pieces())


def decrypt(data: bytes, *, key: str, checkpoint: str, ring: KeyRing) -> bytes:
    """The plaintext of a whole encrypted object. Raises WrongKey, Damaged."""
    cipher = _Cipher.from_header(data[: _HEADER.size], len(data), key=key, checkpoint=checkpoint, ring=ring)
    view = memoryview(data)
    return b"".join(cipher.open(number, view[slice(*cipher.place(number))]) for number in range(cipher.frames))


class SealedObject:
    """An encrypted object in a store, read by ranges of its plaintext."""

    def __init__(self, store: ObjectStore, key: str, *, checkpoint: str, ring: KeyRing, pin: str | None = None) -> None:
        head = store.head(key)
        self._store, self._key, self._pin = store, key, pin or head.pin
        if head.size < _HEADER.size:
            raise _cut_off(key)
        header = store.get_range(key, 0, _HEADER.size, pin=self._pin)
        self._cipher = _Cipher.from_header(header, head.size, key=key, checkpoint=checkpoint, ring=ring)

    @property
    def size(self) -> int:
        """Bytes of plaintext."""
        return self._cipher.size

    def read(self, start: int, stop: int) -> bytes:
        """Bytes [start, stop) of the plaintext; the frames they touch are read in one request and checked."""
        if not 0 <= start <= stop <= self.size:
            raise Damaged(f"{self._key}: bytes {start:,} to {stop:,} were asked for, but it holds {self.size:,}")
        if start == stop:
            return b""
        first, last = start // FRAME, (stop - 1) // FRAME
        base = self._cipher.place(first)[0]
        data = memoryview(self._store.get_range(self._key, base, self._cipher.place(last)[1], pin=self._pin))
        plain = b"".join(
            self._cipher.open(number, data[begin - base : end - base])
            for number in range(first, last + 1)
            for begin, end in (self._cipher.place(number),)
        )
        skipped = first * FRAME
        return plain if len(plain) == stop - start else plain[start - skipped : stop - skipped]


class _Cipher:
    """Opens and seals the frames of one object."""

    def __init__(self, key: str, checkpoint: str, header: bytes, object_key: bytes) -> None:
        self._prefix: bytes
        self.size: int
        *_, self._prefix, self.size = _HEADER.unpack(header)
        self.frames = _frames(self.size)
        self._key = key
        self._bound = _context(key, checkpoint) + header
        self._gcm = AESGCM(object_key)

    @classmethod
    def from_header(cls, header: bytes, length: int, *, key: str, checkpoint: str, ring: KeyRing) -> Self:
        if len(header) < _HEADER.size:
            raise _cut_off(key)
        magic, key_id, wrapped, _, size = _HEADER.unpack(header)
        if magic != _MAGIC:
            raise Damaged(f"{key} is not encrypted as importance statistics are; it was exchanged or damaged")
        if length != sealed_size(size):
            raise _cut_off(key)
        data_key = ring.named(key_id)
        if data_key is None:
            raise WrongKey(
                f"{key} is encrypted under data key {key_id.hex()[:12]}, and we have "
                f"{', '.join(k.id.hex()[:12] for k in (ring.current, *ring.older))}; add that key to {DATA_KEY}"
            )
        try:
            return cls(key, checkpoint, header, aes_key_unwrap(data_key.secret, wrapped))
        except InvalidUnwrap as error:
            raise Damaged(f"{key}: the header was changed, its wrapped key does not open") from error

    def place(self, number: int) -> tuple[int, int]:
        """Where frame `number` lies in the encrypted object."""
        begin = _HEADER.size + number * (FRAME + _TAG)
        return begin, begin + min(FRAME, self.size - number * FRAME) + _TAG

    def seal(self, number: int, plain: memoryview) -> bytes:
        return self._gcm.encrypt(self._nonce(number), plain, self._bound)

    def open(self, number: int, sealed: memoryview) -> bytes:
        try:
            return self._gcm.decrypt(self._nonce(number), sealed, self._bound)
        except InvalidTag as error:
            raise Damaged(
                f"{self._key}: frame {number} of {self.frames} does not open; it was changed, moved, or written for "
                "another object or checkpoint"
            ) from error

    def _nonce(self, number: int) -> bytes:
        # Number and last flag are authenticated by being in the nonce.
        return self._prefix + struct.pack(">I?", number, number == self.frames - 1)


def _frames(size: int) -> int:
    return max(1, -(-size // FRAME))  # an empty object has one empty frame, so that it has a tag


def _context(key: str, checkpoint: str) -> bytes:
    """Object key and checkpoint, each with its length, so that no two pairs read the same."""
    names = (b"emrakul importance", key.encode(), checkpoint.encode())
    return b"".join(struct.pack(">I", len(name)) + name for name in names)


def _cut_off(key: str) -> Damaged:
    return Damaged(f"{key} was cut off or lengthened: its size is not what its header says")
