"""Loading the tip, and going back to an older pair where it is damaged.

What is damaged (missing, or not what its digest says, twice) is told apart from what is only out of reach: a refusal,
a timeout, a wrong key or an untrusted signature never moves the tip.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from kasmina.into import Into
from kasmina.pair import PairDamaged, load_pair
from leyline.envelope import Trust
from leyline.fold import PairState, RunState
from leyline.log import Log, NotAllowed
from leyline.messages import MaskRef
from leyline.records import Draft, Rollback
from leyline.store import ObjectStore, StoreError

_ROUNDS = 10
"""Rollbacks by others that may overtake ours in a row."""


class NoLoadableCheckpoint(StoreError):
    """The tip is damaged, and so is everything that it could be rolled back to."""


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """What training goes on from."""

    record: int
    checkpoint: str
    step: int
    epoch: int
    masks: MaskRef | None
    rolled_back: str = ""
    """Why the tip was rolled back to this pair by this load; empty if it was not."""


def load_newest(
    store: ObjectStore, log: Log, into: Into, *, trust: Trust | None, may_roll_back: bool
) -> tuple[Loaded | None, RunState]:
    """Load the tip, and the state of the run that it is the tip of. None where nothing was published yet.

    A damaged tip is rolled back (one more record) to the nearest good ancestor that loads, else to the baseline, if
    `may_roll_back`; else PairDamaged. NoLoadableCheckpoint where nothing does.
    """
    for _ in range(_ROUNDS):
        state = log.tail().state
        tip = state.tip_pair
        if tip is None:
            return None, state
        try:
            load_pair(store, log, tip, into, trust)
        except PairDamaged as damage:
            if not may_roll_back:
                raise PairDamaged(
                    f"{damage}. Only the trainer's first rank rolls back when it loads; a person does it by "
                    f"`emrakul rollback {store.uri}`"
                ) from damage
            if (found := _roll_back(store, log, state, tip, into, trust, str(damage))) is not None:
                return found
        else:
            return _loaded(tip), state
    raise StoreError(f"{store.uri}: the tip moved {_ROUNDS} times while it was loaded; try again")


def fallbacks(state: RunState, tip: PairState) -> tuple[PairState, ...]:
    """Where to go when the tip cannot be loaded: good ancestors, nearest first, then the baseline."""
    good = [pair for pair in state.ancestors(tip.record) if pair.good and not pair.condemned]
    baseline = None if state.baseline is None else state.pair(state.baseline)
    if baseline is not None and baseline.record != tip.record and baseline not in good and not baseline.condemned:
        good.append(baseline)
    return tuple(good)


def _roll_back(
    store: ObjectStore, log: Log, state: RunState, tip: PairState, into: Into, trust: Trust | None, damage: str
) -> tuple[Loaded, RunState] | None:
    """Load the first fallback that loads, and only then move the tip there. None if somebody else moved it first."""
    for target in fallbacks(state, tip):
        try:
            load_pair(store, log, target, into, trust)
        except PairDamaged:
            continue
        draft = Draft(
            # the same damage of the same tip is one rollback, whoever finds it; a tip that came back may be lost again
            id=f"load-{tip.record}-{state.tip_moved}",
            checkpoint=target.checkpoint,
            masks=target.masks,
            baked=target.baked,
            body=Rollback(
                to=target.record, by="trainer", strategy="baseline" if target.record == state.baseline else "immediate"
            ),
            reason="LoadFailure",
            message=damage,
        )
        try:
            entry = log.append(draft, base=state.n, unless=partial(_moved, before=state))
        except NotAllowed:
            return None
        return _loaded(target, rolled_back=damage), entry.state
    raise NoLoadableCheckpoint(
        f"{store.uri}: the tip cannot be loaded ({damage}), and none of {len(fallbacks(state, tip))} older good "
        f"checkpoints can; restore their objects, or name another pair: `emrakul rollback {store.uri} --to N`"
    )


def _moved(now: RunState, *, before: RunState) -> str | None:
    """What we found damaged must still be the tip, and the run still ours."""
    if (now.tip_moved, now.opened) != (before.tip_moved, before.opened):
        return f"the tip moved to record {now.tip} since it was found damaged"
    return None


def _loaded(pair: PairState, *, rolled_back: str = "") -> Loaded:
    return Loaded(
        record=pair.record,
        checkpoint=pair.checkpoint,
        step=pair.step,
        epoch=pair.epoch,
        masks=pair.masks,
        rolled_back=rolled_back,
    )
