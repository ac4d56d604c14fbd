"""Active bits of many parameters, packed, and where they are many read or computed in pieces when they are asked for.

Single weights are as many as the model: even an eighth of a byte each is more than a worker may hold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from math import prod
from threading import Lock
from typing import Protocol, Self

import numpy as np
from numpy.typing import NDArray

from leyline.digest import Digester, ObjectDigest, stored_chunks, verified_range
from leyline.store import CHUNK, ObjectStore

Bits = NDArray[np.bool_]
PackedBits = NDArray[np.uint8]

WINDOW = 1 << 22
"""Bits that are unpacked at a time."""
HELD = 2
"""Chunks of a stored file that are held: neighbours may lie on both sides of an edge."""
_LOOKED_UP = 1 << 18
"""Bits whose places are computed at once, a multiple of 8: each takes some dozens of bytes meanwhile."""
_SPAN = 1 << 22
"""Bytes in which places are looked up at once."""


class BitSource(Protocol):
    """Packed bits of which ranges of bytes can be had. An array is one."""

    def __len__(self) -> int: ...

    def __getitem__(self, where: slice, /) -> PackedBits: ...


def pieces(bits: BitSource) -> Iterator[PackedBits]:
    """All of them, WINDOW bits at a time."""
    for at in range(0, len(bits), WINDOW // 8):
        yield bits[at : at + WINDOW // 8]


def window(packed: BitSource, start: int, stop: int) -> Bits:
    """Bits [start, stop), little bit order, unpacked."""
    first = start // 8
    whole = np.unpackbits(packed[first : -(-stop // 8)], bitorder="little")
    return whole[start - 8 * first : stop - 8 * first].view(np.bool_)


def clear(packed: PackedBits, start: int, active: Bits) -> None:
    """Clear in place every bit from `start` on where `active` is not set."""
    first, stop = start // 8, start + len(active)
    # Set around the range, so that `and` keeps what shares its first and last byte.
    whole = np.ones(8 * (-(-stop // 8) - first), dtype=np.bool_)
    whole[start - 8 * first : stop - 8 * first] = active
    packed[first : -(-stop // 8)] &= np.packbits(whole, bitorder="little")


def ones(size: int) -> PackedBits:
    """`size` bits that are all set; the padding of the last byte is 0, as np.packbits has it."""
    packed = np.full(-(-size // 8), 0xFF, dtype=np.uint8)
    if size % 8:
        packed[-1] = (1 << size % 8) - 1
    return packed


class StoredFile:
    """The bytes of an object in the store. Every chunk is checked against its digest."""

    def __init__(self, store: ObjectStore, key: str, digest: ObjectDigest, sha256: str) -> None:
        self._store, self._key, self._digest, self.sha256 = store, key, digest, sha256
        self._held: dict[int, PackedBits] = {}
        self._lock = Lock()

    @classmethod
    def read(cls, store: ObjectStore, key: str) -> Self:
        """Reads it once, for its digest. Raises what the store raises."""
        whole, digester = sha256(), Digester()
        for chunk in stored_chunks(store, key):
            whole.update(chunk)
            digester.update(chunk)
        return cls(store, key, digester.finish(), whole.hexdigest())

    def __len__(self) -> int:
        return self._digest.size

    @property
    def held(self) -> int:
        """Whole chunks that are in memory while it is read: those that are kept, and the one that is checked."""
        return min(HELD + 1, len(self) // CHUNK)

    def __getitem__(self, where: slice) -> PackedBits:
        """Raises Damaged and what the store raises."""
        start, stop, _ = where.indices(len(self))
        found = [
            self._chunk(number)[max(start - number * CHUNK, 0) : stop - number * CHUNK]
            for number in range(start // CHUNK, -(-stop // CHUNK))
        ]
        return found[0] if len(found) == 1 else np.concatenate([np.zeros(0, np.uint8), *found])

    def _chunk(self, number: int) -> PackedBits:
        with self._lock:  # threads that read ahead want the same chunk: who comes second waits for the first
            chunk = self._held.pop(number, None)
            if chunk is None:
                while len(self._held) >= HELD:
                    del self._held[next(iter(self._held))]
                start, stop = number * CHUNK, min((number + 1) * CHUNK, len(self))
                chunk = np.frombuffer(verified_range(self._store, self._key, self._digest, start, stop), np.uint8)
            self._held[number] = chunk
            return chunk


@dataclass(frozen=True, eq=False)
class Part:
    """Bytes [start, stop) of a file."""

    file: BitSource
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def __getitem__(self, where: slice) -> PackedBits:
        start, stop, _ = where.indices(len(self))
        return self.file[self.start + start : self.start + stop]


Slice = tuple[int, int, Callable[[], PackedBits]]
"""(start, stop, their packed bits)."""


@dataclass(frozen=True, eq=False)
class Slices:
    """`size` bits: those of the slices are asked for one slice at a time, all others are set."""

    size: int
    slices: Sequence[Slice] = ()

    def __len__(self) -> int:
        return -(-self.size // 8)

    def __getitem__(self, where: slice) -> PackedBits:
        first, last, _ = where.indices(len(self))
        begin, end = 8 * first, min(8 * last, self.size)
        found = ones(end - begin)
        for start, stop, bits in self.slices:
            low, high = max(start, begin), min(stop, end)
            if low < high:
                clear(found, low - begin, window(bits(), low - start, high - start))
        return found


@dataclass(frozen=True, eq=False)
class Both:
    """Set where both are."""

    one: BitSource
    other: BitSource

    def __len__(self) -> int:
        return len(self.one)

    def __getitem__(self, where: slice) -> PackedBits:
        return self.one[where] & self.other[where]


@dataclass(frozen=True, eq=False)
class Rectangle:
    """The bits of the rectangle at `origin` in an array of shape `whole`; its own shape is with its axes in `order`."""

    bits: BitSource
    whole: tuple[int, ...]
    origin: tuple[int, ...]
    shape: tuple[int, ...]
    order: tuple[int, ...]

    def __len__(self) -> int:
        return -(-prod(self.shape) // 8)

    def __getitem__(self, where: slice) -> PackedBits:
        first, last, _ = where.indices(len(self))
        end = min(8 * last, prod(self.shape))
        found = [np.zeros(0, np.uint8)]
        for start in range(8 * first, end, _LOOKED_UP):
            places = np.unravel_index(np.arange(start, min(start + _LOOKED_UP, end)), self.shape)
            flat = sum(
                (along + self.origin[axis]) * prod(self.whole[axis + 1 :])
                for axis, along in zip(self.order, places, strict=True)
            )
            found.append(np.packbits(_looked_up(self.bits, np.asarray(flat)), bitorder="little"))
        return np.concatenate(found)


def _looked_up(bits: BitSource, flat: NDArray[np.int64]) -> PackedBits:
    """The bits with these numbers, one a byte."""
    found, byte = np.empty(flat.shape, np.uint8), flat >> 3
    low, high = int(byte.min()), int(byte.max()) + 1
    for at in range(low, high, _SPAN):
        packed = bits[at : min(at + _SPAN, high)]
        inside = ... if high - low <= _SPAN else (byte >= at) & (byte < at + _SPAN)
        found[inside] = packed[byte[inside] - at] >> (flat[inside] & 7) & 1
    return found


@dataclass(frozen=True, eq=False)
class Packed(Mapping[str, Bits]):
    """Name -> active bits [size], unpacked anew at each access."""

    packed: Mapping[str, BitSource] = field(default_factory=dict)
    sizes: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, bits: Mapping[str, Bits]) -> Self:
        if isinstance(bits, cls):
            return bits
        packed = {name: np.packbits(active, bitorder="little") for name, active in bits.items()}
        return cls(packed, {name: active.size for name, active in bits.items()})

    def __getitem__(self, name: str) -> Bits:
        return window(self.packed[name], 0, self.sizes[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.packed)

    def __len__(self) -> int:
        return len(self.packed)

    def both(self, other: Packed) -> Packed:
        """Active where both are; a name that only one has stays as it is."""
        packed = {**self.packed, **other.packed}
        packed |= {n: Both(self.packed[n], other.packed[n]) for n in self.packed.keys() & other.packed.keys()}
        return Packed({name: packed[name] for name in sorted(packed)}, {**self.sizes, **other.sizes})

    def live(self, name: str) -> int:
        """Bits that are set."""
        return sum(int(np.bitwise_count(piece).sum(dtype=np.int64)) for piece in pieces(self.packed[name]))

    def pruned(self) -> int:
        """Bits that are not set, over all names."""
        return sum(self.sizes[name] - self.live(name) for name in self.packed)
