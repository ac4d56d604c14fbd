"""Whether a run is what its log says: every record and state, and every object of every pair, digest by digest."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from emrakul import objects
from emrakul.objects import Part
from leyline import layout
from leyline.digest import sha256_hex
from leyline.envelope import Trust, Untrusted
from leyline.fold import PairState, RunState
from leyline.log import Entry, Log, verify
from leyline.model import Malformed
from leyline.store import Damaged, NotFound, ObjectStore


@dataclass
class Found:
    """What was looked at, and what is wrong."""

    records: int = 0
    signed: bool = True
    pairs: int = 0
    objects: int = 0
    bytes: int = 0
    gone: int = 0
    """Small objects that records rest on and gc has deleted."""
    faults: dict[str, str] = field(default_factory=dict)
    """A sentence by the key of what is wrong."""

    def fault(self, key: str, error: Exception | str) -> None:
        self.faults.setdefault(key, str(error))


Begin = Callable[[str, int], None]
"""Told what comes next and how many bytes it has."""


def verify_run(
    store: ObjectStore,
    log: Log,
    *,
    trust: Trust | None,
    begin: Begin = lambda _key, _size: None,
    progress: objects.Progress = lambda _: None,
) -> Found:
    """Everything is read, one chunk at a time. Trouble with the store is raised; what is wrong is collected."""
    found = Found()
    log.tail()  # NoRun and StoreReverted before anything else
    state, evidence = _chain(store, log, found)
    found.signed = log.signed
    if state is None:
        return found
    _small(store, evidence, found)
    checked: set[str] = set()
    for pair in state.pairs:
        _pair(store, log, pair, found, checked, trust=trust, begin=begin, progress=progress)
    return found


def _chain(store: ObjectStore, log: Log, found: Found) -> tuple[RunState | None, dict[str, str]]:
    """The state after the last record that holds, and the digests that records rest on, by path."""
    evidence: dict[str, str] = {}
    last: Entry | None = None
    try:
        for last in verify(log):
            found.records += 1
            evidence.update(last.record.evidence)
            _state(store, last, found)
    except (Malformed, Damaged, Untrusted) as error:
        found.fault(layout.record(last.record.n + 1 if last else 0), error)
    return last.state if last else None, evidence


def _state(store: ObjectStore, entry: Entry, found: Found) -> None:
    key = layout.state(entry.record.state)
    try:
        if sha256_hex(store.get(key)) != entry.record.state:
            found.fault(key, f"{key} is not the state after record {entry.record.n}; restore it from a copy")
    except NotFound:
        found.fault(key, f"{key}, the state after record {entry.record.n}, is missing; restore it from a copy")


def _small(store: ObjectStore, evidence: Mapping[str, str], found: Found) -> None:
    """Requests, decisions, verdicts: what is gone was retired (what pairs need is looked at with them)."""
    for key, digest in evidence.items():
        try:
            same = sha256_hex(store.get(key)) == digest
        except NotFound:
            found.gone += 1
            continue
        found.objects += 1
        if not same:
            found.fault(key, f"{key} is not what the log rests on; it was exchanged, restore it from a copy")


def _pair(
    store: ObjectStore,
    log: Log,
    pair: PairState,
    found: Found,
    checked: set[str],
    *,
    trust: Trust | None,
    begin: Begin,
    progress: objects.Progress,
) -> None:
    found.pairs += 1
    try:
        parts: tuple[Part, ...] = objects.parts(store, log, pair, trust)
    except (*objects.DAMAGE, Untrusted) as error:
        found.fault(pair.candidate or layout.checkpoint(pair.checkpoint), error)
        return
    for part in parts:
        if part.key in checked:
            continue
        checked.add(part.key)
        begin(part.key, part.digest.size)
        try:
            objects.check(store, part, deep=True, progress=progress)
        except objects.DAMAGE as error:
            found.fault(part.key, error)
        found.objects += 1
        found.bytes += part.digest.size
