"""The running sums of importance statistics: numerators and denominators apart, odd and even mini-batches apart."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from leyline.topology import Kind, Topology

HALVES = ("odd", "even")
_ROWS = ("abs", "sq", "act", "in")


@dataclass
class Batch:
    """What one mini-batch adds; filled by the hooks, on the device, in float32."""

    size: int
    """Samples in the mini-batch."""
    taken: int
    """Samples of it that are measured: every `stride`-th."""
    units: int
    device: torch.device
    looked: int
    """Samples whose forward statistics are taken (those without a gradient): as many, or fewer, to save time."""
    scale: float = 1.0
    """What its loss was multiplied by, beyond the mean over the mini-batch."""
    fired: set[int] = field(default_factory=set)
    """Groups whose gates were seen: backward where there are gradients, else forward."""
    grams: dict[int, Tensor] = field(default_factory=dict)
    cosines: dict[int, Tensor] = field(default_factory=dict)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    """Squared mini-batch gradients of single parameters, scale and batch factor included."""
    open: bool = True

    def __post_init__(self) -> None:
        self.q = torch.zeros(self.taken, self.units, device=self.device)
        """dL/dgate of the mini-batch's mean loss, [taken, units]; becomes q_n by the factor size / scale."""
        self.batch_q = torch.zeros(self.units, device=self.device)
        self.act = torch.zeros(self.units, device=self.device)
        self.inputs = torch.zeros(self.units, device=self.device)

    @property
    def rows(self) -> slice:
        """The samples that are measured."""
        return _spread(self.size, self.taken)

    @property
    def forward_rows(self) -> slice:
        """The samples whose forward statistics are taken; each stands for taken / looked."""
        return _spread(self.size, self.looked)


def _spread(size: int, taken: int) -> slice:
    """`taken` of `size` samples, at equal distances: a mini-batch may be sorted."""
    stride = size // taken
    return slice(0, stride * taken, stride)


class Sums:
    """EMA numerators of every group, in dense arrays over all units of the model, with their denominators.

    One sampled mini-batch of n samples: N <- decay * N + sum, D <- decay * D + n, D2 <- decay**2 * D2 + n, so that
    N / D is the mean and D**2 / D2 the effective number of samples.
    """

    def __init__(self, topology: Topology, device: torch.device, decay: float) -> None:
        self.decay = decay
        self.device = device
        # mps has no float64; its float32 sums are merged in float64 by whoever reads them.
        self.dtype = torch.float32 if device.type == "mps" else torch.float64
        self._groups = topology.groups
        self.slices: list[slice] = []
        start = 0
        for group in topology.groups:
            stop = start + (0 if group.kind is Kind.LAYER else group.units)
            self.slices.append(slice(start, stop))
            start = stop
        self.units = start
        self._group_of_unit = torch.tensor(
            [index for index, where in enumerate(self.slices) for _ in range(where.stop - where.start)],
            dtype=torch.int64,
            device=device,
        )
        self.totals = torch.zeros(2, len(_ROWS), start, dtype=self.dtype, device=device)
        self.counts = torch.zeros(2, len(self._groups), 2, dtype=self.dtype, device=device)
        self.cosines: dict[int, Tensor] = {}
        self.grams: dict[int, Tensor] = {}
        self.steps = 0
        self._fired: dict[frozenset[int], tuple[Tensor, Tensor]] = {}

    def add(self, batch: Batch, mini_batch: frozenset[int] = frozenset()) -> None:
        """One mini-batch more; one that overflowed (a GradScaler's search) adds nothing. Never waits for the device.

        `mini_batch`: groups without a gate. Theirs is q = sqrt(B) * sum of w * dL/dw, one count a mini-batch: q**2 is
        then B * g**2, whose expectation is that of a single sample's where the mean gradient is small.
        """
        q = batch.q * (batch.size / batch.scale)
        absolute, square = q.abs().sum(0), q.square().sum(0)
        if mini_batch:
            coarse = batch.batch_q * (batch.size**0.5 / batch.scale)
            chosen = self._members(mini_batch)[0]
            absolute = torch.where(chosen, coarse.abs(), absolute)
            square = torch.where(chosen, coarse.square(), square)
        stand_for = batch.taken / batch.looked
        new = torch.stack([absolute, square, batch.act * stand_for, batch.inputs * stand_for])
        units, groups = self._members(frozenset(batch.fired))
        finite = torch.isfinite(new).all()
        half = self.steps % 2
        self.totals.mul_(self.decay)
        self.totals[half].add_(torch.where(finite & units, new, 0.0).to(self.dtype))
        self.counts[:, :, 0].mul_(self.decay)
        self.counts[:, :, 1].mul_(self.decay**2)
        samples = groups * batch.taken
        if mini_batch:
            samples = torch.where(self._members(mini_batch)[1].bool(), groups, samples)
        self.counts[half].add_(torch.where(finite, samples, 0.0).to(self.dtype)[:, None])
        for held, found in ((self.cosines, batch.cosines), (self.grams, batch.grams)):
            for index, value in found.items():
                old = held.get(index)
                new_value = torch.where(torch.isfinite(value).all(), value, 0.0).to(self.device, self.dtype)
                held[index] = new_value if old is None else old.mul_(self.decay).add_(new_value)
        self.steps += 1

    def forget(self, group: int) -> None:
        """Drop what a group has: its counts are to mean something else from now on."""
        self.totals[:, :, self.slices[group]] = 0
        self.counts[:, group] = 0

    def _members(self, groups: frozenset[int]) -> tuple[Tensor, Tensor]:
        """(over units, over groups): which belong to these groups. Kept: a copy to the device may wait for it."""
        if groups not in self._fired:
            over_groups = torch.zeros(len(self._groups))
            over_groups[sorted(groups)] = 1
            over_groups = over_groups.to(self.device)
            self._fired[groups] = (over_groups[self._group_of_unit].bool(), over_groups)
        return self._fired[groups]

    def effective_samples(self) -> list[float]:
        """D**2 / D2 of each group, both halves together; 0 where nothing was seen."""
        both = _host(self.counts.sum(0))
        return [float(d * d / d2) if d2 > 0 else 0.0 for d, d2 in both]

    def arrays(self, *, gradients: bool) -> tuple[dict[str, NDArray[np.float64]], tuple[str, ...]]:
        """Named as ImportanceStats says, and the groups they speak of. Without gradients there is no abs and sq."""
        totals, counts = _host(self.totals), _host(self.counts)
        found: dict[str, NDArray[np.float64]] = {}
        names = []
        for index, group in enumerate(self._groups):
            if group.kind is Kind.LAYER:
                if index in self.cosines:
                    found[f"{group.id}/cos"] = _host(self.cosines[index])
                    names.append(group.id)
                continue
            if not counts[:, index, 0].any():
                continue
            names.append(group.id)
            units = totals[:, :, self.slices[index]]
            for half, word in enumerate(HALVES):
                found[f"{group.id}/{word}/n"] = counts[half, index]
                for row, name in enumerate(_ROWS[:3]):
                    if (gradients and name != "act") or (name == "act" and units[:, row].any()):
                        found[f"{group.id}/{word}/{name}"] = units[half, row]
            if units[:, 3].any():
                found[f"{group.id}/in"] = units[:, 3].sum(0)
            if index in self.grams:
                found[f"{group.id}/gram"] = _host(self.grams[index])
        return found, tuple(names)

    def state(self) -> dict[str, NDArray[Any]]:
        """Everything, to go on from later."""
        found = {"totals": _host(self.totals), "counts": _host(self.counts)}
        found |= {f"cos/{index}": _host(value) for index, value in self.cosines.items()}
        return found | {f"gram/{index}": _host(value) for index, value in self.grams.items()}

    def load_state(self, arrays: Mapping[str, NDArray[Any]], steps: int) -> None:
        """Go on from a state of the same topology; the caller has compared the topologies."""

        def restored(array: NDArray[Any]) -> Tensor:
            return torch.from_numpy(array.copy()).to(self.device, self.dtype)

        self.totals, self.counts = restored(arrays["totals"]), restored(arrays["counts"])
        held = {"cos": {}, "gram": {}}  # type: dict[str, dict[int, Tensor]]
        for name, array in arrays.items():
            family, _, index = name.partition("/")
            if family in held:
                held[family][int(index)] = restored(array)
        self.cosines, self.grams = held["cos"], held["gram"]
        self.steps = steps


def _host(tensor: Tensor) -> NDArray[np.float64]:
    """A copy: what was handed out must not change with the next step."""
    array: NDArray[np.float64] = tensor.to("cpu", torch.float64, copy=True).numpy()
    return array
