"""torch-pruning's dependency graph of a model, with what it cannot know: which structure keeps units apart.

The graph says which rows and columns go together. It takes every operation it does not know for one that acts on each
element alone, so everything that a group passes through is held against a list here; the rest is declined.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection
from typing import Any

import torch_pruning as tp
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

OP = tp.ops.OPTYPE
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


class Refused(Exception):
    """This structure is declined; the message is the reason."""


class Traced:
    """A model's graph, asked for what hangs on some outputs of a layer."""

    def __init__(
        self,
        model: nn.Module,
        forward: Callable[[nn.Module], list[Tensor]],
        taken: Collection[tuple[str, int]],
        tied: Collection[str],
    ) -> None:
        self.taken, self.tied = taken, tied
        self.modules = dict(model.named_modules())
        self.names = {module: name for name, module in self.modules.items()}
        self.parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        self._calls: dict[nn.Module, int] = {}
        hooks = [module.register_forward_hook(self._count) for module in model.modules()]
        try:
            # `* 1` gives every output a node of its own, so that layers whose result is an output are seen as such.
            self._graph = _Graph().build_dependency(
                model, None, forward_fn=lambda m, _: [out * 1 for out in forward(m)], verbose=False
            )
        finally:
            for hook in hooks:
                hook.remove()
        self.nodes: dict[nn.Module, Any] = self._graph.module2node

    def _count(self, module: nn.Module, *_: Any) -> None:
        self._calls[module] = self._calls.get(module, 0) + 1

    def closure(self, module: nn.Module, units: list[int]) -> Any:
        """All items (a module's outputs or inputs, their indices, the unit each belongs to) that hang on `units`."""
        return self._graph.get_pruning_group(module, self._graph.get_pruner_of_module(module).prune_out_channels, units)

    def inputs(self, item: Any) -> bool:
        """Whether the item is about a module's inputs (columns)."""
        kind = item.dep.target.type
        return kind in (OP.CONV, OP.LINEAR) and not self._graph.is_out_channel_pruning_fn(item.dep.handler)

    def check(self, items: Any) -> None:
        """Refuse what a group may not pass through."""
        for check in (self._check_kind, self._check_layer, self._check_operation):  # the plainest reason first
            for item in items:
                check(item.dep.target, self.inputs(item))

    def _check_kind(self, node: Any, _: bool) -> None:
        module, name = node.module, self.names.get(node.module, "")
        if node.type in REFUSED:
            raise Refused(REFUSED[node.type] + (f" ({name})" if name else ""))
        if node.type == OP.PARAMETER:
            parameter = self._graph._param_to_name[module]
            owner = parameter.rpartition(".")[0]
            if "norm" in type(self.modules[owner]).__name__.lower():
                raise Refused(f"{owner} normalises over the masked axis, so masking is not removing")
            raise Refused(f"the bare parameter {parameter} takes part in an unknown way")

    def _check_layer(self, node: Any, inputs: bool) -> None:
        module, name = node.module, self.names.get(node.module, "")
        weights = [f"{name}.{own}" for own, _ in module.named_parameters(recurse=False)] if name else []
        if weights and self._calls.get(module, 0) > 1:
            raise Refused(f"{name} is used {self._calls[module]} times in one pass")
        if shared := [weight for weight in weights if weight in self.tied]:
            raise Refused(f"{shared[0]} is tied to another parameter")
        if isinstance(module, _BatchNorm) and not module.affine:
            raise Refused(f"{name} has no weight and bias, so its output for a masked unit is not zero")
        if isinstance(module, _ConvNd) and module.groups > 1:
            if node.type == OP.DEPTHWISE_CONV:
                if module.in_channels != module.out_channels:
                    raise Refused(f"the depthwise convolution {name} has more inputs than outputs")
            elif not inputs:
                raise Refused(f"the groups of the grouped convolution {name} would differ in size")
            elif isinstance(module, _ConvTransposeNd):
                raise Refused(f"{name} is a grouped transposed convolution")
        if isinstance(module, _ConvNd | nn.Linear | _BatchNorm) and f"{name}.weight" not in self.parameters:
            raise Refused(f"the weight of {name} is computed from other parameters")
        if (f"{name}.weight", int(inputs) ^ int(isinstance(module, _ConvTransposeNd))) in self.taken:
            raise Refused(f"{name} belongs to a declared group")

    def _check_operation(self, node: Any, _: bool) -> None:
        if node.type != OP.ELEMENTWISE or node.module in self.names:
            return
        function = node.grad_fn
        operation = function.name().rsplit("::", 1)[-1].partition("Backward")[0] if function is not None else "Unknown"
        if operation in ("Addmm", "Mm") and any(out.type == OP.LINEAR for out in [*node.outputs, *node.inputs]):
            return  # the product inside a linear layer whose input has more than two axes
        if operation not in PER_UNIT:
            raise Refused(f"the operation {operation} may mix units")
        if operation in ("Mean", "Sum", "Amax") and hasattr(function, "_saved_dim"):
            rank = len(function._saved_self_sym_sizes)
            channel = 1 if rank in (2, 4, 5) else rank - 1
            dims = function._saved_dim
            axes = {_axis(dim, rank) for dim in ([dims] if isinstance(dims, int) else dims)}
            if channel in axes and not (rank == 4 and axes == {1, 2}):
                raise Refused(f"{operation} is taken over the units, so masking is not removing")


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
