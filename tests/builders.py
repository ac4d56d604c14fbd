"""Small real runs, written by hand with numpy: checkpoints as a trainer would publish them, without torch."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from leyline import layout
from leyline.digest import ObjectDigest, digest_bytes, sha256_hex
from leyline.ids import parameter_uuid
from leyline.masks import Masks
from leyline.messages import (
    CheckpointMetadata,
    CheckpointUpdate,
    Decision,
    Format,
    GroupDecision,
    MaskRef,
    Stage,
    StoredObject,
    WeightDecision,
    WorkLimits,
)
from leyline.ready import seal_ready
from leyline.store import Data, ObjectStore
from leyline.topology import Group, Kind, Member, Parameter, Topology

MODEL_ID = "toy"
RUN_ID = "toy-run"


@dataclass(frozen=True)
class Tensor:
    """A stored tensor: dtype in safetensors' words, shape, raw little-endian bytes."""

    dtype: str
    shape: tuple[int, ...]
    raw: bytes


@dataclass(frozen=True)
class Run:
    """What make_run wrote."""

    store: ObjectStore
    metadata: CheckpointMetadata
    topology: Topology
    weights: Mapping[str, Tensor]
    slots: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def prefix(self) -> str:
        return layout.checkpoint(self.metadata.name)


def tensor(values: NDArray[np.floating] | NDArray[np.integer], dtype: str) -> Tensor:
    """`values` as F64, F32, F16, BF16 (cut, not rounded) or I64."""
    match dtype:
        case "BF16":
            raw = (np.asarray(values, "<f4").view("<u4") >> np.uint32(16)).astype("<u2").tobytes()
        case _:
            raw = np.asarray(values, {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8"}[dtype]).tobytes()
    return Tensor(dtype, values.shape, raw)


def toy_topology(width: int = 8) -> Topology:
    """A convolution with its norm feeding a linear layer, an attention of four heads, and a tied embedding.

    One group of `width` channels ("conv1") and one of four heads ("attn"); "lm.weight" is tied to "embed.weight".
    """
    shapes: dict[str, tuple[int, ...]] = {
        "conv1.weight": (width, 3, 3, 3),
        "conv1.bias": (width,),
        "norm1.weight": (width,),
        "norm1.bias": (width,),
        "fc.weight": (16, width),
        "fc.bias": (16,),
        "attn.q.weight": (16, 16),
        "attn.k.weight": (16, 16),
        "attn.v.weight": (16, 16),
        "attn.out.weight": (16, 16),
        "embed.weight": (10, 16),
        "scale": (),
    }
    channels = Group(
        id="conv1",
        kind=Kind.CHANNEL,
        units=width,
        members=(
            Member(parameter="conv1.weight", role="producer", axis=0),
            Member(parameter="conv1.bias", role="producer", axis=0),
            Member(parameter="norm1.weight", role="norm", axis=0),
            Member(parameter="norm1.bias", role="norm", axis=0),
            Member(parameter="fc.weight", role="consumer", axis=1),
        ),
        gates=("norm1",),
    )
    heads = Group(
        id="attn",
        kind=Kind.HEAD,
        units=4,
        members=(
            *(Member(parameter=f"attn.{name}.weight", role="producer", axis=0, block=4) for name in "qkv"),
            Member(parameter="attn.out.weight", role="consumer", axis=1, block=4),
        ),
        gates=("attn.out",),
    )
    parameters = {
        name: Parameter(
            uuid=parameter_uuid(name, shape, MODEL_ID),
            shape=shape,
            aliases=("lm.weight",) if name == "embed.weight" else (),
        )
        for name, shape in shapes.items()
    }
    return Topology(model_id=MODEL_ID, parameters=parameters, groups=(channels, heads))


def toy_weights(topology: Topology, dtype: str = "F32", seed: int = 0) -> dict[str, Tensor]:
    """Normal values for every parameter, and the buffers a model has: statistics, a counter, an empty tensor."""
    random = np.random.default_rng(seed)
    weights = {name: tensor(random.normal(size=p.shape), dtype) for name, p in topology.parameters.items()}
    width = topology.parameters["conv1.bias"].shape[0]
    weights["norm1.running_mean"] = tensor(random.normal(size=width), "F32")
    weights["norm1.num_batches_tracked"] = tensor(np.array(7), "I64")
    weights["empty"] = tensor(np.zeros((0, 4)), dtype)
    return weights


def toy_slots(topology: Topology, seed: int = 1) -> dict[str, Tensor]:
    """Adam's slots: `<param>/exp_avg`, `<param>/exp_avg_sq` in float32 and the scalar `<param>/step`."""
    random = np.random.default_rng(seed)
    slots = {}
    for name, parameter in topology.parameters.items():
        slots[f"{name}/exp_avg"] = tensor(random.normal(size=parameter.shape), "F32")
        slots[f"{name}/exp_avg_sq"] = tensor(random.normal(size=parameter.shape) ** 2, "F32")
        slots[f"{name}/step"] = tensor(np.array(100.0), "F32")
    return slots


def safetensors(tensors: Mapping[str, Tensor], *, pad: int = 8) -> bytes:
    """A file with the tensors in the order given; `pad` 1 leaves data at any offset, aligned to nothing."""
    header, position = {}, 0
    for name, one in tensors.items():
        offsets = [position, position + len(one.raw)]
        header[name] = {"dtype": one.dtype, "shape": list(one.shape), "data_offsets": offsets}
        position = offsets[1]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % pad)
    return b"".join([struct.pack("<Q", len(text)), text, *(one.raw for one in tensors.values())])


def sharded(tensors: Mapping[str, Tensor], shards: int) -> dict[str, bytes]:
    """The objects of a sharded checkpoint by path: shards in the names transformers gives, and the index."""
    names = list(tensors)
    objects, weight_map = {}, {}
    for number in range(shards):
        path = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = names[number::shards]
        objects[path] = safetensors({name: tensors[name] for name in part})
        weight_map |= dict.fromkeys(part, path)
    document = {"metadata": {"total_size": sum(len(t.raw) for t in tensors.values())}, "weight_map": weight_map}
    return {**objects, "model.safetensors.index.json": json.dumps(document).encode()}


def make_run(
    store: ObjectStore,
    *,
    topology: Topology | None = None,
    weights: Mapping[str, Tensor] | None = None,
    slots: Mapping[str, Tensor] | None = None,
    dtype: str = "F32",
    shards: int = 1,
    step: int = 100,
    importance: bytes | None = None,
    more: Mapping[str, bytes] | None = None,
    written: Mapping[str, tuple[Iterable[Data], ObjectDigest]] | None = None,
    pad: int = 8,
    stored: tuple[Format, Mapping[str, bytes]] | None = None,
) -> Run:
    """Write one checkpoint with READY.json, unsigned. `importance` becomes importance.safetensors, `more` as it is.

    `stored` are the weights' objects in another format. `written` streams the weights, too large for memory, instead
    of `weights`. The log is not touched.
    """
    topology = topology or toy_topology()
    written = written or {}
    weights = {} if written else toy_weights(topology, dtype) if weights is None else weights
    objects: dict[str, bytes] = {}
    if not written:
        objects = {"model.safetensors": safetensors(weights, pad=pad)} if shards == 1 else sharded(weights, shards)
    form: Format = "safetensors" if shards == 1 else "safetensors-sharded"
    if stored:
        form, objects = stored[0], dict(stored[1])
    paths = (*written, *objects)
    listed = [StoredObject(path=path, digest=digest) for path, (_, digest) in written.items()]
    for path, (chunks, digest) in written.items():
        store.put_stream(layout.checkpoint(f"{step}-0-{step:08x}", path), chunks, size=digest.size)
    if slots:
        objects["optimizer.safetensors"] = safetensors(slots)
    objects["topology.json"] = topology.canonical()
    if importance is not None:
        objects["importance.safetensors"] = importance
    objects |= more or {}
    listed += [StoredObject(path=path, digest=digest_bytes(data)) for path, data in objects.items()]
    name = f"{step}-0-{step:08x}"
    metadata = CheckpointMetadata(
        idempotency_key=name,
        run_id=RUN_ID,
        model_id=topology.model_id,
        name=name,
        step=step,
        epoch=1,
        term=0,
        format=form,
        weights=paths,
        optimizer="optimizer.safetensors" if slots else None,
        topology="topology.json",
        importance=None if importance is None else "importance.safetensors",
        objects=tuple(listed),
        num_params=sum(parameter.size for parameter in topology.parameters.values()),
        num_bytes=sum(stored.digest.size for stored in listed if stored.path in paths),
    )
    for path, data in objects.items():
        store.put_if_absent(layout.checkpoint(name, path), data)
    store.put_if_absent(layout.checkpoint(name, layout.READY), seal_ready(metadata, ()))
    return Run(store, metadata, topology, weights, slots or {})


def write_masks(store: ObjectStore, path: str, masks: Masks) -> MaskRef:
    data = masks.to_bytes()
    store.put_if_absent(path, data)
    return MaskRef(path=path, digest=sha256_hex(data), counts=masks.counts())


def masks_of(topology: Topology, pruned: Mapping[str, Iterable[int]]) -> Masks:
    """Masks with these units pruned, by group id."""
    units = {}
    for id_, gone in pruned.items():
        units[id_] = np.ones(topology.group(id_).units, dtype=np.bool_)
        units[id_][list(gone)] = False
    groups = {id_: topology.group(id_) for id_ in units}
    named = {member.parameter for group in groups.values() for member in group.members}
    parameters = {name: topology.parameters[name] for name in sorted(named)}
    return Masks(model_id=topology.model_id, groups=groups, units=units, parameters=parameters)


def decide(
    run: Run,
    pruned: Mapping[str, Iterable[int]],
    *,
    weights: tuple[WeightDecision, ...] = (),
    inherited: MaskRef | None = None,
    limits: WorkLimits | None = None,
    cycle: str = "c1-0123456789",
    base: int = 1,
) -> CheckpointUpdate:
    """Write decision.json and update.json: prune these units (and weights) of the run's checkpoint."""
    decision = Decision(
        cycle=cycle,
        base=base,
        checkpoint=run.metadata.name,
        stage=Stage.CONSERVATIVE,
        method="basic" if weights else "forced",
        policy_state="0" * 64,
        settings="0" * 64,
        inherited=inherited,
        groups=tuple(GroupDecision(group=id_, pruned=tuple(units)) for id_, units in pruned.items()),
        weights=weights,
    )
    update = CheckpointUpdate(
        idempotency_key=f"{cycle}/{base}",
        cycle=cycle,
        base=base,
        checkpoint=run.metadata.name,
        decision=decision.sha256(),
        inherited=inherited,
        limits=limits or WorkLimits(beat_seconds=0.5),
    )
    run.store.put_if_absent(layout.decision(cycle), decision.canonical())
    run.store.put_if_absent(layout.update(cycle, base), update.canonical())
    return update
