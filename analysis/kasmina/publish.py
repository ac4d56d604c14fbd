"""Publishing a checkpoint: its objects, then READY.json, then one record. It counts once the record names it.

Nothing here is random and nothing is overwritten: the name's nonce comes from the content, so publishing the same
state again writes the same objects under the same names and finds its own record.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from numpy.typing import NDArray
from torch import Tensor, nn

from kasmina.evaluation import BATCH, DATA, PROGRAM, export_program, pack_data
from kasmina.tensor_files import Blob, Content, TensorFile, digest_of, weight_files
from kasmina.tracker import Source
from kasmina.training_state import Training
from leyline import layout, tensors
from leyline.crypt import KeyRing, encrypt, sealed_size
from leyline.digest import Digester, ObjectDigest, sha256_hex
from leyline.envelope import SigningKey
from leyline.fold import PairState, RunState
from leyline.ids import checkpoint_name
from leyline.log import Entry, Log, NotAllowed
from leyline.messages import (
    CheckpointMetadata,
    EvaluationRef,
    ImportanceStats,
    MaskRef,
    StoredObject,
    SystemStatePacket,
)
from leyline.model import Malformed
from leyline.ready import seal_ready
from leyline.records import Draft, Publish
from leyline.store import ObjectStore

OPTIMIZER = "optimizer.safetensors"
IMPORTANCE = "importance.safetensors"
TRACKER = "tracker.safetensors"

SHARD_BYTES = 5_000_000_000
"""Weights above this are written as shards, as transformers does."""

_LINEAGE = 8
_OVERTAKEN = 10
"""Times that the masks may change between reading the log and appending to it."""


class PublishRefused(Exception):
    """The log refuses this checkpoint: the run was rolled back, or another trainer has it. Its objects are unnamed."""


@dataclass(frozen=True)
class Evaluation:
    """How accuracy is measured on a checkpoint: objects, and what READY.json says of them."""

    ref: EvaluationRef
    files: Mapping[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Written:
    """A checkpoint that exists, and that no record names yet."""

    metadata: CheckpointMetadata
    ready: str
    """SHA-256 of READY.json."""

    @property
    def name(self) -> str:
        return self.metadata.name


class EvaluationExport:
    """Exports the forward pass once: tracing takes seconds, and the program holds no weights."""

    def __init__(self) -> None:
        self._programs: dict[tuple[object, ...], bytes] = {}

    def of(
        self,
        model: nn.Module,
        data: tuple[Tensor | Sequence[Tensor], Tensor | None],
        function: str | None,
        *,
        answering: nn.Module | None = None,
        batch: int = BATCH,
    ) -> Evaluation:
        """`data`: inputs, each [N, ...], and the right classes [N] or None. `function`: the user's own instead.

        `answering`: a module that holds `model` and returns logits, where `model` itself returns something else.
        """
        inputs = (data[0],) if isinstance(data[0], Tensor) else tuple(data[0])
        files = {DATA: pack_data(inputs, data[1])}
        if function is not None:
            return Evaluation(EvaluationRef(data=DATA, function=function), files)
        shape = (*((tuple(each.shape[1:]), each.dtype) for each in inputs), answering, batch)
        if shape not in self._programs:
            whole = model if answering is None else answering
            self._programs[shape] = export_program(whole, inputs, prefix=_place(model, whole), batch=batch)
        files[PROGRAM] = self._programs[shape]
        return Evaluation(EvaluationRef(data=DATA, program=PROGRAM), files)


def _place(model: nn.Module, whole: nn.Module) -> str:
    """The prefix of `model`'s tensors in `whole`: "" where they are one. Malformed if `whole` does not hold it."""
    for name, module in whole.named_modules():
        if module is model:
            return f"{name}." if name else ""
    raise Malformed(
        f"{type(whole).__name__} does not hold the {type(model).__name__} that is published, so its answers would say "
        "nothing of it; give an evaluation model that has it as a submodule"
    )


def write_checkpoint(
    store: ObjectStore,
    training: Training,
    *,
    run_id: str,
    step: int,
    epoch: int,
    term: int,
    source: Source = "tracked",
    lineage: tuple[str, ...] = (),
    baked: MaskRef | None = None,
    evaluation: Evaluation | None = None,
    shard_bytes: int = SHARD_BYTES,
    keys: Sequence[SigningKey] = (),
    ring: KeyRing | None = None,
) -> Written:
    """Write the objects, then READY.json. With `ring` the statistics are encrypted.

    `source`: which of the tracker's statistics go with it.

    IsolationLeak, before anything is written, if a foreign gradient was seen.
    """
    tracker = training.tracker
    if tracker is not None:
        tracker.check_isolation()
    weights = weight_files(*training.weights(), shard_bytes)
    files = dict(weights)
    if training.keeps_slots:
        slots, numbers = training.slots()
        files[OPTIMIZER] = TensorFile(slots, numbers)
    files[layout.TOPOLOGY] = Blob(training.topology.canonical())
    files |= {path: Blob(data) for path, data in (evaluation.files if evaluation else {}).items()}
    statistics: _Statistics | None = None
    if tracker is not None:
        files[TRACKER] = Blob(tracker.state())
        stats, arrays = tracker.stats(checkpoint="", run_id=run_id, step=step, source=source)
        if arrays:
            statistics = _Statistics(stats, arrays)
    digests = {path: digest_of(content) for path, content in files.items()}
    said = (str(epoch), baked.digest if baked else "", str(evaluation.ref.function) if evaluation else "")
    name = checkpoint_name(step, term, _nonce(said, digests, statistics))
    if statistics is not None:
        statistics = statistics.named(run_id, name, lineage)
        files[IMPORTANCE] = statistics.content(name, ring)
        digests[IMPORTANCE] = digest_of(files[IMPORTANCE])
    for path, content in files.items():
        _write(store, layout.checkpoint(name, path), content, digests[path])
    metadata = CheckpointMetadata(
        idempotency_key=name,
        run_id=run_id,
        model_id=training.topology.model_id,
        name=name,
        step=step,
        epoch=epoch,
        term=term,
        format="safetensors" if len(weights) == 1 else "safetensors-sharded",
        weights=tuple(weights),
        optimizer=OPTIMIZER if OPTIMIZER in files else None,
        topology=layout.TOPOLOGY,
        importance=IMPORTANCE if statistics else None,
        evaluation=evaluation.ref if evaluation else None,
        tracker=TRACKER if tracker is not None else None,
        objects=tuple(StoredObject(path=path, digest=digest) for path, digest in digests.items()),
        baked=baked,
        num_params=sum(parameter.size for parameter in training.topology.parameters.values()),
        num_bytes=sum(digests[path].size for path in weights),
        statistics=statistics.stats if statistics else None,
    )
    ready = seal_ready(metadata, keys)
    store.put_if_absent(layout.checkpoint(name, layout.READY), ready)
    return Written(metadata=metadata, ready=sha256_hex(ready))


def append_publish(log: Log, written: Written, *, report: SystemStatePacket | None, base: int) -> Entry:
    """The record. Its masks are the tip's, so they are read again when the tip moved meanwhile.

    `base`: a record that is older than this checkpoint. PublishRefused where the rules forbid it for good.
    """
    metadata = written.metadata
    for _ in range(_OVERTAKEN):
        state = log.tail().state
        masks = _tip_masks(state)
        draft = Draft(
            id=metadata.name,
            checkpoint=metadata.name,
            masks=masks,
            baked=metadata.baked,
            body=Publish(step=metadata.step, epoch=metadata.epoch, term=metadata.term, report=report),
            evidence={layout.checkpoint(metadata.name, layout.READY): written.ready},
        )
        known = _published(state, metadata.name)
        try:
            return log.append(draft, base=base if known is None else min(base, known.record - 1))
        except NotAllowed as error:
            now = log.tail().state
            if now.term != metadata.term or _tip_masks(now) == masks:
                raise PublishRefused(str(error)) from error
    raise PublishRefused(f"checkpoint {metadata.name}: the run's masks changed {_OVERTAKEN} times in a row; try again")


def lineage_of(state: RunState) -> tuple[str, ...]:
    """The checkpoints that the next one descends from, newest first."""
    tip = state.tip_pair
    chain = (tip, *state.ancestors(tip.record)) if tip else ()
    return tuple(dict.fromkeys(pair.checkpoint for pair in chain))[:_LINEAGE]


def _tip_masks(state: RunState) -> MaskRef | None:
    return state.tip_pair.masks if state.tip_pair else None


def _published(state: RunState, name: str) -> PairState | None:
    return next((pair for pair in state.pairs if pair.checkpoint == name and pair.candidate is None), None)


@dataclass(frozen=True)
class _Statistics:
    stats: ImportanceStats
    arrays: Mapping[str, NDArray[Any]]

    def named(self, run_id: str, name: str, lineage: tuple[str, ...]) -> _Statistics:
        # published once already, the checkpoint heads its own lineage
        before = lineage[lineage.index(name) + 1 :] if name in lineage else lineage
        said = {"checkpoint": name, "idempotency_key": f"{run_id}/{name}/importance", "lineage": before}
        return _Statistics(self.stats.model_copy(update=said), self.arrays)

    def packed(self) -> bytes:
        return tensors.pack(self.arrays, {"importance": self.stats.canonical().decode()})

    def content(self, name: str, ring: KeyRing | None) -> Content:
        plain = Blob(self.packed())
        return plain if ring is None else _Sealed(plain, digest_of(plain), name, ring)


@dataclass(frozen=True)
class _Sealed:
    plain: Blob
    digest: ObjectDigest
    checkpoint: str
    ring: KeyRing

    @property
    def size(self) -> int:
        return sealed_size(self.plain.size)

    def __iter__(self) -> Iterator[bytearray]:
        key = layout.checkpoint(self.checkpoint, IMPORTANCE)
        return encrypt(self.plain, digest=self.digest, key=key, checkpoint=self.checkpoint, ring=self.ring)


class _Watched:
    """The content, digested once more while it is written."""

    def __init__(self, content: Content) -> None:
        self._content = content
        self.digest: ObjectDigest | None = None

    def __iter__(self) -> Iterator[bytes | bytearray]:
        digester = Digester()
        for chunk in self._content:
            digester.update(chunk)
            yield chunk
        self.digest = digester.finish()


def _write(store: ObjectStore, key: str, content: Content, digest: ObjectDigest) -> None:
    watched = _Watched(content)
    store.put_stream(key, watched, size=digest.size, digests=digest.chunks)
    if watched.digest is not None and watched.digest != digest:
        raise Malformed(f"{key} changed while it was written; do not train while publishing, and publish again")


def _nonce(said: Sequence[str], digests: Mapping[str, ObjectDigest], statistics: _Statistics | None) -> str:
    """8 hex digits of everything that the checkpoint holds and READY.json says."""
    whole = hashlib.sha256("\0".join(said).encode())
    for path in sorted(digests):
        whole.update(f"{path}\0{digests[path].root}\0".encode())
    if statistics is not None:
        whole.update(statistics.packed())
    return whole.hexdigest()[:8]
