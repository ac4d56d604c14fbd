"""A removed layer must add nothing to its shortcut: where its branch joins, the program's own value is looked at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from leyline.program import Node, references
from leyline.topology import Group
from urabrask.interpret import Interpreter

_ADD = ("aten.add.", "aten.add_.", "operator.add")


def joining_fault(
    group: Group, interpreter: Interpreter, tensors: Mapping[str, Tensor], inputs: Sequence[Tensor]
) -> str:
    """Why a layer whose closing weight is masked still adds something, as a sentence; empty if it adds exactly zero.

    The branch is followed from its closing parameters through every operation that sees nothing else but stored tensors
    (a norm, a bias, a scale), up to the addition that brings in another computed value: the shortcut.
    """
    closing = {member.parameter for member in group.members if member.role == "producer"}
    # Tied names share one tensor, so the storage says which sources of the program are the closing parameters.
    places = {tensors[name].data_ptr() for name in closing if name in tensors}
    stored = {source.node for source in interpreter.program.sources if source.input is None}
    branch = {
        source.node
        for source in interpreter.program.sources
        if source.tensor is not None and tensors[source.tensor].data_ptr() in places
    }
    added: list[float] = []

    def watch(node: Node, results: Mapping[str, Any]) -> None:
        used = list(references((*node.args, *node.kwargs.values())))
        inside = [name for name in used if name in branch and isinstance(results[name], Tensor)]
        if not inside:
            return
        others = [name for name in used if name not in branch and name not in stored]
        # The closing operation itself reads what the branch computed before: it begins the part that must be zero.
        begins = all(name in stored for name in inside)
        if begins or not any(isinstance(results[name], Tensor) for name in others) or not node.op.startswith(_ADD):
            branch.add(node.name)
        else:
            added.extend(float(results[name].abs().max()) for name in inside)

    interpreter.run(tensors, inputs, watch)
    if not added:
        return f"layer {group.id}: its branch joins no shortcut in the evaluation program"
    if not all(value == 0 for value in added):
        return (
            f"layer {group.id} still adds values up to {max(added):.3g} to its shortcut, so a weight, bias or norm of "
            "its end is not masked"
        )
    return ""
