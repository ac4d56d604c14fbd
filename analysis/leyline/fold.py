"""What a run's log adds up to: tip, pairs, live cycle, schedule, breaker, hold. Pure: a fold over the records."""

from __future__ import annotations

from leyline.messages import Fraction, MaskRef
from leyline.model import Value
from leyline.policy import Breaker, Ladder
from leyline.records import (
    Admit,
    Draft,
    End,
    Genesis,
    Open,
    Outcome,
    Pair,
    Prune,
    Publish,
    Resume,
    Retire,
    Rollback,
)


class PairState(Pair):
    """A pair and what has become of it."""

    step: int
    epoch: int
    parent: int | None
    """The pair it descends from, by record."""
    baked: MaskRef | None = None
    provisional: bool = False
    """Its masks exceed what its weights carry: it loads, but is no base for a cycle and is not good."""
    good: bool = False
    condemned: bool = False
    accuracy: float | None = None


class LiveCycle(Value):
    """The one cycle that runs."""

    id: str
    base: int
    admitted: int
    """Its admit record."""
    settings_digest: str
    runtime: str


class RunState(Value):
    """A run after record `n`."""

    n: int
    run_id: str
    model_id: str
    term: int = 0
    opened: int = -1
    """The newest open, by record; -1: none yet."""
    tip: int | None = None
    tip_moved: int = -1
    """The record that moved the tip last."""
    pairs: tuple[PairState, ...] = ()
    """All that are not retired, oldest first."""
    live: LiveCycle | None = None
    cycled: int = -1
    """The newest base that a cycle was admitted on, by record."""
    baseline: int | None = None
    """The first publish; a policy may name another."""
    ladder: Ladder = Ladder()
    breaker: Breaker = Breaker()
    carry: dict[str, Fraction] = {}
    hold: str | None = None
    """The person's rollback that holds the run at ValidationOnly."""
    rolled_back: int = -1
    """The newest rollback, by record."""
    gate: float = 0.02
    """accuracy_drop_threshold of the newest admitted cycle."""
    counters: dict[str, int] = {}
    """Ended cycles by "outcome/reason": what telemetry must agree with."""

    def pair(self, record: int) -> PairState | None:
        """The pair that this record made, if it is not retired."""
        return next((pair for pair in self.pairs if pair.record == record), None)

    @property
    def tip_pair(self) -> PairState | None:
        return None if self.tip is None else self.pair(self.tip)

    def ancestors(self, record: int) -> tuple[PairState, ...]:
        """The pair's parents, nearest first."""
        known = {pair.record: pair for pair in self.pairs}  # a run may have thousands
        found = []
        pair = known.get(record)
        while pair is not None and pair.parent is not None and (pair := known.get(pair.parent)) is not None:
            found.append(pair)
        return tuple(found)

    @property
    def last_good(self) -> PairState | None:
        """The nearest uncondemned good pair, from the tip backwards."""
        tip = self.tip_pair
        chain = (tip, *self.ancestors(tip.record)) if tip else ()
        return next((pair for pair in chain if pair.good and not pair.condemned), None)

    def reported_before(self, record: int | None) -> float | None:
        """The trainer's own accuracy at the pair or its nearest good ancestor that has one.

        A pruned pair's accuracy is the validator's: another instrument, which no report is compared with.
        """
        pair = None if record is None else self.pair(record)
        chain = (pair, *self.ancestors(pair.record)) if pair else ()
        own = (p for p in chain if p.good and not p.condemned and p.candidate is None)
        return next((p.accuracy for p in own if p.accuracy is not None), None)


def fold(state: RunState | None, n: int, draft: Draft) -> RunState:
    """The state after `draft` became record `n`. The rules have already allowed it."""
    body = draft.body
    if state is None:
        if not isinstance(body, Genesis):
            raise ValueError(f"record 0 is a {body.kind.value}, not a genesis; this is no run")
        return RunState(n=n, run_id=body.run_id, model_id=body.model_id)
    after = state.model_copy(update={"n": n})
    match body:
        case Open():
            return after.model_copy(update={"term": state.term + 1, "opened": n})
        case Publish():
            return _publish(after, draft, body)
        case Admit():
            live = LiveCycle(
                id=draft.id,
                base=body.base,
                admitted=n,
                settings_digest=body.settings_digest,
                runtime=body.runtime,
            )
            named = next((p.record for p in state.pairs if body.baseline and p.checkpoint == body.baseline), None)
            baseline = state.baseline if named is None else named
            cycled = max(state.cycled, body.base)
            return after.model_copy(
                update={"live": live, "gate": body.accuracy_drop, "baseline": baseline, "cycled": cycled}
            )
        case Prune():
            return _prune(_end(after, draft, body), draft, body)
        case Outcome():
            return _end(after, draft, body)
        case Rollback():
            return _rollback(after, draft, body)
        case Resume():
            return after.model_copy(update={"hold": None})
        case Retire():
            return after.model_copy(update={"pairs": _without(state, frozenset(body.pairs))})
        case Genesis():
            raise ValueError(f"record {n} is a second genesis")


def _publish(state: RunState, draft: Draft, body: Publish) -> RunState:
    tip = state.tip_pair
    masks = draft.masks
    provisional = masks is not None and (draft.baked is None or draft.baked.digest != masks.digest)
    accuracy = None
    if body.report and body.report.n and body.report.correct is not None:
        accuracy = body.report.correct / body.report.n
    pair = PairState(
        record=state.n,
        checkpoint=draft.checkpoint or draft.id,
        masks=masks,
        step=body.step,
        epoch=body.epoch,
        parent=tip.record if tip else None,
        baked=draft.baked,
        provisional=provisional,
        good=not provisional and _report_is_good(state, body, accuracy, masked=masks is not None),
        accuracy=accuracy,
    )
    breaker = state.breaker
    if breaker.state == "open":
        breaker = breaker.model_copy(update={"checkpoints": breaker.checkpoints + 1})
    return state.model_copy(
        update={
            "tip": state.n,
            "tip_moved": state.n,
            "pairs": (*state.pairs, pair),
            "baseline": state.n if state.baseline is None else state.baseline,
            "breaker": breaker,
        }
    )


def _report_is_good(state: RunState, body: Publish, accuracy: float | None, *, masked: bool) -> bool:
    """Without a report only unmasked weights count as good: nothing of ours can be wrong with them."""
    if body.report is None:
        return not masked
    if body.report.state == "unstable":
        return False
    before = state.reported_before(state.tip)
    if accuracy is None or before is None:
        return body.report.state == "stable" or not masked
    return accuracy >= before - state.gate


def _end(state: RunState, draft: Draft, body: End) -> RunState:
    key = f"{body.outcome}/{draft.reason}"
    return state.model_copy(
        update={
            "live": None,
            "ladder": body.ladder,
            "breaker": body.breaker,
            "carry": state.carry if body.carry is None else body.carry,
            "counters": {**state.counters, key: state.counters.get(key, 0) + 1},
        }
    )


def _prune(state: RunState, draft: Draft, body: Prune) -> RunState:
    base = state.pair(body.base)
    if base is None:
        raise ValueError(f"record {state.n} prunes on pair {body.base}, which the log does not have")
    pair = PairState(
        record=state.n,
        checkpoint=base.checkpoint,
        masks=draft.masks,
        candidate=body.candidate,
        step=base.step,
        epoch=base.epoch,
        parent=base.record,
        baked=draft.masks,
        good=True,
        accuracy=body.accuracy,
    )
    return state.model_copy(update={"tip": state.n, "tip_moved": state.n, "pairs": (*state.pairs, pair)})


def _without(state: RunState, gone: frozenset[int]) -> tuple[PairState, ...]:
    """The other pairs; whose parent goes descends from the nearest ancestor that stays."""
    kept = []
    for pair in state.pairs:
        if pair.record not in gone:
            parent = next((older.record for older in state.ancestors(pair.record) if older.record not in gone), None)
            kept.append(pair.model_copy(update={"parent": parent}))
    return tuple(kept)


def _rollback(state: RunState, draft: Draft, body: Rollback) -> RunState:
    # the target's own ancestors have lower numbers, so none of them is touched
    pairs = tuple(
        pair.model_copy(update={"condemned": pair.record > body.to}) if pair.record >= body.to else pair
        for pair in state.pairs
    )
    return state.model_copy(
        update={
            "term": state.term + 1,
            "tip": body.to,
            "tip_moved": state.n,
            "pairs": pairs,
            "rolled_back": state.n,
            "ladder": state.ladder.demoted(),
            "hold": draft.id if body.by == "person" else state.hold,
        }
    )
