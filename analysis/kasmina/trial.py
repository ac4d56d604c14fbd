"""Trust, but verify: a found group is tried on a copy of the model before the topology names it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from leyline.masks import member_dead
from leyline.topology import Declined, Group, Kind, Member

Bits = NDArray[np.bool_]

STILL_USED = "with its consumers at zero the output still depends on it, so something else consumes it"
STILL_FED = (
    "with its producers at zero its consumers still see a value: an activation with f(0) != 0 follows, or something "
    "else produces it; if that is meant, name it in declared_nonzero"
)
UPSTREAM = "with its closing weight at zero the output still depends on the branch, so the branch does not end there"
NO_SHORTCUT = "with its closing weight at zero nothing passes the block, so there is no shortcut around it"


class Trial:
    """A copy of a model, in eval mode, whose parameters may be written at will.

    Small noise is put on it first: fresh biases, norm parameters and running statistics are 0 or 1, and a member that
    was left out would not show.
    """

    def __init__(self, model: nn.Module, forward: Callable[[nn.Module], list[Tensor]]) -> None:
        self.model, self._forward = model, forward
        self.random = torch.Generator().manual_seed(0)
        self.parameters = dict(model.named_parameters(remove_duplicate=False))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim < 2 or not bool(parameter.any()):
                    # Upwards, so that a ReLU lets it through.
                    parameter.add_(self._noise(parameter).abs(), alpha=0.1 if parameter.ndim < 2 else 0.02)
            for name, buffer in model.named_buffers():
                if name.endswith("running_mean"):
                    buffer += self._noise(buffer) * 0.1
                elif name.endswith("running_var"):
                    buffer *= 1 + self._noise(buffer).abs()

    def _noise(self, like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=self.random).to(like.device, like.dtype)

    def output(self) -> list[Tensor]:
        with torch.no_grad():
            return self._forward(self.model)

    def check(self, groups: Sequence[Group], declared: Collection[str]) -> tuple[list[Group], list[Declined]]:
        """The groups that hold, with zero_at_zero as found, and the others with the reason."""
        if not all(bool(torch.isfinite(out).all()) for out in self.output()):
            reason = "the model's output for the example inputs is not finite, so nothing could be checked"
            return [], [Declined(name=g.id, kind=g.kind, reason=reason) for g in groups]
        held: list[Group] = []
        declined: list[Declined] = []
        together = [g for g in groups if g.kind is not Kind.LAYER and g.id not in declared]
        fine = self.fault(together) is None  # all at once costs three passes; one by one only to find the culprits
        for group in groups:
            known = fine and group.kind is not Kind.LAYER and group.id not in declared
            fault = None if known else self.fault([group])
            if fault == STILL_FED and group.id in declared:
                held.append(group.model_copy(update={"zero_at_zero": False}))
            elif fault:
                declined.append(Declined(name=group.id, kind=group.kind, reason=fault))
            else:
                held.append(group)
        return held, declined

    def fault(self, groups: Sequence[Group]) -> str | None:
        """Mask half of the units of every group (a layer: its one) and see whether random values there are felt."""
        pruned = {group.id: self._half(group) for group in groups}
        makers = self._places(groups, pruned, ("producer", "norm"))
        users = self._places(groups, pruned, ("consumer",))
        before = {name: self.parameters[name].detach().clone() for name in {*makers, *users}}
        try:
            self._write(makers, None)
            self._write(users, None)
            if groups and groups[0].kind is Kind.LAYER:
                return self._layer_fault(groups[0])
            masked = self.output()
            self._write(makers, before)
            self._write(users, None)
            if not _same(masked, self.output()):
                return STILL_USED
            self._write(users, before)
            self._write(makers, None)
            return None if _same(masked, self.output()) else STILL_FED
        finally:
            self._restore(before)

    def _half(self, group: Group) -> Bits:
        pruned = np.zeros(group.units, dtype=np.bool_)
        order = torch.randperm(group.units, generator=self.random).numpy()
        pruned[order[: max(group.units // 2, 1)]] = True
        return pruned

    def _layer_fault(self, group: Group) -> str | None:
        """Called with the closing parameters at zero: the branch must not be felt, and the shortcut must be there."""
        masked = self.output()
        before = {name: self.parameters[name].detach().clone() for name in group.upstream}
        try:
            self._write({name: torch.ones_like(old, dtype=torch.bool) for name, old in before.items()}, before)
            if not _same(masked, self.output()):
                return UPSTREAM
        finally:
            self._restore(before)
        return None if self._passes(group.gates[0]) else NO_SHORTCUT

    def _passes(self, block: str) -> bool:
        """Whether a change of the block's input, of its output's shape, still reaches its output."""
        runs: list[tuple[Tensor, Tensor]] = []

        def change(
            _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]]:
            values = [*args, *kwargs.values()]
            at = next((i for i, v in enumerate(values) if isinstance(v, Tensor) and v.is_floating_point()), None)
            if at is not None and runs:  # the second pass; the first one sees the input as it is
                values[at] = values[at] * 1.5 + 0.5
            return tuple(values[: len(args)]), dict(zip(kwargs, values[len(args) :], strict=True))

        def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
            values = (v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.is_floating_point())
            if (given := next(values, None)) is not None:
                runs.append((given, out[0] if isinstance(out, tuple) else out))

        module = self.model.get_submodule(block)
        hooks = [
            module.register_forward_pre_hook(change, with_kwargs=True),
            module.register_forward_hook(keep, with_kwargs=True),
        ]
        try:
            self.output()
            self.output()
        finally:
            for hook in hooks:
                hook.remove()
        return bool(runs) and runs[0][0].shape == runs[0][1].shape and not torch.equal(runs[0][1], runs[-1][1])

    def _places(self, groups: Iterable[Group], pruned: Mapping[str, Bits], roles: Collection[str]) -> dict[str, Tensor]:
        """Parameter -> where it is pruned by members of these roles."""
        places: dict[str, Tensor] = {}
        for group in groups:
            for member in group.members:
                if member.role in roles:
                    where = self._dead(member, pruned[group.id])
                    known = places.get(member.parameter)
                    places[member.parameter] = where if known is None else known | where
        return places

    def _dead(self, member: Member, pruned: Bits) -> Tensor:
        parameter = self.parameters[member.parameter]
        view, bits = member_dead(member, tuple(parameter.shape), pruned)
        return torch.from_numpy(np.broadcast_to(bits, view).reshape(parameter.shape).copy()).to(parameter.device)

    def _write(self, places: Mapping[str, Tensor], spread: Mapping[str, Tensor] | None) -> None:
        """Zero the places, or fill them with noise of their parameter's spread."""
        with torch.no_grad():
            for name, where in places.items():
                parameter = self.parameters[name]
                if spread is None:
                    parameter[where] = 0
                else:
                    scale = float(spread[name].float().square().mean().sqrt())
                    parameter.copy_(torch.where(where, self._noise(parameter) * scale, parameter))

    def _restore(self, before: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, old in before.items():
                self.parameters[name].copy_(old)


def _same(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    """Bit for bit but for kernels that sum in an order of their own: a zero times anything finite adds nothing."""
    return all(bool(((x - y).abs() <= 1e-6 * x.abs().max()).all()) for x, y in zip(a, b, strict=True))
