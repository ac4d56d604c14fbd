"""Runs an evaluation program with a checkpoint's tensors. Nothing else in it is run: no pickle, no text, no import."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from leyline import exits, tensors
from leyline.model import Malformed
from leyline.program import METADATA, Node, Program, references

Forward = Callable[[Mapping[str, Tensor], Sequence[Tensor]], Tensor]
"""(the checkpoint's tensors by name, inputs [n, ...]) -> logits [n, C]."""


@dataclass(frozen=True)
class Interpreter:
    """A program that was read and checked, as a Forward."""

    name: str
    program: Program
    constants: Mapping[str, Tensor]
    operations: Mapping[str, Callable[..., Any]]
    last_use: Mapping[str, int]
    """Result -> index of the last operation that uses it: it is freed then."""

    def __call__(self, checkpoint: Mapping[str, Tensor], inputs: Sequence[Tensor]) -> Tensor:
        return self.run(checkpoint, inputs)

    def run(
        self,
        checkpoint: Mapping[str, Tensor],
        inputs: Sequence[Tensor],
        watch: Callable[[Node, Mapping[str, Any]], None] | None = None,
    ) -> Tensor:
        """The logits. `watch` sees each operation with all live results, before it is computed."""
        results: dict[str, Any] = {}
        for source in self.program.sources:
            if source.tensor is not None:
                results[source.node] = checkpoint[source.tensor]
            elif source.constant is not None:
                results[source.node] = self.constants[source.constant]
            elif source.input is not None:
                results[source.node] = inputs[source.input]
        given = [(node, value, value._version) for node, value in results.items()]
        with torch.no_grad():
            for index, node in enumerate(self.program.nodes):
                if watch is not None:
                    watch(node, results)
                args = [_value(arg, results) for arg in node.args]
                kwargs = {key: _value(arg, results) for key, arg in node.kwargs.items()}
                try:
                    results[node.name] = self.operations[node.name](*args, **kwargs)
                except (RuntimeError, TypeError, IndexError, ValueError) as error:
                    if exits.is_out_of_memory(error):
                        raise MemoryError from error  # says nothing about the program
                    first = str(error).strip().partition("\n")[0]
                    raise Malformed(f"{self.name}: operation {node.name} ({node.op}) failed: {first}") from error
                for used in references((*node.args, *node.kwargs.values())):
                    if self.last_use[used] == index:
                        results.pop(used, None)
        for node_name, value, version in given:
            if value._version != version:
                raise Malformed(f"{self.name} writes into {node_name}; an evaluation may only read its tensors")
        return _logits(results[self.program.output], inputs, self.name)


def load_program(data: bytes, *, name: str) -> Interpreter:
    """Read a program's file (leyline.program); Malformed names what is wrong or not allowed."""
    arrays, metadata = tensors.unpack(data, name=name)
    if METADATA not in metadata:
        raise Malformed(f"{name} holds no program; publish it with kasmina's export_evaluation")
    program = Program.parse(metadata[METADATA].encode(), name=name)
    program.check(name=name)
    constants = {}
    for key, array in arrays.items():
        dtype = _named(torch.dtype, metadata.get(f"dtype/{key}", ""), name)
        constants[key] = torch.from_numpy(array.copy()).to(dtype)
    for source in program.sources:
        if source.constant is not None and source.constant not in constants:
            raise Malformed(f"{name} uses the constant {source.constant}, which it does not hold")
    last_use: dict[str, int] = {program.output: len(program.nodes)}
    for index, node in enumerate(program.nodes):
        for used in references((*node.args, *node.kwargs.values())):
            last_use[used] = max(index, last_use.get(used, 0))
    operations = {node.name: _operation(node, name) for node in program.nodes}
    return Interpreter(name, program, constants, operations, last_use)


def _operation(node: Node, name: str) -> Callable[..., Any]:
    family, _, rest = node.op.partition(".")
    if family == "operator":
        found: Callable[..., Any] = getattr(operator, rest)
        return found
    packet, _, overload = rest.rpartition(".")
    try:
        resolved: Callable[..., Any] = getattr(getattr(torch.ops.aten, packet), overload)
    except AttributeError as error:
        raise Malformed(f"{name}: torch {torch.__version__} has no operation {node.op}; use the trainer's") from error
    return resolved


def _value(argument: Any, results: Mapping[str, Any]) -> Any:
    if isinstance(argument, list | tuple):
        return [_value(item, results) for item in argument]
    if not isinstance(argument, dict):
        return argument
    match argument:
        case {"node": str(node)}:
            return results[node]
        case {"dtype": str(dtype)}:
            return _named(torch.dtype, dtype, "the program")
        case {"device": str()}:
            return torch.device("cpu")
        case {"layout": str(layout)}:
            return _named(torch.layout, layout, "the program")
        case {"memory_format": str(memory_format)}:
            return _named(torch.memory_format, memory_format, "the program")
        case {"float": "inf" | "-inf" | "nan" as number}:
            return float(number)
    raise Malformed(f"an argument {argument} of the evaluation program is of no known kind")


def _named(kind: type, text: str, name: str) -> Any:
    found = getattr(torch, text, None) if text.isidentifier() else None
    if not isinstance(found, kind):
        raise Malformed(f"{name}: {text!r} is no {kind.__name__} of torch")
    return found


def _logits(result: Any, inputs: Sequence[Tensor], name: str) -> Tensor:
    if not isinstance(result, Tensor) or result.dim() != 2 or len(result) != len(inputs[0]):
        shape = list(result.shape) if isinstance(result, Tensor) else type(result).__name__
        raise Malformed(f"{name} returned {shape} for {len(inputs[0])} samples; logits are [N, C]")
    return result
