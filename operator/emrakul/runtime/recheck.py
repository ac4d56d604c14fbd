"""Recovery validation on this machine: urabrask in a process of its own, which loads the pair of one record."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Mapping

from emrakul.rollback import NoAnswer, Validate
from emrakul.runtime.commands import recheck
from leyline import exits
from leyline.store import Unreachable


def local_recheck(run_uri: str, *, environment: Mapping[str, str], seconds: float, memory_bytes: int) -> Validate:
    """A function from a record to None (its pair is sound) or a sentence (it is not).

    It raises Unreachable where the store refused or did not answer, and NoAnswer where the validator itself failed:
    neither says anything about the pair.
    """

    def validate(record: int) -> str | None:
        command = (sys.executable, *recheck(run_uri=run_uri, record=record))
        try:
            done = subprocess.run(  # noqa: S603  our own interpreter and module
                command,
                env={**os.environ, **environment},
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=seconds,
                preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (memory_bytes, memory_bytes)),
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise NoAnswer(f"the validator did not finish record {record} in {seconds:.0f} s") from error
        said = exits.sentence(done.stderr.decode(errors="replace")) or f"exit code {done.returncode}"
        match done.returncode:
            case exits.DONE:
                return None
            case exits.BAD_INPUT:
                return said
            case exits.STORE:
                raise Unreachable(said)
        raise NoAnswer(f"the validator could not judge record {record}: {said}")

    return validate
