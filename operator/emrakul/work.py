"""What the workers of a cycle say of their work, phase by phase, and the rate at which those of earlier cycles scored.

Read from the answers in the store, so that it is the same after a restart. It bounds how many workers there are, and
is shown to people; nothing that is decided rests on it.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

from emrakul.core.snapshot import Phase
from emrakul.strategy.requests import ROUND
from leyline import answers, layout
from leyline.candidate import Copied
from leyline.log import Log
from leyline.model import Malformed, Value
from leyline.records import Kind
from leyline.store import Exists, Head, NotFound, ObjectStore
from leyline.work import Work, add_up

LOOK_BACK = 256
"""Records before its own in which a cycle looks for one whose workers were measured."""
_AT_ONCE = 8
"""Answers that are read at once."""
_WHOLE = (ROUND["structured"], ROUND["histogram"])
"""The rounds that read every weight of their requests: others would make workers look faster than they are."""


class Rate(Value):
    """`rate.json` of a cycle: what `worker_calculation_rate: auto` stands for in it, whoever drives it on."""

    worker_calculation_rate: int
    """Parameters a worker scores in a second."""
    cycle: str = ""
    """The cycle whose answers say so; none: nothing was measured, and it is the default."""


def work(store: ObjectStore, cycle: str, base: int | None) -> dict[Phase, Work]:
    """The work of each phase, all its workers together; phases without an answer are left out."""
    found = {Phase.ANALYSE: add_up(_scored(store, cycle))}
    if base is not None:
        found[Phase.APPLY] = add_up(_copied(store, cycle, base))
        key = layout.validation_work(cycle, base)
        with suppress(NotFound, Malformed):
            found[Phase.VALIDATE] = Work.parse(store.get(key), name=key)
    return {phase: one for phase, one in found.items() if one.bytes_read}


def calculation_rate(store: ObjectStore, log: Log, *, cycle: str, admitted: int, default: int) -> int:
    """What `auto` stands for in this cycle: found once and written down, since gc takes the answers it comes from."""
    key = layout.calculation_rate(cycle)
    with suppress(NotFound):
        return Rate.parse(store.get(key), name=key).worker_calculation_rate
    found = _measured(store, log, admitted) or Rate(worker_calculation_rate=default)
    try:
        store.put_if_absent(key, found.canonical())
    except Exists:  # another driver of this cycle has found another one meanwhile
        return Rate.parse(store.get(key), name=key).worker_calculation_rate
    return found.worker_calculation_rate


def _measured(store: ObjectStore, log: Log, admitted: int) -> Rate | None:
    """The newest cycle before this one that has answers."""
    for n in range(admitted - 1, max(admitted - LOOK_BACK, 0), -1):
        record, _ = log.read(n)
        if record.kind is not Kind.ADMIT:
            continue
        whole = add_up(_scored(store, record.id, rounds=_WHOLE))
        if whole.seconds > 0 and (rate := int(whole.parameters / whole.seconds)):
            return Rate(worker_calculation_rate=rate, cycle=record.id)
    return None


def _scored(store: ObjectStore, cycle: str, *, rounds: tuple[int, ...] = tuple(ROUND.values())) -> Iterator[Work]:
    def of(head: Head) -> Work:
        with suppress(Malformed, NotFound):
            said = answers.message(store, head)
            if said.status == "answered":
                return Work(**said.model_dump(include=set(Work.model_fields)))
        return Work()

    wanted = []
    for head in store.list(layout.responses(cycle)):
        number, _, index = head.key.removeprefix(layout.responses(cycle)).partition("/")[0].partition("-")
        if number.isdecimal() and index.isdecimal() and int(number) in rounds:
            wanted.append(head)
    with ThreadPoolExecutor(_AT_ONCE) as pool:  # a billion weights have two hundred answers
        yield from pool.map(of, wanted)


def _copied(store: ObjectStore, cycle: str, base: int) -> Iterator[Work]:
    for head in store.list(f"{layout.responses(cycle)}apply-{base}-"):
        with suppress(Malformed, NotFound):
            said = Copied.parse(store.get(head.key), name=head.key)
            yield Work(**said.model_dump(include=set(Work.model_fields)))
