"""Only the mask changed: the candidate is its base, byte for byte, except for zeros where something is pruned.

The candidate's bytes are really read back from the store and hashed. Where a chunk's digest is the base's, the base is
not read again. No torch, five chunks of memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kasmina.formats import FLOATS, Box, TensorRef, bind, elements, read_index, read_slots, stream
from kasmina.formats.extents import Run
from kasmina.formats.index import SAFETENSORS, read_header
from kasmina.formats.zips import Checksums
from leyline import layout
from leyline.masks import Dead, Masks
from leyline.messages import Candidate, CheckpointMetadata, StoredObject
from leyline.model import Malformed
from leyline.store import Changed, Damaged, NotFound, ObjectStore
from leyline.topology import Topology

_COUNTER = "step"
"""Adam's step count, a slot that is no moment."""
_WINDOW = 1 << 20
"""Elements whose mask is spread out at once."""


class NotTheBase(Exception):
    """The candidate is not its base with the masks on; the sentence says where."""


@dataclass(frozen=True, kw_only=True)
class Extent:
    """A box of one tensor, and what must be zero of it, elements numbered as they lie."""

    name: str
    dtype: str
    box: Box
    dead: Dead | None
    finite: bool
    """Whether NaN and Inf are refused here: parameters, not buffers and not the optimizer's slots."""


def check_bytes(
    store: ObjectStore, base: CheckpointMetadata, candidate: Candidate, masks: Masks, topology: Topology
) -> str:
    """What was compared, as a sentence. NotTheBase names the first object, tensor and byte that should not be so.

    Malformed and Damaged speak of the base: it is not what its own metadata says, or holds NaN or Inf.
    """
    folder, origin = layout.candidate(candidate.cycle, candidate.base), layout.checkpoint(base.name)
    extents = _extents(store, base, masks, topology)
    copies = {stored.path: stored for stored in candidate.objects}
    wanted = [*base.weights, *([base.optimizer] if base.optimizer else [])]
    if missing := [path for path in wanted if path not in copies]:
        raise NotTheBase(f"the candidate lacks {missing[0]}, which its base has")
    if extra := [path for path in copies if path not in wanted]:
        raise NotTheBase(f"the candidate holds {extra[0]}, which is no weights or optimizer object of its base")
    total = 0
    for path in wanted:
        pair = _Pair(store, origin + path, base.object(path), folder + path, copies[path])
        pair.check_header()
        pair.check(extents.get(path, []))
        total += copies[path].digest.size
    return f"{len(wanted)} objects of {total:,} bytes were read back: zero where pruned, elsewhere the base's bytes"


def _extents(store: ObjectStore, base: CheckpointMetadata, masks: Masks, topology: Topology) -> dict[str, list[Extent]]:
    """Every tensor of interest by object, in order of offsets."""
    prefix = layout.checkpoint(base.name)
    index = read_index(store, prefix, base)
    found = [
        extent
        for name, refs in bind(index, topology).items()
        for ref in refs
        for extent in _boxed(name, ref, masks.dead(name), finite=ref.dtype in FLOATS)
    ]
    owners = {alias: name for name, known in topology.parameters.items() for alias in (name, *known.aliases)}
    for key, ref in read_slots(store, prefix, base).items():
        owner, _, slot = key.rpartition("/")
        dead = masks.dead(owners.get(owner, owner))
        if dead is not None and slot != _COUNTER and ref.shape == dead.shape:
            found.extend(_boxed(key, ref, dead, finite=False))
    by_object: dict[str, dict[Box, Extent]] = {}
    for extent in sorted(found, key=lambda extent: extent.box.offset):  # tied names have one box
        by_object.setdefault(extent.box.object, {})[extent.box] = extent
    return {path: list(extents.values()) for path, extents in by_object.items()}


def _boxed(name: str, ref: TensorRef, dead: Dead | None, *, finite: bool) -> Iterator[Extent]:
    for box in ref.boxes:
        here = dead.within(box.origin, box.shape, box.order) if dead else None
        yield Extent(name=name, dtype=ref.dtype, box=box, dead=here, finite=finite)


@dataclass(frozen=True)
class _Pair:
    """One object of the base and its copy in the candidate."""

    store: ObjectStore
    base_key: str
    base: StoredObject
    key: str
    copy: StoredObject

    def check_header(self) -> None:
        """Sizes, then names, dtypes, shapes and places of all tensors."""
        if self.copy.digest.size != self.base.digest.size:
            raise NotTheBase(
                f"{self.key} is {self.copy.digest.size:,} bytes, its base {self.base.digest.size:,}; a mask changes no "
                "size"
            )
        try:
            head = self.store.head(self.key)
        except NotFound as error:
            raise NotTheBase(f"{self.key} does not exist, the candidate's manifest lists it") from error
        if head.size != self.copy.digest.size:
            raise NotTheBase(f"{self.key} is {head.size:,} bytes, its manifest says {self.copy.digest.size:,}")
        if not self.key.endswith(SAFETENSORS):
            return
        theirs = read_header(self.store, "", self.base_key, self.store.head(self.base_key))
        try:
            mine = read_header(self.store, "", self.key, head)
        except Malformed as error:
            raise NotTheBase(str(error)) from error
        for name in sorted({*mine, *theirs}):
            if name not in mine:
                raise NotTheBase(f"{self.key} lacks tensor {name}, which its base holds")
            if name not in theirs:
                raise NotTheBase(f"{self.key} holds tensor {name}, which its base does not have")
            if mine[name] != theirs[name]:
                raise NotTheBase(
                    f"{self.key}: tensor {name} is {mine[name].dtype} {list(mine[name].shape)} at byte "
                    f"{mine[name].start}, in the base {theirs[name].dtype} {list(theirs[name].shape)} at byte "
                    f"{theirs[name].start}"
                )

    def check(self, extents: Sequence[Extent]) -> None:
        """Every byte, and the checksums of what was masked inside an archive."""
        checksums = Checksums(each.box.record for each in extents if each.dead is not None and each.box.record)
        said: dict[int, int] = {}
        digests = zip(self.copy.digest.chunks, self.base.digest.chunks, strict=True)
        changed = [number for number, (mine, theirs) in enumerate(digests) if mine != theirs]
        base, again = stream(self.store, self.base_key, self.base.digest, ahead=1, numbers=changed), set(changed)
        begin, tail = 0, b""
        for number, chunk in enumerate(self._chunks()):
            end = begin + len(chunk)
            here = [each for each in extents if each.box.offset < end and begin < each.box.stop]
            checksums.update(chunk, begin)
            places = {at: chunk[at - begin] for at, _ in checksums.places(begin, end)}
            self._must_be_masked(chunk, begin, next(base) if number in again else chunk, here, places)
            for extent in here:
                if extent.finite:
                    _must_be_finite(self.base_key, chunk, begin, tail, extent)
            said |= places
            begin, tail = end, chunk[-8:]
        if wrong := [at for at, byte in checksums.places(0, begin) if said[at] != byte]:
            raise NotTheBase(f"{self.key}: byte {wrong[0]:,} is no checksum of what is stored; no loader would take it")

    def _chunks(self) -> Iterator[bytes]:
        """The candidate's chunks as the store holds them, each checked against the manifest."""
        try:
            yield from stream(self.store, self.key, self.copy.digest, ahead=1)
        except (Damaged, Changed, NotFound) as error:
            raise NotTheBase(str(error)) from error

    def _must_be_masked(
        self, chunk: bytes, begin: int, base: bytes, extents: Sequence[Extent], checksums: Mapping[int, int]
    ) -> None:
        """The chunk must be the base's with zeros where it is pruned; `checksums`, by byte, are judged at the end."""
        expected = bytearray(base)
        masked = [extent for extent in extents if extent.dead is not None]
        for extent in masked:
            _zero(expected, begin, extent)
        for at, byte in checksums.items():
            expected[at - begin] = byte
        if expected != chunk:
            raise NotTheBase(self._wrong(chunk, begin, expected, masked))

    def _wrong(self, chunk: bytes, begin: int, expected: bytearray, masked: Sequence[Extent]) -> str:
        """What is wrong first: an element that should be zero, else a byte that is not the base's."""
        data = np.frombuffer(chunk, np.uint8)
        for extent in masked:
            for at, dead, run in _dead_bytes(extent, begin, begin + len(chunk)):
                wrong = np.flatnonzero(data[at - begin : at - begin + dead.size].astype(np.bool_) & dead)
                if wrong.size:
                    element = extent.box.element(run.first + (at + int(wrong[0]) - run.start) // extent.box.itemsize)
                    return f"{self.key}: element {list(element)} of {extent.name} is pruned but not zero"
        other = begin + int(np.flatnonzero(np.frombuffer(expected, np.uint8) != data)[0])
        return f"{self.key} differs from its base at byte {other:,}, where no mask prunes anything"


def _zero(chunk: bytearray, begin: int, extent: Extent) -> None:
    """Zero what must be zero of one box, in a chunk that begins at byte `begin` of the object."""
    assert extent.dead is not None
    size, end = extent.box.itemsize, begin + len(chunk)
    for run in extent.box.runs(begin, end):
        first = max(begin - run.start, 0) // size
        last = min(-(-(end - run.start) // size), run.size)
        # Whole elements at once, whatever their dtype: zero is the zero byte. The format aligns nothing, so that a
        # chunk may begin and end inside an element; of these it holds some bytes only.
        low, high = first + (run.start + first * size < begin), last - (run.start + last * size > end)
        if low < high:
            flat = np.frombuffer(chunk, dtype=f"<u{size}", count=high - low, offset=run.start + low * size - begin)
            extent.dead.zero(flat, run.first + low)
        for cut in {first, last - 1}:
            if not low <= cut < high and extent.dead.touches(run.first + cut, run.first + cut + 1):
                at = max(run.start + cut * size, begin) - begin
                stop = min(run.start + (cut + 1) * size, end) - begin
                chunk[at:stop] = bytes(stop - at)


def _dead_bytes(extent: Extent, begin: int, end: int) -> Iterator[tuple[int, NDArray[np.bool_], Run]]:
    """Pieces (first byte in the object, which bytes must be zero) of the box's part in [begin, end), with their run."""
    if extent.dead is None:
        return
    size = extent.box.itemsize
    for run in extent.box.runs(begin, end):
        first = max(begin - run.start, 0) // size
        last = min(-(-(end - run.start) // size), run.size)
        for start in range(first, last, _WINDOW):
            stop = min(start + _WINDOW, last)
            dead = np.repeat(extent.dead.range(run.first + start, run.first + stop), size)
            at = run.start + start * size
            lower, upper = max(at, begin), min(at + dead.size, end)
            yield lower, dead[lower - at : upper - at], run


def _must_be_finite(key: str, chunk: bytes, begin: int, tail: bytes, extent: Extent) -> None:
    """Every element that ends in this chunk; one that began in the chunk before has its first bytes in `tail`."""
    size, view = extent.box.itemsize, memoryview(chunk)
    for run in extent.box.runs(begin, begin + len(chunk)):
        first = max(begin - run.start, 0) // size
        last = min((begin + len(chunk) - run.start) // size, run.size)
        if first < last and (cut := begin - (run.start + first * size)) > 0:
            _finite(key, extent, tail[-cut:] + chunk[: size - cut], run.first + first)
            first += 1
        for start in range(first, last, _WINDOW):
            stop = min(start + _WINDOW, last)
            at = run.start + start * size - begin
            _finite(key, extent, view[at : at + (stop - start) * size], run.first + start)


def _finite(key: str, extent: Extent, raw: bytes | memoryview, first: int) -> None:
    values = elements(raw, extent.dtype)
    wrong = np.flatnonzero(~np.isfinite(values))
    if wrong.size:
        raise Malformed(
            f"{key}: element {first + int(wrong[0])} of {extent.name} is {values[wrong[0]]}; weights must be finite, "
            "publish a checkpoint of a training that has not diverged"
        )
