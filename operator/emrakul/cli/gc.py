"""`emrakul gc RUN`: retires old pairs and deletes what nothing needs any more."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import timedelta
from typing import Any

import click

from emrakul.cli.options import Opened, run_options
from emrakul.cli.output import Output, size
from emrakul.gc import Collected, Plan, Policy, collect, preview
from emrakul.quantities import parse_seconds
from emrakul.rollback import newest_settings
from leyline.store import Head


class _Duration(click.ParamType[timedelta]):
    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> timedelta:
        if isinstance(value, timedelta):
            return value
        if value in ("0", "0s"):
            return timedelta()
        try:
            return timedelta(seconds=parse_seconds(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)


@click.command()
@click.option("--dry-run", is_flag=True, help="Only say what would go.")
@click.option("--keep", type=click.IntRange(min=0), default=10, show_default=True, help="Newest pairs that stay.")
@click.option("--age", type=_Duration(), default="24h", show_default=True, help="Younger pairs are not retired.")
@click.option(
    "--grace", type=_Duration(), default="24h", show_default=True, help="Between retiring a pair and deleting it."
)
@run_options
def command(run: Opened, out: Output, *, dry_run: bool, keep: int, age: timedelta, grace: timedelta) -> None:
    """Retire pairs that nothing protects (a record), and delete objects whose grace time is over.

    Tip, baseline, last good pair, the pairs a rollback may need and the base of a live cycle always stay.
    """
    run.log.tail()
    policy = Policy(keep=keep, age=age, grace=grace, depth=newest_settings(run.log).rollback.depth)
    if dry_run:
        _preview(run, out, preview(run.store, run.log, policy))
        return
    run.for_writing()
    with out.progress() as bars:
        task = bars.add_task("deleting", total=None)
        done = collect(run.store, run.log, policy, progress=lambda head: bars.advance(task, head.size))
    _done(run, out, done)


def _preview(run: Opened, out: Output, plan: Plan) -> None:
    if out.json:
        out.document(
            {
                "uri": run.store.uri,
                "dry_run": True,
                "retire": list(plan.retire),
                "delete": [{"object": head.key, "bytes": head.size} for head in plan.delete],
                "later": [{"object": head.key, "bytes": head.size} for head in plan.later],
            }
        )
        return
    out.facts(
        [
            ("would retire", _numbers(plan.retire)),
            ("would delete", _objects(plan.delete)),
            ("later", _later(plan.later)),
        ]
    )
    rows = [*((f"{folder}", "now") for folder in _folders(plan.delete)), *((f, "later") for f in _folders(plan.later))]
    if rows:
        out.table(("objects below", "when"), rows, wide="objects below")


def _done(run: Opened, out: Output, done: Collected) -> None:
    if out.json:
        out.document(
            {
                "uri": run.store.uri,
                "dry_run": False,
                "retired": list(done.retired),
                "deleted": done.deleted,
                "freed_bytes": done.freed,
                "uploads": done.uploads,
                "later": [{"object": head.key, "bytes": head.size} for head in done.later],
            }
        )
        return
    out.facts(
        [
            ("retired", _numbers(done.retired)),
            ("deleted", f"{done.deleted} objects, {size(done.freed)}"),
            ("uploads", f"{done.uploads} unfinished ones thrown away"),
            ("later", _later(done.later, "; run this again")),
        ]
    )


def _later(heads: tuple[Head, ...], remedy: str = "") -> str:
    return f"{_objects(heads)} (grace time not over{remedy})" if heads else "none"


def _numbers(pairs: tuple[int, ...]) -> str:
    return f"records {', '.join(map(str, pairs))}" if pairs else "none"


def _objects(heads: tuple[Head, ...]) -> str:
    return f"{len(heads)} objects, {size(sum(head.size for head in heads))}"


def _folders(heads: Iterable[Head]) -> list[str]:
    return list(dict.fromkeys("/".join(head.key.split("/")[:-1]) for head in heads))
