"""`emrakul rollback RUN`: one record moves the tip back; then recovery validation says whether the run stands."""

from __future__ import annotations

import click

from emrakul.cli.errors import UNEXPECTED, Rejected
from emrakul.cli.options import Opened, run_options
from emrakul.cli.output import Output
from emrakul.cli.recovered import judge, look, rows, validator
from emrakul.finding import Finding
from emrakul.rollback import NoAnswer, Request, Rolled, Strategy, newest_settings, request_id, roll_back
from leyline.reasons import Reason


@click.command()
@click.option("--to", type=click.IntRange(min=0), metavar="N", help="The pair that record N made.")
@click.option("--baseline", is_flag=True, help="The run's baseline: its first checkpoint.")
@click.option(
    "--strategy",
    type=click.Choice(["immediate", "progressive"]),
    help="immediate (default): the last good pair before the tip; progressive: older good pairs one by one, each "
    "loaded and checked first, at last the baseline.",
)
@click.option("--id", "given", metavar="ID", help="Name of this rollback: a name that was used is not done again.")
@click.option("--deep", is_flag=True, help="Check every byte of the target before the tip moves.")
@click.option("--why", default="asked for on the command line", help="Kept in the log.")
@run_options
def command(
    run: Opened,
    out: Output,
    *,
    to: int | None,
    baseline: bool,
    strategy: Strategy | None,
    given: str | None,
    deep: bool,
    why: str,
) -> None:
    """Move the tip back. What came after it is condemned, trainers restart from it, and the run is held.

    No masks are committed until `emrakul resume`.
    """
    if sum((to is not None, baseline, strategy is not None)) > 1:
        raise click.UsageError("--to, --baseline and --strategy exclude each other; give one")
    chosen: Strategy = "named" if to is not None else "baseline" if baseline else strategy or "immediate"
    state = run.for_writing().log.tail().state
    request = Request(
        id=given or request_id(state, chosen, to),
        strategy=chosen,
        finding=Finding(Reason.ASKED, why),
        to=to,
    )
    since = -1 if given else state.tip_moved
    try:
        if chosen == "progressive":
            settings = newest_settings(run.log)
            depth, check = settings.rollback.depth, validator(run, settings)
            rolled = roll_back(
                run.store, run.log, request, trust=run.trust, depth=depth, validate=check, deep=deep, since=since
            )
        else:
            rolled = roll_back(run.store, run.log, request, trust=run.trust, deep=deep, since=since)
    except NoAnswer as error:
        raise Rejected(
            f"{error}; the tip was not moved, --strategy immediate needs no validator", UNEXPECTED
        ) from error
    _show(run, out, rolled)


def _show(run: Opened, out: Output, rolled: Rolled) -> None:
    record = rolled.record
    assert record.tip is not None
    found = look(run, record)
    if out.json:
        out.document(
            {
                "uri": run.store.uri,
                "record": record.n,
                "id": record.id,
                "to": record.tip.record,
                "checkpoint": record.tip.checkpoint,
                "term": record.term,
                "again": rolled.again,
                "message": record.message,
                "passed_over": {str(n): why for n, why in rolled.passed_over.items()},
                "recovery": found.model_dump(mode="json"),
            }
        )
    else:
        passed = [(f"record {n}", f"passed over: {why}") for n, why in rolled.passed_over.items()]
        done = "was done before as record" if rolled.again else "record"
        out.facts([*passed, ("rolled back", f"{done} {record.n}: {record.message}"), *rows(found)])
    judge(found)
