"""What the core does next, from every place where a cycle can stand. The same snapshot gives the same plan."""

from __future__ import annotations

from dataclasses import replace

import pytest

import snapshots as make
from emrakul.core import plan
from emrakul.core.plan import Plan, next_actions
from emrakul.core.snapshot import Ask, Phase, Snapshot
from emrakul.finding import Finding
from emrakul.settings import Settings
from leyline.fold import LiveCycle
from leyline.messages import MaskRef, Stage
from leyline.policy import Breaker
from leyline.reasons import Reason

NOW = make.NOW
ON = "{enable_checkpoint_pruning: true}"


def planned(**changes: object) -> Plan:
    return next_actions(make.snapshot(**changes), NOW)


def action(**changes: object) -> plan.Action:
    actions = planned(**changes).actions
    assert len(actions) == 1, actions
    return actions[0]


def finding(**changes: object) -> Finding:
    found = action(**changes)
    assert isinstance(found, plan.End), found
    return found.finding


def at_apply(**changes: object) -> dict[str, object]:
    return {"rounds": (make.round_(),), "decision": make.decision(), **changes}


class TestAdmission:
    def test_a_new_cycle_is_admitted_first(self) -> None:
        assert action(admitted=None, state=make.state(live=None)) == plan.Admit()

    def test_another_live_cycle_is_waited_for(self) -> None:
        found = planned(admitted=None, state=_other_live(), live_quiet_since=NOW - make.seconds(5))
        assert found.actions == ()
        assert "is live" in found.message

    def test_one_that_nobody_drives_is_abandoned(self) -> None:
        found = planned(admitted=None, state=_other_live(), live_quiet_since=NOW - make.seconds(3600)).actions
        assert isinstance(found[0], plan.Abandon)
        assert found[0].finding.reason is Reason.ABANDONED

    def test_one_that_the_same_operator_drives_is_waited_for_however_long(self) -> None:
        found = planned(
            ask=replace(make.snapshot().ask, live_is_driven=True),
            admitted=None,
            state=_other_live(),
            live_quiet_since=NOW - make.seconds(3600),
        )
        assert found.actions == ()

    def test_a_provisional_base_is_not_even_admitted(self) -> None:
        masks = MaskRef(path="m", digest="0" * 64)
        found = planned(admitted=None, state=make.state(live=None), pair=make.pair(provisional=True, masks=masks))
        assert found.done
        assert found.refused is not None
        assert found.refused.reason is Reason.PROVISIONAL

    def test_an_unusable_checkpoint_ends_the_cycle_with_its_sentence(self) -> None:
        bad = Finding(Reason.INVALID_INPUT, "checkpoint 400: model.safetensors is 3 bytes, READY.json says 4")
        assert finding(input=bad, ready=None) == bad

    def test_an_open_breaker_lets_nobody_in(self) -> None:
        breaker = Breaker(state="open", failures=3, checkpoints=1)
        assert finding(state=make.state(breaker=breaker)).reason is Reason.BREAKER_OPEN

    def test_after_three_checkpoints_the_breaker_lets_one_in(self) -> None:
        breaker = Breaker(state="open", failures=3, checkpoints=3)
        assert action(state=make.state(breaker=breaker)) == plan.Cut("structured")

    @pytest.mark.parametrize(
        ("statistics", "reason"),
        [
            (None, Reason.NO_IMPORTANCE),
            (make.statistics(samples=10), Reason.TOO_FEW_SAMPLES),
            (make.statistics(checkpoint="1-1-ffffffff"), Reason.IMPORTANCE_FOREIGN),
            (make.statistics(last_step=100), Reason.IMPORTANCE_STALE),
        ],
    )
    def test_statistics_that_cannot_be_used(self, statistics: object, reason: Reason) -> None:
        assert finding(ready=make.ready(statistics=statistics)).reason is reason


class TestAnalysis:
    def test_structure_that_is_known_is_scored(self) -> None:
        assert action() == plan.Cut("structured")

    def test_without_known_structure_single_weights_are(self) -> None:
        assert action(groups=0) == plan.Cut("histogram")

    def test_basic_pruning_when_structured_is_disabled(self) -> None:
        settings = Settings.from_yaml("{enable_checkpoint_pruning: true, structured_pruning: {enabled: false}}")
        assert action(ask=Ask(base=2, settings=settings, runtime="local")) == plan.Cut("histogram")

    def test_workers_are_started_for_a_round(self) -> None:
        assert action(rounds=(make.round_(answered=0),)) == plan.Launch(Phase.ANALYSE, 0, 0)

    def test_what_a_queue_takes_back_gets_its_whole_time_again(self) -> None:
        marks = {(Phase.ANALYSE, 0): NOW - make.seconds(3600)}
        jobs = (make.job(Phase.ANALYSE, 0, created=NOW - make.seconds(5), queued=True),)
        assert planned(rounds=(make.round_(answered=1),), jobs=jobs, marks=marks).actions == ()
        jobs = (make.job(Phase.ANALYSE, 0, created=NOW - make.seconds(301), queued=True),)
        assert finding(rounds=(make.round_(answered=1),), jobs=jobs, marks=marks).reason is Reason.ANALYSIS_TIMEOUT

    def test_a_restarted_operator_begins_a_launch_of_its_own(self) -> None:
        marks = {(Phase.ANALYSE, 0): NOW - make.seconds(500)}
        assert action(rounds=(make.round_(answered=1),), marks=marks) == plan.Launch(Phase.ANALYSE, 1, 0)

    def test_running_workers_are_waited_for(self) -> None:
        found = planned(rounds=(make.round_(answered=1),), jobs=(make.job(Phase.ANALYSE, 0),))
        assert (found.actions, found.done) == ((), False)
        assert "1/4" in found.message

    def test_over_time(self) -> None:
        marks = {(Phase.ANALYSE, 0): NOW - make.seconds(301)}
        jobs = (make.job(Phase.ANALYSE, 0),)
        assert finding(rounds=(make.round_(answered=1),), jobs=jobs, marks=marks).reason is Reason.ANALYSIS_TIMEOUT

    def test_within_time_nothing_ends(self) -> None:
        marks = {(Phase.ANALYSE, 0): NOW - make.seconds(299)}
        assert planned(rounds=(make.round_(answered=1),), jobs=(make.job(Phase.ANALYSE, 0),), marks=marks).wait

    def test_workers_that_never_start(self) -> None:
        jobs = (make.job(Phase.ANALYSE, 0, created=NOW - make.seconds(601), message="quota exceeded"),)
        found = finding(rounds=(make.round_(answered=0),), jobs=jobs)
        assert found.reason is Reason.NOT_SCHEDULED
        assert found.message == "analyse: no worker started within 600 s: quota exceeded"

    def test_what_a_queue_holds_back_is_not_late(self) -> None:
        held = make.job(
            Phase.ANALYSE, 0, created=NOW - make.seconds(86_400), suspended=True, message="suspended by queue gpus"
        )
        found = planned(rounds=(make.round_(answered=0),), jobs=(held,))
        assert (found.actions, found.done) == ((), False)
        assert found.message.endswith("; suspended by queue gpus")

    def test_why_nothing_has_started_is_told_while_it_is_waited_for(self) -> None:
        jobs = (make.job(Phase.ANALYSE, 0, message="0/1 nodes are available"),)
        assert planned(rounds=(make.round_(answered=0),), jobs=jobs).message.endswith("; 0/1 nodes are available")

    def test_all_answered_is_done_whatever_became_of_the_workers(self) -> None:
        jobs = (make.job(Phase.ANALYSE, 0, running=False, exits=(1,)),)
        assert action(rounds=(make.round_(),), jobs=jobs) == plan.Decide("structured")

    def test_answers_missing_after_the_workers_ended(self) -> None:
        jobs = (make.job(Phase.ANALYSE, 0, running=False, exits=(1,), message="boom"),)
        found = finding(rounds=(make.round_(answered=3),), jobs=jobs)
        assert found.reason is Reason.WORKERS_FAILED
        assert "boom" in found.message

    def test_three_dead_attempts_end_analysis(self) -> None:
        found = finding(rounds=(make.round_(answered=3, given_up=("0-2",)),), jobs=(make.job(Phase.ANALYSE, 0),))
        assert found.reason is Reason.WORKERS_FAILED
        assert "0-2" in found.message

    def test_out_of_memory_is_told_with_peak_and_limit(self) -> None:
        jobs = (make.job(Phase.ANALYSE, 0, running=False, exits=(44,), out_of_memory="peak 260 MB, limit 256 MB"),)
        found = finding(rounds=(make.round_(answered=0),), jobs=jobs)
        assert found.reason is Reason.OUT_OF_MEMORY
        assert "peak 260 MB, limit 256 MB" in found.message

    def test_bad_input_fails_and_names_it(self) -> None:
        bad = Finding(Reason.INVALID_INPUT, "conv1.weight holds NaN")
        assert finding(rounds=(make.round_(finding=bad),)) == bad

    def test_the_store_cannot_be_reached(self) -> None:
        jobs = (make.job(Phase.ANALYSE, 0, running=False, exits=(75,)),)
        assert finding(rounds=(make.round_(answered=0),), jobs=jobs).reason is Reason.STORE_UNREACHABLE

    def test_a_scorer_that_fails_is_followed_by_basic_pruning(self) -> None:
        assert action(rounds=(make.round_(failed="cannot score conv1"),)) == plan.Cut("histogram")

    def test_basic_pruning_has_three_rounds(self) -> None:
        done = [make.round_("histogram"), make.round_("refine"), make.round_("select")]
        assert action(groups=0, rounds=tuple(done[:1])) == plan.Cut("refine")
        assert action(groups=0, rounds=tuple(done[:2])) == plan.Cut("select")
        assert action(groups=0, rounds=tuple(done)) == plan.Decide("basic")

    def test_the_next_round_keeps_the_launch_and_so_its_limit(self) -> None:
        rounds = (make.round_("histogram"), make.round_("refine", answered=0))
        jobs = (make.job(Phase.ANALYSE, 1, running=False, launch=2),)
        assert action(groups=0, rounds=rounds, jobs=jobs) == plan.Launch(Phase.ANALYSE, 2, 2)

    def test_a_decision_that_declines_ends_the_cycle(self) -> None:
        declined = make.decision(declined="BelowOneUnit", message="0.72 of one", groups=())
        assert finding(rounds=(make.round_(),), decision=declined).reason is Reason.BELOW_ONE_UNIT


class TestCandidate:
    def test_apply_then_validation(self) -> None:
        assert action(**at_apply()) == plan.Update(2)
        assert action(**at_apply(on=(make.on(),))) == plan.Launch(Phase.APPLY, 0, 2)
        assert action(**at_apply(on=(make.on(candidate="cand"),))) == plan.AskValidation(2)
        asked = make.on(candidate="cand", asked=True)
        assert action(**at_apply(on=(asked,))) == plan.Launch(Phase.VALIDATE, 0, 2)

    def test_validation_over_time(self) -> None:
        marks = {(Phase.VALIDATE, 0): NOW - make.seconds(61)}
        facts = at_apply(on=(make.on(candidate="c", asked=True),), jobs=(make.job(Phase.VALIDATE, 2),), marks=marks)
        assert finding(**facts).reason is Reason.VALIDATION_TIMEOUT

    def test_a_pass_is_committed(self) -> None:
        assert action(**at_apply(on=(make.validated(),))) == plan.Commit(2)

    @pytest.mark.parametrize(
        "reason", [Reason.ACCURACY_DROP, Reason.CUMULATIVE_DROP, Reason.PROOF_FAILED, Reason.STRUCTURE]
    )
    def test_a_refused_candidate_is_rolled_back(self, reason: Reason) -> None:
        refused = make.validated(outcome="FAIL", reason=reason.value, message="it lost 3 points")
        found = finding(**at_apply(on=(refused,)))
        assert (found.reason, found.outcome.value) == (reason, "RolledBack")

    def test_without_an_evaluation_nothing_is_committed(self) -> None:
        refused = make.validated(outcome="INCONCLUSIVE", reason="NoEvaluation", message="no evaluation set")
        assert finding(**at_apply(on=(refused,))).outcome.value == "ValidatedOnly"

    @pytest.mark.parametrize(
        ("facts", "reason"),
        [
            ({"admitted": make.admitted(Stage.VALIDATION_ONLY)}, Reason.STAGE),
            ({"ask": Ask(base=2, settings=Settings(), runtime="local")}, Reason.FEATURE_DISABLED),
            ({"state": make.state(hold="rb-1")}, Reason.HELD),
            ({"state": make.state(breaker=Breaker(state="open", failures=3, checkpoints=3))}, Reason.BREAKER_PROBE),
        ],
    )
    def test_who_may_not_commit_ends_validated_only(self, facts: dict[str, object], reason: Reason) -> None:
        found = finding(**at_apply(on=(make.validated(),), **facts))
        assert (found.reason, found.outcome.value) == (reason, "ValidatedOnly")

    def test_without_safety_validation_nothing_is_committed(self) -> None:
        settings = Settings.from_yaml("{enable_checkpoint_pruning: true, enable_safety_validation: false}")
        facts = at_apply(on=(make.on(candidate="cand"),), ask=Ask(base=2, settings=settings, runtime="local"))
        assert finding(**facts).reason is Reason.VALIDATION_DISABLED


class TestMovedTip:
    def test_a_publish_with_the_same_masks_is_rebased_on(self) -> None:
        state = make.state(make.pair(), make.pair(5, parent=2), n=5)
        assert action(**at_apply(on=(make.validated(),), state=state)) == plan.Update(5)

    def test_after_three_rebases_checkpoints_are_too_frequent(self) -> None:
        pairs = [make.pair(), *(make.pair(n, parent=n - 1 if n > 5 else 2) for n in range(5, 10))]
        came = tuple(NOW - make.seconds(50 - 10 * n) for n in range(6))
        marks = {(Phase.APPLY, 0): NOW - make.seconds(50)}
        on = tuple(make.validated(n) for n in (2, 5, 6, 7))
        found = finding(**at_apply(on=on, state=make.state(*pairs, n=9), publishes=came, marks=marks))
        assert found.reason is Reason.TOO_FREQUENT
        assert "every: 2" in found.message

    def test_other_masks_supersede(self) -> None:
        masks = MaskRef(path="m", digest="0" * 64)
        state = make.state(make.pair(), make.pair(5, parent=2, masks=masks, candidate="cycles/x/candidate/"), n=5)
        assert finding(**at_apply(on=(make.validated(),), state=state)).reason is Reason.SUPERSEDED

    def test_a_rollback_ends_the_cycle(self) -> None:
        state = make.state(rolled_back=4, n=4)
        assert finding(**at_apply(on=(make.validated(),), state=state)).reason is Reason.ROLLED_BACK_MEANWHILE

    def test_a_newer_checkpoint_never_stops_a_running_cycle(self) -> None:
        state = make.state(make.pair(), make.pair(5, parent=2), n=5)
        jobs = (make.job(Phase.ANALYSE, 0),)
        assert planned(rounds=(make.round_(answered=1),), jobs=jobs, state=state).wait is not None

    def test_validation_only_does_not_follow_the_tip(self) -> None:
        state = make.state(make.pair(), make.pair(5, parent=2), n=5)
        facts = at_apply(on=(make.validated(),), state=state, admitted=make.admitted(Stage.VALIDATION_ONLY))
        assert finding(**facts).reason is Reason.STAGE


class TestEnd:
    def test_an_ended_cycle_tells_its_results_and_stops_its_workers(self) -> None:
        found = planned(end=make.ended(), jobs=(make.job(Phase.ANALYSE, 0),))
        assert found.actions == (plan.Stop(Phase.ANALYSE), plan.Tell())
        assert not found.done

    def test_then_there_is_nothing_left(self) -> None:
        found = planned(end=make.ended(), told=True)
        assert found.done
        assert found.state == "Skipped"

    def test_suspended_stops_workers_and_goes_on_later(self) -> None:
        ask = replace(make.snapshot().ask, suspend=True)
        assert action(ask=ask, jobs=(make.job(Phase.ANALYSE, 0),)) == plan.Stop(Phase.ANALYSE)
        assert planned(ask=ask).wait is not None


def test_the_same_snapshot_gives_the_same_plan() -> None:
    snapshot: Snapshot = make.snapshot(**at_apply(on=(make.validated(),)))
    assert next_actions(snapshot, NOW) == next_actions(snapshot, NOW)


def _other_live() -> object:
    return make.state(live=LiveCycle(id="c1-x", base=1, admitted=2, settings_digest="", runtime="local"))
