"""Channel groups of convolutions and linear layers, translated from torch-pruning's dependency graph."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.instancenorm import _InstanceNorm

from kasmina.graph import OP, Refused, Traced
from leyline.model import Value
from leyline.topology import Declined, Group, Kind, Member

MAX_SEGMENTS = 16
"""More pieces than this and the mapping is a shuffle, not a concat or split."""


def channel_groups(
    model: nn.Module,
    forward: Callable[[nn.Module], list[Tensor]],
    *,
    taken: Collection[tuple[str, int]],
    tied: Collection[str],
) -> tuple[list[Group], list[Declined]]:
    """Every channel group of `model` (a copy in eval mode that may be run freely), and what was declined.

    `taken` holds the (parameter, axis) pairs that declared groups own, `tied` the parameters with several names.
    """
    try:
        reader = _Reader(Traced(model, forward, taken, tied))
    except Exception as error:
        reason = f"torch-pruning cannot trace the model ({type(error).__name__}: {error})"
        return [], [Declined(name="*", kind=Kind.CHANNEL, reason=reason)]
    groups: list[Group] = []
    declined: list[Declined] = []
    for name, module in model.named_modules():
        if isinstance(module, _ConvNd | nn.Linear) and module in reader.traced.nodes:
            found, refused = reader.read(name, module)
            groups += found
            declined += refused
    return groups, declined


class _Span(Value):
    """One module's part in a group: unit u has [offset + u*block, ...), of its outputs or of its inputs."""

    module: str
    inputs: bool
    offset: int
    block: int


class _Reader:
    """Reads groups off the graph, root by root in model order, each row once."""

    def __init__(self, traced: Traced) -> None:
        self.traced = traced
        self.modules, self.parameters = traced.modules, traced.parameters
        self.order = {name: at for at, name in enumerate(self.modules)}
        self.claimed: dict[str, NDArray[np.bool_]] = {}

    def read(self, root: str, module: nn.Module) -> tuple[list[Group], list[Declined]]:
        """The groups whose first producer is `root`: one, or several where a split parts its outputs."""
        width = _width(module)
        claimed = self.claimed.setdefault(root, np.zeros(width, dtype=np.bool_))
        if claimed.all() or (f"{root}.weight", _rows(module)) in self.traced.taken:
            return [], []
        units = np.flatnonzero(~claimed)
        first = self.traced.closure(module, units[:1].tolist())  # tells most refusals, and cheaply
        try:
            self.traced.check(first)
            segments = self._segments(self.traced.closure(module, units.tolist()), units)
        except Refused as refused:
            self._claim_all(first)
            return [], [Declined(name=root, kind=Kind.CHANNEL, reason=str(refused))]
        groups, declined = [], []
        for start, stop, spans in segments:
            name = root if stop - start == width else f"{root}[{start}:{stop}]"
            try:
                self._sample(module, start, stop, spans)
                groups.append(self._group(name, start, stop, spans))
            except Refused as refused:
                declined.append(Declined(name=name, kind=Kind.CHANNEL, reason=str(refused)))
            for span in spans:
                if not span.inputs:
                    self._claim(span, start, stop)
        return groups, declined

    def _claim(self, span: _Span, start: int, stop: int) -> None:
        module = self.modules[span.module]
        if isinstance(module, _ConvNd | nn.Linear):
            rows = self.claimed.setdefault(span.module, np.zeros(_width(module), dtype=np.bool_))
            rows[max(span.offset + start * span.block, 0) : span.offset + stop * span.block] = True

    def _claim_all(self, items: Any) -> None:
        """What hangs on a declined layer is declined with it, once."""
        for item in items:
            module = item.dep.target.module
            if isinstance(module, _ConvNd | nn.Linear) and not self.traced.inputs(item):
                self.claimed[self.traced.names[module]] = np.ones(_width(module), dtype=np.bool_)

    def _segments(self, items: Any, units: NDArray[np.int64]) -> list[tuple[int, int, tuple[_Span, ...]]]:
        """Runs of units over which every module's indices are offset + u*block: [start, stop) and the spans."""
        size = int(units[-1]) + 1
        parts: list[tuple[str, bool, NDArray[np.int64], NDArray[np.int64]]] = []
        for item in items:
            name = self.traced.names.get(item.dep.target.module)
            if name is None or item.dep.target.type in (OP.ELEMENTWISE, OP.PRELU):
                continue
            index, unit = np.asarray(item.idxs), np.asarray(item.root_idxs)
            first = np.full(size, np.iinfo(np.int64).max)
            last = np.full(size, -1)
            np.minimum.at(first, unit, index)
            np.maximum.at(last, unit, index)
            block = np.bincount(unit, minlength=size)
            if (block[block > 0] != (last - first + 1)[block > 0]).any():
                raise Refused(f"a unit has several separate places in {name}")
            offset = np.where(block > 0, first - np.arange(size) * block, -1)
            parts.append((name, self.traced.inputs(item), offset, block))
        table = np.stack([column for part in parts for column in part[2:]], axis=1)[units]
        breaks = 1 + np.flatnonzero((table[1:] != table[:-1]).any(axis=1) | (np.diff(units) != 1))
        edges = [0, *breaks.tolist(), len(units)]
        if len(edges) - 1 > MAX_SEGMENTS:
            raise Refused("its units are mapped in an order that neither an offset nor a block expresses")
        found = []
        for low, high in itertools.pairwise(edges):
            at = int(units[low])
            spans = tuple(
                _Span(module=name, inputs=inputs, offset=int(offset[at]), block=int(block[at]))
                for name, inputs, offset, block in parts
                if block[at]
            )
            found.append((at, int(units[high - 1]) + 1, spans))
        return found

    def _sample(self, module: nn.Module, start: int, stop: int, spans: tuple[_Span, ...]) -> None:
        """Ask about single units: what they pass through, and whether they drag others along (chunk, shuffle)."""
        if stop - start < 2:
            raise Refused("it has a single unit")
        self.traced.check(self.traced.closure(module, [start]))
        expected = {(span.module, span.inputs): span for span in spans}
        for unit in {start, (start + stop) // 2, stop - 1}:
            for item in self.traced.closure(module, [unit]):
                span = expected.get((self.traced.names.get(item.dep.target.module, ""), self.traced.inputs(item)))
                if span is None:
                    continue
                begin = span.offset + unit * span.block
                if sorted(item.idxs) != list(range(begin, begin + span.block)):
                    raise Refused(f"unit {unit} is coupled to other units in {span.module}")

    def _group(self, name: str, start: int, stop: int, spans: tuple[_Span, ...]) -> Group:
        members: list[Member] = []
        for span in sorted(spans, key=lambda s: (self.order[s.module], s.inputs)):
            members += self._members(span, start, stop)
        if not any(member.role == "consumer" for member in members):
            raise Refused("nothing consumes its output through weights")
        return Group(
            id=name,
            kind=Kind.CHANNEL,
            units=stop - start,
            members=tuple(members),
            gates=self._gates(spans),
        )

    def _members(self, span: _Span, start: int, stop: int) -> list[Member]:
        module, block = self.modules[span.module], span.block
        begin = span.offset + start * block
        size = _width(module) if not span.inputs else _inputs_of(module)
        if begin < 0 or begin + (stop - start) * block > size:
            raise Refused(f"its units do not fit {span.module}")
        weight = f"{span.module}.weight"
        if span.inputs:
            if isinstance(module, _ConvNd) and module.groups > 1:
                if begin or block > 1 or stop - start != module.in_channels:
                    raise Refused(f"it is only a part of the inputs of the grouped convolution {span.module}")
                return [Member(parameter=weight, role="consumer", axis=1, groups=module.groups)]
            axis = 0 if isinstance(module, _ConvTransposeNd) else 1
            return [Member(parameter=weight, role="consumer", axis=axis, start=begin, block=block)]
        found = []
        if weight in self.parameters:
            norm = isinstance(module, _BatchNorm | _InstanceNorm)
            role: Any = "norm" if norm else "producer"
            found.append(Member(parameter=weight, role=role, axis=_rows(module), start=begin, block=block))
            if (bias := f"{span.module}.bias") in self.parameters:
                found.append(Member(parameter=bias, role=role, axis=0, start=begin, block=block))
        return found

    def _gates(self, spans: tuple[_Span, ...]) -> tuple[str, ...]:
        """Where the units' effect is measured, once each: the norms, or the producers that no norm follows.

        Not what feeds a depthwise convolution of the same group. Of two factors of a product the one without an
        activation (SwiGLU), and what a sigmoid scales, not the scale (squeeze-and-excite): its a * dL/da is the whole.
        """
        inside = {self.modules[span.module]: span.module for span in spans if not span.inputs}
        norms = {module for module in inside if isinstance(module, _BatchNorm | _InstanceNorm)}
        after = {module: list(self.traced.nodes[module].outputs) for module in inside}
        products = {node for nodes in after.values() for node in nodes if _operation(node) == "Mul"}
        chosen = []
        for module, name in inside.items():
            layers = _layers_after(after[module])
            if any(isinstance(m, _ConvNd) and m in inside for m in layers):
                continue
            if module not in norms and layers & norms:
                continue
            if any(
                _operation(node) in ("Sigmoid", "Hardsigmoid") or products & set(node.outputs) for node in after[module]
            ):
                continue
            chosen.append(name)
        return tuple(sorted(chosen or inside.values(), key=lambda name: self.order[name]))


def _operation(node: Any) -> str:
    return node.grad_fn.name().partition("Backward")[0] if node.grad_fn is not None else ""


def _layers_after(nodes: list[Any]) -> set[nn.Module]:
    """The layers that come next, with only operations between."""
    layers: set[nn.Module] = set()
    stack, seen = list(nodes), set()
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if isinstance(node.module, _ConvNd | nn.Linear | _BatchNorm | _InstanceNorm):
            layers.add(node.module)
        else:
            stack += node.outputs
    return layers


def _rows(module: nn.Module) -> int:
    """The axis of a weight that its outputs lie on."""
    return 1 if isinstance(module, _ConvTransposeNd) else 0


def _width(module: nn.Module) -> int:
    if isinstance(module, _ConvNd):
        return module.out_channels
    if isinstance(module, nn.Linear):
        return module.out_features
    assert isinstance(module, _BatchNorm | _InstanceNorm), type(module)
    return module.num_features


def _inputs_of(module: nn.Module) -> int:
    return module.in_channels if isinstance(module, _ConvNd) else module.in_features  # type: ignore[return-value]
