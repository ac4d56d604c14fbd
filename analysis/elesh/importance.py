"""The importance file of a checkpoint: opened once, checked against checkpoint and topology, read by range."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from elesh.reading import Extent, PlainObject, Source
from elesh.scorers import GateStatistics, Half
from kasmina.formats import FLOATS
from leyline import layout
from leyline.crypt import DATA_KEY, KeyRing, SealedObject, WrongKey
from leyline.messages import CheckpointMetadata, ImportanceStats, StoredObject
from leyline.model import Malformed
from leyline.reasons import Reason
from leyline.sketch import estimate
from leyline.store import CHUNK, Changed, Damaged, NotFound, ObjectStore
from leyline.tensors import ITEMSIZE, Entry, header_length, parse_header
from leyline.topology import Group, Topology

Vector = NDArray[np.float64]
T = TypeVar("T")

_SEALED = b"EMRKAES1"


class ImportanceTrouble(Exception):
    """The statistics cannot be used; the weights may be fine."""

    def __init__(self, reason: Reason, sentence: str) -> None:
        super().__init__(sentence)
        self.reason = reason


class Importance:
    """The statistics of one checkpoint. Every method may raise ImportanceTrouble."""

    def __init__(
        self,
        name: str,
        source: Source,
        entries: dict[str, Entry],
        stats: ImportanceStats,
        topology: Topology,
    ) -> None:
        self.stats = stats
        self._name, self._source, self._entries, self._topology = name, source, entries, topology
        self._chunk: tuple[int, bytes] | None = None
        self._table: tuple[str, NDArray[np.float32]] | None = None

    @classmethod
    def open(cls, store: ObjectStore, metadata: CheckpointMetadata, topology: Topology, ring: KeyRing | None) -> Self:
        """Read header and message, decrypting if need be; foreign or corrupt files are refused.

        WrongKey if it is encrypted under a key that we do not have.
        """
        if metadata.importance is None:
            raise ImportanceTrouble(
                Reason.NO_IMPORTANCE,
                f"checkpoint {metadata.name} has no statistics",
            )
        name = layout.checkpoint(metadata.name, metadata.importance)
        stored = metadata.object(metadata.importance)
        source = _told(name, lambda: _source(name, store, stored, metadata.name, ring))
        return _told(name, lambda: cls._open(name, source, metadata, topology))

    @classmethod
    def _open(cls, name: str, source: Source, metadata: CheckpointMetadata, topology: Topology) -> Self:
        length = header_length(source.read(0, min(8, source.size)), source.size, name=name)
        entries, texts = parse_header(source.read(0, length), source.size, name=name)
        if "importance" not in texts:
            raise Malformed(f"{name} has no ImportanceStats in its metadata")
        stats = ImportanceStats.parse(texts["importance"].encode(), name=name)
        if stats.run_id != metadata.run_id or metadata.name not in (stats.checkpoint, *stats.lineage):
            raise ImportanceTrouble(
                Reason.IMPORTANCE_FOREIGN,
                f"{name} holds statistics of checkpoint {stats.checkpoint} of run {stats.run_id}, which do not belong "
                f"to {metadata.name} of run {metadata.run_id}",
            )
        if unknown := set(stats.groups) - {group.id for group in topology.groups}:
            raise ImportanceTrouble(
                Reason.IMPORTANCE_FOREIGN, f"{name} speaks of group {min(unknown)}, which the topology does not have"
            )
        if metadata.statistics is not None and metadata.statistics != stats:
            raise Malformed(f"{name} says other things of its statistics than READY.json does")
        return cls(name, source, entries, stats, topology)

    def group(self, group: Group, live: NDArray[np.bool_]) -> GateStatistics | None:
        """What was kept at the group's gates, or None if it was not tracked."""
        if group.id not in self.stats.groups:
            return None
        return _told(self._name, lambda: self._group(group, live))

    def _group(self, group: Group, live: NDArray[np.bool_]) -> GateStatistics:
        return GateStatistics(
            units=group.units,
            live=live,
            odd=self._half(group, "odd"),
            even=self._half(group, "even"),
            cosines=self._cosines(group),
            gram=self._gram(group),
            inputs=self._vector(f"{group.id}/in", group.units),
        )

    def knows_weights(self) -> bool:
        """Whether the diagonal Fisher of every parameter is here: scores of some and magnitudes of others would not
        compare."""
        return all(f"weight/{name}" in self._entries for name in self._topology.parameters)

    def fisher(self, parameter: str, start: int, stop: int) -> tuple[Extent, str] | None:
        """Where the Fisher of elements [start, stop) of a parameter lies, and its dtype; None where it is a sketch."""
        entry, known = self._entries[f"weight/{parameter}"], self._topology.parameters[parameter]
        if entry.shape != known.shape:
            return None
        if entry.dtype not in FLOATS:
            raise ImportanceTrouble(
                Reason.IMPORTANCE_CORRUPT,
                _about(self._name, f"weight/{parameter} is of {entry.dtype}, which is no float"),
            )
        width = ITEMSIZE[entry.dtype]
        return Extent(self._source, entry.start + start * width, entry.start + stop * width), entry.dtype

    def estimate(self, parameter: str, start: int, stop: int) -> NDArray[np.float32]:
        """The sketch's estimates of the Fisher of elements [start, stop): never below the truth."""
        if self._table is None or self._table[0] != parameter:
            self._table = (parameter, _told(self._name, lambda: self._sketch(parameter)))
        return np.asarray(estimate(self._table[1], start, stop, self._topology.parameters[parameter].uuid))

    def _sketch(self, parameter: str) -> NDArray[np.float32]:
        entry = self._entries[f"weight/{parameter}"]
        rows, cells = entry.shape if len(entry.shape) == 2 else (0, 0)
        if entry.dtype != "F32" or not rows or cells < 2 or cells & (cells - 1):
            raise Malformed(
                f"{self._name}: weight/{parameter} is {entry.dtype} {list(entry.shape)}, neither the Fisher of "
                f"{list(self._topology.parameters[parameter].shape)} nor a sketch (F32, a power of two cells a row)"
            )
        return np.frombuffer(self._source.read(entry.start, entry.stop), dtype="<f4").reshape(rows, cells)

    def _half(self, group: Group, half: str) -> Half | None:
        weights = self._vector(f"{group.id}/{half}/n", 2)
        if weights is None or weights[0] == 0:
            return None
        absolute, squares, activity = (
            self._vector(f"{group.id}/{half}/{kind}", group.units) for kind in ("abs", "sq", "act")
        )
        return Half(weights, absolute, squares, activity)

    def _cosines(self, group: Group) -> Vector | None:
        found = self._vector(f"{group.id}/cos", 2, signed=True)
        if found is not None and abs(found[0]) > found[1] * (1 + 1e-6):
            raise Malformed(f"{self._name}: {group.id}/cos sums {found[1]} cosines to {found[0]}")
        return found

    def _gram(self, group: Group) -> Vector | None:
        entry = self._entries.get(f"{group.id}/gram")
        if entry is None:
            return None
        heads = entry.shape[0] if entry.shape else 0
        if heads not in (group.units, group.units * group.heads_per_unit):
            raise Malformed(
                f"{self._name}: {group.id}/gram has shape {list(entry.shape)}; {group.units} units are known"
            )
        return self._array(f"{group.id}/gram", (heads, heads), signed=True)

    def _vector(self, name: str, size: int, *, signed: bool = False) -> Vector | None:
        return self._array(name, (size,), signed=signed) if name in self._entries else None

    def _array(self, name: str, shape: tuple[int, ...], *, signed: bool) -> Vector:
        entry = self._entries[name]
        if entry.dtype != "F64" or entry.shape != shape:
            raise Malformed(f"{self._name}: {name} is {entry.dtype} {list(entry.shape)}; expected is F64 {list(shape)}")
        values = np.frombuffer(self._bytes(entry.start, entry.stop), dtype="<f8").reshape(shape)
        if not np.isfinite(values).all() or (not signed and (values < 0).any()):
            raise Malformed(f"{self._name}: {name} holds {'NaN or infinity' if signed else 'what is no count'}")
        return values

    def _bytes(self, start: int, stop: int) -> bytes:
        """Small tensors lie side by side: one chunk serves them all."""
        number = start // CHUNK
        if stop > (number + 1) * CHUNK:
            return self._source.read(start, stop)
        if self._chunk is None or self._chunk[0] != number:
            self._chunk = (number, self._source.read(number * CHUNK, min((number + 1) * CHUNK, self._source.size)))
        return self._chunk[1][start - number * CHUNK : stop - number * CHUNK]


def require_fisher(values: NDArray[np.float32] | NDArray[np.float64], name: str) -> None:
    """ImportanceTrouble unless every value is a mean of squares: finite and not negative."""
    if values.size and not (values.min() >= 0 and values.max() < np.inf):
        raise ImportanceTrouble(
            Reason.IMPORTANCE_CORRUPT, f"weight/{name} holds values that are negative, NaN or infinite"
        )


class _Told:
    """A source whose trouble is the statistics', not the weights'."""

    def __init__(self, name: str, source: Source | SealedObject) -> None:
        self._name, self._source = name, source

    @property
    def size(self) -> int:
        return self._source.size

    def read(self, start: int, stop: int) -> bytes:
        return _told(self._name, lambda: self._source.read(start, stop))


def _source(name: str, store: ObjectStore, stored: StoredObject, checkpoint: str, ring: KeyRing | None) -> Source:
    head = store.head(name)
    first = store.get_range(name, 0, min(len(_SEALED), head.size), pin=head.pin)
    if first != _SEALED:
        return _Told(name, PlainObject(store, name, stored.digest, pin=head.pin))
    if ring is None:
        raise WrongKey(f"{name} is encrypted, and {DATA_KEY} is not set; give this worker the data key")
    return _Told(name, SealedObject(store, name, checkpoint=checkpoint, ring=ring, pin=head.pin))


def _told(name: str, read: Callable[[], T]) -> T:
    try:
        return read()
    except (Malformed, Damaged, Changed, NotFound) as error:
        raise ImportanceTrouble(Reason.IMPORTANCE_CORRUPT, _about(name, str(error))) from error


def _about(name: str, said: str) -> str:
    return said if name in said else f"{name}: {said}"
