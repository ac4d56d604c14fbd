"""Who is let in, and who may commit: one small rule a line, each with its finding. Pure."""

from __future__ import annotations

from collections.abc import Callable

from emrakul.core.snapshot import Snapshot
from emrakul.finding import Finding
from emrakul.schedule import breaker_lets
from emrakul.strategy import evidence
from leyline.messages import Stage
from leyline.reasons import Reason


def _input_is_bad(s: Snapshot) -> Finding | None:
    return s.input


def _breaker_is_open(s: Snapshot) -> Finding | None:
    if s.admitted is not None and not breaker_lets(s.state.breaker, s.ask.settings):
        left = s.ask.settings.breaker.checkpoints - s.state.breaker.checkpoints
        return Finding(
            Reason.BREAKER_OPEN, f"{s.state.breaker.failures} cycles in a row failed; {left} more checkpoints to wait"
        )
    return None


def _statistics(s: Snapshot) -> Finding | None:
    """Basic pruning by magnitude needs none."""
    if s.ready is None or s.ask.forced or not s.ask.settings.structured_pruning.enabled or not s.groups:
        return None
    return evidence.admissible(
        s.ready.statistics,
        checkpoint=s.ready.name,
        lineage=s.lineage,
        step=s.ready.step,
        interval=s.interval,
        settings=s.ask.settings,
    )


CHECKS: tuple[Callable[[Snapshot], Finding | None], ...] = (
    _input_is_bad,  # missing READY, truncated shard, header that lies, unsigned: nothing is read further
    _breaker_is_open,  # three failures in a row
    _statistics,  # samples, lineage, age
)


def why_no_masks(s: Snapshot) -> Finding:
    """Why a cycle that passed ends without masks, the most telling reason first."""
    found = _no_masks(s)
    assert found is not None
    return found


def commits(s: Snapshot) -> bool:
    """Whether a PASS leads to masks in the log."""
    return _no_masks(s) is None


def _no_masks(s: Snapshot) -> Finding | None:
    settings = s.ask.settings
    passed = "the candidate passed"
    if not settings.enable_checkpoint_pruning:
        return Finding(Reason.FEATURE_DISABLED, f"{passed}, but enable_checkpoint_pruning is false")
    if not settings.enable_safety_validation:
        return Finding(Reason.VALIDATION_DISABLED, "the candidate was written and nobody validated it")
    if s.state.hold is not None:
        return Finding(Reason.HELD, f"{passed}, but the run is held by rollback {s.state.hold}")
    if s.state.breaker.state != "closed":
        return Finding(Reason.BREAKER_PROBE, f"{passed}, with the breaker half-open")
    if s.stage is Stage.VALIDATION_ONLY:
        epoch = f"epoch {s.ready.epoch} of " if s.ready else ""
        until = settings.structured_pruning.progressive_schedule.phase_1_epochs
        return Finding(Reason.STAGE, f"{passed}; {epoch}the validation-only epochs 1 to {until}")
    return None
