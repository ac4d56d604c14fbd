"""Command line of the validator: `python -m urabrask --cycle <run>/cycles/<id> --base N --launch K`."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from contextlib import suppress

from leyline import exits, layout
from leyline.envelope import Trust, Untrusted, trust_from_environment
from leyline.messages import Verdict
from leyline.model import Malformed, canonical_json
from leyline.open import open_store
from leyline.reasons import Reason
from leyline.store import Exists, NotFound, ObjectStore, Refused, StoreError, Unreachable, Unsuitable
from urabrask.validate import Report, Subject, read_subject, validate

_STORE_TROUBLE = (Refused, Unreachable, Unsuitable)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m urabrask",
        description="Judge one cycle's candidate: only the mask changed, pruned units are dead, accuracy holds.",
        epilog=f"exit codes: {exits.DONE} a verdict stands, whatever it says; {exits.BAD_INPUT} the checkpoint or the "
        f"cycle breaks a rule; {exits.OUT_OF_MEMORY} out of memory; {exits.STORE} the store refused or did not answer",
    )
    parser.add_argument("--cycle", required=True, help="<run URI>/cycles/<id>")
    parser.add_argument("--base", required=True, type=int, help="log record of the base pair")
    parser.add_argument("--launch", required=True, type=int, help="number of this launch, for its start mark")
    found = parser.parse_args(argv)
    run, _, cycle = found.cycle.rstrip("/").rpartition("/cycles/")
    if not run or "/" in cycle:
        parser.error(f"--cycle {found.cycle} is no cycle; write <run URI>/cycles/<id>")
    found.run, found.cycle = run, cycle
    return found


def judge(store: ObjectStore, *, cycle: str, base: int, trust: Trust | None) -> Verdict:
    """The verdict on this candidate, made once: one that stands is kept."""
    key = layout.verdict(cycle, base)
    with suppress(NotFound):
        return Verdict.parse(store.get(key), name=key)
    since = time.monotonic()
    verdict, report = validate(store, read_subject(store, cycle=cycle, base=base, trust=trust), trust, _measure)
    report.timed("all", since)
    try:
        store.put_if_absent(key, verdict.canonical())
    except Exists:  # a second launch was faster; other threads may round an answer otherwise
        verdict = Verdict.parse(store.get(key), name=key)
    print(json.dumps({"cycle": cycle, "base": base, "seconds": report.seconds}), file=sys.stderr)
    with suppress(StoreError):
        store.put_if_absent(layout.validation_telemetry(cycle, base), json.dumps(report.seconds).encode())
    return verdict


def _measure(store: ObjectStore, subject: Subject, trust: Trust | None, report: Report) -> None:
    # Torch takes seconds and most of the memory to import: what the checks before it refuse never pays for it.
    since = time.monotonic()
    from urabrask.measure import measure

    report.timed("import", since)
    measure(store, subject, trust, report)


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code is leyline.exits'."""
    wanted = _arguments(argv)
    try:
        store = open_store(wanted.run)
        store.put_if_absent(layout.started(wanted.cycle, "validate", wanted.launch), b"started")
        try:
            verdict = judge(store, cycle=wanted.cycle, base=wanted.base, trust=trust_from_environment())
        except _STORE_TROUBLE:
            raise
        except (Malformed, StoreError) as error:
            # For the control plane, which otherwise sees only the exit code.
            reason = Reason.UNTRUSTED if isinstance(error, Untrusted) else Reason.INVALID_INPUT
            with suppress(Exists):
                content = canonical_json({"message": str(error), "reason": reason.value})
                store.put_if_absent(layout.validation_error(wanted.cycle, wanted.base), content)
            raise
    except _STORE_TROUBLE as error:
        print(error, file=sys.stderr)
        return exits.STORE
    except (Malformed, StoreError) as error:
        print(error, file=sys.stderr)
        return exits.BAD_INPUT
    except MemoryError:
        print("out of memory; raise validation_memory_limit", file=sys.stderr)
        return exits.OUT_OF_MEMORY
    print(f"{verdict.outcome} {verdict.reason} {verdict.message}".replace("  ", " "))
    return exits.DONE


if __name__ == "__main__":
    sys.exit(main())
