"""`python -m elesh`: one analysis worker of one round of a cycle."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from elesh.worker import run
from leyline import exits
from leyline.crypt import KeyRing, WrongKey
from leyline.envelope import trust_from_environment
from leyline.model import Malformed
from leyline.open import open_store
from leyline.store import StoreError

_EXITS = f"""\
exit codes:
  {exits.DONE:<3} every request is answered, or somebody else is answering it
  {exits.BAD_INPUT:<3} the checkpoint or the requests break a rule; the answer says which
  {exits.GAVE_UP:<3} a request has as many dead attempts as are allowed
  {exits.OUT_OF_MEMORY:<3} memory ran out; the next attempt uses half the buffer
  {exits.KEY:<3} the statistics are encrypted under a key that is not in EMRAKUL_DATA_KEY
  {exits.STORE:<3} the store refused or did not answer
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, run, and turn errors into a sentence and an exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m elesh",
        description="Scores channels, heads, layers and single weights of a checkpoint for one cycle.",
        epilog=_EXITS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--cycle", required=True, metavar="URI", help="the cycle: <run>/cycles/<id>")
    parser.add_argument("--round", type=int, default=0, help="which requests-<round>.json (0: structured)")
    parser.add_argument("--worker", type=int, default=0, help="number of this worker, from 0")
    parser.add_argument("--of", type=int, default=1, help="how many workers share the round")
    parser.add_argument("--launch", type=int, default=0, help="number of the launch, for its start mark")
    given = parser.parse_args(arguments)
    run_uri, separator, cycle = given.cycle.rstrip("/").rpartition("/cycles/")
    if not separator or not run_uri or "/" in cycle:
        parser.error(f"--cycle {given.cycle} is no cycle; write <run URI>/cycles/<id>")
    if not 0 <= given.worker < given.of:
        parser.error(f"--worker {given.worker} --of {given.of}: workers are numbered from 0")
    try:
        return run(
            open_store(run_uri),
            cycle=cycle,
            round_=given.round,
            worker=given.worker,
            of=given.of,
            launch=given.launch,
            trust=trust_from_environment(),
            ring=KeyRing.from_environment(),
            log=_log,
        )
    except (Malformed, ValueError) as error:
        _log(str(error))
        return exits.BAD_INPUT
    except WrongKey as error:
        _log(str(error))
        return exits.KEY
    except StoreError as error:
        _log(str(error))
        return exits.STORE
    except (MemoryError, RuntimeError) as error:
        if not exits.is_out_of_memory(error):
            raise
        _log("memory ran out; raise analysis_memory_limit if the next attempt, with half the buffer, fails too")
        return exits.OUT_OF_MEMORY


def _log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
