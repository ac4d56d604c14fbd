"""What a bench says: lines of a figure, a reference measured in the same run, and their ratio."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Sample:
    """What was measured, each time that it was."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    def per(self, amount: float) -> Sample:
        """Seconds -> `amount` a second."""
        return Sample(tuple(amount / value for value in self.values))

    def times(self, factor: float) -> Sample:
        return Sample(tuple(value * factor for value in self.values))

    def again(self, count: int) -> Sample:
        """The same so many times."""
        return Sample(self.values * count)


@dataclass(frozen=True, kw_only=True)
class Line:
    """One line of the table."""

    group: str
    what: str
    unit: str
    figure: Sample
    reference: str
    against: Sample
    """In the same unit."""
    target: str = ""
    """What design asks for, as a sentence; empty where nothing is asked."""
    reached: bool | None = None

    @property
    def ratio(self) -> float:
        return self.figure.median / self.against.median

    def to_json(self) -> dict[str, Any]:
        return {
            "group": self.group,
            "what": self.what,
            "unit": self.unit,
            "figure": self.figure.median,
            "values": list(self.figure.values),
            "reference": self.reference,
            "reference_figure": self.against.median,
            "reference_values": list(self.against.values),
            "ratio": self.ratio,
            "target": self.target,
            "reached": self.reached,
        }

    @classmethod
    def from_json(cls, plain: dict[str, Any]) -> Line:
        same = {key: plain[key] for key in ("group", "what", "unit", "reference", "target", "reached")}
        return cls(**same, figure=Sample(tuple(plain["values"])), against=Sample(tuple(plain["reference_values"])))


def seconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def alternating(
    repeats: int, *calls: Callable[[], object], before: Callable[[], object] = lambda: None
) -> list[Sample]:
    """Seconds of each call, taken in turn, so that what else the machine does falls on all of them.

    The first is the reference: it is measured before and after each of the others. `before` is not counted.
    """
    taken: list[list[float]] = [[] for _ in calls]
    for turn in [*list(range(len(calls))) * repeats, 0]:
        before()
        taken[turn].append(seconds(calls[turn]))
    return [Sample(tuple(values)) for values in taken]


def one(value: float) -> Sample:
    return Sample((value,))
