"""`emrakul import URI RUN`: a checkpoint that kasmina never saw; a process of kasmina reads its format."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import click

from emrakul.cli.errors import INVALID, STORE, UNEXPECTED, Rejected
from emrakul.cli.options import StoreOptions, output_options, store_options
from emrakul.cli.output import Output, size
from emrakul.runtime.commands import adopt
from leyline import exits
from leyline.ids import MAX_STEP

_CODES = {exits.BAD_INPUT: INVALID, exits.STORE: STORE}


@click.command()
@click.argument("origin", metavar="URI")
@click.argument("run", metavar="RUN")
@click.option(
    "--step",
    type=click.IntRange(0, MAX_STEP),
    help="Its training step [the number that the name of file or folder ends with, or 0].",
)
@click.option("--epoch", type=click.IntRange(0, MAX_STEP), default=0, show_default=True, help="Its training epoch.")
@click.option("--model-id", metavar="NAME", help="Name of the model [the run's; of a new run its last part].")
@click.option(
    "--exclude",
    metavar="NAME",
    multiple=True,
    help="Tensors that no cycle may touch, with * and ? as in a shell; may be given again.",
)
@store_options
@output_options
def command(
    origin: str,
    run: str,
    options: StoreOptions,
    out: Output,
    *,
    step: int | None,
    epoch: int,
    model_id: str | None,
    exclude: tuple[str, ...],
) -> None:
    """Publish the checkpoint at URI, a folder or its one file, in RUN, which is made if there is none.

    It may be safetensors (one file, or several with their index), what torch.save wrote since torch 1.6 (.pt, .pth,
    .ckpt, .bin), or a folder of torch.distributed.checkpoint; `emrakul convert` is for what is older.

    Its objects stay where they are and are read there by their digests. The same command again makes no second record.
    """
    arguments = adopt(run_uri=run, origin=origin, step=step, epoch=epoch, model_id=model_id, exclude=exclude)
    done = subprocess.run(  # noqa: S603  our own interpreter and module
        (sys.executable, *arguments),
        env={**os.environ, **options.environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != exits.DONE:
        said = exits.sentence(done.stderr) or f"kasmina.foreign ended with exit code {done.returncode}"
        raise Rejected(said, _CODES.get(done.returncode, UNEXPECTED))
    document: dict[str, Any] = json.loads(done.stdout)
    if out.json:
        out.document(document)
        return
    new = "" if document["new"] else ", which an earlier import made"
    out.facts(
        [
            ("imported", f"{document['checkpoint']} as record {document['record']} of {document['uri']}{new}"),
            ("from", f"{document['imported_from']}, where its objects stay: {size(document['bytes'])}"),
            ("weights", document["weights"]),
            ("prunable", f"{document['parameters']:,} weights at most, single ones, by magnitude"),
        ]
    )
