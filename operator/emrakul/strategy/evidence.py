"""Whether the statistics are good enough to decide on: enough samples, of these weights, fresh, and repeatable.

Reliability sees sampling noise only: both halves drift together, so drift is bounded by age instead.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from emrakul.finding import Finding
from emrakul.settings import Settings
from emrakul.strategy.aggregate import GroupScores
from leyline.ids import checkpoint_step
from leyline.messages import ImportanceStats
from leyline.ranking import kendall_tau, spearman_brown
from leyline.reasons import Reason

INTERVALS = 2
MIN_AGE = 200
"""Statistics may be this many steps old, or INTERVALS checkpoint intervals, whichever is more."""


def admissible(
    stats: ImportanceStats | None,
    *,
    checkpoint: str,
    lineage: Sequence[str],
    step: int,
    interval: int | None,
    settings: Settings,
) -> Finding | None:
    """Why these statistics of `checkpoint` (at `step`) cannot be used, before anything is read, or None.

    `lineage` has the checkpoint's ancestors, nearest first; `interval` the steps between the last two checkpoints.
    Magnitude, if it was chosen, needs no statistics.
    """
    if settings.scorers[0] == "magnitude":
        return None
    if stats is None:
        return Finding(Reason.NO_IMPORTANCE, f"checkpoint {checkpoint} has no importance statistics")
    for rule in (_foreign, _stale, _too_few):
        if finding := rule(stats, checkpoint, lineage, step, interval, settings):
            return finding
    return None


def _foreign(
    stats: ImportanceStats, checkpoint: str, lineage: Sequence[str], step: int, _: int | None, __: Settings
) -> Finding | None:
    if stats.checkpoint != checkpoint and stats.checkpoint not in lineage:
        return Finding(
            Reason.IMPORTANCE_FOREIGN,
            f"the statistics belong to checkpoint {stats.checkpoint}, which is no ancestor of {checkpoint}",
        )
    if _measured_at(stats) > step:
        return Finding(
            Reason.IMPORTANCE_FOREIGN,
            f"the statistics were measured at step {_measured_at(stats)}, after checkpoint {checkpoint} of step {step}",
        )
    # retired ancestors are unknown to the log: only what is newer than the oldest known one can be judged
    oldest = min((checkpoint_step(name) for name in lineage), default=None)
    for name in stats.lineage:
        if oldest is not None and _step(name, unknown=oldest) >= oldest and name not in (checkpoint, *lineage):
            return Finding(
                Reason.IMPORTANCE_FOREIGN,
                f"the statistics were gathered over checkpoint {name}, which is no ancestor of {checkpoint}",
            )
    return None


def _step(name: str, *, unknown: int) -> int:
    """Step of a checkpoint; what is no checkpoint's name comes from whoever wrote the statistics."""
    try:
        return checkpoint_step(name)
    except ValueError:
        return unknown


def _stale(
    stats: ImportanceStats, checkpoint: str, _: Sequence[str], step: int, interval: int | None, __: Settings
) -> Finding | None:
    age = step - _measured_at(stats)
    limit = max(MIN_AGE, INTERVALS * (interval or 0))
    if age <= limit:
        return None
    return Finding(
        Reason.IMPORTANCE_STALE,
        f"the statistics of checkpoint {checkpoint} are {age} steps old; at most {limit} are allowed "
        f"({INTERVALS} checkpoint intervals, at least {MIN_AGE})",
    )


def _too_few(
    stats: ImportanceStats, checkpoint: str, _: Sequence[str], __: int, ___: int | None, settings: Settings
) -> Finding | None:
    if stats.samples >= settings.min_importance_samples:
        return None
    return Finding(
        Reason.TOO_FEW_SAMPLES,
        f"the statistics of checkpoint {checkpoint} rest on {stats.samples} samples; "
        f"min_importance_samples is {settings.min_importance_samples}",
    )


def _measured_at(stats: ImportanceStats) -> int:
    return stats.last_step if stats.source == "tracked" else stats.step


def reliability(scores: Iterable[GroupScores]) -> float | None:
    """Spearman-Brown-corrected tau between the halves over all live units, or None where there are no halves.

    Both halves rest on half the samples: r' = 2r / (1 + r) is what the whole is worth.
    """
    odd, even = [], []
    for one in scores:
        if one.halves is None:
            continue
        known = one.live & np.isfinite(one.halves[0]) & np.isfinite(one.halves[1])
        odd.append(one.halves[0][known])
        even.append(one.halves[1][known])
    if sum(len(half) for half in odd) < 2:
        return None
    return spearman_brown(kendall_tau(np.concatenate(odd), np.concatenate(even)))
