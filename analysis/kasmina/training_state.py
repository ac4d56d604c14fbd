"""What a checkpoint holds of a training: tensors by canonical name, and optimizer slots by `<parameter>/<slot>`.

Of an optimizer only moments and counters: learning rates and schedules belong to the training script, which sets them
from the step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from kasmina.tracker import ImportanceTracker
from leyline.ids import canonical_name
from leyline.model import Malformed
from leyline.topology import Topology

MASTER = "fp32_master"
"""The slot of a parameter's fp32 master, where the optimizer steps one."""

_SCALAR = "scalar/"
"""Metadata key of a slot that is a Python number and not a tensor."""


class ModelDoesNotFit(ValueError):
    """The checkpoint is of another model than the one that is to be loaded; nothing was changed."""


@dataclass(frozen=True)
class Copies:
    """What goes with a parameter beside its slots: averaged copies, and fp32 masters, by canonical name."""

    ema: tuple[Mapping[str, Tensor], ...] = ()
    master: Mapping[str, Tensor] = field(default_factory=dict)

    def named(self, slot: str) -> Mapping[str, Tensor] | None:
        """The copies that are published under this slot, if it is none of an optimizer's."""
        if slot == MASTER:
            return self.master
        number = slot.removeprefix("ema")
        return self.ema[int(number)] if slot != number and number.isdecimal() and int(number) < len(self.ema) else None


def weights_of(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Parameters and buffers by canonical name, and the other names of tied ones.

    Malformed where a module keeps something that is no tensor (get_extra_state).
    """
    tensors: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    first: dict[tuple[Any, ...], str] = {}
    for name, tensor in _named(model).items():
        key = _storage(tensor)
        if key is not None and key in first:
            tied[name] = first[key]
        else:
            tensors[name] = tensor
            if key is not None:
                first[key] = name
    return tensors, tied


Stepped = Mapping[str, tuple[Tensor, Optimizer]]
"""What the optimizers step, by name: the model's parameters, or their masters."""


def stepped(model: nn.Module, optimizers: Sequence[Optimizer], copies: Copies) -> Stepped:
    """Malformed where an optimizer steps a tensor that has no name here, or two step the same."""
    names = {id(tensor): name for name, tensor in copies.master.items()}
    names |= {id(parameter): canonical_name(name) for name, parameter in model.named_parameters()}
    found: dict[str, tuple[Tensor, Optimizer]] = {}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                name = names.get(id(parameter))
                if name is None:
                    raise Malformed(
                        f"the optimizer steps a tensor of shape {list(parameter.shape)} that is neither a parameter of "
                        "the model nor one of fp32_master; pass the model that it trains"
                    )
                if name in found:
                    raise Malformed(f"two optimizers step {name}; let one do it")
                found[name] = parameter, optimizer
    return found


def slots_of(
    model: nn.Module, optimizers: Sequence[Optimizer], copies: Copies
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Every slot of every optimizer, masters and averaged copies, and the metadata that says which are numbers.

    Malformed where an optimizer keeps what is neither tensor nor number, or as `stepped` says.
    """
    slots: dict[str, Tensor] = {}
    numbers: dict[str, str] = {}
    for name, (parameter, optimizer) in stepped(model, optimizers, copies).items():
        for slot, value in optimizer.state.get(parameter, {}).items():
            key = f"{name}/{slot}"
            if isinstance(value, Tensor):
                slots[key] = value
            elif type(value) in (int, float):
                slots[key] = torch.tensor(value, dtype=torch.int64 if type(value) is int else torch.float64)
                numbers[_SCALAR + key] = type(value).__name__
            elif value is not None:
                raise Malformed(
                    f"the optimizer keeps {slot} of {name} as a {type(value).__name__}; only tensors and numbers can "
                    f"be published (parameter of shape {list(parameter.shape)})"
                )
    slots |= {f"{name}/{MASTER}": tensor for name, tensor in copies.master.items()}
    for number, copy in enumerate(copies.ema):
        slots |= {f"{name}/ema{number}": tensor for name, tensor in copy.items()}
    return slots, numbers


@torch.no_grad()
def restore_slot(key: str, value: Tensor, stepped: Stepped, copies: Copies, number: str | None) -> None:
    """Put one slot back where it was.

    Not through load_state_dict: that casts moments to the parameter's dtype, and fp32 moments of bf16 weights with it.
    """
    name, _, slot = key.rpartition("/")
    if (held := copies.named(slot)) is not None:
        held[name].copy_(value)
        return
    parameter, optimizer = stepped[name]
    optimizer.state[parameter][slot] = _placed(value, parameter, optimizer, number)


def forget_slots(optimizers: Sequence[Optimizer]) -> None:
    """Before slots are restored: none may stay that the checkpoint does not have."""
    for optimizer in optimizers:
        optimizer.state.clear()


def number_of(key: str, metadata: Mapping[str, str]) -> str | None:
    """`int` or `float` where the slot is a Python number."""
    return metadata.get(_SCALAR + key)


def _placed(value: Tensor, parameter: Tensor, optimizer: Optimizer, number: str | None) -> Any:
    if number is not None:
        return int(value.item()) if number == "int" else float(value.item())
    if value.ndim == 0:  # step counters stay on the CPU unless the optimizer runs in one kernel or graph
        group = next(g for g in optimizer.param_groups if any(p is parameter for p in g["params"]))
        on_device = group.get("capturable") or group.get("fused")
        return value.clone().to(parameter.device if on_device else "cpu")
    if value.shape == parameter.shape:
        return torch.empty_like(parameter, dtype=value.dtype).copy_(value)
    return value.clone().to(parameter.device)


def _named(model: nn.Module | Mapping[str, Tensor]) -> dict[str, Tensor]:
    if not isinstance(model, nn.Module):
        return dict(model)
    found = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not isinstance(tensor, Tensor):
            raise Malformed(
                f"{name} of the model is a {type(tensor).__name__} and no tensor; only tensors can be published"
            )
        found[canonical_name(name)] = tensor
    return found


def _storage(tensor: Tensor) -> tuple[Any, ...] | None:
    """Equal for two names of one tensor; None where nothing is stored."""
    if tensor.numel() == 0:
        return None
    return tensor.device, tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype


@dataclass(frozen=True, kw_only=True)
class Training:
    """Everything of a training that a checkpoint holds."""

    model: nn.Module
    topology: Topology
    optimizers: tuple[Optimizer, ...] = ()
    ema: tuple[nn.Module | Mapping[str, Tensor], ...] = ()
    fp32_master: Mapping[str, Tensor] = field(default_factory=dict)
    tracker: ImportanceTracker | None = None

    def copies(self) -> Copies:
        """As they are now: moving a module to a device replaces its buffers."""
        return Copies(tuple(_named(copy) for copy in self.ema), self.fp32_master)

    def weights(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        return weights_of(self.model)

    def slots(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        return slots_of(self.model, self.optimizers, self.copies())

    @property
    def keeps_slots(self) -> bool:
        return bool(self.optimizers or self.ema or self.fp32_master)
