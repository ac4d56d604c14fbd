"""Runs a short command and gives its output; when it fails, the error shows what it said."""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Mapping


class CommandFailed(RuntimeError):
    """A command's exit code and its standard error, which callers may look into: kubectl tells refusals there."""

    def __init__(self, command: tuple[str, ...], code: int, error: str) -> None:
        super().__init__(f"{shlex.join(command)} ended with {code}: {error.strip()}")
        self.code = code
        self.error = error


def output(
    *command: str,
    input: str | None = None,
    environment: Mapping[str, str] | None = None,
    seconds: float = 120,
) -> str:
    """The standard output of `command`, which gets `input`; CommandFailed unless it ends with 0."""
    done = subprocess.run(
        command,
        input=input,
        stdin=subprocess.DEVNULL if input is None else None,
        env={**os.environ, **(environment or {})},
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )
    if done.returncode:
        raise CommandFailed(command, done.returncode, done.stderr)
    return done.stdout
