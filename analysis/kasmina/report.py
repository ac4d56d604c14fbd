"""How the training says it is doing: the state that a report has where its writer does not know better."""

from __future__ import annotations

import math
import statistics
from collections import deque
from typing import Literal

State = Literal["stable", "unstable", "unknown"]

_HISTORY = 101
"""Losses that the median runs over."""
_ALLOWED = 0.2
"""A loss may exceed the median by a fifth of it."""


class LossHistory:
    """The losses reported so far in this process."""

    def __init__(self) -> None:
        self._losses: deque[float] = deque(maxlen=_HISTORY)

    def judge(self, loss: float, grad_norm: float | None) -> State:
        """stable: finite and at most 1.2 x the running median; unknown where there is no history yet."""
        if not math.isfinite(loss) or (grad_norm is not None and not math.isfinite(grad_norm)):
            return "unstable"
        median = statistics.median(self._losses) if self._losses else None
        self._losses.append(loss)
        if median is None:
            return "unknown"
        return "stable" if loss <= median + _ALLOWED * abs(median) else "unstable"
