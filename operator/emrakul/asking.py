"""From a manifest to what is asked of a run: which base, which settings, whose guidance."""

from __future__ import annotations

import json

from emrakul.api.cycle import PruningCycle
from emrakul.api.policy import PolicySpec
from emrakul.core.snapshot import Ask
from emrakul.guidance import Guidance, read_guidance
from emrakul.invalid import Invalid
from emrakul.settings import Settings
from leyline.fold import PairState, RunState
from leyline.messages import Decision, Stage
from leyline.store import ObjectStore

_ORDER = list(Stage)


def ask_for(
    base: int, policy: PolicySpec | None, *, store: ObjectStore, runtime: str, forced: Decision | None = None
) -> Ask:
    """What a policy (or nobody: all defaults) asks for on a base pair."""
    return Ask(
        base=base,
        settings=policy.settings if policy else Settings(),
        runtime=runtime,
        guidance=stricter(policy.guidance if policy else Guidance(), newest_guidance(store)),
        baseline=policy.baseline if policy else None,
        forced=forced.sha256() if forced else None,
    )


def base_of(cycle: PruningCycle, state: RunState) -> int:
    """The record of the pair that a cycle is about: the newest of its checkpoint, or the newest published one.

    What a cycle committed is no base: the same command given twice would prune the same statistics twice.
    """
    name = cycle.spec.checkpoint_name
    if name is None:
        published = (p for p in reversed(state.pairs) if p.candidate is None and not p.condemned)
        newest = next(published, None)
        if newest is None:
            raise Invalid(f"run {state.run_id} has no checkpoint yet; publish one first")
        return newest.record
    found = _of(name, state)
    if found is None:
        known = ", ".join(pair.checkpoint for pair in state.pairs[-3:]) or "none"
        raise Invalid(
            f"run {state.run_id} has no checkpoint {name} in its log; the newest are {known}, or write latest"
        )
    return found.record


def _of(name: str, state: RunState) -> PairState | None:
    """The trainer's own pair of a checkpoint: a cycle works on what was published, not on a candidate."""
    return next((p for p in reversed(state.pairs) if p.checkpoint == name and p.candidate is None), None)


def newest_guidance(store: ObjectStore) -> Guidance:
    """The newest object under `guidance/`, by name; Invalid names it and what it may not ask."""
    newest = None
    for head in store.list("guidance/"):
        newest = head.key
    if newest is None:
        return Guidance()
    try:
        content = json.loads(store.get(newest))
    except ValueError as error:
        raise Invalid(f"{newest} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise Invalid(f"{newest} is a JSON {type(content).__name__}; guidance is an object")
    return read_guidance(content, name=newest)


def stricter(a: Guidance, b: Guidance) -> Guidance:
    """What holds back more, field by field."""
    caps = [stage for stage in (a.max_stage, b.max_stage) if stage is not None]
    return Guidance(
        max_stage=min(caps, key=_ORDER.index) if caps else None,
        hold=a.hold or b.hold,
        rate_factor=min(a.rate_factor, b.rate_factor),
    )
