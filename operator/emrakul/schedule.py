"""The progressive schedule and the circuit breaker: what a cycle may do, and what is remembered of its end. Pure."""

from __future__ import annotations

from emrakul.settings import Settings
from leyline.messages import GateResult, Stage, SystemStatePacket
from leyline.policy import Breaker, Ladder
from leyline.reasons import Outcome, Reason, breaks

_ORDER = (Stage.VALIDATION_ONLY, Stage.CONSERVATIVE, Stage.MODERATE, Stage.AGGRESSIVE)


def stage_for(
    *, epoch: int, ladder: Ladder, breaker: Breaker, hold: str | None, cap: Stage | None, settings: Settings
) -> Stage:
    """The stage of a cycle on a checkpoint of `epoch` (epochs count from 1).

    ValidationOnly in the first epochs, under a person's hold, and while the breaker only probes; else the ladder's
    rung, never above `cap` (guidance).
    """
    until = settings.structured_pruning.progressive_schedule.phase_1_epochs
    if epoch <= until or hold is not None or breaker.state != "closed":
        return Stage.VALIDATION_ONLY
    return min(ladder.stage, cap or Stage.AGGRESSIVE, key=_ORDER.index)


def ladder_after(
    ladder: Ladder,
    outcome: Outcome,
    *,
    gate: GateResult | None,
    packet: SystemStatePacket | None,
    stage: Stage,
    settings: Settings,
) -> Ladder:
    """The ladder after a cycle of `stage` ended.

    Up: promotion_cycles commits in a row, each within half the allowed drop (`gate` against the base) of a training
    that is stable; unknown holds. Down: a refused candidate, once the validation-only epochs are over. ValidatedOnly,
    NothingToPrune, Skipped and Failed neither count nor break the streak.
    """
    if outcome is Outcome.ROLLED_BACK:
        return ladder if stage is Stage.VALIDATION_ONLY else ladder.demoted()
    if outcome is not Outcome.COMMITTED:
        return ladder
    calm = packet is not None and packet.state == "stable"
    small = gate is not None and gate.drop <= gate.allowed / 2
    if (packet is not None and packet.state == "unstable") or not small:
        return Ladder(stage=ladder.stage)
    if not calm:
        return ladder
    streak = ladder.streak + 1
    if streak < settings.structured_pruning.progressive_schedule.promotion_cycles or ladder.stage is _ORDER[-1]:
        return Ladder(stage=ladder.stage, streak=streak)
    return Ladder(stage=_ORDER[_ORDER.index(ladder.stage) + 1])


def breaker_lets(breaker: Breaker, settings: Settings) -> bool:
    """Whether a cycle may run: while open, one after settings.breaker.checkpoints checkpoints."""
    return breaker.state != "open" or breaker.checkpoints >= settings.breaker.checkpoints


def breaker_after(breaker: Breaker, reason: Reason, settings: Settings) -> Breaker:
    """The breaker after a cycle ended.

    Failures in a row open it; once open, only the end of a cycle that was let through closes it, by its success.
    """
    if reason is Reason.BREAKER_OPEN:
        return breaker
    if breaks(reason):
        if breaker.state == "closed" and breaker.failures + 1 < settings.breaker.failures:
            return Breaker(failures=breaker.failures + 1)
        return Breaker(state="open", failures=breaker.failures + 1)
    if reason in _PASSED:
        return Breaker()
    # a cycle that was skipped, or found nothing to prune, says nothing about whether pruning works
    return breaker if breaker.state == "closed" else breaker.model_copy(update={"checkpoints": 0})


_PASSED = frozenset({Reason.PRUNED, Reason.STAGE, Reason.HELD, Reason.FEATURE_DISABLED, Reason.BREAKER_PROBE})
"""Ends whose candidate passed its verdict."""
