"""The table of a run's cycles: what each one asked, got, cost, and why it ended."""

from __future__ import annotations

from emrakul.cli.options import Opened
from emrakul.cli.output import Output
from emrakul.timeline import CycleReport, cycles
from leyline.messages import Budget
from leyline.topology import HOST

COLUMNS = ("checkpoint", "outcome", "pruned", "accuracy", "seconds")
_VERBS = {"analyse": "score", "apply": "write", "validate": "check"}


def show(run: Opened, out: Output, *, last: int | None) -> None:
    """All cycles, or the newest `last`, as a table or one JSON document."""
    found = list(cycles(run.store, run.log))
    found = found if last is None else found[-last:]
    if out.json:
        from emrakul.cli.run import document

        out.document({"uri": run.store.uri, "cycles": [document(one) for one in found]})
        return
    out.table(COLUMNS, (_row(one) for one in found), wide="pruned")


def _row(one: CycleReport) -> tuple[str, ...]:
    """Several lines a cell, so that a row fits 80 columns; a kind that was allowed nothing is left out."""
    told = [budget for budget in one.budgets if budget.allowed] or list(one.budgets[:1])
    return (
        f"{one.checkpoint.rpartition('-')[0]}\n{one.stage}",
        f"{one.outcome}\n{one.reason}" if one.outcome else "live",
        "\n".join(_units(budget) for budget in told) or "-",
        _accuracy(one),
        "\n".join(f"{_VERBS[name]} {seconds:4.1f}" for name, seconds in one.seconds.items() if name in _VERBS),
    )


def _units(budget: Budget) -> str:
    """Achieved of what was allowed of what is live, then the rate that was asked and the constraint that bound."""
    where = "" if budget.domain == HOST else f" in {budget.domain}"
    units = f"{budget.achieved}/{budget.allowed} of {budget.live} {budget.kind.value}s{where}"
    return f"{units}\n at {budget.requested:.0%}, by {budget.bound}"


def _accuracy(one: CycleReport) -> str:
    """Base, then candidate."""
    if one.accuracy_base is None or one.accuracy_candidate is None:
        return "-"
    return f"{one.accuracy_base:.4f}\n{one.accuracy_candidate:.4f}"
