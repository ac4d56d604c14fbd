"""Every way a command can fail, as one sentence on stderr and one exit code (docs/cli.md)."""

from __future__ import annotations

import click

from emrakul.invalid import Invalid
from leyline.crypt import WrongKey
from leyline.envelope import KeyFileError, Untrusted
from leyline.log import NoRun, NotAllowed, StoreReverted
from leyline.model import Malformed, printable
from leyline.store import Changed, Damaged, Exists, NotFound, Refused, StoreError, Unreachable, Unsuitable

DONE = 0
UNEXPECTED = 1
USAGE = 2
REFUSED = 3
INVALID = 4
DAMAGED = 5
STORE = 75
INTERRUPTED = 130


class Rejected(Exception):
    """A command that did its work and found something wrong: a sentence and an exit code."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


_CODES: tuple[tuple[tuple[type[BaseException], ...], int], ...] = (
    ((click.UsageError,), USAGE),
    ((KeyboardInterrupt, click.Abort), INTERRUPTED),
    ((NotAllowed,), REFUSED),
    ((Invalid, NoRun, KeyFileError, WrongKey, Unsuitable), INVALID),
    ((Malformed, Damaged, Changed, NotFound, Exists, Untrusted, StoreReverted), DAMAGED),
    ((Refused, Unreachable), STORE),
    ((StoreError,), INVALID),  # what is left: a malformed or nested run URI
)
"""The first that fits decides."""


def code_of(error: BaseException) -> int:
    """The exit code for an error."""
    if isinstance(error, Rejected):
        return error.code
    return next((code for kinds, code in _CODES if isinstance(error, kinds)), UNEXPECTED)


def tell(error: BaseException) -> int:
    """Say it on stderr and return the exit code."""
    code = code_of(error)
    if code == INTERRUPTED:
        text = "interrupted; the same command goes on from here"
    elif isinstance(error, click.ClickException):
        text = f"{error.format_message()} (`emrakul --help` lists commands and options)"
    elif code == UNEXPECTED and not isinstance(error, Rejected):
        text = f"unexpected {type(error).__name__}: {error}; --debug shows where it comes from"
    else:
        text = str(error)
    click.echo(f"emrakul: {printable(' '.join(text.split()))}", err=True)
    return code
