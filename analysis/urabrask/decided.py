"""Whether the candidate's masks are those that were decided: they fit the model, and are inherited plus decision."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import lru_cache, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from leyline.bits import WINDOW, Bits, BitSource, Packed, PackedBits, Slice, Slices, ones, pieces, window
from leyline.ids import parameter_uuid
from leyline.masks import Masks
from leyline.messages import Decision, WeightDecision
from leyline.model import Malformed
from leyline.tensors import unpack
from leyline.topology import Topology

_ANSWERS = 4
"""Answers that are held unpacked."""


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

    Bits of single weights are taken from there again whenever they are asked for. Malformed where the decision names
    what the model does not have.
    """
    units: dict[str, Bits] = {}
    weights: dict[str, list[Slice]] = {}
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

    @lru_cache(_ANSWERS)
    def arrays(folder: str) -> Mapping[str, NDArray[Any]]:
        return unpack(answers[folder], name=folder)[0]

    def bits(weight: WeightDecision) -> PackedBits:
        packed, size = arrays(weight.answer).get(f"{weight.slice.key}/mask"), weight.slice.stop - weight.slice.start
        if packed is None or packed.dtype != np.uint8 or packed.shape != ((size + 7) // 8,):
            raise Malformed(f"{weight.answer} holds no mask of {size} bits for {weight.slice.key}")
        return packed

    for weight in decision.weights:
        slice_, parameter = weight.slice, topology.parameters.get(weight.slice.parameter)
        if parameter is None or not slice_.start <= slice_.stop <= parameter.size:
            raise Malformed(f"the decision prunes weights {slice_.key} up to {slice_.stop}, which the model lacks")
        if not np.array_equal(bits(weight), ones(slice_.stop - slice_.start)):
            weights.setdefault(slice_.parameter, []).append((slice_.start, slice_.stop, partial(bits, weight)))
    sizes = {name: topology.parameters[name].size for name in weights}
    new = Masks(
        model_id=topology.model_id,
        groups={id_: topology.group(id_) for id_ in units},
        units=units,
        weights=Packed({name: Slices(sizes[name], slices) for name, slices in weights.items()}, sizes),
    )
    return new if inherited is None else inherited.union(new)


def differences(masks: Masks, wanted: Masks) -> Iterator[str]:
    """A sentence for each group or parameter whose mask is not the wanted one, bit by bit."""
    for what, mine, theirs in (("group", masks.units, wanted.units), ("parameter", masks.weights, wanted.weights)):
        found, should = Packed.of(mine), Packed.of(theirs)
        for name, size in sorted({**found.sizes, **should.sizes}.items()):
            here, there = (side.packed.get(name, Slices(size)) for side in (found, should))
            if more := _only(there, here):
                yield f"the masks prune {more} of {what} {name}, which nobody decided"
            if fewer := _only(here, there):
                yield f"the masks leave {fewer} of {what} {name} active, which the decision or the base prunes"


def _only(one: BitSource, other: BitSource) -> str:
    """The bits that `one` has and `other` lacks: the first four, and how many more. Empty if there are none."""
    count, shown = 0, list[int]()
    for number, (mine, theirs) in enumerate(zip(pieces(one), pieces(other), strict=True)):
        if (only := mine & ~theirs).any():
            found = number * WINDOW + np.flatnonzero(window(only, 0, 8 * len(only)))
            count += found.size
            shown += found[:4].tolist()
    listed = ", ".join(map(str, shown[:4]))
    return f"{listed} and {count - 4} more" if count > 4 else listed
