"""What a status that was just written adds to the metrics: each figure once, by the change that shows it."""

from __future__ import annotations

from emrakul.api.cycle import CycleStatus
from emrakul.api.resource import ConditionType
from emrakul.cluster.metrics import Metrics


def count(metrics: Metrics, before: CycleStatus, after: CycleStatus) -> None:
    """Compare with the status that stood before."""
    if after.requests is not None and before.requests is None:
        metrics.analysis_started()
    if _analysed(after) and not _analysed(before) and after.requests is not None:
        metrics.analysis_completed()
    if after.outcome is None or before.outcome is not None or after.reason is None:
        return
    metrics.cycle_ended(
        after.outcome,
        after.reason,
        analysing=after.requests is not None and not _analysed(after),
        validation_seconds=float(after.timings.validation) if after.timings and after.timings.validation else None,
        achieved=float(sum(budget.achieved for budget in after.budgets)),
        requested=sum(float(budget.requested) * budget.live for budget in after.budgets),
        coverage=float(after.coverage) if after.coverage else None,
    )


def _analysed(status: CycleStatus) -> bool:
    return any(c.type is ConditionType.ANALYZED and c.status == "True" for c in status.conditions)
