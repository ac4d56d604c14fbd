"""The table of a run's cycles: what each one asked, got, cost, and why it ended."""

from __future__ import annotations

from emrakul.cli.options import Opened
from emrakul.cli.output import Output
from emrakul.timeline import CycleReport, cycles

COLUMNS = ("checkpoint", "stage", "outcome", "pruned", "asked / allowed / done", "accuracy", "seconds")


def show(run: Opened, out: Output, *, last: int | None) -> None:
    """All cycles, or the newest `last`, as a table or one JSON document."""
    found = list(cycles(run.store, run.log))
    found = found if last is None else found[-last:]
    if out.json:
        from emrakul.cli.run import document

        out.document({"uri": run.store.uri, "cycles": [document(one) for one in found]})
        return
    out.table(COLUMNS, (_row(one) for one in found), wide="outcome")


def _row(one: CycleReport) -> tuple[str, ...]:
    """A kind a line, so that a person reads across."""
    budgets = one.budgets
    return (
        one.checkpoint.rpartition("-")[0],
        one.stage,
        f"{one.outcome}\n{one.reason}" if one.outcome else "live",
        "\n".join(f"{b.achieved} {b.kind.value}{'' if b.achieved == 1 else 's'}" for b in budgets) or "-",
        "\n".join(f"{b.requested:.0%} / {b.allowed} / {b.achieved}, {b.bound}" for b in budgets) or "-",
        _accuracy(one),
        "\n".join(f"{name} {seconds:.1f}" for name, seconds in one.seconds.items() if name != "cycle"),
    )


def _accuracy(one: CycleReport) -> str:
    if one.accuracy_base is None or one.accuracy_candidate is None:
        return "-"
    return f"{one.accuracy_base:.4f}\n{one.accuracy_candidate:.4f}"
