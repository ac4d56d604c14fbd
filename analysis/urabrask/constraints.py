"""The hard constraints, counted again from the masks alone: the control plane's own arithmetic is not trusted here."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

from leyline.bits import Packed
from leyline.masks import Masks
from leyline.messages import PruningValidationRequest
from leyline.topology import Kind, Topology


def broken(masks: Masks, topology: Topology, request: PruningValidationRequest) -> Iterator[str]:
    """A sentence for each constraint that the masks (inherited and new together) break.

    Counts are of what the model had originally: retention is of all channels of a group, heads are query heads of a
    layer, layers all residual branches of the model, and weights (basic pruning) those of a parameter.
    """
    retention, removal = _exact(request.min_channel_retention), _exact(request.max_layer_removal)
    layers = [group for group in topology.groups if group.kind is Kind.LAYER]
    removed = [group.id for group in layers if (pruned := masks.pruned(group.id)) is not None and pruned.any()]
    for id_, active in sorted(masks.units.items()):
        group, live = masks.groups[id_], int(active.sum())
        if group.kind is Kind.CHANNEL and live < retention * group.units:
            yield (
                f"group {id_} keeps {live} of its {group.units} channels, min_channel_retention "
                f"{request.min_channel_retention:g} asks for {_ceil(retention * group.units)}"
            )
        if group.kind is Kind.HEAD and live * group.heads_per_unit < request.min_attention_heads:
            yield (
                f"group {id_} keeps {live * group.heads_per_unit} of its {group.units * group.heads_per_unit} heads, "
                f"min_attention_heads asks for {request.min_attention_heads}"
            )
    if len(removed) > removal * len(layers):
        yield (
            f"{len(removed)} of {len(layers)} layers are removed ({', '.join(removed[:4])}), max_layer_removal "
            f"{request.max_layer_removal:g} allows {int(removal * len(layers))}"
        )
    weights = Packed.of(masks.weights)  # counted as they are packed: single weights are as many as the model
    for name, size in sorted(weights.sizes.items()):
        if (live := weights.live(name)) < retention * size:
            yield (
                f"parameter {name} keeps {live} of its {size} weights, min_channel_retention "
                f"{request.min_channel_retention:g} asks for {_ceil(retention * size)}"
            )


def _exact(number: float) -> Fraction:
    """0.7 as seven tenths: the float is a hair less, and 0.7 of 10 channels is 7."""
    return Fraction(repr(number))


def _ceil(number: Fraction) -> int:
    return -(-number.numerator // number.denominator)
