"""How accuracy is measured, written beside a checkpoint: the forward pass as a program without weights, and its data.

Exporting traces the model once (seconds); the bytes stay valid while its code and shapes do, so publish them again.
"""

from __future__ import annotations

import inspect
import math
import operator
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram

from leyline import tensors
from leyline.ids import canonical_name
from leyline.model import Malformed
from leyline.program import ARITHMETIC, METADATA, Node, Program, Source

PROGRAM = "program.safetensors"
DATA = "evaluation.safetensors"

BATCH = 256
"""Samples that are evaluated at once, if nothing else is said."""
_ASSERTIONS = ("aten._assert", "aten.sym_constrain_range")


def export_evaluation(
    model: nn.Module, inputs: Sequence[Tensor], target: Tensor | None, *, prefix: str = "", batch: int = BATCH
) -> tuple[bytes, bytes]:
    """The program's file and the evaluation set's.

    `inputs`: what `model(*inputs)` takes, each [N, ...]; `target`: int64 [N], right classes, or None (then right is
    what the base itself answers). The model returns logits [N, C], finite. It is traced in eval mode and without its
    hooks, and left as it was. Where the published model is a part of `model`, `prefix` is that part's name with a dot:
    its tensors come from each checkpoint, everything else is stored in the program. `batch`: samples evaluated at once,
    in their order; answers may depend on the batch, as in retrieval, where its samples are each other's candidates.
    Malformed where the model cannot be evaluated this way; the sentence says why.
    """
    return export_program(model, inputs, prefix=prefix, batch=batch), pack_data(inputs, target)


def pack_data(inputs: Sequence[Tensor], target: Tensor | None) -> bytes:
    """evaluation.safetensors: `input.<i>` [N, ...] and `target` int64 [N]."""
    arrays = {f"input.{index}": tensor for index, tensor in enumerate(inputs)}
    if not arrays or any(t.dim() == 0 or len(t) != len(inputs[0]) or len(t) == 0 for t in inputs):
        raise Malformed("the evaluation set needs at least one input, and all of them with the same N > 0 samples")
    if target is not None:
        if target.shape != (len(inputs[0]),) or target.dtype != torch.int64:
            raise Malformed(
                f"the evaluation target must be int64 [{len(inputs[0])}], the right class of each sample; "
                f"it is {target.dtype} {list(target.shape)}"
            )
        arrays["target"] = target
    return tensors.pack({name: _array(name, tensor)[0] for name, tensor in arrays.items()}, {})


def export_program(model: nn.Module, inputs: Sequence[Tensor], *, prefix: str = "", batch: int = BATCH) -> bytes:
    """The program alone; `inputs` are traced with their first two samples, so they must have two."""
    if not inputs or any(tensor.dim() == 0 or len(tensor) < 2 for tensor in inputs):
        raise Malformed("exporting the evaluation program needs at least two samples of each input")
    example = tuple(tensor[:2].detach() for tensor in inputs)
    with _as_evaluated(model), torch.no_grad():
        try:
            # AUTO, not DYNAMIC: two inputs may turn out to share one dimension. What became fixed is refused below.
            dynamic = tuple({0: Dim.AUTO} for _ in example)
            exported = torch.export.export(model, example, dynamic_shapes=_shapes(model, dynamic))
        except Exception as error:  # torch.export documents no common base of what it raises
            first = str(error).strip().partition("\n")[0]
            raise Malformed(f"torch.export cannot trace {type(model).__name__} for the evaluation: {first}") from error
    program, constants = _program(exported, prefix, batch)
    program.check(name=f"the evaluation program of {type(model).__name__}")
    if prefix and not program.tensors:
        raise Malformed(
            f"no tensor of {type(model).__name__} begins with {prefix!r}; prefix is the part's name and dot"
        )
    arrays, metadata = {}, {METADATA: program.to_json()}
    for name, tensor in constants.items():
        arrays[name], dtype = _array(name, tensor)
        metadata[f"dtype/{name}"] = dtype
    return tensors.pack(arrays, metadata)


def _shapes(model: nn.Module, dynamic: tuple[Any, ...]) -> Any:
    """dynamic_shapes for positional inputs; a forward with *args takes them as one argument."""
    first = next(iter(inspect.signature(model.forward).parameters.values()))
    return (dynamic,) if first.kind is first.VAR_POSITIONAL else dynamic


def _program(exported: ExportedProgram, prefix: str, batch: int) -> tuple[Program, dict[str, Tensor]]:
    signature = exported.graph_signature
    states = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    stored = {**signature.inputs_to_lifted_tensor_constants, **states}
    held: Mapping[str, Any] = {**exported.constants, **exported.state_dict}
    sources, nodes, constants = [], [], {}
    output = ""
    for node in exported.graph.nodes:
        if node.op == "placeholder":
            if node.name in signature.user_inputs:
                _must_vary(node, f"input {signature.user_inputs.index(node.name)}")
                sources.append(Source(node=node.name, input=signature.user_inputs.index(node.name)))
            elif node.users:
                name = stored[node.name]
                if name in exported.state_dict and name.startswith(prefix):
                    sources.append(Source(node=node.name, tensor=canonical_name(name.removeprefix(prefix))))
                else:
                    constants[name] = held[name]
                    sources.append(Source(node=node.name, constant=name))
        elif node.op == "call_function":
            if not _name(node.target).startswith(_ASSERTIONS):
                nodes.append(_node(node))
        elif node.op == "output":
            output = _output(node)
        else:
            raise Malformed(f"the model's forward pass holds a {node.op} of {node.target}, which no program may")
    version = torch.__version__.partition("+")[0]
    program = Program(torch=version, batch=batch, sources=tuple(sources), nodes=tuple(nodes), output=output)
    return program, constants


def _node(node: fx.Node) -> Node:
    try:
        return Node(
            name=node.name,
            op=_name(node.target),
            args=tuple(_argument(arg) for arg in node.args),
            kwargs={key: _argument(arg) for key, arg in node.kwargs.items()},
        )
    except TypeError as error:
        raise Malformed(f"operation {node.name} ({node.target}) takes {error}, which no program may") from error


def _name(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverload):
        return str(target)
    name = getattr(target, "__name__", "")
    if name in ARITHMETIC and getattr(operator, name) is target:
        return f"operator.{name}"
    return f"{getattr(target, '__module__', '')}.{name or target}"


def _argument(value: Any) -> Any:
    match value:
        case None | bool() | int() | str():
            return value
        case float():
            return value if math.isfinite(value) else {"float": str(value)}
        case fx.Node():
            return {"node": value.name}
        case list() | tuple():
            return [_argument(item) for item in value]
        case torch.dtype():
            return {"dtype": str(value).removeprefix("torch.")}
        case torch.device():
            return {"device": ""}
        case torch.layout():
            return {"layout": str(value).removeprefix("torch.")}
        case torch.memory_format():
            return {"memory_format": str(value).removeprefix("torch.")}
        case _:
            raise TypeError(f"a {type(value).__name__}")


def _output(node: fx.Node) -> str:
    (results,) = node.args
    result = results[0] if isinstance(results, tuple | list) and len(results) == 1 else None
    if not isinstance(result, fx.Node):
        raise Malformed(
            "the evaluated model must return one tensor of logits [N, C]; wrap it in a module that does, give prefix"
        )
    shape = result.meta["val"].shape
    if len(shape) != 2:
        raise Malformed(f"the evaluated model returns {len(shape)} dimensions; logits are [N, C]")
    _must_vary(result, "the output")
    return result.name


def _must_vary(node: fx.Node, what: str) -> None:
    if isinstance(node.meta["val"].shape[0], int):
        raise Malformed(f"the model fixes the number of samples of {what} to {node.meta['val'].shape[0]}; keep it free")


def _array(name: str, tensor: Tensor) -> tuple[NDArray[Any], str]:
    """The tensor as numpy holds it, and its dtype; bfloat16, which numpy lacks, goes as the float32 it fits in."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    plain = tensor.detach().cpu()
    if tensor.dtype is torch.bfloat16:
        plain = plain.float()
    try:
        return np.ascontiguousarray(plain.numpy()), dtype
    except TypeError as error:
        raise Malformed(f"tensor {name} of {dtype} cannot be stored in an evaluation: {error}") from error


@contextmanager
def _as_evaluated(model: nn.Module) -> Iterator[None]:
    """The model in eval mode and without hooks (observers would see the tracer's tensors), then as it was."""
    before = [(module, module.training, module._forward_hooks, module._forward_pre_hooks) for module in model.modules()]
    try:
        for module, *_ in before:
            module.training = False
            module._forward_hooks = type(module._forward_hooks)()
            module._forward_pre_hooks = type(module._forward_pre_hooks)()
        yield
    finally:
        for module, training, hooks, pre_hooks in before:
            module.training = training
            module._forward_hooks = hooks
            module._forward_pre_hooks = pre_hooks
