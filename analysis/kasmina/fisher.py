"""Diagonal Fisher of single weights: an average of squared gradients, dense or as a Count-Min sketch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kasmina import sketch
from leyline.topology import Topology

Weights = Literal["none", "dense", "count-min"]


class WeightSums:
    """F <- (decay * D * F + B * g**2) / (decay * D + 1): the batch Fisher (pruning.md 4.3) of mini-batch gradients g.

    "count-min" sketches each parameter that is bigger than its sketch, and keeps the others dense; "dense" keeps all
    dense. Arrays are float32: `weight/<parameter>`, of the parameter's shape, or [rows, cells] of a sketch.
    """

    def __init__(self, topology: Topology, kind: Weights, decay: float) -> None:
        self._decay = decay
        self._uuids = {name: p.uuid for name, p in topology.parameters.items()}
        self._sizes = {
            name: found
            for name, p in topology.parameters.items()
            if kind == "count-min" and (found := sketch.size(p.size)) is not None
        }
        self._dense_elements = sum(p.size for name, p in topology.parameters.items() if name not in self._sizes)
        self._kind = kind
        self._sums: dict[str, Tensor] = {}
        self._weight: dict[str, float] = {}

    def add(self, squares: Mapping[str, Tensor]) -> None:
        """One mini-batch's B * g**2 by parameter. One that overflowed adds nothing."""
        for name, square in squares.items():
            new = torch.where(torch.isfinite(square).all(), square, 0.0)
            weight = self._decay * self._weight.get(name, 0.0) + 1.0
            keep = 1.0 - 1.0 / weight
            held = self._sums.get(name)
            if name in self._sizes:
                if held is None:
                    held = self._sums[name] = torch.zeros(self._sizes[name], device=new.device)
                index = torch.arange(new.numel(), dtype=torch.int64, device=new.device)
                sketch.update(held, new.flatten() / weight, index, self._uuids[name], decay=keep)
            elif held is None:
                self._sums[name] = new.clone()
            else:
                held.mul_(keep).add_(new, alpha=1.0 / weight)
            self._weight[name] = weight

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Mean squared gradients by `weight/<parameter>`."""
        return {f"weight/{n}": held.to("cpu", torch.float32, copy=True).numpy() for n, held in self._sums.items()}

    def state(self) -> dict[str, NDArray[Any]]:
        """The arrays, and the sum of weights behind each."""
        weights = {f"behind/{n}": np.asarray(w, dtype=np.float64) for n, w in self._weight.items()}
        return self.arrays() | weights

    def load_state(self, arrays: Mapping[str, NDArray[Any]], devices: Mapping[str, torch.device]) -> None:
        """Go on from a state of the same topology and kind."""
        self._sums, self._weight = {}, {}
        for name, device in devices.items():
            if f"weight/{name}" in arrays:
                self._sums[name] = torch.from_numpy(arrays[f"weight/{name}"].copy()).to(device)
                self._weight[name] = float(arrays[f"behind/{name}"])

    def said(self) -> str | None:
        """What a person reads where sketches were asked for: their size and error, or that dense is not bigger."""
        if self._kind != "count-min":
            return None
        if not self._sizes:
            return f"dense: no parameter is bigger than its sketch (epsilon {sketch.EPSILON:g}, delta {sketch.DELTA:g})"
        cells = sum(rows * width for rows, width in self._sizes.values())
        return (
            f"count-min v{sketch.VERSION}, conservative: {len(self._sizes)} parameters in {cells * 4:,} bytes, "
            f"epsilon {sketch.EPSILON:g}, delta {sketch.DELTA:g}; over-estimates only. "
            f"{self._dense_elements:,} weights of smaller parameters dense"
        )
