"""Recovery validation: whether a run stands on its feet after a rollback. Four looks, one sentence each.

State, model and telemetry can be judged at once; training continuity only when the trainer has come back.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Literal

from emrakul.rollback import NoAnswer, Validate
from leyline import layout
from leyline.fold import RunState
from leyline.log import Log, verify
from leyline.messages import SystemStatePacket
from leyline.model import Malformed, Value
from leyline.records import End, Publish, Record, Rollback
from leyline.store import Exists, NotFound, ObjectStore

Outcome = Literal["passed", "failed", "pending"]


class Look(Value):
    """One thing that was looked at."""

    name: Literal["state", "model", "training", "telemetry"]
    outcome: Outcome
    message: str


class Recovery(Value):
    """What was found after one rollback; kept in the run once nothing is pending."""

    schema_version: Literal[1] = 1
    rollback: int
    """The rollback's record."""
    to: int
    """The pair that it went back to."""
    looks: tuple[Look, ...]

    @property
    def outcome(self) -> Outcome:
        """The worst of the four."""
        found = {look.outcome for look in self.looks}
        return "failed" if "failed" in found else "pending" if "pending" in found else "passed"


def recover(
    store: ObjectStore,
    log: Log,
    rollback: Record,
    *,
    validate: Validate,
    counted: Mapping[str, int] | None = None,
) -> Recovery:
    """Look at the run after `rollback`; what was found before and kept is the answer.

    `counted` are the ended cycles by
    "outcome/reason" that a telemetry edge has counted; without one they are counted from the records.
    """
    if (kept := read(store, rollback.n)) is not None:
        return kept
    assert isinstance(rollback.body, Rollback)
    records, state = _state(log)
    model = _kept_model(store, rollback, validate)
    training = _training(rollback, records, _reports(store, rollback.term))
    telemetry = _telemetry(log.tail().state, count(records) if counted is None else counted)
    found = Recovery(rollback=rollback.n, to=rollback.body.to, looks=(state, model, training, telemetry))
    if found.outcome == "pending":
        return found
    try:
        store.put_if_absent(layout.recovery(rollback.n), found.canonical())
    except Exists:  # another process looked at the same time
        return read(store, rollback.n) or found
    return found


def read(store: ObjectStore, rollback: int) -> Recovery | None:
    """What was kept for a rollback record, or None."""
    key = layout.recovery(rollback)
    try:
        return Recovery.parse(store.get(key), name=key)
    except NotFound:
        return None


def count(records: Iterable[Record]) -> dict[str, int]:
    """Ended cycles by "outcome/reason"."""
    ends = [(record.body.outcome, record.reason) for record in records if isinstance(record.body, End)]
    return dict(Counter(f"{outcome}/{reason}" for outcome, reason in ends))


def _state(log: Log) -> tuple[list[Record], Look]:
    """The whole log, folded from the genesis, must give the state that the newest record names."""
    tail = log.tail()
    records: list[Record] = []
    folded: RunState | None = None
    try:
        for entry in verify(log):
            records.append(entry.record)
            if entry.record.n == tail.record.n:
                folded = entry.state
                break
    except Malformed as error:
        return records, Look(name="state", outcome="failed", message=str(error))
    if folded != tail.state:
        why = f"the records up to {tail.record.n} do not add up to the state of record {tail.record.n}"
        return records, Look(name="state", outcome="failed", message=why)
    return records, Look(
        name="state", outcome="passed", message=f"records 0 to {tail.record.n} add up to the run's state"
    )


def _kept_model(store: ObjectStore, rollback: Record, validate: Validate) -> Look:
    """As the validator said it once: the trainer may take weeks to come back, and the pair does not change."""
    assert isinstance(rollback.body, Rollback)
    key = layout.recovery_model(rollback.n)
    try:
        return Look.parse(store.get(key), name=key)
    except NotFound:
        look = _model(rollback.body.to, rollback.checkpoint or "", validate)
    if look.outcome != "pending":
        with suppress(Exists):
            store.put_if_absent(key, look.canonical())
    return look


def _model(record: int, checkpoint: str, validate: Validate) -> Look:
    try:
        why = validate(record)
    except NoAnswer as error:
        return Look(name="model", outcome="pending", message=str(error))
    if why:
        return Look(name="model", outcome="failed", message=why)
    whole = f"record {record} (checkpoint {checkpoint}) has its digests and its structure, and loads"
    return Look(name="model", outcome="passed", message=whole)


def _reports(store: ObjectStore, term: int) -> list[SystemStatePacket]:
    """Reports written since the rollback raised the term, oldest first."""
    found = []
    for head in store.list("reports/"):
        prefix, _, rest = head.key.removeprefix("reports/").partition("-")
        if prefix.isdecimal() and int(prefix) >= term and rest.removesuffix(".json").isdecimal():
            found.append((int(prefix), head.key))
    return [SystemStatePacket.parse(store.get(key), name=key) for _, key in sorted(found)[:1]]


def _training(rollback: Record, records: Iterable[Record], reports: list[SystemStatePacket]) -> Look:
    """The trainer's first word after the rollback: a report, or a checkpoint."""
    published = next((r for r in records if r.n > rollback.n and isinstance(r.body, Publish)), None)
    if reports and reports[0].state == "unstable":
        why = f"the first report after the rollback (step {reports[0].step}) says that the training is unstable"
        return Look(name="training", outcome="failed", message=why)
    if reports:
        return Look(
            name="training", outcome="passed", message=f"the trainer has come back and reports step {reports[0].step}"
        )
    if published is not None and isinstance(published.body, Publish):
        why = f"the trainer has come back and published step {published.body.step} (record {published.n})"
        return Look(name="training", outcome="passed", message=why)
    return Look(name="training", outcome="pending", message="the trainer has not reported since; restart it")


def _telemetry(state: RunState, counted: Mapping[str, int]) -> Look:
    if dict(counted) != state.counters:
        keys = sorted({*counted, *state.counters})
        other = next(key for key in keys if counted.get(key, 0) != state.counters.get(key, 0))
        why = f"{other} was counted {counted.get(other, 0)} times, the log says {state.counters.get(other, 0)}"
        return Look(name="telemetry", outcome="failed", message=why)
    total = sum(state.counters.values())
    return Look(name="telemetry", outcome="passed", message=f"all {total} ended cycles are counted as the log has them")
