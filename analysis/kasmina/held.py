"""How long the training stands still for its checkpoints, by the clock."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Concatenate, ParamSpec, Protocol, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


class HeldTime:
    """Seconds that the newest checkpoint has held the training so far: its publish, and every hold since."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seconds: float | None = None
        self._holding = False

    @property
    def seconds(self) -> float | None:
        """None before anything was published."""
        return self._seconds

    @contextmanager
    def hold(self) -> Iterator[None]:
        """The training stands still in here. A hold inside a hold (publish waits) is no second one."""
        if self._holding:
            yield
            return
        began, self._holding = self._clock(), True
        try:
            yield
        finally:
            self._holding = False
            if self._seconds is not None:
                self._seconds += self._clock() - began

    def published(self) -> None:
        """From here on a new checkpoint counts; the hold that this happens in belongs to it."""
        self._seconds = 0.0


class _Holds(Protocol):
    _held: HeldTime


S = TypeVar("S", bound=_Holds)


def holds(method: Callable[Concatenate[S, P], R]) -> Callable[Concatenate[S, P], R]:
    """For a method that the training waits for."""

    @wraps(method)
    def held(self: S, /, *args: P.args, **kwargs: P.kwargs) -> R:
        with self._held.hold():
            return method(self, *args, **kwargs)

    return held
