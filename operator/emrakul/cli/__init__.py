"""The command line: one group, each command in a file of its own that is only imported when it is called."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

import click

COMMANDS = {
    "run": "Run the pruning cycle of a manifest to its end.",
    "import": "Make a checkpoint that kasmina never saw one of a run.",
    "watch": "Follow a run and drive a cycle for each checkpoint that is due.",
    "status": "Where a run stands: tip, stage, breaker, live cycle.",
    "history": "Every record of a run's log, with its reason: the audit.",
    "explain": "Why a cycle ended as it did, or why a unit went or stayed.",
    "verify": "Check every record and every object against its digest.",
    "rollback": "Move the tip back to an older checkpoint.",
    "resume": "Let cycles commit again after a person's rollback.",
    "gc": "Retire old checkpoints and delete what nothing needs.",
    "convert": "Turn a checkpoint from before torch 1.6 into safetensors.",
    "operator": "Run the operator in a Kubernetes cluster.",
    "keygen": "Make a signing key and its public half.",
}

_MODULES = {"import": "importing"}
"""Commands that no module can be called."""

EXIT_CODES = """\b
Exit codes:
  0   done
  1   unexpected (a fault of ours; --debug shows where)
  2   usage: an option or argument is wrong
  3   refused by the rules of the run's log
  4   invalid input: a manifest, a setting, a key file, a run URI
  5   damaged or untrusted data, or no checkpoint that loads
  6   run: the cycle was skipped, the checkpoint stays as it was
  7   run: the candidate was refused, the checkpoint stays as it was
  75  the store refused or did not answer; trying again may help
  130 interrupted; the same command goes on from there

\b
Environment:
  EMRAKUL_TRUST        folder of public keys, <role>*.pem
  EMRAKUL_SIGNING_KEY  PEM file of the key that signs our records
  EMRAKUL_DATA_KEY     key of encrypted importance statistics
  AWS_...              credentials, region and endpoint, as usual
"""


class _Lazy(click.Group):
    """A group whose commands are imported one at a time: `emrakul status` does not pay for `emrakul run`."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        if cmd_name not in COMMANDS:
            return None
        found = importlib.import_module(f"emrakul.cli.{_MODULES.get(cmd_name, cmd_name)}").command
        assert isinstance(found, click.Command)
        return found

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(
    cls=_Lazy,
    epilog=EXIT_CODES,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Prunes neural networks safely at their checkpoints. RUN is a run URI: s3://bucket/prefix, file:///folder "
    "or a path. Masks save neither memory nor time by themselves.",
)
@click.version_option(package_name="emrakul", message="%(prog)s %(version)s")
def _group() -> None:
    pass


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; every failure is one sentence on stderr and an exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        code = _group.main(given, prog_name="emrakul", standalone_mode=False)
        sys.stdout.flush()
    except (BrokenPipeError, SystemExit):
        # the reader (head, less) has seen enough; click and rich turn that into SystemExit, and nobody else exits
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (Exception, KeyboardInterrupt) as error:
        if "--debug" in given:
            raise
        from emrakul.cli.errors import tell

        return tell(error)
    return code if isinstance(code, int) else 0
