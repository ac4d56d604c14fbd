"""Where a pair's tensors go when it is loaded: into a training, in place, or into plain tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from kasmina.enforce import MaskEnforcer, MasksDoNotFit
from kasmina.formats import TensorRef
from kasmina.tensor_files import TORCH
from kasmina.training_state import ModelDoesNotFit, Stepped, Training, forget_slots, restore_slot, stepped
from leyline.ids import canonical_name
from leyline.masks import Masks
from leyline.model import Malformed


class Into(Protocol):
    """Takes the tensors of a pair."""

    @property
    def wants_slots(self) -> bool: ...

    def begin(self, weights: Mapping[str, TensorRef], slots: Mapping[str, TensorRef], /) -> None:
        """Before the first tensor. ModelDoesNotFit, with nothing changed, where they cannot be taken."""
        ...

    def weight(self, name: str, value: Tensor, /) -> None: ...

    def slot(self, key: str, value: Tensor, number: str | None, /) -> None: ...

    def tracker(self, state: bytes | None, /) -> None: ...

    def masks(self, masks: Masks, /) -> None:
        """Called last. MasksDoNotFit where they do not."""
        ...


class IntoTraining:
    """In place: every tensor goes where the training holds it."""

    def __init__(self, training: Training, enforcer: MaskEnforcer, *, blank: bytes) -> None:
        """`blank`: the state of the tracker before any step, for checkpoints that have none."""
        self._training, self._enforcer, self._blank = training, enforcer, blank
        self._weights, self._tied = training.weights()
        self._copies = training.copies()
        self._stepped: Stepped = stepped(training.model, training.optimizers, self._copies)
        self.note = ""
        """Why the tracker starts anew, where it does although the checkpoint has a state."""

    @property
    def wants_slots(self) -> bool:
        return self._training.keeps_slots

    def begin(self, weights: Mapping[str, TensorRef], slots: Mapping[str, TensorRef]) -> None:
        self._check_weights(weights)
        self._check_slots(slots)
        forget_slots(self._training.optimizers)
        self.note = ""

    @torch.no_grad()
    def weight(self, name: str, value: Tensor) -> None:
        name = self._tied.get(name, name)
        if name in self._weights:  # else it is one that _check_weights lets pass
            self._weights[name].copy_(value)

    def slot(self, key: str, value: Tensor, number: str | None) -> None:
        restore_slot(key, value, self._stepped, self._copies, number)

    def tracker(self, state: bytes | None) -> None:
        if (tracker := self._training.tracker) is None:
            return
        try:
            tracker.load_state(self._blank if state is None else state)
        except Malformed as error:  # another tracker than the one that was published: no reason not to train
            tracker.load_state(self._blank)
            self.note = f"the importance statistics start anew: {error}"

    def masks(self, masks: Masks) -> None:
        self._enforcer.update(masks)

    def _check_weights(self, weights: Mapping[str, TensorRef]) -> None:
        # an imported BERT still holds its position_ids: whole numbers that the model lacks are no weights of it, nor
        # are the tables (masks, frequencies) that today's model makes for itself and saves no longer
        made = {canonical_name(name) for name, _ in self._training.model.named_buffers(remove_duplicate=False)}
        known = set(self._weights) | set(self._tied) | made
        if extra := next((name for name, ref in weights.items() if name not in known and _is_float(ref)), None):
            raise ModelDoesNotFit(f"the checkpoint holds {extra}, which this model does not have; load its own model")
        for name, tensor in self._weights.items():
            names = (name, *(other for other, first in self._tied.items() if first == name))
            found = next((weights[each] for each in names if each in weights), None)
            if found is None:
                raise ModelDoesNotFit(f"the checkpoint has no {name}; load it into the model that published it")
            if found.shape != tuple(tensor.shape):
                raise ModelDoesNotFit(
                    f"{name} has shape {list(found.shape)} in the checkpoint and {list(tensor.shape)} in this model; "
                    "load it into the model that published it"
                )

    def _check_slots(self, slots: Mapping[str, TensorRef]) -> None:
        for key, ref in slots.items():
            name, _, slot = key.rpartition("/")
            held = self._copies.named(slot)
            if held is None and name not in self._stepped:
                raise ModelDoesNotFit(f"the checkpoint holds {key}, but nothing here steps {name}; pass its optimizers")
            if held is not None and (name not in held or tuple(held[name].shape) != ref.shape):
                raise ModelDoesNotFit(f"the checkpoint holds {key} of shape {list(ref.shape)}, this training does not")


def _is_float(ref: TensorRef) -> bool:
    return ref.dtype not in TORCH or TORCH[ref.dtype].is_floating_point or TORCH[ref.dtype].is_complex


class IntoTensors:
    """Only the weights, on the CPU, with the masks applied."""

    wants_slots = False

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}

    def begin(self, _weights: Mapping[str, TensorRef], _slots: Mapping[str, TensorRef]) -> None:
        self.tensors = {}

    def weight(self, name: str, value: Tensor) -> None:
        self.tensors[name] = value

    def slot(self, key: str, _value: Tensor, _number: str | None) -> None:
        raise AssertionError(f"{key} was not wanted")

    def tracker(self, _state: bytes | None) -> None:
        pass

    def masks(self, masks: Masks) -> None:
        for name in masks.parameters:
            if (dead := masks.dead(name)) is None:
                continue
            if name not in self.tensors or tuple(self.tensors[name].shape) != dead.shape:
                raise MasksDoNotFit(f"the masks prune {name} of shape {list(dead.shape)}, which the weights lack")
            self.tensors[name].masked_fill_(torch.from_numpy(dead.full()), 0)
