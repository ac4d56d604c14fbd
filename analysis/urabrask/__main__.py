"""Command line of the validator.

`python -m urabrask --cycle <run>/cycles/<id> --base N --launch K` judges a candidate and writes its verdict;
`python -m urabrask --run <run> --record N` tells by its exit code whether the pair of a record can be loaded.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from contextlib import suppress

from leyline import exits, layout
from leyline.envelope import SigningKey, Trust, Untrusted, signing_keys_from_environment, trust_from_environment
from leyline.messages import Verdict
from leyline.model import Malformed, canonical_json
from leyline.open import open_store
from leyline.reasons import Reason
from leyline.store import Exists, NotFound, ObjectStore, Refused, StoreError, Unreachable, Unsuitable
from leyline.verdict import open_verdict, seal_verdict
from urabrask.recovery import Loadable, recheck
from urabrask.validate import Report, Subject, read_subject, validate

_STORE_TROUBLE = (Refused, Unreachable, Unsuitable)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m urabrask",
        description="Judge one cycle's candidate: only the mask changed, pruned units are dead, accuracy holds. Or, "
        "after a rollback, say whether the pair of one record can be loaded.",
        epilog=f"exit codes: {exits.DONE} a verdict stands, whatever it says, or the pair is sound; {exits.BAD_INPUT} "
        f"the checkpoint, the cycle or the pair breaks a rule; {exits.OUT_OF_MEMORY} out of memory; {exits.STORE} the "
        "store refused or did not answer",
    )
    parser.add_argument("--cycle", help="<run URI>/cycles/<id>")
    parser.add_argument("--base", type=int, help="log record of the base pair")
    parser.add_argument("--launch", type=int, help="number of this launch, for its start mark")
    parser.add_argument("--run", help="the run's URI, for recovery validation")
    parser.add_argument("--record", type=int, help="the record whose pair is loaded and checked")
    found = parser.parse_args(argv)
    judging, rechecking = (found.cycle, found.base, found.launch), (found.run, found.record)
    given = [[value is not None for value in one] for one in (judging, rechecking)]
    if not (all(given[0]) and not any(given[1])) and not (all(given[1]) and not any(given[0])):
        parser.error("give --cycle with --base and --launch, or --run with --record")
    if found.run is not None:
        return found
    run, _, cycle = found.cycle.rstrip("/").rpartition("/cycles/")
    if not run or "/" in cycle:
        parser.error(f"--cycle {found.cycle} is no cycle; write <run URI>/cycles/<id>")
    found.run, found.cycle = run, cycle
    return found


def judge(
    store: ObjectStore, *, cycle: str, base: int, trust: Trust | None, keys: Sequence[SigningKey] = ()
) -> Verdict:
    """The verdict on this candidate, made once: one that stands is kept. Whether it counts the control plane says."""
    key = layout.verdict(cycle, base)
    with suppress(NotFound):
        return open_verdict(store.get(key), None, name=key)
    since = time.monotonic()
    verdict, report = validate(store, read_subject(store, cycle=cycle, base=base, trust=trust), trust, _measure)
    report.timed("all", since)
    try:
        store.put_if_absent(key, seal_verdict(verdict, keys))
    except Exists:  # a second launch was faster; other threads may round an answer otherwise
        verdict = open_verdict(store.get(key), None, name=key)
    print(json.dumps({"cycle": cycle, "base": base, "seconds": report.seconds}), file=sys.stderr)
    with suppress(StoreError):
        store.put_if_absent(layout.validation_telemetry(cycle, base), json.dumps(report.seconds).encode())
        if report.bytes is not None:
            store.put_if_absent(layout.validation_work(cycle, base), report.bytes.canonical())
    return verdict


def _measure(store: ObjectStore, subject: Subject, trust: Trust | None, report: Report) -> None:
    # Torch takes seconds and most of the memory to import: what the checks before it refuse never pays for it.
    since = time.monotonic()
    from urabrask.measure import measure

    report.timed("import", since)
    measure(store, subject, trust, report)


def _answers(store: ObjectStore, loadable: Loadable) -> str:
    from urabrask.measure import pair_answers

    return pair_answers(store, loadable)


def _judge(wanted: argparse.Namespace) -> str:
    store, cycle, base = open_store(wanted.run), wanted.cycle, wanted.base
    store.put_if_absent(layout.started(cycle, "validate", wanted.launch), b"started")
    try:
        keys = signing_keys_from_environment()
        verdict = judge(store, cycle=cycle, base=base, trust=trust_from_environment(), keys=keys)
    except _STORE_TROUBLE:
        raise
    except (Malformed, StoreError) as error:
        # For the control plane, which otherwise sees only the exit code.
        reason = Reason.UNTRUSTED if isinstance(error, Untrusted) else Reason.INVALID_INPUT
        content = canonical_json({"message": str(error), "reason": reason.value})
        with suppress(Exists):
            store.put_if_absent(layout.validation_error(cycle, base), content)
        raise
    return " ".join(part for part in (verdict.outcome, verdict.reason, verdict.message) if part)


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code is leyline.exits'."""
    wanted = _arguments(argv)
    # Before torch starts its threads: on cores that others want too, threads that spin while they wait for one another
    # took 9 s of CPU where sleeping ones take 5.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        if wanted.cycle is not None:
            said = _judge(wanted)
        else:
            store = open_store(wanted.run)
            said = recheck(store, record=wanted.record, trust=trust_from_environment(), answers=_answers)
    except _STORE_TROUBLE as error:
        print(error, file=sys.stderr)
        return exits.STORE
    except (Malformed, StoreError) as error:
        print(error, file=sys.stderr)
        return exits.BAD_INPUT
    except (MemoryError, RuntimeError) as error:
        if not exits.is_out_of_memory(error):
            raise
        print("out of memory; raise validation_memory_limit", file=sys.stderr)
        return exits.OUT_OF_MEMORY
    print(said)
    return exits.DONE


if __name__ == "__main__":
    sys.exit(main())
