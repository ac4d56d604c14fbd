"""What the log says to a trainer since it last looked."""

from __future__ import annotations

from dataclasses import dataclass

from leyline.fold import RunState
from leyline.messages import MaskRef


@dataclass(frozen=True, kw_only=True)
class SyncResult:
    """The answer of `TrainingRun.sync`. At most one of masks, restart and fenced is set."""

    record: int
    """The log's newest record as far as this answer knows. Rank 0 gives it to the other ranks' `sync(at=…)`."""
    masks: MaskRef | None = None
    """New masks; they are on weights, moments, masters and averaged copies already."""
    restart: bool = False
    """The run was rolled back: call `load()`, and go on from the step that it says."""
    fenced: bool = False
    """Another trainer opened the run: stop, nothing of this one is published any more."""
    error: str = ""
    """A sentence where the store could not be asked, or the masks not be taken. Training may go on: sync again."""


@dataclass(frozen=True, kw_only=True)
class Position:
    """Where a trainer stands in the log."""

    opened: int | None
    """Its own open, by record; None for ranks that open nothing."""
    rolled_back: int
    """The newest rollback that its weights know of."""
    masks: MaskRef | None
    """The masks on its weights."""


def news(state: RunState, position: Position) -> SyncResult:
    """What is new in `state` for a trainer at `position`. Pure; `masks` are those to be applied now."""
    if position.opened is not None and state.opened != position.opened:
        return SyncResult(record=state.n, fenced=True)
    if state.rolled_back > position.rolled_back:
        return SyncResult(record=state.n, restart=True)
    masks = state.tip_pair.masks if state.tip_pair else None
    return SyncResult(record=state.n, masks=masks if masks != position.masks else None)
