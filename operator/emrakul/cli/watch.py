"""`emrakul watch POLICY.yaml`: what the operator does for a policy, on this machine."""

from __future__ import annotations

import time
from pathlib import Path

import click

from emrakul.api.manifest import load_policy
from emrakul.cli.options import StoreOptions, output_options, store_options
from emrakul.cli.output import Output
from emrakul.cli.recovered import validator
from emrakul.cli.run import drive, interruptible, opened, read
from emrakul.core.snapshot import Snapshot
from emrakul.watch import Watcher
from leyline.log import NoRun
from leyline.records import End

POLL_SECONDS = 0.5


@click.command()
@click.argument("policy", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--workers", type=click.IntRange(1, 1000), help="Analysis workers, instead of the formula's number.")
@click.option("--once", is_flag=True, help="End as soon as there is nothing to do.")
@store_options
@output_options
def command(policy: Path, out: Output, options: StoreOptions, *, workers: int | None, once: bool) -> None:
    """Follow a run: its rollbacks, and a cycle for each checkpoint that is due. Ctrl-C ends it."""
    spec = load_policy(read(policy), name=str(policy)).spec
    with interruptible():
        while True:
            try:
                run = opened(spec.run, spec, options)
                break
            except NoRun:  # the trainer has not started yet
                if once:
                    raise
                time.sleep(POLL_SECONDS)
        watcher = Watcher(
            run.store,
            run.log,
            spec,
            trust=run.trust,
            validate=validator(run, spec.settings),
            drive=lambda ask, name: drive(run, ask, workers=workers, name=name)[0],
        )
        while True:
            done = watcher.step()
            if done is None:
                if once:
                    return
                time.sleep(POLL_SECONDS)
            elif isinstance(done, Snapshot):
                _tell(done, out)
            else:
                click.echo(done)


def _tell(ended: Snapshot, out: Output) -> None:
    """One line for each cycle."""
    record = ended.end
    if record is None or not isinstance(record.body, End):
        return
    if out.json:
        click.echo(record.model_dump_json())
    else:
        said = f"{record.body.outcome}/{record.reason}: {record.message}"
        click.echo(f"{record.checkpoint} {ended.stage.value}: {said}")
