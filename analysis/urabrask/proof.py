"""The dead-unit proof: whatever stood in a pruned unit, the answers would be the same. So masking is removing.

Two fills, in eval mode, with the candidate's own tensors. A: producers and norms of the pruned units get random
values, the consumers stay zero; a consumer that no mask covers lets them through. B: the consumers' columns get random
values, producers and norms stay zero; a producer or norm that no mask covers feeds them. Values come from
N(0, sigma of the tensor's live values): larger ones overflow, and Inf * 0 is NaN. A is done twice, the second time with
the sign of what comes last before the activation turned (the norm, or the producers where there is none): a ReLU lets
through what is not negative, and the values of a single unit may be negative on every sample.

A layer has no consumers. Fill A writes everything upstream inside its branch, which its closing weight must stop; what
the branch then adds to the shortcut is looked at in the program itself (`joins`), because a constant moves no answer.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from leyline.masks import Dead, Masks, member_dead
from leyline.topology import Group, Kind
from urabrask.interpret import Forward

TOLERANCE = 1e-5
"""Largest difference, relative to the largest answer. Filled terms are multiplied by exact zeros, so bit-identical is
what one sees; a kernel that adds in another order may round otherwise."""

_WINDOW = 1 << 19
"""Elements that are looked at, or filled, at once."""

Fill = Literal["A", "B"]
_ROLES: dict[Fill, tuple[str, ...]] = {"A": ("producer", "norm"), "B": ("consumer",)}
_MISSED = {
    "A": "values in its producers and norms reach the answers, so a consumer of it is not masked",
    "B": "its consumers still see a value, so a producer or norm of it is not masked, or an activation with f(0) != 0 "
    "stands between",
}


@dataclass(frozen=True)
class Proof:
    """The proof's material. `seed`: text that fixes the random values (digests, never the time)."""

    forward: Forward
    tensors: Mapping[str, Tensor]
    inputs: Sequence[Tensor]
    masks: Masks
    seed: str
    sigmas: dict[str, float] = field(default_factory=dict)
    """By tensor, once it was needed: all fills of a tensor are alike, and its values are looked at once."""

    def fault(self) -> str:
        """The first group, unit and fill that is felt, as a sentence; empty if none is."""
        unfilled = self.forward(self.tensors, self.inputs)
        if not bool(torch.isfinite(unfilled).all()):
            return "the candidate's own answers hold NaN or Inf"
        pruned = {id_: ~active for id_, active in sorted(self.masks.units.items())}
        for fill in _ROLES:
            ids = [id_ for id_ in pruned if self._takes(self.masks.groups[id_], fill)]
            if self._felt(fill, {id_: pruned[id_] for id_ in ids}, unfilled):
                return self._culprit(fill, {id_: pruned[id_] for id_ in ids}, unfilled)
        return ""

    def _takes(self, group: Group, fill: Fill) -> bool:
        """B is not for layers, nor where the user declared that f(0) != 0 may stand before the consumers."""
        return fill == "A" or (group.kind is not Kind.LAYER and group.zero_at_zero)

    def _felt(self, fill: Fill, pruned: Mapping[str, NDArray[np.bool_]], unfilled: Tensor) -> bool:
        return any(self._differs(fill, pruned, unfilled, sign) for sign in ((1, -1) if fill == "A" else (1,)))

    def _differs(self, fill: Fill, pruned: Mapping[str, NDArray[np.bool_]], unfilled: Tensor, sign: int) -> bool:
        with self._filled(fill, pruned, sign):
            filled = self.forward(self.tensors, self.inputs)
        difference = (filled.double() - unfilled.double()).abs().max()
        # Not "> tolerance": NaN is no difference by any comparison, and must fail.
        return not bool(difference <= TOLERANCE * unfilled.double().abs().max())

    def _culprit(self, fill: Fill, pruned: Mapping[str, NDArray[np.bool_]], unfilled: Tensor) -> str:
        """Halve the groups, then the units, while one half alone is felt."""
        while len(pruned) > 1:
            names = list(pruned)
            halves = [{id_: pruned[id_] for id_ in half} for half in _halves(names)]
            felt = next((half for half in halves if self._felt(fill, half, unfilled)), None)
            if felt is None:
                return f"fill {fill}: only together are groups {', '.join(names[:4])} felt; {_MISSED[fill]}"
            pruned = felt
        (id_, bits), *_ = pruned.items()
        units = np.flatnonzero(bits).tolist()
        while len(units) > 1:
            narrowed = (half for half in _halves(units) if self._felt(fill, {id_: _only(half, bits)}, unfilled))
            if (found := next(narrowed, None)) is None:
                break
            units = found
        group = self.masks.groups[id_]
        if group.kind is Kind.LAYER:
            return f"fill {fill}: layer {id_} is felt; values upstream in its branch pass its closing weight"
        named = f"unit {units[0]}" if len(units) == 1 else f"units {', '.join(map(str, units[:4]))}"
        return f"fill {fill}: {named} of group {id_} is felt: {_MISSED[fill]}"

    @contextmanager
    def _filled(self, fill: Fill, pruned: Mapping[str, NDArray[np.bool_]], sign: int) -> Iterator[None]:
        places, last = self._places(fill, pruned)
        before: dict[str, list[Tensor]] = {}
        try:
            for name, dead in places.items():
                noise, kept = self._noise(fill, name, sign if name in last else 1), before.setdefault(name, [])
                for values, place in _windows(self.tensors[name], dead):
                    kept.append(values[place])
                    values[place] = noise(len(kept[-1]))
            yield
        finally:
            for name, kept in reversed(before.items()):  # of two names of one tensor the second saw the first's noise
                for (values, place), was in zip(_windows(self.tensors[name], places[name]), kept, strict=False):
                    values[place] = was

    def _places(self, fill: Fill, pruned: Mapping[str, NDArray[np.bool_]]) -> tuple[dict[str, Dead | None], set[str]]:
        """What is filled of each tensor (None: all of it), and the tensors that come last before an activation."""
        places: dict[str, Dead | None] = {}
        last: set[str] = set()
        for id_, bits in pruned.items():
            group = self.masks.groups[id_]
            if group.kind is Kind.LAYER:
                places |= dict.fromkeys((name for name in group.upstream if name in self.tensors), None)
                continue
            normed = any(member.role == "norm" for member in group.members)
            last |= {member.parameter for member in group.members if (member.role == "norm") == normed}
            for member in group.members:
                if member.role in _ROLES[fill] and member.parameter in self.tensors:
                    shape = self.masks.parameters[member.parameter].shape
                    known = places.get(member.parameter, Dead(shape, ()))
                    if known is not None:
                        places[member.parameter] = Dead(shape, (*known.parts, member_dead(member, shape, bits)))
        return places, last

    def _noise(self, fill: Fill, name: str, sign: int) -> Callable[[int], Tensor]:
        """Draws so many values for a tensor."""
        tensor = self.tensors[name]
        seed = hashlib.sha256(f"{self.seed}\0{fill}\0{name}".encode()).digest()
        random = torch.Generator().manual_seed(int.from_bytes(seed[:7], "little"))
        if name not in self.sigmas:
            self.sigmas[name] = _sigma(tensor, self.masks.dead(name))
        scale = sign * self.sigmas[name]
        return lambda count: (torch.randn(count, generator=random, dtype=torch.float32) * scale).to(tensor.dtype)


def _windows(tensor: Tensor, dead: Dead | None) -> Iterator[tuple[Tensor, Tensor]]:
    """Views of a tensor's values in C order, each with the places (bool) that are pruned; None: all of them.

    A tensor's worth of places, or of float64, would be a quarter, or twice, of what the tensor takes.
    """
    flat = tensor.view(-1)
    for at in range(0, flat.numel(), _WINDOW):
        values = flat[at : at + _WINDOW]
        pruned = np.ones(len(values), dtype=np.bool_) if dead is None else dead.range(at, at + len(values))
        if pruned.any():
            yield values, torch.from_numpy(pruned)


def _sigma(tensor: Tensor, dead: Dead | None) -> float:
    """Standard deviation of the live values; of a constant (a fresh norm) its size, of nothing alive 1."""
    flat = tensor.view(-1)
    count, mean, squares = 0, 0.0, 0.0
    for at in range(0, flat.numel(), _WINDOW):  # windows are added up as Chan et al. (1979) do it
        values = flat[at : at + _WINDOW].double()
        live = values if dead is None else values[torch.from_numpy(~dead.range(at, at + len(values)))]
        if new := len(live):
            variance, middle = (float(each) for each in torch.var_mean(live, correction=0))
            squares += new * variance + (middle - mean) ** 2 * count * new / (count + new)
            mean = mean + (middle - mean) * new / (count + new) if count else middle
            count += new
    deviation = math.sqrt(squares / count) if count else 0.0
    if deviation > 1e-9 * abs(mean):  # below, it is how a constant's sum was rounded
        return deviation
    return abs(mean) if abs(mean) > 0 else 1.0


def _halves(items: list) -> tuple[list, list]:  # type: ignore[type-arg]
    return items[: len(items) // 2], items[len(items) // 2 :]


def _only(units: Sequence[int], like: NDArray[np.bool_]) -> NDArray[np.bool_]:
    bits = np.zeros_like(like)
    bits[list(units)] = True
    return bits
