"""`emrakul explain RUN CYCLE [UNIT]`: why a cycle ended as it did, or why a unit went or stayed."""

from __future__ import annotations

from typing import Any

import click

from emrakul.cli.options import Opened, run_options
from emrakul.cli.output import Output, worked
from leyline.model import Malformed
from leyline.records import Admit, End, Kind, Record
from leyline.store import NotFound


@click.command()
@run_options
@click.argument("cycle")
@click.argument("unit", required=False)
def command(run: Opened, out: Output, *, cycle: str, unit: str | None) -> None:
    """Why CYCLE ended as it did; with UNIT, why that unit went or stayed.

    CYCLE is a name that `emrakul history` shows; UNIT is GROUP:NUMBER, such as layer1.conv1:3.
    """
    admit = run.log.find((Kind.ADMIT.value, cycle), base=-1) if run.log.tail() else None
    if admit is None:
        raise click.UsageError(f"{run.store.uri} has no cycle {cycle}; `emrakul history` shows their names")
    if unit is None:
        _cycle(run, out, admit)
        return
    group, _, number = unit.rpartition(":")
    if not group or not number.isdecimal():
        raise click.UsageError(f"{unit!r} is no unit; write GROUP:NUMBER, such as layer1.conv1:3")
    message = _unit(run, admit, group, int(number))
    if out.json:
        out.document({"cycle": cycle, "group": group, "unit": int(number), "message": message})
    else:
        out.line(message)


def _unit(run: Opened, admit: Record, group: str, number: int) -> str:
    # numpy and the strategy are needed here only
    from emrakul.analysis import answers, case_of
    from emrakul.control import frozen
    from emrakul.core.snapshot import Ask
    from emrakul.observe import Observer
    from emrakul.settings import Settings
    from emrakul.strategy.decide import explain, score

    assert isinstance(admit.body, Admit)
    observer = Observer(run.store, run.log, admit.id, trust=run.trust)
    ask = frozen(Ask(base=admit.body.base, settings=Settings(), runtime=admit.body.runtime), admit.body)
    snapshot, _ = observer.look(ask)
    if snapshot.ready is None or snapshot.pair is None:
        why = snapshot.input.message if snapshot.input else "its checkpoint was retired"
        raise NotFound(f"cycle {admit.id} cannot be explained any more: {why}")
    if snapshot.decision is None:
        raise click.UsageError(f"cycle {admit.id} has made no decision; `emrakul explain RUN {admit.id}` says why")
    method = "basic" if snapshot.decision.method == "basic" else "structured"
    case = case_of(snapshot, observer, method=method)
    try:
        scores = score(case, answers(observer, "structured")) if snapshot.decision.method == "structured" else ()
        return explain(case, snapshot.decision, scores, group, number)
    except KeyError as error:
        raise click.UsageError(str(error.args[0])) from error
    except Malformed as error:
        if not any(True for _ in run.store.list(f"cycles/{admit.id}/responses/")):
            raise NotFound(f"the scores of cycle {admit.id} were deleted by gc; its decision still stands") from error
        raise


def _cycle(run: Opened, out: Output, admit: Record) -> None:
    from emrakul.timeline import report
    from emrakul.work import work

    end = next((r for r in run.log.since(admit.n) if r.id == admit.id and isinstance(r.body, End)), None)
    found = report(run.store, admit, end)
    done = work(run.store, admit.id, end.body.base if end and isinstance(end.body, End) else None)
    document: dict[str, Any] = {
        "cycle": found.cycle,
        "checkpoint": found.checkpoint,
        "base": found.base,
        "stage": found.stage,
        "outcome": found.outcome or None,
        "reason": found.reason or None,
        "message": found.message or None,
        "masks": found.counts,
        "accuracy_base": found.accuracy_base,
        "accuracy_candidate": found.accuracy_candidate,
        "budgets": [budget.model_dump(mode="json") for budget in found.budgets],
        "seconds": found.seconds,
        "work": {phase.value: one.model_dump(mode="json") for phase, one in done.items()},
    }
    if out.json:
        out.document(document)
        return
    rows = [
        ("cycle", f"{found.cycle} on record {found.base} ({found.checkpoint})"),
        ("stage", found.stage),
        ("outcome", f"{found.outcome}/{found.reason}" if found.outcome else "still live"),
    ]
    if found.message:
        rows.append(("because", found.message))
    if found.accuracy_base is not None and found.accuracy_candidate is not None:
        rows.append(("accuracy", f"{found.accuracy_base:.4f} before, {found.accuracy_candidate:.4f} after"))
    if found.seconds:
        rows.append(("took", ", ".join(f"{name} {seconds:.1f} s" for name, seconds in found.seconds.items())))
    rows += worked(done)
    out.facts(rows)
    if found.budgets:
        out.line("")
        out.table(
            ("domain", "kind", "live", "rate", "allowed", "eligible", "went", "bound by"),
            [
                (
                    b.domain,
                    b.kind.value,
                    *map(str, (b.live, f"{b.requested:.2%}", b.allowed, b.eligible, b.achieved)),
                    b.bound,
                )
                for b in found.budgets
            ],
            wide="bound by",
        )
