"""What the tracker costs: sampled training steps against the steps beside them, by the clock."""

from __future__ import annotations

import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Protocol

import torch


@dataclass(frozen=True)
class Cost:
    """Share of training time that the tracker took so far, with its standard error (0.008 is 0.8 %)."""

    share: float
    error: float
    sampled_step: float
    """What a sampled step takes more, as a share of a step without it."""
    pairs: int
    """Sampled steps that were compared with their two neighbours."""


class Mark(Protocol):
    """A point in time that becomes known without waiting for it."""

    def known(self) -> bool: ...

    def until(self, later: Mark) -> float: ...


class WallMark:
    """The wall clock, now."""

    def __init__(self) -> None:
        self.at = time.perf_counter()

    def known(self) -> bool:
        return True

    def until(self, later: Mark) -> float:
        assert isinstance(later, WallMark)
        return later.at - self.at


class CudaMark:
    """When the device gets here. Read only after it did: asking never makes the host wait."""

    def __init__(self) -> None:
        event: Any = torch.cuda.Event  # untyped in torch
        self.event = event(enable_timing=True)
        self.event.record()

    def known(self) -> bool:
        return bool(self.event.query())

    def until(self, later: Mark) -> float:
        assert isinstance(later, CudaMark)
        return float(self.event.elapsed_time(later.event)) / 1000


class PairedCost:
    """Collects a mark at the start of every step, and compares each sampled step with its unsampled neighbours.

    Medians throughout: a step that lies beside an evaluation or a publish is an outlier, not a cost.
    """

    def __init__(self, mark: Callable[[], Mark]) -> None:
        self._new_mark = mark
        self._marks: deque[tuple[Mark, bool]] = deque()
        self._last: deque[tuple[float, bool]] = deque(maxlen=3)
        self._plain: deque[float] = deque(maxlen=512)
        self._extra: deque[float] = deque(maxlen=128)
        self._steps = 0
        self._sampled = 0

    def step(self, sampled: bool) -> None:
        """A step starts here, and the one before it ends."""
        self._marks.append((self._new_mark(), sampled))
        while len(self._marks) > 1 and self._marks[1][0].known():
            mark, was_sampled = self._marks.popleft()
            self._took(mark.until(self._marks[0][0]), was_sampled)

    def _took(self, seconds: float, sampled: bool) -> None:
        self._steps += 1
        self._sampled += sampled
        if not sampled:
            self._plain.append(seconds)
        self._last.append((seconds, sampled))
        if [s for _, s in self._last] == [False, True, False]:
            (before, _), (step, _), (after, _) = self._last
            self._extra.append(step - (before + after) / 2)

    def cost(self) -> Cost | None:
        """None until a sampled step was compared."""
        if not self._extra:
            return None
        step = statistics.median(self._plain)
        extra = statistics.median(self._extra)
        error = error_of_median(self._extra)
        # Of all the time that training took, the tracker's own included: s of S steps cost `extra` more each.
        total = self._steps * step + self._sampled * max(extra, 0.0)
        return Cost(
            share=self._sampled * max(extra, 0.0) / total,
            error=self._sampled * error / total,
            sampled_step=extra / step,
            pairs=len(self._extra),
        )

    def stride(self, max_cost: float, *, default: int, least: int = 4, most: int = 1000) -> int:
        """Every how many steps one may be sampled so that `max_cost` holds, the error of the measurement included."""
        cost = self.cost()
        if cost is None or cost.pairs < 5:
            return default
        upper = cost.sampled_step + cost.error * self._steps / max(self._sampled, 1)
        return min(max(math.ceil(upper / max_cost), least), most)


def error_of_median(values: Collection[float]) -> float:
    """Standard error, from the median absolute deviation: 1.4826 * sqrt(pi / 2) = 1.858."""
    middle = statistics.median(values)
    return 1.858 * statistics.median(abs(value - middle) for value in values) / math.sqrt(len(values))
