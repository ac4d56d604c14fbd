"""The schedule: validation only at first, up by three good cycles, down by one refusal; the breaker; guidance."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emrakul.guidance import Guidance, read_guidance
from emrakul.invalid import Invalid
from emrakul.schedule import ORDER, breaker_after, breaker_lets, ladder_after, stage_for
from emrakul.settings import Settings
from leyline.messages import GateResult, Stage, SystemStatePacket
from leyline.policy import Breaker, Ladder
from leyline.reasons import Outcome, Reason, breaks

SETTINGS = Settings()
CLOSED = Breaker()


def stage(epoch: int, ladder: Stage = Stage.AGGRESSIVE, **changes: object) -> Stage:
    given_ = {"breaker": CLOSED, "hold": None, "cap": None, "settings": SETTINGS, **changes}
    return stage_for(epoch=epoch, ladder=Ladder(stage=ladder), **given_)  # type: ignore[arg-type]


def gate(drop: float) -> GateResult:
    return GateResult(
        against="base", outcome="PASS", n=1000, right_reference=970, right_candidate=970 - round(1000 * drop),
        lost=0, gained=0, drop=drop, upper=drop, allowed=0.02,
    )  # fmt: skip


def packet(state: str = "stable") -> SystemStatePacket:
    return SystemStatePacket.model_validate({"idempotency_key": "k", "step": 1, "epoch": 1, "state": state})


def after(
    ladder: Ladder, outcome: Outcome = Outcome.COMMITTED, *, drop: float = 0.0, state: str | None = "stable"
) -> Ladder:
    return ladder_after(
        ladder,
        outcome,
        gate=gate(drop),
        packet=packet(state) if state else None,
        stage=ladder.stage,
        settings=SETTINGS,
    )


# --- stage ------------------------------------------------------------------------------------------------------------


def test_epochs_one_to_thirty_are_validation_only() -> None:
    assert {stage(epoch) for epoch in range(1, 31)} == {Stage.VALIDATION_ONLY}
    assert stage(31) == Stage.AGGRESSIVE
    assert stage(31, Stage.CONSERVATIVE) == Stage.CONSERVATIVE


def test_a_hold_and_a_breaker_that_is_not_closed_keep_it_there() -> None:
    assert stage(31, hold="rollback-1") == Stage.VALIDATION_ONLY
    assert stage(31, breaker=Breaker(state="open", checkpoints=3)) == Stage.VALIDATION_ONLY
    assert stage(31, breaker=Breaker(state="half-open")) == Stage.VALIDATION_ONLY


def test_guidance_caps_and_never_lifts() -> None:
    assert stage(31, Stage.AGGRESSIVE, cap=Stage.CONSERVATIVE) == Stage.CONSERVATIVE
    assert stage(31, Stage.CONSERVATIVE, cap=Stage.AGGRESSIVE) == Stage.CONSERVATIVE
    assert stage(31, cap=Stage.VALIDATION_ONLY) == Stage.VALIDATION_ONLY
    assert stage(1, cap=Stage.AGGRESSIVE) == Stage.VALIDATION_ONLY


# --- ladder -----------------------------------------------------------------------------------------------------------


def test_three_good_cycles_in_a_row_promote_up_to_aggressive() -> None:
    ladder, seen = Ladder(), []
    for _ in range(8):
        ladder = after(ladder, drop=0.01)
        seen.append((ladder.stage.value, ladder.streak))
    assert seen[:3] == [("Conservative", 1), ("Conservative", 2), ("Moderate", 0)]
    assert seen[5] == ("Aggressive", 0)
    assert seen[7] == ("Aggressive", 0)


def test_more_than_half_the_allowed_drop_starts_the_row_again() -> None:
    assert after(Ladder(streak=2), drop=0.0101) == Ladder()
    assert after(Ladder(streak=2), drop=0.0100).stage == Stage.MODERATE


def test_unstable_training_breaks_the_row_and_unknown_holds_it() -> None:
    assert after(Ladder(streak=2), state="unstable") == Ladder()
    assert after(Ladder(streak=2), state="unknown") == Ladder(streak=2)
    assert after(Ladder(streak=2), state=None) == Ladder(streak=2)


@pytest.mark.parametrize("outcome", [Outcome.VALIDATED_ONLY, Outcome.NOTHING_TO_PRUNE, Outcome.SKIPPED, Outcome.FAILED])
def test_a_cycle_that_commits_nothing_neither_counts_nor_breaks_the_row(outcome: Outcome) -> None:
    ladder = Ladder(stage=Stage.MODERATE, streak=2)
    assert after(ladder, outcome) == ladder


def test_a_cycle_that_guidance_kept_below_its_rung_proves_nothing_about_it() -> None:
    ladder = Ladder(stage=Stage.MODERATE, streak=2)
    capped = ladder_after(
        ladder, Outcome.COMMITTED, gate=gate(0), packet=packet(), stage=Stage.CONSERVATIVE, settings=SETTINGS
    )
    assert capped == ladder


def test_a_refused_candidate_costs_one_stage_and_the_streak_but_never_goes_below_conservative() -> None:
    assert after(Ladder(stage=Stage.AGGRESSIVE, streak=1), Outcome.ROLLED_BACK) == Ladder(stage=Stage.MODERATE)
    assert after(Ladder(stage=Stage.MODERATE, streak=2), Outcome.ROLLED_BACK) == Ladder()
    assert after(Ladder(streak=2), Outcome.ROLLED_BACK) == Ladder()


EVENTS = st.tuples(st.sampled_from(list(Outcome)), st.sampled_from([0.0, 0.02]), st.sampled_from(["stable", "unknown"]))


@settings(deadline=None)
@given(st.lists(EVENTS))
def test_the_ladder_moves_one_rung_at_a_time_and_stays_on_it(events: list[tuple[Outcome, float, str]]) -> None:
    ladder = Ladder()
    for outcome, drop, state in events:
        moved = after(ladder, outcome, drop=drop, state=state)
        assert moved.stage is not Stage.VALIDATION_ONLY
        assert abs(ORDER.index(moved.stage) - ORDER.index(ladder.stage)) <= 1
        assert moved.streak < 3
        ladder = moved


# --- breaker ----------------------------------------------------------------------------------------------------------


def run(*reasons: Reason, breaker: Breaker = CLOSED) -> Breaker:
    for reason in reasons:
        breaker = breaker_after(breaker, reason, SETTINGS)
    return breaker


def test_three_failures_in_a_row_open_it() -> None:
    failures = (Reason.ACCURACY_DROP, Reason.ANALYSIS_TIMEOUT, Reason.INVALID_INPUT)
    assert run(*failures[:2]) == Breaker(failures=2)
    assert run(*failures) == Breaker(state="open", failures=3)
    assert not breaker_lets(run(*failures), SETTINGS)


def test_a_success_between_closes_the_row_and_a_skip_does_not() -> None:
    two = (Reason.WORKERS_FAILED, Reason.OUT_OF_MEMORY)
    assert run(*two, Reason.PRUNED, Reason.ACCURACY_DROP).failures == 1
    assert run(*two, Reason.BELOW_ONE_UNIT, Reason.ACCURACY_DROP).failures == 1
    assert run(*two, Reason.SUPERSEDED, Reason.TOO_FEW_SAMPLES, Reason.ACCURACY_DROP).state == "open"


def test_it_waits_for_three_checkpoints_and_then_lets_one_cycle_through() -> None:
    assert [breaker_lets(Breaker(state="open", checkpoints=n), SETTINGS) for n in range(4)] == [False] * 3 + [True]
    waiting = Breaker(state="open", failures=3, checkpoints=1)
    assert run(Reason.BREAKER_OPEN, breaker=waiting) == waiting, "a cycle it refused changes nothing"


def test_the_probe_closes_it_or_starts_the_wait_again() -> None:
    probing = Breaker(state="open", failures=3, checkpoints=3)
    assert run(Reason.BREAKER_PROBE, breaker=probing) == Breaker()
    assert run(Reason.ACCURACY_DROP, breaker=probing) == Breaker(state="open", failures=4)
    assert run(Reason.MARGIN, breaker=probing) == probing, "nothing was validated, so nothing is proven"


@settings(deadline=None)
@given(st.lists(st.sampled_from(list(Reason)), max_size=12))
def test_it_is_open_only_after_three_failures(reasons: list[Reason]) -> None:
    breaker = run(*reasons)
    assert (breaker.state == "closed") or sum(map(breaks, reasons)) >= 3
    assert breaker.state != "closed" or breaker.failures < 3


# --- guidance ---------------------------------------------------------------------------------------------------------


def test_guidance_caps_holds_and_lowers() -> None:
    guidance = read_guidance({"max_stage": "Moderate", "rate_factor": 0.25})
    assert (guidance.cap, guidance.rate_factor) == (Stage.MODERATE, Fraction(1, 4))
    assert read_guidance({"hold": True, "max_stage": "Aggressive"}).cap == Stage.VALIDATION_ONLY
    assert read_guidance({"maxStage": "Conservative", "rateFactor": "0.5"}, camel=True).cap == Stage.CONSERVATIVE
    assert read_guidance({}) == Guidance()
    assert Guidance().cap is None


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"rate_factor": 1.5}, "asks for 1.5 times the rate; guidance may lower it"),
        ({"rate_factor": "2"}, "asks for 2 times the rate"),
        ({"rate_factor": -1}, "a fraction lies between 0 and 1"),
        ({"accuracy_drop_threshold": 0.1}, "sets accuracy_drop_threshold, a safety constraint"),
        ({"minChannelRetention": "0.1"}, "sets minChannelRetention, a safety constraint"),
        ({"aggressive_threshold": 0.5}, "which is a setting"),
        ({"safety_margin": 0}, "which is a setting"),
        ({"max_stage": "Reckless"}, "max_stage is 'Reckless', it should be 'ValidationOnly'"),
        ({"max_stages": "Moderate"}, "did you mean max_stage?"),
        ({"hold": "no"}, "hold is 'no', it should be a valid boolean"),
    ],
)
def test_what_would_loosen_anything_is_refused(content: dict[str, object], says: str) -> None:
    with pytest.raises(Invalid, match=r"^guidance/7\.json") as refusal:
        read_guidance(content, name="guidance/7.json")
    assert says in str(refusal.value)
