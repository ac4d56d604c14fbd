"""The apply worker: writes the candidate, the base checkpoint with everything zero that is pruned.

Reads update.json and what it names; writes candidate/masks.safetensors, the masked objects, and last of all
candidate/MANIFEST.json. Whoever finishes last writes that; its content is the same whoever it is.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kasmina.formats import TensorRef, bind, read_index, read_slots
from kasmina.rewrite import Zeroes, copy_masked, zeroed_weights, zeroes_of
from leyline import exits, layout, tensors
from leyline.answers import with_result
from leyline.bits import HELD, Bits, Packed, PackedBits, Slice, Slices, StoredFile, ones
from leyline.candidate import Copied, copy_tasks, get_named, named_by_the_cycle
from leyline.claims import Task, share
from leyline.digest import sha256_hex, verified_range
from leyline.envelope import Trust, trust_from_environment
from leyline.masks import MaskFile, Masks
from leyline.messages import (
    Candidate,
    CheckpointMetadata,
    CheckpointUpdate,
    Decision,
    MaskRef,
    StoredObject,
    WeightDecision,
)
from leyline.model import Malformed, canonical_json
from leyline.open import open_store
from leyline.ready import read_ready
from leyline.store import CHUNK, Damaged, Exists, NotFound, ObjectStore, Refused, StoreError, Unreachable, Unsuitable
from leyline.topology import Topology
from leyline.work import Meter

_RESIDENT = 10
"""Chunks' worth of memory that a worker needs besides: interpreter and libraries, and what a store has in flight."""
_ANSWERS = 4
"""Answers that are held: pieces of a mask may begin inside one, and small tensors of one be apart in the mask file."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything a worker needs to know, read once."""

    update: CheckpointUpdate
    metadata: CheckpointMetadata
    masks: Masks
    """Those of single weights are put together from the answers whenever they are asked for."""
    weights: Mapping[str, int]
    """How many lie in each object."""
    tensors: Mapping[str, TensorRef]
    slots: Mapping[str, TensorRef]

    def zeroes(self, masks: Masks) -> tuple[Zeroes, ...]:
        """What the masks prune, by where it lies. Malformed if they do not fit the tensors."""
        return (*zeroes_of(self.tensors, masks, slots=False), *zeroes_of(self.slots, masks, slots=True))


def read_plan(store: ObjectStore, *, cycle: str, base: int, trust: Trust | None) -> Plan:
    """Read and check what update.json names. Malformed or Damaged in a sentence if anything does not fit."""
    key = layout.update(cycle, base)
    update = CheckpointUpdate.parse(get_named(store, key), name=key)
    if (update.cycle, update.base) != (cycle, base):
        raise Malformed(f"{key} speaks of cycle {update.cycle} on base {update.base}; it was copied there")
    key = layout.decision(cycle)
    data = get_named(store, key)
    if (found := sha256_hex(data)) != update.decision:
        raise Damaged(f"{key} has SHA-256 {found[:12]}, update.json says {update.decision[:12]}; start a new cycle")
    decision = Decision.parse(data, name=key)
    if decision.cycle != cycle:
        raise Malformed(f"{key} belongs to cycle {decision.cycle}; it was copied there, start a new cycle")
    metadata = read_ready(store, update.checkpoint, trust=trust)
    prefix = layout.checkpoint(metadata.name)
    index = read_index(store, prefix, metadata)
    stored = metadata.object(metadata.topology)
    document = verified_range(store, prefix + stored.path, stored.digest, 0, stored.digest.size)
    topology = Topology.parse(document, name=prefix + stored.path)
    bind(index, topology)
    masks = decided_masks(store, decision, topology)
    if update.inherited:
        masks = inherited_masks(store, update.inherited).union(masks)
    for name, parameter in masks.parameters.items():
        if name not in topology.parameters or topology.parameters[name].uuid != parameter.uuid:
            raise Malformed(f"the masks prune {name} of shape {list(parameter.shape)}, which this model lacks")
    weights: Counter[str] = Counter()
    for ref in index.values():
        for box in ref.boxes:
            weights[box.object] += box.size
    slots = read_slots(store, prefix, metadata)
    plan = Plan(update=update, metadata=metadata, masks=masks, weights=weights, tensors=index, slots=slots)
    plan.zeroes(masks)  # what does not fit is refused before anything is written
    return plan


def inherited_masks(store: ObjectStore, ref: MaskRef) -> Masks:
    """The masks of the base pair."""
    with named_by_the_cycle():
        file = StoredFile.read(store, ref.path)
    if file.sha256 != ref.digest:
        raise Damaged(
            f"{ref.path} has SHA-256 {file.sha256[:12]}, the tip's masks {ref.digest[:12]}; roll back the run"
        )
    return Masks.read(file, name=ref.path)


def decided_masks(store: ObjectStore, decision: Decision, topology: Topology) -> Masks:
    """What this cycle prunes, inherited masks apart."""
    groups = {group.id: group for group in topology.groups}
    units: dict[str, Bits] = {}
    for item in decision.groups:
        group = groups.get(item.group)
        if group is None:
            raise Malformed(f"the decision prunes group {item.group}, which the checkpoint's topology lacks")
        if wrong := [unit for unit in item.pruned if not 0 <= unit < group.units]:
            raise Malformed(f"the decision prunes unit {wrong[0]} of group {item.group}, which has {group.units}")
        if item.pruned:
            units[item.group] = np.ones(group.units, dtype=np.bool_)
            units[item.group][list(item.pruned)] = False
    weights = decided_weights(store, decision.weights, topology)
    named = {member.parameter for id_ in units for member in groups[id_].members} | set(weights)
    return Masks(
        model_id=topology.model_id,
        groups={id_: groups[id_] for id_ in units},
        units=units,
        parameters={name: topology.parameters[name] for name in sorted(named)},
        weights=weights,
    )


def decided_weights(store: ObjectStore, decisions: Sequence[WeightDecision], topology: Topology) -> Packed:
    """Basic pruning's active bits by parameter, from the packed bits in the answers that the decision names."""

    @lru_cache(_ANSWERS)
    def answer(folder: str, result: str) -> tuple[str, Mapping[str, NDArray[Any]]]:
        path, data = with_result(store, folder, result)
        return path, tensors.unpack(data, name=path)[0]

    def bits(item: WeightDecision) -> PackedBits:
        path, arrays = answer(item.answer, item.result)
        packed, size = arrays.get(f"{item.slice.key}/mask"), item.slice.stop - item.slice.start
        if packed is None or packed.dtype != np.uint8 or packed.shape != ((size + 7) // 8,):
            raise Malformed(f"{path} holds no {size} packed bits of {item.slice.key}")
        return packed

    weights: dict[str, list[Slice]] = {}
    for item in decisions:
        name, start, stop = item.slice.parameter, item.slice.start, item.slice.stop
        parameter = topology.parameters.get(name)
        if parameter is None or stop > parameter.size or start >= stop:
            raise Malformed(f"the decision prunes {name} [{start}, {stop}), which the checkpoint's topology lacks")
        if not np.array_equal(bits(item), ones(stop - start)):
            weights.setdefault(name, []).append((start, stop, partial(bits, item)))
    sizes = {name: topology.parameters[name].size for name in weights}
    return Packed({name: Slices(sizes[name], slices) for name, slices in weights.items()}, sizes)


def apply(store: ObjectStore, plan: Plan, *, worker: int, of: int, mark: str | None = None) -> tuple[str, ...]:
    """Do this worker's part of the candidate, and help the others. The tasks that were given up: none is success.

    `mark` is the launch's start mark: attempts from before it were interrupted, not killed by their task.
    """
    update = plan.update
    if _exists(store, layout.manifest(update.cycle, update.base)):
        return ()
    path, file = layout.masks(update.cycle, update.base), MaskFile(plan.masks)
    store.put_stream(path, file, size=file.size)
    # From here on the bits are read from there: how the answers cut them has nothing to do with how the tensors lie.
    masks = Masks.read(StoredFile(store, path, file.digest, file.sha256), name=path)
    tasks = copy_tasks(plan.metadata, base=update.base)
    outcome = share(
        store=store,
        cycle=update.cycle,
        tasks=tuple(tasks),
        worker=worker,
        of=of,
        # Consensus is for scores: a copy is checked byte by byte by the validator.
        limits=update.limits.model_copy(update={"replicas": 1}),
        compute=partial(_copy, store, plan, plan.zeroes(masks), tasks),
        mark=mark,
    )
    if not outcome.given_up:
        copied = [_copied(store, update.cycle, task, stored.path) for task, stored in tasks.items()]
        manifest = Candidate(
            cycle=update.cycle,
            base=update.base,
            checkpoint=update.checkpoint,
            decision=update.decision,
            masks=MaskRef(path=path, digest=file.sha256, counts=masks.counts()),
            objects=tuple(copied),
            weights_zeroed=zeroed_weights(masks),
        )
        store.put_if_absent(layout.manifest(update.cycle, update.base), manifest.canonical())
    return outcome.given_up


def _copy(
    store: ObjectStore,
    plan: Plan,
    zeroes: Sequence[Zeroes],
    tasks: Mapping[Task, StoredObject],
    task: Task,
    _: int,
    scale: float,
) -> bytes:
    stored, meter = tasks[task], Meter(store)
    spare = plan.update.limits.memory_bytes // CHUNK - _RESIDENT - (HELD if plan.masks.weights else 0)
    copied = copy_masked(
        meter.store,
        source=layout.checkpoint(plan.metadata.name),
        target=layout.candidate(plan.update.cycle, plan.update.base),
        stored=stored,
        zeroes=zeroes,
        ahead=int(scale * max(0, min(2, spare // 2 - 1))),  # each twice: as it was read, and masked
    )
    work = meter.done(parameters=plan.weights.get(stored.path, 0))
    return Copied(object=copied, **work.model_dump()).canonical()


def _copied(store: ObjectStore, cycle: str, task: Task, path: str) -> StoredObject:
    """What the first answer says of the object; all answers say the same of it."""
    head = next(iter(store.list(layout.responses(cycle, task.id))))
    copied = Copied.parse(store.get(head.key), name=head.key).object
    if copied.path != path:
        raise Malformed(f"{head.key} answers for {copied.path}, not for {path}; start a new cycle")
    return copied


def _exists(store: ObjectStore, key: str) -> bool:
    try:
        store.head(key)
    except NotFound:
        return False
    return True


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m kasmina.apply",
        description="Write one cycle's candidate checkpoint: the base with everything zero that is pruned.",
        epilog=f"exit codes: {exits.DONE} the candidate stands; {exits.BAD_INPUT} the checkpoint or the decision "
        f"breaks a rule; {exits.GAVE_UP} one object could not be copied in three attempts; {exits.OUT_OF_MEMORY} out "
        f"of memory; {exits.STORE} the store refused or did not answer",
    )
    parser.add_argument("--cycle", required=True, help="<run URI>/cycles/<id>")
    parser.add_argument("--base", required=True, type=int, help="log record of the base pair")
    parser.add_argument("--worker", required=True, type=int, help="number of this worker, from 0")
    parser.add_argument("--of", required=True, type=int, help="number of workers")
    parser.add_argument("--launch", required=True, type=int, help="number of this launch, for its start mark")
    found = parser.parse_args(argv)
    if not 0 <= found.worker < found.of:
        parser.error(f"--worker {found.worker} of {found.of}: workers are numbered from 0")
    run, _, cycle = found.cycle.rstrip("/").rpartition("/cycles/")
    if not run or "/" in cycle:
        parser.error(f"--cycle {found.cycle} is no cycle; write <run URI>/cycles/<id>")
    found.run, found.cycle = run, cycle
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run one worker; the exit code is leyline.exits'."""
    wanted = _arguments(argv)
    try:
        store = open_store(wanted.run)
        mark = layout.started(wanted.cycle, "apply", wanted.launch)
        store.put_if_absent(mark, b"started")
        try:
            plan = read_plan(store, cycle=wanted.cycle, base=wanted.base, trust=trust_from_environment())
            given_up = apply(store, plan, worker=wanted.worker, of=wanted.of, mark=mark)
        except (Refused, Unreachable, Unsuitable):
            raise
        except (Malformed, StoreError) as error:
            # For the control plane, which sees only the exit code. Only the first worker's sentence is kept.
            key = layout.apply_error(wanted.cycle, wanted.base)
            with suppress(Exists):
                store.put_if_absent(key, canonical_json({"message": str(error)}))
            raise
    except (Refused, Unreachable, Unsuitable) as error:
        print(error, file=sys.stderr)
        return exits.STORE
    except (Malformed, StoreError) as error:
        print(error, file=sys.stderr)
        return exits.BAD_INPUT
    except (MemoryError, RuntimeError) as error:
        if not exits.is_out_of_memory(error):
            raise
        print("out of memory; the next attempt reads less ahead, or raise analysis_memory_limit", file=sys.stderr)
        return exits.OUT_OF_MEMORY
    if given_up:
        print(f"gave up on {', '.join(given_up)}: three attempts died; read the workers' logs", file=sys.stderr)
        return exits.GAVE_UP
    return exits.DONE


if __name__ == "__main__":
    sys.exit(main())
