"""The table of scorers that need gate statistics alone, by name. Those that need weights are in leyline.partial."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from elesh import gate
from leyline.topology import Kind

Vector = NDArray[np.float64]
Bits = NDArray[np.bool_]


@dataclass(frozen=True)
class Half:
    """EMA sums over the odd, the even, or all mini-batches; what was not hooked is None."""

    weights: Vector
    """[2]: (sum of weights, sum of squared weights)."""
    absolute: Vector | None = None
    squares: Vector | None = None
    activity: Vector | None = None

    def __add__(self, other: Half) -> Half:
        return Half(
            self.weights + other.weights,
            _sum(self.absolute, other.absolute),
            _sum(self.squares, other.squares),
            _sum(self.activity, other.activity),
        )


@dataclass(frozen=True)
class GateStatistics:
    """What the importance file holds of one group; `live` are the units that no inherited mask prunes."""

    units: int
    live: Bits
    odd: Half | None = None
    even: Half | None = None
    cosines: Vector | None = None
    gram: Vector | None = None
    inputs: Vector | None = None

    @property
    def whole(self) -> Half | None:
        return self.odd + self.even if self.odd and self.even else self.odd or self.even


class Scores(NamedTuple):
    """Scores [units], their standard errors, and the scores of each half alone."""

    score: Vector
    error: Vector
    odd: Vector | None = None
    even: Vector | None = None


Formula = Callable[[GateStatistics], Scores | None]
"""None where the statistics it needs were not kept."""


def _taylor(stats: GateStatistics) -> Scores | None:
    def error(half: Half) -> Vector:
        if half.absolute is None or half.squares is None:
            return np.full(stats.units, np.inf)
        return gate.taylor_error(half.absolute, half.squares, half.weights)

    return _of_halves(stats, lambda half: _maybe(gate.taylor, half.absolute, half.weights), error)


def _taylor_squares(stats: GateStatistics) -> Scores | None:
    return _of_halves(stats, lambda half: _maybe(gate.taylor_squares, half.squares, half.weights))


def _contribution(stats: GateStatistics) -> Scores | None:
    return _of_halves(stats, lambda half: _maybe(gate.contribution, half.activity, half.weights))


def _michel(stats: GateStatistics) -> Scores | None:
    raw = _taylor(stats)
    if raw is None:
        return None
    norm = gate.layer_norm(raw.score, stats.live)
    halves = (None if half is None else gate.normalised(half, stats.live) for half in (raw.odd, raw.even))
    return Scores(raw.score / norm, raw.error / norm, *halves)


def _block_influence(stats: GateStatistics) -> Scores | None:
    if stats.cosines is None or stats.cosines[1] <= 0:
        return None
    return Scores(gate.block_influence(stats.cosines), gate.block_influence_error(stats.cosines))


SCORERS: Mapping[str, tuple[frozenset[Kind], Formula]] = {
    "taylor": (frozenset({Kind.CHANNEL}), _taylor),
    "michel": (frozenset({Kind.HEAD}), _michel),
    "block_influence": (frozenset({Kind.LAYER}), _block_influence),
    "contribution": (frozenset({Kind.CHANNEL, Kind.HEAD}), _contribution),
    "taylor_squares": (frozenset({Kind.CHANNEL, Kind.HEAD}), _taylor_squares),
}
"""Name -> kinds of unit that it is made for, formula."""

FROM_WEIGHTS = frozenset({"magnitude", "wanda", "fisher"})
"""Scorers whose sums over weights are added up from many answers."""


def _of_halves(
    stats: GateStatistics,
    score: Callable[[Half], Vector | None],
    error: Callable[[Half], Vector] | None = None,
) -> Scores | None:
    whole = stats.whole
    if whole is None or (total := score(whole)) is None:
        return None
    odd = score(stats.odd) if stats.odd else None
    even = score(stats.even) if stats.even else None
    if error is not None:
        return Scores(total, error(whole), odd, even)
    spread = np.full(stats.units, np.inf) if odd is None or even is None else gate.half_error(odd, even, total)
    return Scores(total, spread, odd, even)


def _maybe(formula: Callable[[Vector, Vector], Vector], total: Vector | None, weights: Vector) -> Vector | None:
    return None if total is None else formula(total, weights)


def _sum(a: Vector | None, b: Vector | None) -> Vector | None:
    return None if a is None or b is None else a + b
