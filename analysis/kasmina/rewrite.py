"""The masked copy of one object: streamed once, checked in passing, zeroed in passing. Names, dtypes, sizes stay."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from kasmina.formats.index import SAFETENSORS, read_header
from kasmina.formats.stream import in_order
from leyline.digest import ObjectDigest, digest_of_chunks, sha256_hex, verified_range
from leyline.ids import canonical_name
from leyline.masks import Dead, Masks
from leyline.messages import StoredObject
from leyline.model import Malformed
from leyline.store import CHUNK, Data, Head, ObjectStore
from leyline.tensors import ITEMSIZE, Entry

_COUNTER = "step"
"""Adam's step count: no moment, although a scalar parameter's has its parameter's shape."""


@dataclass(frozen=True, kw_only=True)
class Extent:
    """Bytes [start, stop) of an object: one tensor of which something is pruned."""

    start: int
    stop: int
    itemsize: int
    dead: Dead


def copy_masked(
    store: ObjectStore, *, source: str, target: str, stored: StoredObject, masks: Masks, slots: bool, ahead: int
) -> StoredObject:
    """Write `<target><path>`, which is `<source><path>` with everything zero that the masks prune.

    `slots`: the object's tensors are named `<parameter>/<slot>`. An object that is no safetensors file (an index) is
    copied as it is. Malformed if masks and tensors do not fit, Damaged if the source is not what its digest says.
    """
    head = store.head(source + stored.path)
    copy = _Copy(
        store,
        source + stored.path,
        stored.digest,
        head.pin,
        _extents(store, source, stored.path, head, masks, slots=slots),
        ahead,
    )
    store.put_stream(target + stored.path, copy, size=stored.digest.size)
    return StoredObject(path=stored.path, digest=digest_of_chunks(stored.digest.size, copy.digests))


@dataclass
class _Copy:
    """The masked chunks; can be iterated again, which a store asks for when a conflict ends its upload."""

    store: ObjectStore
    key: str
    digest: ObjectDigest
    pin: str
    extents: tuple[Extent, ...]
    ahead: int

    def __iter__(self) -> Iterator[Data]:
        self.digests: list[str] = []
        for masked, digest in in_order(self._chunk, range(len(self.digest.chunks)), ahead=self.ahead):
            self.digests.append(digest)
            yield masked

    def _chunk(self, number: int) -> tuple[Data, str]:
        """One masked chunk and its SHA-256; in the threads that read ahead, because hashing takes most of a copy."""
        start, stop = number * CHUNK, min((number + 1) * CHUNK, self.digest.size)
        masked = _masked(verified_range(self.store, self.key, self.digest, start, stop, self.pin), start, self.extents)
        return masked, self.digest.chunks[number] if isinstance(masked, bytes) else sha256_hex(masked)


def _extents(
    store: ObjectStore, source: str, path: str, head: Head, masks: Masks, *, slots: bool
) -> tuple[Extent, ...]:
    if not path.endswith(SAFETENSORS):
        return ()
    owners = {alias: name for name, parameter in masks.parameters.items() for alias in parameter.aliases}
    found = []
    for tensor, entry in read_header(store, source, path, head).items():
        owner, slot = _owner(tensor) if slots else (tensor, "")
        name = canonical_name(owner)
        dead = masks.dead(owners.get(name, name))
        if dead is None or slot == _COUNTER or (slots and entry.shape != dead.shape):
            continue
        if entry.shape != dead.shape:
            raise Malformed(
                f"{path}: tensor {tensor} has shape {list(entry.shape)}, its mask {list(dead.shape)}; the masks belong "
                "to another model"
            )
        found.append(_extent(entry, dead))
    return tuple(sorted(found, key=lambda extent: extent.start))


def _extent(entry: Entry, dead: Dead) -> Extent:
    return Extent(start=entry.start, stop=entry.stop, itemsize=ITEMSIZE[entry.dtype], dead=dead)


def _owner(tensor: str) -> tuple[str, str]:
    owner, _, slot = tensor.rpartition("/")
    return owner, slot


def _masked(chunk: bytes, start: int, extents: tuple[Extent, ...]) -> Data:
    """The chunk, which begins at byte `start` of its object, with the dead elements zero."""
    touching = [extent for extent in extents if extent.start < start + len(chunk) and start < extent.stop]
    if not touching:
        return chunk
    masked = bytearray(chunk)
    for extent in touching:
        _zero(masked, start, extent)
    return masked


def _zero(chunk: bytearray, start: int, extent: Extent) -> None:
    """Zero what is dead of one tensor, as unsigned integers: zero is the zero byte in every dtype we read."""
    size = extent.itemsize
    begin = max(start - extent.start, 0)
    end = min(start + len(chunk), extent.stop) - extent.start
    first, last = -(-begin // size), end // size
    if first < last:
        at = extent.start + first * size - start
        extent.dead.zero(np.frombuffer(chunk, dtype=f"<u{size}", count=last - first, offset=at), first)
    # The format aligns nothing: an element may lie across two chunks, and each zeroes its part.
    for cut in {begin // size, end // size}:
        lower, upper = max(cut * size, begin), min((cut + 1) * size, end)
        if 0 < upper - lower < size and extent.dead.touches(cut, cut + 1):
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
