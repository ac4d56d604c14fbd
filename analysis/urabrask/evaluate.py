"""What a model answers on the evaluation set, and which answers are right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from leyline import tensors
from leyline.model import Malformed
from urabrask.interpret import Forward


@dataclass(frozen=True)
class EvaluationSet:
    """Inputs [N, ...] and, where there are labels, target int64 [N]."""

    inputs: tuple[Tensor, ...]
    target: NDArray[np.int64] | None

    @property
    def n(self) -> int:
        return len(self.inputs[0])

    def batch(self, start: int, size: int) -> tuple[Tensor, ...]:
        return tuple(each[start : start + size] for each in self.inputs)


@dataclass(frozen=True)
class Answers:
    """A model's answers: argmax of the logits, int64 [N], and how many samples got NaN or Inf."""

    labels: NDArray[np.int64]
    not_finite: int


def load_set(data: bytes, *, name: str) -> EvaluationSet:
    """Read evaluation.safetensors; Malformed unless it is input.0, input.1, ... and perhaps target, all of one N."""
    arrays, _ = tensors.unpack(data, name=name)
    target = arrays.pop("target", None)
    keys = [f"input.{index}" for index in range(len(arrays))]
    if not keys or set(keys) != set(arrays):
        raise Malformed(f"{name} holds {sorted(arrays)}; an evaluation set has input.0, input.1, ... and target")
    sizes = {len(array) if array.ndim else 0 for array in arrays.values()}
    if len(sizes) != 1 or 0 in sizes:
        raise Malformed(f"{name}: its inputs have {sorted(sizes)} samples; all need the same N > 0")
    if target is not None and (target.dtype != np.int64 or target.shape != (next(iter(sizes)),)):
        raise Malformed(f"{name}: target is {target.dtype} {list(target.shape)}; it is int64 [N]")
    inputs = tuple(torch.from_numpy(arrays[key].copy()) for key in keys)
    return EvaluationSet(inputs, None if target is None else target.astype(np.int64))


def load_function(reference: str) -> Forward:
    """The user's own `module:function`(tensors by name, inputs) -> logits, from their image."""
    module, separator, name = reference.partition(":")
    try:
        function = getattr(import_module(module), name) if separator else None
    except (ImportError, AttributeError, ValueError) as error:
        raise Malformed(f"evaluation function {reference} is not in this image: {error}") from error
    if not callable(function):
        raise Malformed(f"evaluation function {reference} is none; give module:function")

    def forward(checkpoint: Mapping[str, Tensor], inputs: Sequence[Tensor]) -> Tensor:
        with torch.no_grad():
            logits = function(dict(checkpoint), tuple(inputs))
        if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != len(inputs[0]):
            raise Malformed(f"{reference} must return logits [N, C] for N samples")
        return logits

    return forward


def answer(forward: Forward, checkpoint: Mapping[str, Tensor], data: EvaluationSet, *, batch: int) -> Answers:
    """Ask the model every sample, `batch` at a time."""
    labels, not_finite = [], 0
    for start in range(0, data.n, batch):
        logits = forward(checkpoint, data.batch(start, batch))
        not_finite += int((~torch.isfinite(logits)).any(dim=1).sum())
        labels.append(logits.argmax(dim=1).to(torch.int64).numpy())
    return Answers(np.concatenate(labels), not_finite)


def right(answers: Answers, reference: Answers, data: EvaluationSet) -> NDArray[np.bool_]:
    """Which answers are right: equal to the target or, where there is none, to what the reference answers. [N]"""
    truth = reference.labels if data.target is None else data.target
    found: NDArray[np.bool_] = answers.labels == truth
    return found
