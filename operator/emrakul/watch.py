"""Follows a run's log and drives what it asks for: rollbacks first, then a live cycle, then the newest checkpoint."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from leyline.fold import PairState, RunState
from leyline.records import Admit, Kind, Record


@dataclass(frozen=True)
class Due:
    """The pair whose cycle is due."""

    base: int
    checkpoint: str


def due(state: RunState, admitted: Iterable[Record], *, every: int = 1) -> Due | None:
    """The newest checkpoint, if it is fit for a cycle and no cycle has worked on it yet. Pure.

    `admitted` are the run's admit records. Of several that came meanwhile only the newest counts: a cycle on an
    older one would be superseded. With `every` = n, n checkpoints must have come since the last cycle's.
    """
    pair = state.tip_pair
    if state.live is not None or pair is None or not _fit(pair):
        return None
    bases = [record.body.base for record in admitted if isinstance(record.body, Admit)]
    if pair.record in bases:
        return None
    last = max((base for base in bases if base < pair.record), default=-1)
    came = [other for other in state.pairs if other.candidate is None and last < other.record <= pair.record]
    return Due(pair.record, pair.checkpoint) if len(came) >= every or last < 0 else None


def _fit(pair: PairState) -> bool:
    """A pair that a cycle wrote is waiting for the trainer; a provisional or condemned one is no base."""
    return pair.candidate is None and not pair.provisional and not pair.condemned


def admits(records: Iterable[Record]) -> tuple[Record, ...]:
    return tuple(record for record in records if record.kind is Kind.ADMIT)
