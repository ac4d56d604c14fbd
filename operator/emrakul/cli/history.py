"""`emrakul history RUN`: the log is the audit; this reads it out."""

from __future__ import annotations

from typing import Any

import click

from emrakul.cli.cycles import show
from emrakul.cli.options import Opened, run_options
from emrakul.cli.output import Output, iso
from leyline import layout
from leyline.records import Admit, End, Publish, Record, Retire, Rollback


@click.command()
@click.option("--last", type=click.IntRange(min=1), metavar="N", help="Only the newest N.")
@click.option("--cycles", is_flag=True, help="The cycles instead: stage, outcome, budgets, accuracy, times.")
@run_options
def command(run: Opened, out: Output, *, last: int | None, cycles: bool) -> None:
    """Every record of a run: number, kind, time by the store's clock, what, reason and sentence."""
    if cycles:
        show(run, out, last=last)
        return
    newest = run.log.tail().record.n
    first = 0 if last is None else max(0, newest + 1 - last)
    numbers = range(first, newest + 1)
    rows = [_row(run, run.log.read(n)[0]) for n in numbers]
    if out.json:
        out.document({"uri": run.store.uri, "records": rows})
        return
    shown = ([str(row["n"]), row["time"][5:16].replace("T", " "), row["kind"], _said(row)] for row in rows)
    out.table(("n", "UTC", "kind", "what"), shown, wide="what")


def _row(run: Opened, record: Record) -> dict[str, Any]:
    row: dict[str, Any] = {
        "n": record.n,
        "time": iso(run.store.head(layout.record(record.n)).modified),
        "kind": record.kind.value,
        "id": record.id,
        "term": record.term,
        "tip": record.tip.record if record.tip else None,
        "checkpoint": record.checkpoint,
        "masks": record.masks.counts if record.masks else {},
        "what": what(record),
        "reason": record.reason,
        "message": record.message,
    }
    if isinstance(record.body, End):
        row |= {"outcome": record.body.outcome, "base": record.body.base, "accuracy": record.body.accuracy}
    return row


def what(record: Record) -> str:
    """The record in a few words."""
    body = record.body
    if isinstance(body, Publish):
        imported = f", imported from {body.imported_from}" if body.imported_from else ""
        return f"checkpoint {record.id}, epoch {body.epoch}{imported}"
    if isinstance(body, Admit):
        return f"cycle {record.id} on record {body.base}, {body.stage.value}, {body.runtime}"
    if isinstance(body, End):
        accuracy = "" if body.accuracy is None else f", accuracy {body.accuracy:.4f}"
        return f"cycle {record.id}: {body.outcome}{accuracy}"
    if isinstance(body, Rollback):
        return f"tip back to record {body.to} ({body.strategy}, by {body.by})"
    if isinstance(body, Retire):
        return f"pairs {', '.join(map(str, body.pairs))} may be deleted"
    return record.id


def _said(row: dict[str, Any]) -> str:
    sentence = ": ".join(part for part in (row["reason"], row["message"]) if part)
    return f"{row['what']}\n{sentence}" if sentence else row["what"]
