"""Channel groups of convolutions and linear layers, translated from torch-pruning's dependency graph.

The graph says which rows and columns go together; what it cannot know (which operations keep units apart, whether the
index mapping holds) is checked here or by `kasmina.trial`, and what is not understood is declined.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection
from typing import Any

import numpy as np
import torch_pruning as tp
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.instancenorm import _InstanceNorm

from leyline.model import Value
from leyline.topology import Declined, Group, Kind, Member

OP = tp.ops.OPTYPE
MAX_SEGMENTS = 16
"""More pieces than this and the mapping is a shuffle, not a concat or split."""

PER_UNIT = frozenset(
    """
    Relu Hardtanh LeakyRelu Elu Gelu Silu Mish Hardswish Tanh Sigmoid Hardsigmoid Softplus Threshold Prelu
    Add Sub Mul Div Neg Abs Pow Exp Sqrt Rsqrt Clamp ClampMin ClampMax Maximum Minimum Mean Sum Amax
    MaxPool2DWithIndices MaxPool3DWithIndices AvgPool2D AvgPool3D AdaptiveAvgPool2D AdaptiveAvgPool3D
    AdaptiveMaxPool2D MkldnnAdaptiveAvgPool2D UpsampleNearest1D UpsampleNearest2D UpsampleBilinear2D
    ConstantPadNd ReflectionPad1D ReflectionPad2D ReplicationPad2D View UnsafeView ReshapeAlias Transpose
    Permute T Clone Alias Squeeze Unsqueeze Expand Select Slice Index ToCopy NativeDropout Cat Split
    SplitWithSizes NativeBatchNorm CudnnBatchNorm Convolution Repeat
    """.split()  # noqa: SIM905 (a table reads better as one)
)
"""Autograd operations that keep the units of a group apart. Anything else (softmax, matrix products of activations,
functional norms) may mix them, so a group that passes through it is declined."""

REFUSED = {
    OP.OUTPUT: "its output is the model's output",
    OP.LN: "LayerNorm over the masked axis: its mean and variance count masked units too, so masking is not removing",
    OP.GN: "GroupNorm mixes the units of a group in its mean and variance, so masking is not removing",
    OP.EMBED: "it is coupled to an embedding",
    OP.MHA: "it is coupled to an attention layer's width",
    OP.LSTM: "it is coupled to a recurrent layer",
}


class _Refused(Exception):
    """This structure is declined; the message is the reason."""


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
        reader = _Reader(model, forward, taken, tied)
    except Exception as error:
        return [], [
            Declined(
                name="*",
                kind=Kind.CHANNEL,
                reason=f"torch-pruning cannot trace the model ({type(error).__name__}: {error})",
            )
        ]
    groups: list[Group] = []
    declined: list[Declined] = []
    for name, module in model.named_modules():
        if isinstance(module, _ConvNd | nn.Linear) and module in reader.graph.module2node:
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
    """Reads groups off the dependency graph, root by root in model order, each row once."""

    def __init__(
        self,
        model: nn.Module,
        forward: Callable[[nn.Module], list[Tensor]],
        taken: Collection[tuple[str, int]],
        tied: Collection[str],
    ) -> None:
        self.taken, self.tied = taken, tied
        self.modules = dict(model.named_modules())
        self.order = {name: at for at, name in enumerate(self.modules)}
        self.names = {module: name for name, module in self.modules.items()}
        self.parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        self.claimed: dict[str, NDArray[np.bool_]] = {}
        self.calls: dict[nn.Module, int] = {}
        hooks = [module.register_forward_hook(self._count) for module in model.modules()]
        # `* 1` gives every output a node of its own, so that layers whose result is an output are seen as such.
        self.graph = _Graph().build_dependency(
            model, None, forward_fn=lambda m, _: [out * 1 for out in forward(m)], verbose=False
        )
        for hook in hooks:
            hook.remove()

    def _count(self, module: nn.Module, *_: Any) -> None:
        self.calls[module] = self.calls.get(module, 0) + 1

    def read(self, root: str, module: nn.Module) -> tuple[list[Group], list[Declined]]:
        """The groups whose first producer is `root`: one, or several where a split parts its outputs."""
        width = _width(module)
        claimed = self.claimed.setdefault(root, np.zeros(width, dtype=np.bool_))
        if claimed.all() or (f"{root}.weight", _rows(module)) in self.taken:
            return [], []
        units = np.flatnonzero(~claimed)
        try:
            self._check(self._closure(module, units[:1]), root)
            items = self._closure(module, units)
            segments = self._segments(items, units)
        except _Refused as refused:
            claimed[:] = True
            return [], [Declined(name=root, kind=Kind.CHANNEL, reason=str(refused))]
        groups, declined = [], []
        for start, stop, spans in segments:
            name = root if stop - start == width else f"{root}[{start}:{stop}]"
            try:
                self._sample(module, start, stop, spans)
                groups.append(self._group(name, start, stop, spans))
            except _Refused as refused:
                declined.append(Declined(name=name, kind=Kind.CHANNEL, reason=str(refused)))
            claimed[start:stop] = True
            for span in spans:
                if not span.inputs:
                    self._claim(span, start, stop)
        return groups, declined

    def _claim(self, span: _Span, start: int, stop: int) -> None:
        module = self.modules[span.module]
        if isinstance(module, _ConvNd | nn.Linear):
            rows = self.claimed.setdefault(span.module, np.zeros(_width(module), dtype=np.bool_))
            rows[max(span.offset + start * span.block, 0) : span.offset + stop * span.block] = True

    def _closure(self, module: nn.Module, units: NDArray[np.int64]) -> Any:
        prune = self.graph.get_pruner_of_module(module).prune_out_channels
        return self.graph.get_pruning_group(module, prune, units.tolist())

    def _check(self, items: Any, root: str) -> None:
        """Refuse what a group may not pass through; where it is refused, its producers are not asked again."""
        try:
            for check in (self._check_kind, self._check_layer, self._check_operation):  # the plainest reason first
                for item in items:
                    check(item.dep.target, self._inputs(item))
        except _Refused:
            for item in items:
                module = item.dep.target.module
                if isinstance(module, _ConvNd | nn.Linear) and not self._inputs(item) and self.names[module] != root:
                    self.claimed[self.names[module]] = np.ones(_width(module), dtype=np.bool_)
            raise

    def _inputs(self, item: Any) -> bool:
        """Whether the item is about a module's inputs (columns)."""
        kind = item.dep.target.type
        return kind in (OP.CONV, OP.LINEAR) and not self.graph.is_out_channel_pruning_fn(item.dep.handler)

    def _check_kind(self, node: Any, _: bool) -> None:
        module, name = node.module, self.names.get(node.module, "")
        if node.type in REFUSED:
            raise _Refused(REFUSED[node.type] + (f" ({name})" if name else ""))
        if node.type == OP.PARAMETER:
            parameter = self.graph._param_to_name[module]
            owner = parameter.rpartition(".")[0]
            if "norm" in type(self.modules[owner]).__name__.lower():
                raise _Refused(f"{owner} normalises over the masked axis, so masking is not removing")
            raise _Refused(f"the bare parameter {parameter} takes part in an unknown way")

    def _check_layer(self, node: Any, inputs: bool) -> None:
        module, name = node.module, self.names.get(node.module, "")
        weights = [f"{name}.{own}" for own, _ in module.named_parameters(recurse=False)] if name else []
        if weights and self.calls.get(module, 0) > 1:
            raise _Refused(f"{name} is used {self.calls[module]} times in one pass")
        if shared := [weight for weight in weights if weight in self.tied]:
            raise _Refused(f"{shared[0]} is tied to another parameter")
        if isinstance(module, _BatchNorm) and not module.affine:
            raise _Refused(f"{name} has no weight and bias, so its output for a masked unit is not zero")
        if isinstance(module, _ConvNd) and module.groups > 1:
            if node.type == OP.DEPTHWISE_CONV:
                if module.in_channels != module.out_channels:
                    raise _Refused(f"the depthwise convolution {name} has more inputs than outputs")
            elif not inputs:
                raise _Refused(f"the groups of the grouped convolution {name} would differ in size")
            elif isinstance(module, _ConvTransposeNd):
                raise _Refused(f"{name} is a grouped transposed convolution")
        if isinstance(module, _ConvNd | nn.Linear | _BatchNorm) and f"{name}.weight" not in self.parameters:
            raise _Refused(f"the weight of {name} is computed from other parameters")
        if (f"{name}.weight", int(inputs) ^ int(isinstance(module, _ConvTransposeNd))) in self.taken:
            raise _Refused(f"{name} belongs to a declared group")

    def _check_operation(self, node: Any, _: bool) -> None:
        if node.type != OP.ELEMENTWISE or node.module in self.names:
            return
        function = node.grad_fn
        operation = function.name().rsplit("::", 1)[-1].partition("Backward")[0] if function is not None else "Unknown"
        if operation in ("Addmm", "Mm") and any(out.type == OP.LINEAR for out in [*node.outputs, *node.inputs]):
            return  # the product inside a linear layer whose input has more than two axes
        if operation not in PER_UNIT:
            raise _Refused(f"the operation {operation} may mix units")
        if operation in ("Mean", "Sum", "Amax") and hasattr(function, "_saved_dim"):
            rank = len(function._saved_self_sym_sizes)
            channel = 1 if rank in (2, 4, 5) else rank - 1
            dims = function._saved_dim
            axes = {_axis(dim, rank) for dim in ([dims] if isinstance(dims, int) else dims)}
            if channel in axes and not (rank == 4 and axes == {1, 2}):
                raise _Refused(f"{operation} is taken over the units, so masking is not removing")

    def _segments(self, items: Any, units: NDArray[np.int64]) -> list[tuple[int, int, tuple[_Span, ...]]]:
        """Runs of units over which every module's indices are offset + u*block: [start, stop) and the spans."""
        size = int(units[-1]) + 1
        parts: list[tuple[str, bool, NDArray[np.int64], NDArray[np.int64]]] = []
        for item in items:
            name = self.names.get(item.dep.target.module)
            if name is None or item.dep.target.type in (OP.ELEMENTWISE, OP.PRELU):
                continue
            index, unit = np.asarray(item.idxs), np.asarray(item.root_idxs)
            first = np.full(size, np.iinfo(np.int64).max)
            last = np.full(size, -1)
            np.minimum.at(first, unit, index)
            np.maximum.at(last, unit, index)
            block = np.bincount(unit, minlength=size)
            if (block[block > 0] != (last - first + 1)[block > 0]).any():
                raise _Refused(f"a unit has several separate places in {name}")
            offset = np.where(block > 0, first - np.arange(size) * block, -1)
            parts.append((name, self._inputs(item), offset, block))
        table = np.stack([column for part in parts for column in part[2:]], axis=1)[units]
        breaks = 1 + np.flatnonzero((table[1:] != table[:-1]).any(axis=1) | (np.diff(units) != 1))
        edges = [0, *breaks.tolist(), len(units)]
        if len(edges) - 1 > MAX_SEGMENTS:
            raise _Refused("its units are mapped in an order that neither an offset nor a block expresses")
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
        """Ask the graph about single units: a unit that drags others along is no unit (chunk, shuffle)."""
        if stop - start < 2:
            raise _Refused("it has a single unit")
        expected = {(span.module, span.inputs): span for span in spans}
        for unit in {start, (start + stop) // 2, stop - 1}:
            for item in self._closure(module, np.asarray([unit])):
                span = expected.get((self.names.get(item.dep.target.module, ""), self._inputs(item)))
                if span is None:
                    continue
                begin = span.offset + unit * span.block
                if sorted(item.idxs) != list(range(begin, begin + span.block)):
                    raise _Refused(f"unit {unit} is coupled to other units in {span.module}")

    def _group(self, name: str, start: int, stop: int, spans: tuple[_Span, ...]) -> Group:
        members: list[Member] = []
        for span in sorted(spans, key=lambda s: (self.order[s.module], s.inputs)):
            members += self._members(span, start, stop)
        if not any(member.role == "consumer" for member in members):
            raise _Refused("nothing consumes its output through weights")
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
            raise _Refused(f"its units do not fit {span.module}")
        weight = f"{span.module}.weight"
        if span.inputs:
            if isinstance(module, _ConvNd) and module.groups > 1:
                if begin or block > 1 or stop - start != module.in_channels:
                    raise _Refused(f"it is only a part of the inputs of the grouped convolution {span.module}")
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
        """Where the units' effect is measured: the norms, or the producers that no norm follows.

        Not what feeds a depthwise convolution of the same group (it would count twice), nor a sigmoid's input (a scale
        of squeeze-and-excite: the units it scales carry the whole effect).
        """
        inside = {self.modules[span.module]: span.module for span in spans if not span.inputs}
        norms = {module for module in inside if isinstance(module, _BatchNorm | _InstanceNorm)}
        chosen = []
        for module, name in inside.items():
            layers, operations = self._next(module)
            if any(isinstance(m, _ConvNd) and m in inside for m in layers):
                continue
            if module not in norms and (layers & norms or operations & {"Sigmoid", "Hardsigmoid"}):
                continue
            chosen.append(name)
        return tuple(sorted(chosen or inside.values(), key=lambda name: self.order[name]))

    def _next(self, module: nn.Module) -> tuple[set[nn.Module], set[str]]:
        """The layers that follow a module with only operations between, and the operation right after it."""
        node = self.graph.module2node[module]
        right_after = {out.grad_fn.name().partition("Backward")[0] for out in node.outputs if out.grad_fn is not None}
        layers: set[nn.Module] = set()
        stack, seen = list(node.outputs), set()
        while stack:
            at = stack.pop()
            if at in seen:
                continue
            seen.add(at)
            if isinstance(at.module, _ConvNd | nn.Linear | _BatchNorm | _InstanceNorm):
                layers.add(at.module)
            else:
                stack += at.outputs
        return layers, right_after


class _Split:
    """What a split's autograd node says, in the words torch-pruning looks for (it knows no split of one size)."""

    def __init__(self, function: Any, outputs: list[Any]) -> None:
        self.function = function
        sizes = function._saved_self_sym_sizes
        dim = _axis(function._saved_dim, len(sizes))
        parts = list(getattr(function, "_saved_split_sizes", ()))
        if not parts:
            size = function._saved_split_size
            parts = [min(size, sizes[dim] - at) for at in range(0, sizes[dim], size)]
        self.edges = [0, *itertools.accumulate(parts)]
        self.numbers = [[n for f, n in out.grad_fn.next_functions if f is function] for out in outputs]
        self._saved_split_sizes = [parts[numbers[0]] if numbers else sizes[dim] for numbers in self.numbers]
        self._saved_dim = 1 if dim == 1 or (dim, len(sizes)) == (2, 3) else 0
        self._saved_self_sym_sizes = sizes

    def name(self) -> str:
        return "SplitBackward0"


class _Graph(tp.DependencyGraph):  # type: ignore[misc]
    """torch-pruning's graph, with a split's outputs mapped by their own number, not by the order of their discovery."""

    def _build_dependency(self, module2node: Any) -> None:
        super()._build_dependency(module2node)
        for node in module2node.values():
            if node.type != OP.SPLIT:
                continue
            node.enable_index_mapping = False  # or it is mapped again, by discovery
            split = node.grad_fn = _Split(node.grad_fn, node.outputs)
            if split._saved_dim != 1:
                node.module.split_sizes = [None] * len(node.outputs)  # of another axis: says nothing of channels
                continue
            mapping = tp.dependency.index_mapping._SplitIndexMapping
            for out, numbers in zip(node.outputs, split.numbers, strict=True):
                there = [dep for dep in node.dependencies if dep.target is out]
                back = [dep for dep in out.dependencies if dep.target is node]
                for number, to, fro in zip(numbers, there, back, strict=False):
                    offset = split.edges[number : number + 2]
                    to.index_mapping[0] = mapping(offset=offset, reverse=False)
                    fro.index_mapping[0] = mapping(offset=offset, reverse=True)


def _axis(dim: int, rank: int) -> int:
    """Autograd shows a negative axis as an unsigned number of 64 bits."""
    return (dim if dim < rank else dim - 2**64) % rank


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
