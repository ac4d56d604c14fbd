"""Where a tensor's elements lie: rectangles of it, each strided over the bytes of one object. Pure arithmetic.

A safetensors tensor is one rectangle in C order. A view in a torch file may be transposed or leave gaps; a distributed
checkpoint cuts a tensor into several rectangles in several objects.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any, NamedTuple

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from leyline.store import CHUNK

Read = Callable[[str, int, int], bytes | memoryview]
"""(object, start, stop) -> its bytes [start, stop)."""


class Record(NamedTuple):
    """A file inside a zip archive: bytes [start, stop) of the object, and the bytes at which its CRC-32 stands."""

    start: int
    stop: int
    crcs: tuple[int, ...]


class Run(NamedTuple):
    """Elements of a box without a gap: `size` of them from byte `start`, of which the first has number `first`."""

    start: int
    first: int
    size: int


@dataclass(frozen=True, kw_only=True)
class Box:
    """The rectangle of a tensor that begins at `origin`, and where it lies in `object`, little-endian."""

    object: str
    """Path in the checkpoint's folder, as in READY.json."""
    pin: str
    """The object's content when its header was read; read the data under the same."""
    offset: int
    """Byte of the element at `origin`."""
    itemsize: int
    origin: tuple[int, ...]
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    """In elements."""
    record: Record | None = None

    @property
    def size(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def stop(self) -> int:
        """The byte behind its last element."""
        return self.offset + self.itemsize * reach(self.shape, self.strides)

    @cached_property
    def order(self) -> tuple[int, ...]:
        """Its axes from the widest stride to the narrowest. In this order elements are numbered as they lie."""
        return tuple(sorted(range(len(self.shape)), key=lambda axis: -self.strides[axis]))

    @cached_property
    def axes(self) -> tuple[tuple[int, int], ...]:
        """(side, stride) in memory order, without sides of 1, whose stride means nothing."""
        return tuple((self.shape[axis], self.strides[axis]) for axis in self.order if self.shape[axis] != 1)

    @property
    def regular(self) -> bool:
        """Whether no two elements share a byte, and each lies behind those before it."""
        return all(
            stride > sum((side - 1) * inner for side, inner in self.axes[number + 1 :])
            for number, (_, stride) in enumerate(self.axes)
        )

    def runs(self, begin: int, end: int) -> Iterator[Run]:
        """What has a byte in [begin, end) of the object, in order; numbers count in memory order."""
        if self.size:
            yield from _runs(self.offset, 0, self.axes, self.itemsize, begin, end)

    def element(self, number: int) -> tuple[int, ...]:
        """Where in the tensor the element with this number is."""
        found = np.unravel_index(number, [self.shape[axis] for axis in self.order]) if self.shape else ()
        place = dict(zip(self.order, found, strict=True))
        return tuple(int(place[axis]) + self.origin[axis] for axis in range(len(self.shape)))


@dataclass(frozen=True, kw_only=True)
class TensorRef:
    """One tensor: its boxes cover it, each element once."""

    dtype: str
    """In the words of safetensors: F32, BF16, ..."""
    shape: tuple[int, ...]
    boxes: tuple[Box, ...]
    shared: str = ""
    """Another tensor that lies in some of the same bytes without being the same, or this one, if it overlaps itself."""

    @property
    def size(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.boxes[0].itemsize

    @property
    def object(self) -> str:
        """The object that holds it, or its beginning."""
        return self.boxes[0].object

    @property
    def whole(self) -> Box | None:
        """The one box in which the tensor lies in C order without a gap, if it does."""
        box = self.boxes[0]
        return box if len(self.boxes) == 1 and dense(box.shape, box.strides) else None


def c_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides of an array in C order, in elements."""
    return tuple(prod(shape[axis + 1 :]) for axis in range(len(shape)))


def dense(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether elements lie in C order without a gap."""
    known = zip(shape, strides, c_strides(shape), strict=True)
    return 0 in shape or all(stride == expected for side, stride, expected in known if side != 1)


def reach(shape: Sequence[int], strides: Sequence[int]) -> int:
    """Elements from the first to the last, both included; 0 if there are none."""
    return 0 if 0 in shape else 1 + sum((side - 1) * stride for side, stride in zip(shape, strides, strict=True))


def gather(ref: TensorRef, start: int, stop: int, read: Read) -> bytes:
    """Elements [start, stop) of the tensor in C order, wherever they lie. Reads at most CHUNK bytes at a time."""
    width = ref.boxes[0].itemsize
    out = np.empty(stop - start, dtype=f"V{width}")
    for first, place in _rectangles(start, stop, ref.shape):
        sides = [part.stop - part.start for part in place]
        target = out[first - start : first - start + prod(sides)].reshape(sides)
        for box in ref.boxes:
            inside = [
                slice(max(part.start, at), min(part.stop, at + side))
                for part, at, side in zip(place, box.origin, box.shape, strict=True)
            ]
            if any(part.start >= part.stop for part in inside):
                continue
            within = [slice(a.start - b.start, a.stop - b.start) for a, b in zip(inside, place, strict=True)]
            steps = zip(inside, box.origin, box.strides, strict=True)
            byte = box.offset + width * sum((part.start - at) * stride for part, at, stride in steps)
            part: tuple[Any, ...] = (..., *within)
            _copy(target[part], box, byte, read)
    return out.tobytes()


def _copy(target: NDArray[Any], box: Box, byte: int, read: Read) -> None:
    """Fill `target` from the elements at `byte` and on, in halves as long as they are spread over more than CHUNK."""
    span = box.itemsize * reach(target.shape, box.strides)
    if span <= CHUNK:
        flat = np.frombuffer(read(box.object, byte, byte + span), dtype=target.dtype)
        target[...] = as_strided(flat, target.shape, [stride * box.itemsize for stride in box.strides])
        return
    axis = max(range(target.ndim), key=lambda a: (target.shape[a] - 1) * box.strides[a])
    half = target.shape[axis] // 2
    before: list[Any] = [slice(None)] * target.ndim
    before[axis] = slice(half)
    behind = [*before[:axis], slice(half, None), *before[axis + 1 :]]
    _copy(target[tuple(before)], box, byte, read)
    _copy(target[tuple(behind)], box, byte + half * box.strides[axis] * box.itemsize, read)


def _rectangles(start: int, stop: int, shape: Sequence[int]) -> Iterator[tuple[int, tuple[slice, ...]]]:
    """Elements [start, stop) of an array in C order as rectangles: (number of the first element, place)."""
    if start >= stop:
        return
    if not shape:
        yield 0, ()
        return
    row = prod(shape[1:])
    (low, head), (high, tail) = divmod(start, row), divmod(stop, row)
    parts = [(low, head, row), (high, 0, tail)] if low < high else [(low, head, tail)]
    if low < high and not head:
        parts = parts[1:]
    whole = range(low + (head > 0), high)
    for index, begin, end in parts:
        if index == high and whole:
            yield whole.start * row, (slice(whole.start, whole.stop), *(slice(0, side) for side in shape[1:]))
            whole = range(0)
        for first, place in _rectangles(begin, end, shape[1:]):
            yield index * row + first, (slice(index, index + 1), *place)


def _runs(byte: int, first: int, axes: Sequence[tuple[int, int]], width: int, begin: int, end: int) -> Iterator[Run]:
    sides, strides = [side for side, _ in axes], [stride for _, stride in axes]
    if dense(sides, strides):
        count = prod(sides)
        if byte < end and begin < byte + count * width:
            yield Run(byte, first, count)
        return
    step, inner, span = strides[0] * width, prod(sides[1:]), width * reach(sides[1:], strides[1:])
    for index in range(max(0, (begin - byte - span) // step + 1), min(sides[0], -(-(end - byte) // step))):
        yield from _runs(byte + index * step, first + index * inner, axes[1:], width, begin, end)
