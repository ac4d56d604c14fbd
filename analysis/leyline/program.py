"""The evaluation program: a forward pass as a list of tensor operations, written by the trainer, run by the validator.

It is made by torch.export, but not stored in torch's own archive: loading that unpickles objects and evaluates text.
Here it is a safetensors file whose tensors are the program's constants and whose `__metadata__["program"]` is the JSON
of Program. Only operations that `refusal` lets through are run, and none of them can touch anything but tensors.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field

from leyline.model import Malformed, Value

METADATA = "program"
"""Key of the program in the file's metadata."""

ARITHMETIC = frozenset(
    {"getitem", "add", "sub", "mul", "floordiv", "truediv", "mod", "neg", "pow", "eq", "ne", "lt", "le", "gt", "ge"}
)
"""Functions of Python's `operator` that programs use on sizes and on operations with several results."""

_ATEN = re.compile(r"aten\.(?P<name>[A-Za-z0-9_]+)\.(?P<overload>[A-Za-z0-9_]+)")
_INTERNAL = frozenset({"_unsafe_view", "_to_copy", "_softmax", "_log_softmax", "_native_batch_norm_legit_no_training"})
_TEXT = frozenset(
    {
        "conv1d",
        "conv2d",
        "conv3d",
        "gelu",
        "gelu_",
        "div",
        "div_",
        "einsum",
        "pad",
        "meshgrid",
        "scatter",
        "scatter_reduce",
        "index_reduce",
    }
)
"""Operations with a harmless text argument. In any other, text may be a file's name (aten::from_file, aten::save)."""
_RANDOM = re.compile(r"rand|bernoulli|normal|multinomial|poisson|exponential|uniform|cauchy|geometric|binomial|seed")
_TRAINING = {
    "batch_norm": 5, "dropout": 2, "dropout_": 2, "native_dropout": 2, "feature_dropout": 2, "alpha_dropout": 2,
    "feature_alpha_dropout": 2, "rrelu": 3, "scaled_dot_product_attention": 4, "lstm": 6, "gru": 6, "rnn_tanh": 6,
    "rnn_relu": 6,
}  # fmt: skip
"""Operations that behave differently in training, and which argument says so (a flag, or a dropout rate)."""


class Source(Value):
    """Where one input of the program comes from."""

    node: str
    tensor: str | None = None
    """The checkpoint's tensor of this name (a parameter, or a buffer such as a running mean)."""
    constant: str | None = None
    """A tensor in the program's own file."""
    input: int | None = None
    """`input.<i>` of the evaluation set."""


class Node(Value):
    """One operation. In `args`, {"node": n} is an earlier result, {"dtype": d}, {"device": ""}, {"layout": l},
    {"memory_format": m} and {"float": "inf"} are what JSON cannot say."""

    name: str
    op: str
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}


class Program(Value):
    """A forward pass in eval mode: inputs [N, ...] to logits [N, C]."""

    schema_version: Literal[1] = 1
    torch: str
    """Version of torch that exported it."""
    batch: int = Field(default=256, ge=1)
    """Samples that are evaluated at once."""
    sources: tuple[Source, ...]
    nodes: tuple[Node, ...]
    output: str

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names of the checkpoint's tensors that it uses."""
        return tuple(source.tensor for source in self.sources if source.tensor is not None)

    def to_json(self) -> str:
        # Not canonical_json: "to the end" of a slice is 2**63 - 1, which RFC 8785 has no number for.
        return json.dumps(self.model_dump(mode="json", exclude_defaults=True), sort_keys=True, separators=(",", ":"))

    def check(self, *, name: str) -> None:
        """Malformed unless every operation is allowed and every result is computed before it is used."""
        known = {source.node for source in self.sources}
        for node in self.nodes:
            if reason := refusal(node):
                raise Malformed(f"{name}: operation {node.op} ({node.name}) {reason}")
            for used in references((*node.args, *node.kwargs.values())):
                if used not in known:
                    raise Malformed(f"{name}: operation {node.name} uses {used}, which is computed nowhere before it")
            known.add(node.name)
        if self.output not in known:
            raise Malformed(f"{name}: its output {self.output} is computed nowhere")


def refusal(node: Node) -> str:
    """Why this operation may not be in a program; empty if it may."""
    family, _, rest = node.op.partition(".")
    if family == "operator":
        return "" if rest in ARITHMETIC else f"is no arithmetic; allowed are {', '.join(sorted(ARITHMETIC))}"
    match = _ATEN.fullmatch(node.op)
    if match is None:
        return "is no tensor operation of torch (aten.<name>.<overload>); programs may use nothing else"
    name = match["name"]
    if name.startswith("_") and not name.startswith("__") and name not in _INTERNAL:
        return "is internal to torch and may skip its checks; express the model without it"
    if _RANDOM.search(name):
        return "is random; an evaluation must give the same answer twice"
    if name not in _TEXT and any(_texts((*node.args, *node.kwargs.values()))):
        return "has a text argument; only " + ", ".join(sorted(_TEXT)) + " may"
    if (position := _TRAINING.get(name)) is not None:
        given = [*node.args[position : position + 1], *(node.kwargs[k] for k in _FLAGS if k in node.kwargs)]
        if any(given):
            return "is in training mode; export the model in eval mode"
    return ""


_FLAGS = ("training", "train", "dropout_p")


def references(value: Any) -> Iterator[str]:
    """Names of the results that an argument refers to, however deep."""
    if isinstance(value, dict):
        if "node" in value:
            yield str(value["node"])
    elif isinstance(value, list | tuple):
        for item in value:
            yield from references(item)


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)
