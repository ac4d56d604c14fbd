"""The progressive schedule and the circuit breaker: which stage a checkpoint gets, and what an outcome changes. Pure.

The ladder remembers the rung that commits; epochs, a hold, the breaker and guidance only keep below it.
"""

from __future__ import annotations

from emrakul.settings import Settings
from leyline.messages import GateResult, Stage, SystemStatePacket
from leyline.policy import Breaker, Ladder
from leyline.reasons import OUTCOME_OF, Outcome, Reason, breaks

__all__ = ["Breaker", "Ladder", "breaker_after", "breaker_lets", "ladder_after", "stage_for"]

ORDER = tuple(Stage)
"""ValidationOnly, Conservative, Moderate, Aggressive."""
GOOD_SHARE = 0.5
"""Part of the allowed drop that a cycle may use up and still count for promotion."""


def stage_for(
    *,
    epoch: int,
    ladder: Ladder,
    breaker: Breaker,
    hold: str | None,
    cap: Stage | None,
    settings: Settings,
) -> Stage:
    """The stage of a cycle on a checkpoint of `epoch`.

    `hold` is the rollback that a person has not resumed from, `cap` the highest stage that guidance allows.
    """
    if epoch <= settings.structured_pruning.progressive_schedule.phase_1_epochs:
        return Stage.VALIDATION_ONLY
    if hold is not None or breaker.state != "closed":
        return Stage.VALIDATION_ONLY
    return ladder.stage if cap is None else min(ladder.stage, cap, key=ORDER.index)


def ladder_after(
    ladder: Ladder,
    outcome: Outcome,
    *,
    gate: GateResult | None,
    packet: SystemStatePacket | None,
    stage: Stage,
    settings: Settings,
) -> Ladder:
    """The ladder after a cycle at `stage`; `gate` is its comparison with its base, `packet` the training's newest.

    A committed cycle counts for promotion if it cost at most half the allowed drop and training is stable; if its
    state is unknown the streak holds, else it starts again. A refused candidate costs one stage.
    """
    if outcome is Outcome.ROLLED_BACK:
        return ladder.demoted()
    if outcome is not Outcome.COMMITTED or stage is not ladder.stage:
        return ladder
    allowed = float(settings.constraints.accuracy_drop_threshold) * GOOD_SHARE
    state = packet.state if packet is not None else "unknown"
    if gate is None or gate.drop > allowed or state == "unstable":
        return Ladder(stage=ladder.stage)
    if state == "unknown" or ladder.stage is Stage.AGGRESSIVE:
        return ladder
    if ladder.streak + 1 < settings.structured_pruning.progressive_schedule.promotion_cycles:
        return Ladder(stage=ladder.stage, streak=ladder.streak + 1)
    return Ladder(stage=ORDER[ORDER.index(ladder.stage) + 1])


def breaker_lets(breaker: Breaker, settings: Settings) -> bool:
    """Whether a cycle may run: always while closed, one at ValidationOnly after enough checkpoints."""
    return breaker.state != "open" or breaker.checkpoints >= settings.breaker.checkpoints


def breaker_after(breaker: Breaker, reason: Reason, settings: Settings) -> Breaker:
    """The breaker after a cycle that ended for `reason`.

    Skipped cycles that never got to fail say nothing about health and change nothing. While it is not closed, only a
    candidate that passed closes it; a new failure starts the wait again.
    """
    if breaks(reason):
        failures = breaker.failures + 1
        if breaker.state != "closed" or failures >= settings.breaker.failures:
            return Breaker(state="open", failures=failures)
        return Breaker(failures=failures)
    outcome = OUTCOME_OF[reason]
    if outcome in (Outcome.COMMITTED, Outcome.VALIDATED_ONLY):
        return Breaker()
    if outcome is Outcome.NOTHING_TO_PRUNE and breaker.state == "closed":
        return Breaker()
    return breaker
