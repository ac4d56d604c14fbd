"""The three service level objectives: 95 % of analyses succeed, under 5 minutes of overhead, under 1 % of time."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

WINDOW = 200
"""The newest measurements that the objectives look at: a bad day a month ago is none of today."""


@dataclass(frozen=True)
class Objective:
    """What is wanted, what was measured, and whether it holds; None where nothing was measured yet."""

    target: float
    value: float | None
    met: bool | None


def slo(*, analyses: Sequence[bool], held: Sequence[float], shares: Sequence[float]) -> dict[str, Objective]:
    """The objectives, by the names that /health/emrakul gives them.

    `analyses`: of those that are over, whether each succeeded. `held` (seconds that a checkpoint held its training)
    and `shares` (of training time) are judged by their 95th percentile: 19 of 20 must be below.
    """
    success, overhead, share = success_rate(analyses), percentile(held), percentile(shares)
    return {
        "analysisSuccess": Objective(0.95, success, None if success is None else success >= 0.95),
        "checkpointOverheadSeconds": Objective(300.0, overhead, None if overhead is None else overhead < 300.0),
        "trainingTimeShare": Objective(0.01, share, None if share is None else share < 0.01),
    }


def success_rate(analyses: Sequence[bool]) -> float | None:
    """Share of these that succeeded; None of none."""
    return sum(analyses) / len(analyses) if analyses else None


def percentile(values: Sequence[float], q: float = 0.95) -> float | None:
    """The smallest of `values` that at least the share `q` of them are not above; None of none."""
    ranked = sorted(values)
    return ranked[max(math.ceil(q * len(ranked)), 1) - 1] if ranked else None


class Measured:
    """The newest measurements of this process."""

    def __init__(self) -> None:
        self.analyses: deque[bool] = deque(maxlen=WINDOW)
        self.held: deque[float] = deque(maxlen=WINDOW)
        self.shares: deque[float] = deque(maxlen=WINDOW)

    def objectives(self) -> dict[str, Objective]:
        return slo(analyses=self.analyses, held=self.held, shares=self.shares)
