"""`emrakul keygen PATH`: a signing key, and the public half that others trust."""

from __future__ import annotations

from pathlib import Path

import click

from emrakul.cli.options import output_options
from emrakul.cli.output import Output
from leyline.envelope import ROLES, SIGNING_KEY, TRUST, generate_key


@click.command()
@click.argument("path", type=click.Path(path_type=Path, dir_okay=False))
@output_options
def command(path: Path, out: Output) -> None:
    """Make an Ed25519 key in PATH (readable by its owner only), and its public half beside it as <stem>.pub.pem.

    An existing file is never replaced.
    """
    key = generate_key(path)
    public = path.with_name(f"{path.stem}.pub.pem")
    if out.json:
        out.document({"private": str(path), "public": str(public), "id": key.id})
        return
    out.facts(
        [
            ("private", f"{path}; name it in {SIGNING_KEY} where records are signed"),
            ("public", f"{public}; copy it into the folder of {TRUST} as <role>*.pem, role {' or '.join(ROLES)}"),
            ("key id", key.id),
        ]
    )
