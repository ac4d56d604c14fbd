"""Hooks for one mini-batch: what flows through the gates, and the gradients that come back."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils.hooks import RemovableHandle

from kasmina.hooks import (
    ParameterTap,
    Tap,
    by_sample,
    cosines,
    first_tensor,
    gate_taps,
    head_gram,
    input_taps,
    modules_of,
    on_gradient,
    parameter_taps,
    parameter_units,
    per_unit,
)
from kasmina.sums import Batch
from leyline.topology import Kind, Topology


class _View(NamedTuple):
    """A tensor with its channel axis, and the same by sample, [batch, ...], with the channel axis there."""

    tensor: Tensor
    axis: int
    samples: Tensor
    sample_axis: int


class Probe:
    """Knows where a model's gates are, and hooks them all for one mini-batch at a time."""

    def __init__(
        self,
        model: nn.Module,
        topology: Topology,
        parameters: Mapping[str, nn.Parameter],
        slices: list[slice],
    ) -> None:
        self._modules = modules_of(model)
        self._groups = topology.groups
        self._parameters = parameters
        self._slices = slices
        self._gates = gate_taps(self._modules, topology)
        self._inputs = input_taps(self._modules, topology)
        self._behind = self._parameters_behind_gates()
        self.gated = frozenset(tap.group for tap in self._gates)
        """Groups of channels and heads: those that have gates to hook."""

    def hook(
        self, batch: Batch, *, gradients: bool, mini_batch: Collection[int], weights: bool
    ) -> list[RemovableHandle]:
        """Hook everything into `batch`; the caller removes the handles after the backward.

        `mini_batch`: groups to measure at their parameters. `weights`: also keep every parameter's squared gradient.
        """
        handles: list[RemovableHandle] = []
        add = handles.append
        for tap in self._gates:
            module = self._modules[tap.module]
            if self._groups[tap.group].kind is Kind.HEAD:
                add(module.register_forward_pre_hook(self._on_heads(batch, tap, gradients), with_kwargs=True))
            else:
                add(module.register_forward_hook(self._on_output(batch, tap, gradients)))
        for tap in self._inputs:
            hook = self._on_input(batch, tap)
            add(self._modules[tap.module].register_forward_pre_hook(hook, with_kwargs=True))
        for index, group in enumerate(self._groups):
            for gate in group.gates if group.kind is Kind.LAYER else ():
                add(self._modules[gate].register_forward_hook(self._on_layer(batch, index), with_kwargs=True))
        trained = {name: p for name, p in self._parameters.items() if p.requires_grad} if gradients else {}
        for index in mini_batch:
            for at_parameter in parameter_taps(self._groups[index], index):
                if at_parameter.parameter in trained:
                    add(on_gradient(trained[at_parameter.parameter], self._on_parameter(batch, at_parameter)))
        if weights:
            handles += [on_gradient(p, _on_weight(batch, name)) for name, p in trained.items()]
        return handles

    def upstream(self, mini_batch: Collection[int], *, weights: bool) -> dict[str, nn.Parameter]:
        """Parameters whose gradients lead through every gate, the cheapest ones; all of them if `weights`.

        A pass that only measures asks for these, and no convolution computes its weight's gradient for nothing.
        """
        trained = {name: p for name, p in self._parameters.items() if p.requires_grad}
        if weights or not all(name in trained for name in self._behind):
            return trained
        taps = [tap for index in mini_batch for tap in parameter_taps(self._groups[index], index)]
        wanted = self._behind | {tap.parameter for tap in taps}
        return {name: p for name, p in trained.items() if name in wanted}

    def _parameters_behind_gates(self) -> set[str]:
        """For each gate its module's own smallest parameter; where it has none, or for heads, a producer's."""
        found = set()
        for tap in self._gates:
            group = self._groups[tap.group]
            own = [n for n in self._parameters if n.rpartition(".")[0] == tap.module and group.kind is not Kind.HEAD]
            own = own or [m.parameter for m in group.members if m.role == "producer"]
            found.add(min(own, key=lambda name: self._parameters[name].numel()))
        return found

    def _view(self, batch: Batch, tap: Tap, value: Any) -> _View | None:
        tensor = first_tensor(value)
        if tensor is None or not tensor.is_floating_point() or (axis := tap.axis(tensor.shape)) is None:
            return None
        seen = by_sample(tensor.detach(), axis, batch.size)
        return None if seen is None else _View(tensor, axis, *seen)

    def _watch(self, batch: Batch, tap: Tap, view: _View, gradients: bool) -> None:
        """When the gradient of a gate's tensor arrives, add a * dL/da of the samples measured."""
        if not gradients:
            batch.fired.add(tap.group)
            return
        if not view.tensor.requires_grad or not torch.is_grad_enabled():
            return
        # A copy: what follows may overwrite it (ReLU(inplace=True), a residual addition `out += x`).
        # Of the samples measured only: a reference to the whole would keep alive what the forward frees.
        kept, axis, sample_axis = view.samples[batch.rows].clone(), view.axis, view.sample_axis

        def arrived(grad: Tensor) -> None:
            if not batch.open or (seen := by_sample(grad, axis, batch.size)) is None:
                return
            with torch.no_grad():
                found = per_unit(kept.float() * seen[0][batch.rows].float(), sample_axis, tap)
                batch.q[:, self._slices[tap.group]] += found.to(batch.device, non_blocking=True)
            batch.fired.add(tap.group)

        on_gradient(view.tensor, arrived)

    def _add_squares(self, batch: Batch, tap: Tap, view: _View, sums: Tensor) -> None:
        with torch.no_grad():
            squares = per_unit(view.samples[batch.forward_rows].float().square(), view.sample_axis, tap).sum(0)
            sums[self._slices[tap.group]] += squares.to(batch.device, non_blocking=True)

    def _on_output(self, batch: Batch, tap: Tap, gradients: bool) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            if batch.open and (view := self._view(batch, tap, output)) is not None:
                self._add_squares(batch, tap, view, batch.act)
                self._watch(batch, tap, view, gradients)

        return hook

    def _on_heads(self, batch: Batch, tap: Tap, gradients: bool) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            if not batch.open or (view := self._view(batch, tap, (args, kwargs))) is None:
                return
            weight = getattr(module, "weight", None)
            if isinstance(weight, Tensor):
                with torch.no_grad():
                    part = view.samples[batch.forward_rows]
                    gram = head_gram(part, view.sample_axis, tap, weight.detach()).to(batch.device, non_blocking=True)
                    _add(batch.grams, tap.group, gram)
                    batch.act[self._slices[tap.group]] += gram.diagonal()
            self._watch(batch, tap, view, gradients)

        return hook

    def _on_input(self, batch: Batch, tap: Tap) -> Callable[..., None]:
        def hook(_module: nn.Module, args: Any, kwargs: Any) -> None:
            if batch.open and (view := self._view(batch, tap, (args, kwargs))) is not None:
                self._add_squares(batch, tap, view, batch.inputs)

        return hook

    def _on_layer(self, batch: Batch, index: int) -> Callable[..., None]:
        closing = self._modules.get(self._groups[index].members[0].parameter.rpartition(".")[0])
        channels_first = isinstance(closing, _ConvNd)

        def hook(_module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            before, after = first_tensor((args, kwargs)), first_tensor(output)
            if not batch.open or before is None or after is None:
                return
            with torch.no_grad():
                found = cosines(before.detach(), after.detach(), batch.size, channels_first, batch.forward_rows)
                if found is not None:
                    _add(batch.cosines, index, found)

        return hook

    def _on_parameter(self, batch: Batch, tap: ParameterTap) -> Callable[[Tensor], None]:
        parameter = self._parameters[tap.parameter]

        def arrived(grad: Tensor) -> None:
            if batch.open:
                with torch.no_grad():
                    found = parameter_units(parameter.detach().float() * grad.float(), tap)
                    batch.batch_q[self._slices[tap.group]] += found.to(batch.device)
                batch.fired.add(tap.group)

        return arrived


def _on_weight(batch: Batch, name: str) -> Callable[[Tensor], None]:
    def arrived(grad: Tensor) -> None:
        if batch.open:
            with torch.no_grad():
                batch.gradients[name] = grad.float().square() * (batch.size / batch.scale**2)

    return arrived


def _add(held: dict[int, Tensor], index: int, found: Tensor) -> None:
    held[index] = held[index] + found if index in held else found
