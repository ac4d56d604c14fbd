"""What became of every cycle of a run: outcome, budgets, accuracy and the time of each phase, read from the store."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from typing import TypeVar

from emrakul.core.ending import accuracy
from leyline import layout
from leyline.log import Log
from leyline.messages import Budget, Decision, Verdict
from leyline.records import Admit, End, Kind, Record
from leyline.store import NotFound, ObjectStore
from leyline.verdict import open_verdict

Content = TypeVar("Content", Decision, Verdict)


@dataclass(frozen=True, kw_only=True)
class CycleReport:
    """One cycle, as people look at it."""

    cycle: str
    checkpoint: str
    admitted: int
    """The admit record."""
    base: int
    stage: str
    ended: int | None = None
    """The end record; None while the cycle is live."""
    outcome: str = ""
    reason: str = ""
    message: str = ""
    counts: dict[str, int] = field(default_factory=dict)
    """All masked units by kind, the inherited ones included, after a commit."""
    budgets: tuple[Budget, ...] = ()
    accuracy_base: float | None = None
    accuracy_candidate: float | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    """By phase, by the store's clock: analyse (with the decision), apply, validate, and the whole cycle."""


def cycles(store: ObjectStore, log: Log, *, since: int = 0) -> Iterator[CycleReport]:
    """Every cycle admitted after record `since`, oldest first."""
    admits: dict[str, Record] = {}
    for record in log.since(since):
        if record.kind is Kind.ADMIT:
            admits[record.id] = record
        elif record.kind in (Kind.PRUNE, Kind.OUTCOME) and record.id in admits:
            yield report(store, admits.pop(record.id), record)
    for record in admits.values():
        yield report(store, record, None)


def report(store: ObjectStore, admit: Record, end: Record | None) -> CycleReport:
    """One cycle, from its records and what it left in the store."""
    assert isinstance(admit.body, Admit)
    body = end.body if end else None
    assert body is None or isinstance(body, End)
    decision = _read(store, layout.decision(admit.id), Decision)
    verdict = _verdict(store, layout.verdict(admit.id, body.base)) if body else None
    before, after = accuracy(verdict) if verdict else (None, None)
    return CycleReport(
        cycle=admit.id,
        checkpoint=admit.checkpoint or "",
        admitted=admit.n,
        base=admit.body.base,
        stage=admit.body.stage.value,
        ended=end.n if end else None,
        outcome=body.outcome if body else "",
        reason=end.reason if end else "",
        message=end.message if end else "",
        counts=end.masks.counts if end and end.masks else {},
        budgets=decision.budgets if decision else (),
        accuracy_base=before,
        accuracy_candidate=after,
        seconds=phases(store, admit, end),
    )


def phases(store: ObjectStore, admit: Record, end: Record | None) -> dict[str, float]:
    """Seconds of each phase that the cycle reached; of several bases the last one counts."""
    base = end.body.base if end and isinstance(end.body, End) else None
    began = _at(store, layout.record(admit.n))
    marks = [("analyse", _at(store, layout.decision(admit.id)))]
    if base is not None:
        marks.append(("apply", _at(store, layout.manifest(admit.id, base))))
        marks.append(("validate", _at(store, layout.verdict(admit.id, base))))
    found: dict[str, float] = {}
    before = began
    for name, at in marks:
        if at is not None and before is not None:
            found[name] = (at - before).total_seconds()
        before = at  # what gc has deleted tells nothing: neither of its own phase nor of the next
    ended = _at(store, layout.record(end.n)) if end else None
    if began and ended:
        found["cycle"] = (ended - began).total_seconds()
    return found


def _at(store: ObjectStore, key: str) -> datetime | None:
    try:
        return store.head(key).modified
    except NotFound:
        return None


def _read(store: ObjectStore, key: str, model: type[Content]) -> Content | None:
    try:
        return model.parse(store.get(key), name=key)
    except NotFound:
        return None


def _verdict(store: ObjectStore, key: str) -> Verdict | None:
    """What it says; whether it counted, the end record says."""
    try:
        return open_verdict(store.get(key), None, name=key)
    except NotFound:
        return None
