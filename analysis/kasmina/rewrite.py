"""The masked copy of one object: streamed once, checked in passing, zeroed in passing. Names, dtypes, sizes stay."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from kasmina.formats import Box, TensorRef
from kasmina.formats.stream import in_order
from kasmina.formats.zips import Checksums
from leyline.digest import ObjectDigest, digest_of_chunks, sha256_hex, verified_range
from leyline.masks import Dead, Masks
from leyline.messages import StoredObject
from leyline.model import Malformed
from leyline.store import CHUNK, Data, ObjectStore

_COUNTER = "step"
"""Adam's step count: no moment, although a scalar parameter's has its parameter's shape."""


@dataclass(frozen=True, kw_only=True)
class Extent:
    """Bytes [start, stop) of an object: elements of a tensor that lie without a gap."""

    start: int
    stop: int
    itemsize: int
    dead: Dead
    first: int = 0
    """Number that the element at `start` has for `dead`."""


def copy_masked(
    store: ObjectStore, *, source: str, target: str, stored: StoredObject, zeroes: Sequence[Zeroes], ahead: int
) -> StoredObject:
    """Write `<target><path>`, which is `<source><path>` with everything zero that `zeroes` say, checksums repaired.

    Damaged if the source is not what its digest says.
    """
    head = store.head(source + stored.path)
    here = tuple(sorted((each for each in zeroes if each.box.object == stored.path), key=lambda each: each.box.offset))
    copy = _Copy(store, source + stored.path, stored.digest, head.pin, here, ahead)
    store.put_stream(target + stored.path, copy, size=stored.digest.size, digests=copy.digests)
    return StoredObject(path=stored.path, digest=digest_of_chunks(stored.digest.size, copy.digests))


@dataclass(frozen=True)
class Zeroes:
    """What is pruned of one box, its elements numbered as they lie."""

    box: Box
    dead: Dead


def zeroes_of(refs: Mapping[str, TensorRef], masks: Masks, *, slots: bool) -> list[Zeroes]:
    """What the masks prune of these tensors. Malformed if masks and tensors do not fit.

    `slots`: they are named `<parameter>/<slot>`.
    """
    owners = {alias: name for name, parameter in masks.parameters.items() for alias in parameter.aliases}
    found: dict[Box, Zeroes] = {}
    for tensor, ref in refs.items():
        owner, slot = _owner(tensor) if slots else (tensor, "")
        dead = masks.dead(owners.get(owner, owner))
        if dead is None or slot == _COUNTER or (slots and ref.shape != dead.shape):
            continue
        if ref.shape != dead.shape:
            raise Malformed(
                f"{ref.object}: tensor {tensor} has shape {list(ref.shape)}, its mask {list(dead.shape)}; the masks "
                "belong to another model"
            )
        for box in ref.boxes:  # tied tensors have the same ones
            found.setdefault(box, Zeroes(box, dead.within(box.origin, box.shape, box.order)))
    return list(found.values())


@dataclass
class _Copy:
    """The masked chunks; can be iterated again, which a store asks for when a conflict ends its upload."""

    store: ObjectStore
    key: str
    digest: ObjectDigest
    pin: str
    zeroes: tuple[Zeroes, ...]
    ahead: int
    digests: list[str] = field(default_factory=list)
    """SHA-256 of each masked chunk that was given."""

    def __iter__(self) -> Iterator[Data]:
        self.digests.clear()
        checksums = Checksums(each.box.record for each in self.zeroes if each.box.record)
        known = checksums.ahead
        if known:
            for start, masked, _ in self._masked():
                checksums.update(masked, start)
        for start, masked, digest in self._masked():
            if not known:
                checksums.update(masked, start)
            if places := checksums.places(start, start + len(masked)):
                masked = bytearray(masked)
                for at, byte in places:
                    masked[at - start] = byte
                digest = sha256_hex(masked)
            self.digests.append(digest)
            yield masked

    def _masked(self) -> Iterator[tuple[int, Data, str]]:
        return in_order(self._chunk, range(len(self.digest.chunks)), ahead=self.ahead)

    def _chunk(self, number: int) -> tuple[int, Data, str]:
        """Where a chunk begins, the chunk masked, and its SHA-256.

        In the threads that read ahead, because hashing takes most of a copy.
        """
        start, stop = number * CHUNK, min((number + 1) * CHUNK, self.digest.size)
        chunk = verified_range(self.store, self.key, self.digest, start, stop, self.pin)
        masked = _masked(chunk, start, self.zeroes)
        if masked is chunk:
            return start, masked, self.digest.chunks[number]
        del chunk  # of several that are under way at once, each would be held twice while it is hashed
        return start, masked, sha256_hex(masked)


def _owner(tensor: str) -> tuple[str, str]:
    owner, _, slot = tensor.rpartition("/")
    return owner, slot


def _masked(chunk: bytes, start: int, zeroes: Sequence[Zeroes]) -> Data:
    """The chunk, which begins at byte `start` of its object, with the dead elements zero."""
    end = start + len(chunk)
    touching = [each for each in zeroes if each.box.offset < end and start < each.box.stop]
    if not touching:
        return chunk
    masked = bytearray(chunk)
    for each in touching:
        size = each.box.itemsize
        for run in each.box.runs(start, end):
            stop = run.start + run.size * size
            _zero(masked, start, Extent(start=run.start, stop=stop, itemsize=size, dead=each.dead, first=run.first))
    return masked


def _zero(chunk: bytearray, start: int, extent: Extent) -> None:
    """Zero what is dead of one extent, as unsigned integers: zero is the zero byte in every dtype that is bound."""
    size = extent.itemsize
    begin = max(start - extent.start, 0)
    end = min(start + len(chunk), extent.stop) - extent.start
    first, last = -(-begin // size), end // size
    if first < last:
        at = extent.start + first * size - start
        flat = np.frombuffer(chunk, dtype=f"<u{size}", count=last - first, offset=at)
        extent.dead.zero(flat, extent.first + first)
    # The format aligns nothing: an element may lie across two chunks, and each zeroes its part.
    for cut in {begin // size, end // size}:
        lower, upper = max(cut * size, begin), min((cut + 1) * size, end)
        if 0 < upper - lower < size and extent.dead.touches(extent.first + cut, extent.first + cut + 1):
            at = extent.start + lower - start
            chunk[at : at + upper - lower] = bytes(upper - lower)


def zeroed_weights(masks: Masks) -> int:
    """Weights that are pruned, over all parameters; counted in windows, so that a large mask is never whole."""
    window = 1 << 22
    count = 0
    for name, parameter in masks.parameters.items():
        if dead := masks.dead(name):
            starts = range(0, parameter.size, window)
            count += sum(int(dead.range(at, min(at + window, parameter.size)).sum()) for at in starts)
    return count
