"""`emrakul resume RUN`: ends the hold that a person's rollback left."""

from __future__ import annotations

import click

from emrakul.cli.options import Opened, run_options
from emrakul.cli.output import Output
from emrakul.cli.recovered import judge, look, rows
from emrakul.rollback import resume


@click.command()
@run_options
def command(run: Opened, out: Output) -> None:
    """Let cycles commit again after a person's rollback, and look at the recovery once more."""
    entry = resume(run.for_writing().log)
    record = entry.record
    rollback, _ = run.log.read(entry.state.rolled_back)
    found = look(run, rollback)
    if out.json:
        document = {"uri": run.store.uri, "record": record.n, "rollback": record.id, "message": record.message}
        out.document({**document, "recovery": found.model_dump(mode="json")})
    else:
        out.facts([("resumed", f"record {record.n}: {record.message}"), *rows(found)])
    judge(found)
