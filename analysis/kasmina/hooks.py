"""Where a group's units lie in the tensors that flow through its gates, and sums over them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.utils.hooks import RemovableHandle

from leyline.ids import canonical_name
from leyline.topology import Group, Kind, Member, Topology

_CHANNELS_FIRST = (_ConvNd, _NormBase, nn.GroupNorm)
"""Modules whose outputs are [N, C, positions...]; all others give [N, positions..., C]."""


@dataclass(frozen=True)
class Tap:
    """One module's tensor, and which of its channels belong to a group's units.

    Unit u owns channels [start + u*block, start + (u+1)*block) for each span; a fused projection has several spans.
    """

    group: int
    """Index into the topology's groups."""
    module: str
    units: int
    width: int
    """Channels of the whole tensor."""
    channels_first: bool
    spans: tuple[tuple[int, int], ...]
    transposed: bool = False
    """The module's weight is [in, out] (GPT-2's Conv1D) instead of [out, in]."""

    def axis(self, shape: torch.Size) -> int | None:
        """The axis that the channels lie on, or None where none is `width` long."""
        for axis in (1, len(shape) - 1) if self.channels_first else (len(shape) - 1, 1):
            if 0 < axis < len(shape) and shape[axis] == self.width:
                return axis
        return None


@dataclass(frozen=True)
class ParameterTap:
    """One parameter's part in a group that no gate can be hooked for."""

    group: int
    parameter: str
    member: Member
    units: int


def on_gradient(tensor: Tensor, hook: Callable[[Tensor], None]) -> RemovableHandle:
    """Call `hook` with what a backward pass brings to `tensor`; of a parameter, before it is accumulated."""
    register: Any = tensor.register_hook  # untyped in torch
    handle: RemovableHandle = register(hook)
    return handle


def modules_of(model: nn.Module) -> dict[str, nn.Module]:
    """Modules by canonical name; of a wrapper and what it wraps, the inner one."""
    named = model.named_modules(remove_duplicate=False)
    return {canonical_name(f"{name}.")[:-1] if name else "": module for name, module in named}


def parameters_of(model: nn.Module, topology: Topology) -> dict[str, nn.Parameter]:
    """The model's parameters by canonical name (of ties the first), compared with the topology's."""
    found = {canonical_name(name): parameter for name, parameter in model.named_parameters()}
    for name, expected in topology.parameters.items():
        if name not in found or tuple(found[name].shape) != expected.shape:
            shape = "no such parameter" if name not in found else f"shape {list(found[name].shape)}"
            raise ValueError(
                f"the topology names {name} of shape {list(expected.shape)}, this model has {shape}; trace it again"
            )
    if extra := next((name for name in found if name not in topology.parameters), None):
        raise ValueError(f"this model has {extra}, which its topology does not know; trace it again")
    return found


def gate_taps(modules: Mapping[str, nn.Module], topology: Topology) -> list[Tap]:
    """A tap for each gate of each group of channels (its output) and heads (the output projection's input)."""
    taps = []
    for index, group in enumerate(topology.groups):
        for gate in group.gates:
            if gate not in modules:
                raise ValueError(
                    f"group {group.id} has its gate at {gate}, which this model does not have; trace its topology again"
                )
            if group.kind in (Kind.CHANNEL, Kind.HEAD):
                roles = ("consumer",) if group.kind is Kind.HEAD else ("norm", "producer")
                taps.append(_tap(index, group, gate, modules[gate], roles, topology))
    return taps


def input_taps(modules: Mapping[str, nn.Module], topology: Topology) -> list[Tap]:
    """A tap for the input of one consumer of each group of channels: the x_j of Wanda."""
    taps = []
    for index, group in enumerate(topology.groups):
        owners = [m.parameter.rpartition(".")[0] for m in group.members if m.role == "consumer"]
        if group.kind is Kind.CHANNEL and owners and owners[0] in modules:
            taps.append(_tap(index, group, owners[0], modules[owners[0]], ("consumer",), topology))
    return taps


def parameter_taps(group: Group, index: int) -> list[ParameterTap]:
    """The parameters whose w * dL/dw, summed, is the derivative by a unit's gate (pruning.md 4.2 with section 6).

    The norm's parameters of the producers, or the producers' rows and biases; for heads the output projection's
    columns, which scale exactly as its input does.
    """
    if group.kind is Kind.HEAD:
        chosen = [m for m in group.members if m.role == "consumer"]
    else:
        chosen = [m for m in group.members if m.role == "norm"]
        chosen = chosen or [m for m in group.members if m.role == "producer"]
    return [ParameterTap(index, m.parameter, m, group.units) for m in chosen]


def _tap(index: int, group: Group, name: str, module: nn.Module, roles: tuple[str, ...], topology: Topology) -> Tap:
    own = [m for m in group.members if m.role in roles and m.parameter.rpartition(".")[0] == name]
    spans = tuple(dict.fromkeys((m.start, m.block) for m in own)) or ((0, 1),)
    width, transposed = group.units, False
    if own:
        weight = own[0]
        shape = topology.parameters[weight.parameter].shape
        width = group.units if weight.groups > 1 else shape[weight.axis]
        transposed = weight.role == "consumer" and weight.axis == 0 and not isinstance(module, _ConvNd)
    return Tap(index, name, group.units, width, isinstance(module, _CHANNELS_FIRST), spans, transposed)


def first_tensor(value: Any) -> Tensor | None:
    """The first tensor of what a module takes or gives: itself, or in a tuple, list or mapping."""
    if isinstance(value, Tensor):
        return value
    children: Iterable[Any] = ()
    if isinstance(value, Mapping):
        children = value.values()
    elif isinstance(value, tuple | list):
        children = value
    for child in children:
        if (found := first_tensor(child)) is not None:
            return found
    return None


def by_sample(x: Tensor, axis: int, batch: int) -> tuple[Tensor, int] | None:
    """A view [batch, ...] of `x`, and where `axis` lies in it; None if no leading axis holds the samples.

    Knows samples first, samples second ([T, N, C]), and samples folded with positions ([N*T, ...], N outermost).
    """
    if x.shape[0] == batch:
        return x, axis
    if x.ndim == 3 and x.shape[1] == batch and axis == 2:
        return x.transpose(0, 1), axis
    if x.shape[0] and x.shape[0] % batch == 0 and axis > 0:
        return x.reshape(batch, -1, *x.shape[1:]), axis + 1
    return None


def per_unit(x: Tensor, axis: int, tap: Tap) -> Tensor:
    """[N, units]: `x` [N, ...] summed over positions and over the channels of each unit."""
    rest = [at for at in range(1, x.ndim) if at != axis]
    channels = x.sum(rest) if rest else x
    if tap.spans == ((0, 1),) and tap.width == tap.units:
        return channels
    total = torch.zeros(len(x), tap.units, dtype=x.dtype, device=x.device)
    for start, block in tap.spans:
        total += channels[:, start : start + tap.units * block].reshape(len(x), tap.units, block).sum(2)
    return total


def head_gram(x: Tensor, axis: int, tap: Tap, weight: Tensor) -> Tensor:
    """[units, units]: sum over samples and positions of <o_h, o_k>, o_h = W_O^(h) a_h the head's contribution.

    From the second moments of the projection's input, so that no head's output is ever formed:
    <o_h, o_k> = trace(M_hk^T C_hk), M = W_O^T W_O, C = sum of a a^T. The diagonal is the squared contribution norm.
    """
    (start, block), *_ = tap.spans
    columns = slice(start, start + tap.units * block)
    a = x.movedim(axis, -1).reshape(-1, x.shape[axis])[:, columns].float()
    w = (weight.t() if tap.transposed else weight)[:, columns].float()
    product = (w.t() @ w) * (a.t() @ a)
    return product.reshape(tap.units, block, tap.units, block).sum((1, 3))


def parameter_units(value: Tensor, tap: ParameterTap) -> Tensor:
    """[units]: an array of the parameter's shape, summed over all but the units."""
    member = tap.member
    rest = [at for at in range(value.ndim) if at != member.axis]
    along = value.sum(rest) if rest else value
    return along[member.start : member.start + tap.units * member.block].reshape(tap.units, member.block).sum(1)


def cosines(before: Tensor, after: Tensor, batch: int, channels_first: bool, rows: slice) -> Tensor | None:
    """[2]: sum over tokens of cos(before, after) along the channels, and the number of tokens; None if shapes differ.

    Block Influence (ShortGPT, Men et al. 2024) is one minus their quotient.
    """
    if before.shape != after.shape or before.ndim < 2:
        return None
    axis = 1 if channels_first or before.ndim > 3 else before.ndim - 1
    x, y = by_sample(before, axis, batch), by_sample(after, axis, batch)
    if x is None or y is None:
        return None
    a, b, at = x[0][rows].float(), y[0][rows].float(), x[1]
    # torch's own cosine_similarity takes ten times as long along a strided axis.
    norms = (a.square().sum(at) * b.square().sum(at)).sqrt()
    angle = (a * b).sum(at) / norms.clamp_min(1e-12)
    return torch.stack([angle.sum(), angle.new_tensor(float(angle.numel()))])
