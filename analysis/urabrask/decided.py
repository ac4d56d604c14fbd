"""Whether the candidate's masks are those that were decided: they fit the model, and are inherited plus decision."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from leyline.bits import Bits, Packed, PackedBits, clear_packed, first_set, ones
from leyline.ids import parameter_uuid
from leyline.masks import Masks
from leyline.messages import Decision
from leyline.model import Malformed
from leyline.tensors import unpack
from leyline.topology import Topology


def misfits(masks: Masks, topology: Topology) -> Iterator[str]:
    """A sentence for everything in the masks that is not the model's: parameters, shapes, groups, domains."""
    if masks.model_id != topology.model_id:
        yield f"the masks are of model {masks.model_id}, the checkpoint is of {topology.model_id}"
    for name, parameter in masks.parameters.items():
        known = topology.parameters.get(name)
        if known is None:
            yield f"the masks name {name}, which the model does not have"
        elif parameter.shape != known.shape:
            yield f"the masks hold {name} with shape {list(parameter.shape)}, the model has {list(known.shape)}"
        elif parameter.uuid != parameter_uuid(name, known.shape, topology.model_id) or parameter != known:
            yield f"the masks hold {name} under UUID {parameter.uuid}, the model's is {known.uuid}"
    groups = {group.id: group for group in topology.groups}
    for id_, group in masks.groups.items():
        if id_ not in groups:
            yield f"the masks name group {id_}, which the topology does not have"
        elif group != groups[id_]:
            yield f"the masks describe group {id_} with other members, units or kind than the topology"
        for member in group.members:
            parameter = masks.parameters[member.parameter]
            if parameter.domain != group.domain:
                yield f"group {id_} of domain {group.domain} masks {member.parameter} of domain {parameter.domain}"


def expected(decision: Decision, inherited: Masks | None, topology: Topology, answers: Mapping[str, bytes]) -> Masks:
    """Inherited masks and the decision's, together. `answers`: the stored answers that the decision names, by folder.

    Malformed where the decision names what the model does not have.
    """
    units: dict[str, Bits] = {}
    weights: dict[str, PackedBits] = {}
    for chosen in decision.groups:
        try:
            group = topology.group(chosen.group)
        except KeyError as error:
            raise Malformed(f"the decision prunes group {chosen.group}, which the topology does not have") from error
        if any(not 0 <= unit < group.units for unit in chosen.pruned):
            raise Malformed(f"the decision prunes units {list(chosen.pruned)} of {group.id}, which has {group.units}")
        if chosen.pruned:
            units[group.id] = np.ones(group.units, np.bool_)
            units[group.id][list(chosen.pruned)] = False
    held: tuple[str, Mapping[str, NDArray[Any]]] = "", {}
    for weight in decision.weights:
        slice_, parameter = weight.slice, topology.parameters.get(weight.slice.parameter)
        if parameter is None or not slice_.start <= slice_.stop <= parameter.size:
            raise Malformed(f"the decision prunes weights {slice_.key} up to {slice_.stop}, which the model lacks")
        if held[0] != weight.answer:  # its slices stand one after the other: each answer is unpacked once
            held = weight.answer, unpack(answers[weight.answer], name=weight.answer)[0]
        packed = held[1].get(f"{slice_.key}/mask")
        size = slice_.stop - slice_.start
        if packed is None or packed.dtype != np.uint8 or packed.shape != ((size + 7) // 8,):
            raise Malformed(f"{weight.answer} holds no mask of {size} bits for {slice_.key}")
        if not np.array_equal(packed, ones(size)):
            name = slice_.parameter
            weights[name] = weights[name] if name in weights else ones(parameter.size)
            clear_packed(weights[name], slice_.start, packed, size)
    new = Masks(
        model_id=topology.model_id,
        groups={id_: topology.group(id_) for id_ in units},
        units=units,
        weights=Packed(weights, {name: topology.parameters[name].size for name in weights}),
    )
    return new if inherited is None else inherited.union(new)


def differences(masks: Masks, wanted: Masks) -> Iterator[str]:
    """A sentence for each group or parameter whose mask is not the wanted one, bit by bit."""
    for what, mine, theirs in (("group", masks.units, wanted.units), ("parameter", masks.weights, wanted.weights)):
        found, should = Packed.of(mine), Packed.of(theirs)
        for name, size in sorted({**found.sizes, **should.sizes}.items()):
            here, there = (side.packed.get(name, ones(size)) for side in (found, should))
            if (more := there & ~here).any():
                yield f"the masks prune {_some(more)} of {what} {name}, which nobody decided"
            if (fewer := here & ~there).any():
                yield f"the masks leave {_some(fewer)} of {what} {name} active, which the decision or the base prunes"


def _some(bits: PackedBits) -> str:
    count, shown = int(np.bitwise_count(bits).sum(dtype=np.int64)), first_set(bits, 4)
    return f"{', '.join(map(str, shown))} and {count - 4} more" if count > 4 else ", ".join(map(str, shown))
