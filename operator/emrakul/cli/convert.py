"""`emrakul convert SOURCE TARGET`: a checkpoint from before torch 1.6 as safetensors, once and offline."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import click

from emrakul.cli.errors import INVALID, Rejected
from emrakul.cli.options import output_options
from emrakul.cli.output import Output
from leyline import exits


@click.command()
@click.argument("source", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.argument("target", type=click.Path(path_type=Path, dir_okay=False))
@output_options
def command(source: Path, target: Path, out: Output) -> None:
    """Write the weights in SOURCE, which torch.save wrote before 1.6, to TARGET as safetensors.

    SOURCE is read as data in a process with limits of its own: nothing in it is executed. An existing file is never
    replaced.
    """
    worker = [sys.executable, "-m", "kasmina.convert", str(source), str(target)]
    done = subprocess.run(worker, capture_output=True, text=True, check=False)  # noqa: S603
    if done.returncode != exits.DONE:
        said = exits.sentence(done.stderr)
        raise Rejected(said or f"{source} could not be read in the memory that its process is allowed", INVALID)
    if out.json:
        out.document({"source": str(source), "target": str(target), "tensors": int(done.stdout)})
        return
    out.facts([("written", f"{target}: {done.stdout.strip()} tensors; publish or import it as safetensors")])
