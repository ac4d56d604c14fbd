"""Active bits of many parameters, kept packed: single weights are as many as the model, and a bool takes a byte."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Self

import numpy as np
from numpy.typing import NDArray

Bits = NDArray[np.bool_]
PackedBits = NDArray[np.uint8]

WINDOW = 1 << 22
"""Bits that are unpacked at a time."""


def window(packed: PackedBits, start: int, stop: int) -> Bits:
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


def clear_packed(packed: PackedBits, start: int, active: PackedBits, size: int) -> None:
    """clear() for the first `size` bits of `active`, spread out in windows: one row may be larger than the memory."""
    for at in range(0, size, WINDOW):
        piece = window(active, at, min(at + WINDOW, size))
        if not piece.all():
            clear(packed, start + at, piece)


def first_set(packed: PackedBits, count: int) -> list[int]:
    """The numbers of the first `count` bits that are set."""
    found: list[int] = []
    for at in range(0, 8 * len(packed), WINDOW):
        found += (at + np.flatnonzero(window(packed, at, min(at + WINDOW, 8 * len(packed))))[:count]).tolist()
        if len(found) >= count:
            break
    return found[:count]


def ones(size: int) -> PackedBits:
    """`size` bits that are all set; the padding of the last byte is 0, as np.packbits has it."""
    packed = np.full(-(-size // 8), 0xFF, dtype=np.uint8)
    if size % 8:
        packed[-1] = (1 << size % 8) - 1
    return packed


@dataclass(frozen=True, eq=False)
class Packed(Mapping[str, Bits]):
    """Name -> active bits [size], unpacked anew at each access."""

    packed: Mapping[str, PackedBits] = field(default_factory=dict)
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
        packed |= {name: self.packed[name] & other.packed[name] for name in self.packed.keys() & other.packed.keys()}
        return Packed({name: packed[name] for name in sorted(packed)}, {**self.sizes, **other.sizes})

    def live(self, name: str) -> int:
        """Bits that are set."""
        return int(np.bitwise_count(self.packed[name]).sum(dtype=np.int64))

    def pruned(self) -> int:
        """Bits that are not set, over all names."""
        return sum(self.sizes[name] - self.live(name) for name in self.packed)
