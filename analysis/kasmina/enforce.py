"""Masks that hold while training goes on: what is pruned stays exactly zero, in weights and in all that moves them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from leyline.ids import canonical_name, parameter_uuid
from leyline.masks import Masks


class MasksDoNotFit(ValueError):
    """The masks speak of other parameters than the model has; the sentence names the first one."""


class MaskEnforcer:
    """Keeps pruned elements zero: gradients before clipping, then weights, slots, masters and copies after each step.

    `optimizers`: every optimizer of the run. Their slots of a parameter's own shape (momentum, Adam's moments) are
    masked; slots of another shape (Shampoo's factors) mix rows and cannot be, which is why weights are masked after
    the step and not only gradients before it. Without optimizers call `apply_now` after each step.
    `ema`: averaged copies, each a module or a mapping from canonical name to tensor. `fp32_master`: canonical name to
    the tensor that the optimizer really steps. `model_id`: refuse masks that were made for another model.

    Zeros are assigned, never multiplied: NaN * 0 is NaN, and -1 * 0 is -0. Parameters with nothing pruned are not
    touched. Used as a context manager, or until `remove()`.
    """

    def __init__(
        self,
        model: nn.Module,
        masks: Masks,
        *,
        optimizers: Sequence[Optimizer] = (),
        ema: Sequence[nn.Module | Mapping[str, Tensor]] = (),
        fp32_master: Mapping[str, Tensor] | None = None,
        model_id: str | None = None,
    ) -> None:
        self._parameters = _by_name(model.named_parameters(remove_duplicate=False))
        self._optimizers = tuple(optimizers)
        self._copies = [
            _by_name(copy.named_parameters(remove_duplicate=False)) if isinstance(copy, nn.Module) else dict(copy)
            for copy in ema
        ]
        self._master = self._by_every_name(fp32_master or {})
        self._model_id = model_id
        self._gradient_hooks: list[RemovableHandle] = []
        self._dead: dict[str, Tensor] = {}
        self._on_device: dict[tuple[str, torch.device], Tensor] = {}
        self.update(masks)
        self._step_hooks = [opt.register_step_post_hook(self._after_step) for opt in self._optimizers]

    def update(self, masks: Masks) -> None:
        """Take these masks from now on, and apply them. MasksDoNotFit, with nothing changed, where they do not fit.

        Restores nothing: what only the old masks pruned stays zero until the caller loads its values.
        """
        dead = {name: torch.from_numpy(found.full()) for name, found in self._checked(masks).items()}
        self._drop_gradient_hooks()
        self._dead = {name: bits for name, bits in dead.items() if bool(bits.any())}
        self._on_device = {}
        for name in self._dead:
            parameter = self._parameters[name]
            if parameter.requires_grad:
                hook = self._gradient_hook(name)
                register: Any = parameter.register_post_accumulate_grad_hook  # untyped in torch
                self._gradient_hooks.append(register(hook))
        self.apply_now()

    @torch.no_grad()
    def apply_now(self) -> None:
        """Zero what is pruned in weights, optimizer slots, fp32 masters and averaged copies. Idempotent."""
        for name in self._dead:
            parameter, master = self._parameters[name], self._master.get(name)
            self._zero(name, parameter)
            for held in (parameter,) if master is None else (parameter, master):
                for slot in self._slots(held):
                    self._zero(name, slot)
            if master is not None:
                self._zero(name, master)
            for copy in self._copies:
                self._zero(name, copy[name])

    def remove(self) -> None:
        """Enforce no more. Weights stay as they are."""
        self._drop_gradient_hooks()
        for handle in self._step_hooks:
            handle.remove()

    def __enter__(self) -> MaskEnforcer:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def _by_every_name(self, masters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Masks name a tied parameter once, and its master may be given under another of its names."""
        found: dict[str, Tensor] = {}
        for name, master in masters.items():
            parameter = self._parameters.get(canonical_name(name))
            if parameter is None:
                raise MasksDoNotFit(
                    f"an fp32 master is given for {name}, which this model does not have; name masters as parameters"
                )
            found |= {other: master for other, known in self._parameters.items() if known is parameter}
        return found

    def _checked(self, masks: Masks) -> dict[str, Any]:
        """What is pruned, by parameter, after every name, shape and UUID was compared with the model's."""
        model_id = self._model_id or masks.model_id
        found = {}
        for name, expected in masks.parameters.items():
            if (dead := masks.dead(name)) is None:
                continue
            if name not in self._parameters:
                raise MasksDoNotFit(
                    f"the masks prune {name}, which this model does not have; load the model that they were made for"
                )
            shape = tuple(self._parameters[name].shape)
            if shape != expected.shape:
                raise MasksDoNotFit(
                    f"{name} has shape {list(shape)} in this model, the masks are for {list(expected.shape)}; "
                    "load the model that they were made for"
                )
            if parameter_uuid(name, shape, model_id) != expected.uuid:
                raise MasksDoNotFit(
                    f"{name} has another UUID in model {model_id} than in the masks (of model {masks.model_id}); "
                    "load the model that they were made for"
                )
            for number, copy in enumerate(self._copies):
                if name not in copy or tuple(copy[name].shape) != shape:
                    raise MasksDoNotFit(
                        f"the masks prune {name}, but averaged copy {number} has no such tensor of shape "
                        f"{list(shape)}; pass copies of this model, named as its parameters are"
                    )
            if name in self._master and tuple(self._master[name].shape) != shape:
                raise MasksDoNotFit(
                    f"the fp32 master of {name} has shape {list(self._master[name].shape)}, the parameter "
                    f"{list(shape)}; pass unflattened masters"
                )
            found[name] = dead
        return found

    def _slots(self, parameter: Tensor) -> Iterable[Tensor]:
        for optimizer in self._optimizers:
            for slot in optimizer.state.get(parameter, {}).values():
                if isinstance(slot, Tensor) and slot.shape == parameter.shape:
                    yield slot

    def _zero(self, name: str, tensor: Tensor) -> None:
        key = (name, tensor.device)
        if key not in self._on_device:
            self._on_device[key] = self._dead[name].to(tensor.device)
        tensor.masked_fill_(self._on_device[key], 0)

    def _gradient_hook(self, name: str) -> Any:
        def after_accumulate(parameter: Tensor) -> None:
            # A sparse gradient has no dense elements to fill; the weight and its slots are zeroed after the step.
            if parameter.grad is not None and not parameter.grad.is_sparse:
                self._zero(name, parameter.grad)

        return after_accumulate

    def _after_step(self, *_: object) -> None:
        self.apply_now()

    def _drop_gradient_hooks(self) -> None:
        for handle in self._gradient_hooks:
            handle.remove()
        self._gradient_hooks = []


def _by_name(named: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    return {canonical_name(name): tensor for name, tensor in named}
