"""When a record may be appended: one small pure function for each kind, over the state that it would follow."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from leyline import layout
from leyline.fold import RunState
from leyline.records import (
    PROTOCOL,
    Admit,
    Draft,
    Genesis,
    Kind,
    Outcome,
    Prune,
    Publish,
    Resume,
    Retire,
    Rollback,
)

ROLLBACK_DEPTH = 5
"""Good pairs behind the tip that gc leaves alone, so that a progressive rollback has somewhere to go."""

Refusal = str | None
"""None: allowed. Else a sentence."""


def refusal(state: RunState | None, draft: Draft) -> Refusal:
    """Why this draft may not follow this state, or None."""
    if state is None:
        return None if isinstance(draft.body, Genesis) else "the log is empty; its first record must be a genesis"
    return _RULES[draft.kind](state, draft)


def _genesis(state: RunState, _draft: Draft) -> Refusal:
    return f"run {state.run_id} already has a genesis"


def _open(_state: RunState, _draft: Draft) -> Refusal:
    return None


def _publish(state: RunState, draft: Draft) -> Refusal:
    assert isinstance(draft.body, Publish)
    if state.opened < 0:
        return "the run was never opened; a trainer opens it before it publishes"
    if draft.body.term != state.term:
        cause = "rolled back" if state.rolled_back > state.opened else "opened by another trainer"
        return (
            f"checkpoint {draft.id} belongs to term {draft.body.term}, but the run was {cause} since (term "
            f"{state.term}); restart from the tip"
        )
    if any(pair.checkpoint == draft.id and pair.candidate is None for pair in state.pairs):
        return f"checkpoint {draft.id} is in the log already"
    masks = state.tip_pair.masks if state.tip_pair else None
    if draft.masks != masks:
        said = draft.masks.path if draft.masks else "no masks"
        return f"checkpoint {draft.id} names {said}, the tip has {masks.path if masks else 'none'}; read on, try again"
    if masks is None and draft.baked is not None:
        return f"checkpoint {draft.id} says {draft.baked.path} is baked into it, but the tip has no masks"
    return None


def _admit(state: RunState, draft: Draft) -> Refusal:
    assert isinstance(draft.body, Admit)
    if state.live is not None:
        return f"cycle {state.live.id} is live; one cycle a run"
    if draft.body.protocol != PROTOCOL:
        return f"protocol {draft.body.protocol} is not this log's ({PROTOCOL}); use images of the operator's version"
    base = state.pair(draft.body.base)
    if base is None:
        return f"base record {draft.body.base} is no pair, or is retired"
    if base.condemned:
        return f"base record {draft.body.base} was condemned by a rollback"
    if base.provisional:
        return f"base record {draft.body.base} is provisional: its weights do not carry its masks yet"
    return None


def _prune(state: RunState, draft: Draft) -> Refusal:
    assert isinstance(draft.body, Prune)
    if state.live is None or state.live.id != draft.id:
        return f"cycle {draft.id} has ended or was never admitted"
    if state.tip != draft.body.base:
        return f"the tip moved to record {state.tip} since base {draft.body.base}"
    if state.rolled_back > state.live.admitted:  # the tip may be back at the base: it did move
        return f"the run was rolled back by record {state.rolled_back} since cycle {draft.id} was admitted"
    base = state.pair(draft.body.base)
    if base is None or base.condemned or base.provisional:
        return f"base record {draft.body.base} was condemned or retired, or is provisional"
    folder = layout.candidate(draft.id, draft.body.base)
    if draft.body.candidate != folder:
        return f"cycle {draft.id} on base {draft.body.base} names candidate {draft.body.candidate}, not {folder}"
    if draft.masks is None or draft.masks.path != layout.masks(draft.id, draft.body.base):
        return f"cycle {draft.id} would prune without the masks of its candidate {folder}"
    if layout.verdict(draft.id, draft.body.base) not in draft.evidence:
        return f"cycle {draft.id} has no verdict for base {draft.body.base}; nothing is committed without one"
    return None


def _outcome(state: RunState, draft: Draft) -> Refusal:
    assert isinstance(draft.body, Outcome)
    if state.live is None or state.live.id != draft.id:
        return f"cycle {draft.id} has ended or was never admitted"
    return None


def _rollback(state: RunState, draft: Draft) -> Refusal:
    assert isinstance(draft.body, Rollback)
    target = state.pair(draft.body.to)
    if target is None:
        return f"record {draft.body.to} is no pair, or is retired; `emrakul history` lists them"
    # a person who asks for "the last good pair" names none: what another rollback condemned meanwhile stays so
    named = draft.body.by == "person" and draft.body.strategy in ("named", "baseline")
    if target.record == state.tip and not named:
        return f"record {draft.body.to} is already the tip"
    if target.condemned and not named:
        return f"record {draft.body.to} was condemned by a rollback; only a person may name it"
    return None


def _resume(state: RunState, draft: Draft) -> Refusal:
    assert isinstance(draft.body, Resume)
    if state.hold is None:
        return "the run is not held"
    if state.hold != draft.body.rollback:
        return f"the run is held by rollback {state.hold}, not by {draft.body.rollback}"
    return None


def _retire(state: RunState, draft: Draft) -> Refusal:
    assert isinstance(draft.body, Retire)
    needed = protected(state)
    for record in draft.body.pairs:
        if record in needed:
            return f"pair {record} is still needed: it is {needed[record]}"
        if state.pair(record) is None:
            return f"record {record} is no pair, or is retired already"
    return None


def protected(state: RunState, *, depth: int = ROLLBACK_DEPTH) -> dict[int, str]:
    """Pairs that gc must leave alone, and why."""
    why: dict[int, str] = {}
    if state.live is not None:
        why[state.live.base] = "the base of a live cycle"
    if state.last_good is not None:
        tip = state.tip_pair
        chain = (tip, *state.ancestors(tip.record)) if tip else ()
        for pair in [pair for pair in chain if pair.good and not pair.condemned][: depth + 1]:
            why[pair.record] = "within the rollback depth"
        why[state.last_good.record] = "the last good pair"
    if state.baseline is not None:
        why[state.baseline] = "the baseline"
    if state.tip is not None:
        why[state.tip] = "the tip"
    return why


@dataclass(frozen=True)
class Kept:
    """What gc must leave in place: everything that a pair of the log may still be loaded from."""

    checkpoints: frozenset[str]
    """By name."""
    candidates: frozenset[str]
    """By folder."""
    masks: frozenset[str]
    """By path; a mask file outlives the candidate it was written with."""


def kept(state: RunState) -> Kept:
    """A pruned pair needs its base's checkpoint, and a later checkpoint the mask file of an earlier candidate."""
    masks = (ref for pair in state.pairs for ref in (pair.masks, pair.baked))
    return Kept(
        checkpoints=frozenset(pair.checkpoint for pair in state.pairs),
        candidates=frozenset(pair.candidate for pair in state.pairs if pair.candidate is not None),
        masks=frozenset(ref.path for ref in masks if ref is not None),
    )


_RULES: dict[Kind, Callable[[RunState, Draft], Refusal]] = {
    Kind.GENESIS: _genesis,
    Kind.OPEN: _open,
    Kind.PUBLISH: _publish,
    Kind.ADMIT: _admit,
    Kind.PRUNE: _prune,
    Kind.OUTCOME: _outcome,
    Kind.ROLLBACK: _rollback,
    Kind.RESUME: _resume,
    Kind.RETIRE: _retire,
}
