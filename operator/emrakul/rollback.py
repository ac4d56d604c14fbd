"""Rollback of a run: which older pair the tip goes back to, and the one record that moves it there.

Nothing is copied or moved, so it takes as long as one append whatever the checkpoint's size. What comes after the
record (recovery validation) is `recovery.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

from emrakul import objects
from emrakul.core import ending
from emrakul.finding import Finding
from emrakul.settings import Settings
from leyline import layout
from leyline.envelope import Trust
from leyline.fold import PairState, RunState
from leyline.log import Entry, Log, NotAllowed
from leyline.messages import AnalysisResults, SystemStatePacket
from leyline.reasons import Outcome, Reason
from leyline.records import Admit, Draft, Kind, Publish, Record, Resume, Rollback
from leyline.rules import ROLLBACK_DEPTH
from leyline.store import Damaged, ObjectStore

Strategy = Literal["immediate", "progressive", "baseline", "named"]

Validate = Callable[[int], str | None]
"""Loads and checks the pair of a record (urabrask): None if it is sound, else a sentence; NoAnswer if it cannot say."""


class NoAnswer(Exception):
    """The validator failed, which says nothing about the pair."""


class NoTarget(NotAllowed):
    """There is no older pair of the kind that was asked for."""


class NoLoadableTarget(Damaged):
    """There are older pairs, and none of them is whole."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """Who wants the tip moved back, how far, and why. One record per id."""

    id: str
    strategy: Strategy
    finding: Finding
    by: Literal["person", "operator"] = "person"
    to: int | None = None
    """named: the pair's record."""
    before: int | None = None
    """Only pairs older than this record; None: older than the tip."""


@dataclass(frozen=True, kw_only=True)
class Rolled:
    """What became of a request."""

    record: Record
    passed_over: Mapping[int, str]
    """Targets that were tried first, and why they would not do."""
    again: bool = False
    """The record stood there already: this id was done before."""


# --- which pair: pure -------------------------------------------------------------------------------------------------


def targets(
    state: RunState, strategy: Strategy, *, depth: int, to: int | None = None, before: int | None = None
) -> tuple[PairState, ...]:
    """Where the tip may go, in the order in which it is tried. NotAllowed or NoTarget in a sentence."""
    tip = state.tip_pair
    if tip is None:
        raise NoTarget("nothing was published yet, so there is nothing to roll back to")
    baseline = None if state.baseline is None else state.pair(state.baseline)
    if strategy == "named":
        pair = None if to is None else state.pair(to)
        if pair is None:
            raise NotAllowed(f"record {to} is no pair, or is retired; `emrakul history` lists them")
        return (pair,)
    if strategy == "baseline":
        if baseline is None:
            raise NoTarget("the baseline was retired; name another pair with --to N")
        return (baseline,)
    limit = tip.record if before is None else min(before, tip.record)
    older = [pair for pair in state.ancestors(tip.record) if pair.record < limit]
    good = [pair for pair in older if pair.good and not pair.condemned]
    if strategy == "progressive":
        good = good[:depth]
    if baseline is not None and baseline not in good and baseline.record < limit and not baseline.condemned:
        good.append(baseline)
    if not good:
        raise NoTarget(
            f"no good pair is older than record {limit}; `emrakul history` lists all pairs, and a person may name "
            "one with --to N"
        )
    return tuple(good)


def request_id(state: RunState, strategy: Strategy, to: int | None = None) -> str:
    """Deterministic, from where the tip stands and what is asked: the same command twice at once is one rollback."""
    return f"rollback-{state.tip_moved}-{strategy if to is None else to}"


# --- probation: pure --------------------------------------------------------------------------------------------------


def on_probation(state: RunState) -> PairState | None:
    """The newest pruned pair under the tip whose masks no good, fully baked checkpoint has confirmed yet."""
    tip = state.tip_pair
    for pair in (tip, *state.ancestors(tip.record)) if tip else ():
        if pair.candidate is not None:
            return None if pair.condemned else pair
        if pair.good and not pair.provisional:
            return None
    return None


def probation_finding(
    state: RunState, records: Sequence[Record], packet: SystemStatePacket | None
) -> tuple[PairState, Finding] | None:
    """The pruned pair whose masks made the training worse, and how that was seen; None while nothing says so.

    `records` are those since that pair's (others are passed over), `packet` the newest report. A report counts only
    if the trainer had applied the masks when it wrote it; a publish, if the masks were baked into its weights.
    """
    pruned = on_probation(state)
    if pruned is None:
        return None
    line = {pair.record: pair for pair in state.pairs if pruned.record < pair.record and not pair.condemned}
    reports = [
        record.body.report
        for record in records
        if isinstance(record.body, Publish) and record.n in line and not line[record.n].provisional
    ]
    if packet is not None and packet.record >= pruned.record:
        reports.append(packet)
    for report in reports:
        if report is not None and (worse := _worse(state, pruned, report)):
            why = f"after the masks of record {pruned.record} (step {pruned.step}) {worse}"
            return pruned, Finding(Reason.PROBATION, why)
    return None


def _worse(state: RunState, pruned: PairState, report: SystemStatePacket) -> str | None:
    if report.state == "unstable":
        return f"the training is unstable at step {report.step} ({report.source}, loss {report.loss})"
    before = state.reported_before(pruned.parent)
    if report.n and report.correct is not None and before is not None:
        accuracy = report.correct / report.n
        if accuracy < before - state.gate:
            return (
                f"accuracy at step {report.step} is {accuracy:.3f} ({report.correct} of {report.n}), more than "
                f"{state.gate:g} below the {before:.3f} that was reported before those masks"
            )
    return None


# --- the record -------------------------------------------------------------------------------------------------------


def roll_back(
    store: ObjectStore,
    log: Log,
    request: Request,
    *,
    trust: Trust | None,
    depth: int = ROLLBACK_DEPTH,
    validate: Validate | None = None,
    deep: bool = False,
    since: int = -1,
) -> Rolled:
    """Move the tip back, once per request id; then end the live cycle and tell Tamiyo.

    Each target's objects are checked first (`deep`: every digest), and with strategy progressive `validate` must
    find it sound; `depth` is settings.rollback.depth. `since` is a record that the id's own cannot come before.
    Raises NoTarget, NoLoadableTarget, NotAllowed.
    """
    if request.strategy == "progressive" and validate is None:
        raise TypeError("a progressive rollback validates every target; pass validate")
    # the tail first: append looks for the id from there on, so no record falls between the two looks
    before = log.tail().state
    if (found := log.find((Kind.ROLLBACK.value, request.id), base=since)) is not None:
        _settle(store, log, found)
        return Rolled(record=found, passed_over={}, again=True)
    passed_over: dict[int, str] = {}
    for pair in targets(before, request.strategy, depth=depth, to=request.to, before=request.before):
        if why := _unfit(store, log, pair, trust, validate if request.strategy == "progressive" else None, deep=deep):
            passed_over[pair.record] = why
            continue
        entry = log.append(_draft(log, before, pair, request), base=before.n)
        _settle(store, log, entry.record)
        return Rolled(record=entry.record, passed_over=passed_over)
    tried = "; ".join(f"record {record}: {why}" for record, why in passed_over.items())
    raise NoLoadableTarget(
        f"{store.uri}: no pair to roll back to is whole, so the tip stays where it is ({tried}); restore the objects, "
        f"or name another pair: `emrakul rollback {store.uri} --to N`"
    )


def resume(log: Log) -> Entry:
    """End the hold that a person's rollback left. NotAllowed where there is none."""
    state = log.tail().state
    if state.hold is None:
        raise NotAllowed("the run is not held, so there is nothing to resume")
    draft = Draft(
        id=state.hold,
        body=Resume(rollback=state.hold),
        message=f"the hold of rollback {state.hold} has ended; cycles may commit again",
    )
    return log.append(draft, base=state.rolled_back)


def _unfit(
    store: ObjectStore, log: Log, pair: PairState, trust: Trust | None, validate: Validate | None, *, deep: bool
) -> str | None:
    """Why the tip cannot go to this pair. Trouble with the store is raised: it says nothing of the pair."""
    try:
        parts = objects.parts(store, log, pair, trust)
    except objects.DAMAGE as error:
        return str(error)
    if fault := next(objects.faults(store, parts, deep=deep), None):
        return fault
    return validate(pair.record) if validate is not None else None


def _draft(log: Log, state: RunState, pair: PairState, request: Request) -> Draft:
    who = "a person" if request.by == "person" else "the control plane"
    finding = Finding(
        request.finding.reason,
        f"{who} moved the tip from record {state.tip} back to record {pair.record} "
        f"(checkpoint {pair.checkpoint}): {request.finding.message}",
    )
    return Draft(
        id=request.id,
        checkpoint=pair.checkpoint,
        masks=pair.masks,
        baked=pair.baked,
        evidence=objects.evidence(log, pair),
        body=Rollback(to=pair.record, by=request.by, strategy=request.strategy),
        reason=finding.reason.value,
        message=finding.sentence,
    )


def _settle(store: ObjectStore, log: Log, record: Record) -> None:
    """What follows from the record, and may be done again after a crash: the live cycle ends, Tamiyo is told."""
    now = log.tail().state
    if now.live is not None and now.live.admitted < record.n:
        why = Finding(Reason.ROLLED_BACK_MEANWHILE, f"the run was rolled back (record {record.n})")
        with suppress(NotAllowed):  # whoever drives the cycle saw the rollback first and ended it
            log.append(ending.abandoned(now, why), base=now.live.admitted)
    after = log.state_at(record.n)
    told = AnalysisResults(
        idempotency_key=record.id,
        run=after.run_id,
        cycle="",
        checkpoint=record.checkpoint or "",
        outcome=Outcome.ROLLED_BACK.value,
        reason=record.reason,
        message=record.message,
        stage=log.state_at(record.n - 1).ladder.stage,
        next_stage=after.ladder.stage,
        streak=after.ladder.streak,
        counts=record.masks.counts if record.masks else {},
        breaker=after.breaker.state,
    )
    store.put_if_absent(layout.results(f"rollback-{record.n}"), told.canonical())


def newest_settings(log: Log) -> Settings:
    """The settings of the newest admitted cycle, or the defaults where there was none."""
    for n in range(log.tail().record.n, -1, -1):
        body = log.read(n)[0].body
        if isinstance(body, Admit):
            return Settings.model_validate(body.settings)
    return Settings()
