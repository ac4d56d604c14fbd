"""Candidates made by hand: a checkpoint, a decision, masks, and a masked copy that a test may spoil."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from builders import RUN_ID, Tensor, masks_of, safetensors, write_masks
from leyline import layout
from leyline.digest import digest_bytes
from leyline.masks import Masks
from leyline.messages import (
    Candidate,
    CheckpointMetadata,
    Decision,
    EvaluationRef,
    GroupDecision,
    MaskRef,
    PruningValidationRequest,
    Stage,
    StoredObject,
)
from leyline.ready import seal_ready
from leyline.store import ObjectStore
from leyline.tensors import ITEMSIZE
from leyline.topology import Topology

CYCLE = "c1-0123456789"
BASE = 1
WEIGHTS = "model.safetensors"
OPTIMIZER = "optimizer.safetensors"


@dataclass(frozen=True)
class Staged:
    """What stage() wrote, and the names under which urabrask finds it."""

    store: ObjectStore
    metadata: CheckpointMetadata
    candidate: Candidate
    masks: Masks
    request: PruningValidationRequest


def publish(
    store: ObjectStore,
    topology: Topology,
    weights: Mapping[str, Tensor],
    *,
    slots: Mapping[str, Tensor] | None = None,
    evaluation: tuple[bytes, bytes] | None = None,
    function: str | None = None,
    step: int = 100,
    pad: int = 8,
    keys: Any = (),
) -> CheckpointMetadata:
    """A checkpoint with its READY.json. `evaluation`: the program's file and the evaluation set's."""
    name = f"{step}-0-{step:08x}"
    objects = {WEIGHTS: safetensors(weights, pad=pad), "topology.json": topology.canonical()}
    if slots:
        objects[OPTIMIZER] = safetensors(slots)
    ref = None
    if evaluation:
        objects |= {"program.safetensors": evaluation[0], "evaluation.safetensors": evaluation[1]}
        program = None if function else "program.safetensors"
        ref = EvaluationRef(data="evaluation.safetensors", program=program, function=function)
    metadata = CheckpointMetadata(
        idempotency_key=name,
        run_id=RUN_ID,
        model_id=topology.model_id,
        name=name,
        step=step,
        epoch=1,
        term=0,
        format="safetensors",
        weights=(WEIGHTS,),
        optimizer=OPTIMIZER if slots else None,
        topology="topology.json",
        evaluation=ref,
        objects=tuple(StoredObject(path=path, digest=digest_bytes(data)) for path, data in objects.items()),
        num_params=sum(parameter.size for parameter in topology.parameters.values()),
        num_bytes=len(objects[WEIGHTS]),
    )
    for path, data in objects.items():
        store.put_if_absent(layout.checkpoint(name, path), data)
    store.put_if_absent(layout.checkpoint(name, layout.READY), seal_ready(metadata, keys))
    return metadata


def masked(tensors: Mapping[str, Tensor], masks: Masks, *, slots: bool = False) -> dict[str, Tensor]:
    """Copies with zeros where pruned."""
    return {name: _masked(name.rpartition("/")[0] if slots else name, one, masks) for name, one in tensors.items()}


def _masked(owner: str, one: Tensor, masks: Masks) -> Tensor:
    dead = masks.dead(owner)
    if dead is None or one.shape != dead.shape:
        return one
    values = np.frombuffer(one.raw, f"<u{ITEMSIZE[one.dtype]}").reshape(one.shape).copy()
    values[dead.full()] = 0
    return Tensor(one.dtype, one.shape, values.tobytes())


def stage(
    store: ObjectStore,
    metadata: CheckpointMetadata,
    topology: Topology,
    weights: Mapping[str, Tensor],
    pruned: Mapping[str, Iterable[int]],
    *,
    slots: Mapping[str, Tensor] | None = None,
    masks: Masks | None = None,
    inherited: Masks | None = None,
    copy: Mapping[str, Tensor] | None = None,
    slots_copy: Mapping[str, Tensor] | None = None,
    pad: int = 8,
    cycle: str = CYCLE,
    base: int = BASE,
    **asked: Any,
) -> Staged:
    """Decision, masks, masked objects, manifest and request for pruning these units.

    `masks` and `copy` replace what would be right; `asked` changes the request.
    """
    decision = Decision(
        cycle=cycle,
        base=base,
        checkpoint=metadata.name,
        stage=Stage.CONSERVATIVE,
        method="forced",
        policy_state="0" * 64,
        settings="0" * 64,
        groups=tuple(GroupDecision(group=id_, pruned=tuple(units)) for id_, units in pruned.items()),
    )
    store.put_if_absent(layout.decision(cycle), decision.canonical())
    before: MaskRef | None = None
    if inherited is not None:
        before = write_masks(store, "cycles/c0-0123456789/on-0/candidate/masks.safetensors", inherited)
    if masks is None:
        masks = masks_of(topology, pruned)
        masks = masks if inherited is None else inherited.union(masks)
    ref = write_masks(store, layout.masks(cycle, base), masks)
    objects = {WEIGHTS: safetensors(masked(weights, masks) if copy is None else copy, pad=pad)}
    if slots:
        objects[OPTIMIZER] = safetensors(masked(slots, masks, slots=True) if slots_copy is None else slots_copy)
    for path, data in objects.items():
        store.put_if_absent(layout.candidate(cycle, base, path), data)
    candidate = Candidate(
        cycle=cycle,
        base=base,
        checkpoint=metadata.name,
        decision=decision.sha256(),
        masks=ref,
        objects=tuple(StoredObject(path=path, digest=digest_bytes(data)) for path, data in objects.items()),
    )
    store.put_if_absent(layout.manifest(cycle, base), candidate.canonical())
    request = PruningValidationRequest(
        **{
            "idempotency_key": f"{cycle}/{base}",
            "cycle": cycle,
            "base": base,
            "checkpoint": metadata.name,
            "inherited": before,
            "reference": metadata.name,
            "candidate": candidate.sha256(),
            "accuracy_drop": 0.02,
            "cumulative_drop": 0.04,
            "min_channel_retention": 0.5,
            "min_attention_heads": 2,
            "max_layer_removal": 0.25,
            **asked,
        }
    )
    store.put_if_absent(layout.validation_request(cycle, base), request.canonical())
    return Staged(store, metadata, candidate, masks, request)
