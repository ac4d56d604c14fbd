"""The weights of one checkpoint: where each parameter lies, ready to be read in pieces."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Self

from elesh.reading import Extent, GatheredTensor, PlainObject, Source
from elesh.squares import segments
from kasmina.formats import Chunks, TensorRef, bind, elements, read_index
from leyline import layout
from leyline.digest import ObjectDigest, verified_range
from leyline.messages import CheckpointMetadata, Slice
from leyline.partial import rows
from leyline.store import ObjectStore
from leyline.tensors import ITEMSIZE
from leyline.topology import Topology


class Segment(NamedTuple):
    """Elements [start, stop) of one parameter, all from one slice, and the bytes that hold them."""

    slice: Slice
    start: int
    stop: int
    extent: Extent
    dtype: str


@dataclass(frozen=True)
class Weights:
    """One checkpoint, its topology and its tensors."""

    store: ObjectStore
    metadata: CheckpointMetadata
    topology: Topology
    refs: dict[str, TensorRef]
    """By parameter."""
    chunks: int
    """That may be held of tensors in several pieces."""

    @classmethod
    def open(cls, store: ObjectStore, metadata: CheckpointMetadata, *, chunks: int = 4) -> Self:
        """Read topology and headers. Malformed, Damaged or Changed if they are not what READY.json says."""
        prefix = layout.checkpoint(metadata.name)
        digest = metadata.object(metadata.topology).digest
        data = verified_range(store, prefix + metadata.topology, digest, 0, digest.size)
        topology = Topology.parse(data, name=prefix + metadata.topology)
        # What else is listed is not ours to judge: bad statistics must not pass for bad weights.
        only = {"objects": tuple(stored for stored in metadata.objects if stored.path in metadata.weights)}
        bound = bind(read_index(store, prefix, metadata.model_copy(update=only)), topology)
        return cls(store, metadata, topology, {name: found[0] for name, found in bound.items()}, chunks)

    @property
    def held(self) -> int:
        """Chunks that are held of tensors in several pieces."""
        return 0 if all(ref.whole for ref in self.refs.values()) else self._pieces.keep

    @cached_property
    def _pins(self) -> dict[str, str]:
        """Of the objects that hold weights."""
        return {box.object: box.pin for ref in self.refs.values() for box in ref.boxes}

    @cached_property
    def _digests(self) -> dict[str, ObjectDigest]:
        return {path: self.metadata.object(path).digest for path in self._pins}

    @cached_property
    def _pieces(self) -> Chunks:
        prefix = layout.checkpoint(self.metadata.name)
        return Chunks(self.store, prefix, self._digests, self._pins, most=self.chunks)

    @cached_property
    def _sources(self) -> dict[str, tuple[Source, int]]:
        """What each parameter is read from, and the byte there at which it begins."""
        prefix = layout.checkpoint(self.metadata.name)
        objects = {
            path: PlainObject(self.store, prefix + path, self._digests[path], pin=pin)
            for path, pin in self._pins.items()
        }
        found: dict[str, tuple[Source, int]] = {}
        for name, ref in self.refs.items():
            whole = ref.whole
            found[name] = (objects[whole.object], whole.offset) if whole else (GatheredTensor(ref, self._pieces), 0)
        return found

    def as_they_lie(self, slices: Iterable[Slice]) -> list[Slice]:
        """The slices in the order of their bytes: read so, a chunk that several of them touch is read once."""
        return sorted(slices, key=self.place)

    def place(self, slice_: Slice) -> tuple[str, int, int]:
        """Orders slices as their bytes lie."""
        ref = self.refs[slice_.parameter]
        return ref.object, ref.boxes[0].offset, slice_.start

    def segments(self, slice_: Slice) -> list[Segment]:
        """The slice in pieces that one thread scores at a time. Malformed unless it is whole rows."""
        ref = self.refs[slice_.parameter]
        rows(slice_, ref.shape)
        elements(b"", ref.dtype)  # refuses what holds no floats before anything is read
        width, (source, begin) = ITEMSIZE[ref.dtype], self._sources[slice_.parameter]
        return [
            Segment(slice_, start, stop, Extent(source, begin + start * width, begin + stop * width), ref.dtype)
            for start, stop in segments(slice_.start, slice_.stop, ref.shape)
        ]
