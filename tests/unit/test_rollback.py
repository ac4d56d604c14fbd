"""Rollback: which pair, the one record, probation, and what recovery validation says after it."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from emrakul import objects, recovery
from emrakul.finding import Finding
from emrakul.recovery import recover
from emrakul.rollback import (
    NoAnswer,
    NoLoadableTarget,
    NoTarget,
    Request,
    newest_settings,
    on_probation,
    probation_finding,
    request_id,
    resume,
    roll_back,
    targets,
)
from emrakul.settings import Settings
from histories import History, packet
from leyline import layout
from leyline.local import LocalStore
from leyline.log import Log, NotAllowed
from leyline.messages import AnalysisResults
from leyline.reasons import Reason
from leyline.records import Draft, Kind, Record, Rollback
from leyline.store import Refused

ASKED = Finding(Reason.ASKED, "the loss rose")


@pytest.fixture
def run(tmp_path: Path) -> History:
    """Records 2 (baseline), 3, 5 (pruned on 3), 6 (provisional), 7 (baked, good): the tip."""
    history = History(LocalStore(tmp_path / "run"))
    history.publish(100, report=packet(100, correct=90, n=100))
    history.publish(200)
    history.prune({"conv1": [1, 2]})
    history.publish(300)
    history.publish(400, baked=True, report=packet(400, correct=90, n=100))
    return history


def asked(run: History, strategy: str = "immediate", **more: object) -> Request:
    id_ = request_id(run.log.tail().state, strategy, more.get("to"))  # type: ignore[arg-type]
    return Request(id=id_, strategy=strategy, finding=ASKED, **more)  # type: ignore[arg-type]


def records(run: History, strategy: str = "immediate", *, depth: int = 5, **more: int) -> list[int]:
    return [pair.record for pair in targets(run.log.tail().state, strategy, depth=depth, **more)]  # type: ignore[arg-type]


# --- which pair -------------------------------------------------------------------------------------------------------


def test_immediate_goes_to_the_last_good_pair_before_the_tip(run: History) -> None:
    assert records(run) == [5, 3, 2]  # 6 is provisional, so it is not good


def test_progressive_stops_at_the_depth_and_ends_at_the_baseline(run: History) -> None:
    assert records(run, "progressive", depth=1) == [5, 2]
    assert records(run, "progressive", depth=2) == [5, 3, 2]
    assert records(run, "progressive", depth=9) == [5, 3, 2]


def test_baseline_and_named_are_one_pair(run: History) -> None:
    assert records(run, "baseline") == [2]
    assert records(run, "named", to=6) == [6]


def test_a_record_that_is_no_pair_is_refused_by_name(run: History) -> None:
    with pytest.raises(NotAllowed, match="record 4 is no pair"):
        records(run, "named", to=4)


def test_nothing_is_older_than_the_baseline(run: History) -> None:
    roll_back(run.store, run.log, asked(run, "baseline"), trust=None)
    with pytest.raises(NoTarget, match="no good pair is older than record 2"):
        records(run)


def test_an_empty_run_has_no_target(tmp_path: Path) -> None:
    with pytest.raises(NoTarget, match="nothing was published"):
        records(History(LocalStore(tmp_path / "run")))


def test_before_a_suspected_pair(run: History) -> None:
    assert records(run, before=5) == [3, 2]


def test_what_was_condemned_is_no_target_again(run: History) -> None:
    roll_back(run.store, run.log, asked(run, "named", to=3), trust=None)
    run.publish(500)
    assert records(run) == [3, 2]


# --- the record -------------------------------------------------------------------------------------------------------


def test_the_tip_moves_by_one_record_and_the_run_is_held(run: History) -> None:
    before = run.log.tail().state
    rolled = roll_back(run.store, run.log, asked(run), trust=None)
    after = run.log.tail().state
    assert (after.n, after.tip, after.term) == (before.n + 1, 5, before.term + 1)
    assert after.hold == rolled.record.id == "rollback-7-immediate"
    assert [pair.record for pair in after.pairs if pair.condemned] == [6, 7]
    assert rolled.record.evidence.keys() == {
        layout.checkpoint(rolled.record.checkpoint or "", layout.READY),
        layout.manifest("c3-" + Settings().digest()[:10], 3),
    }
    resume(run.log)
    assert run.log.tail().state.hold is None
    with pytest.raises(NotAllowed, match="not held"):
        resume(run.log)


def test_a_request_id_is_done_once(run: History) -> None:
    request = Request(id="fix-7", strategy="immediate", finding=ASKED)
    first = roll_back(run.store, run.log, request, trust=None)
    run.publish(500)
    again = roll_back(run.store, Log(run.store), request, trust=None)
    assert (again.again, again.record.n) == (True, first.record.n)
    assert run.log.tail().record.kind is Kind.PUBLISH


def test_the_same_command_twice_at_once_is_one_rollback(run: History) -> None:
    request = asked(run)
    together = [
        threading.Thread(target=lambda: roll_back(run.store, Log(run.store), request, trust=None)) for _ in range(4)
    ]
    for thread in together:
        thread.start()
    for thread in together:
        thread.join()
    assert sum(record.kind is Kind.ROLLBACK for record in run.log.since(0)) == 1


def test_a_rollback_that_comes_between_the_look_and_the_append_is_found(run: History) -> None:
    request = asked(run)

    class Overtaken(Log):
        def find(self, slot: tuple[str, str], *, base: int) -> Record | None:
            found = super().find(slot, base=base)
            roll_back(run.store, Log(run.store), request, trust=None)
            return found

    roll_back(run.store, Overtaken(run.store), request, trust=None)
    assert sum(record.kind is Kind.ROLLBACK for record in run.log.since(0)) == 1


def test_the_operators_rollback_leaves_no_hold(run: History) -> None:
    roll_back(run.store, run.log, asked(run, by="operator"), trust=None)
    assert run.log.tail().state.hold is None


def test_a_rollback_ends_the_live_cycle_and_tells_tamiyo(run: History) -> None:
    cycle = run.admit()
    rolled = roll_back(run.store, run.log, asked(run), trust=None)
    end = run.log.find(("end", cycle), base=0)
    assert end is not None
    assert end.reason == Reason.ROLLED_BACK_MEANWHILE.value
    key = layout.results(f"rollback-{rolled.record.n}")
    told = AnalysisResults.parse(run.store.get(key), name=key)
    assert (told.outcome, told.reason) == ("RolledBack", "RollbackRequested")


def test_a_rollback_that_died_after_its_record_is_finished_by_the_next(run: History) -> None:
    cycle = run.admit()
    rollback = Draft(id="fix-8", checkpoint="x", body=Rollback(to=3, by="person", strategy="named"))
    run.log.append(rollback, base=0)  # and the process is gone
    assert run.log.tail().state.live is not None
    request = Request(id="fix-8", strategy="named", finding=ASKED, to=3)
    assert roll_back(run.store, run.log, request, trust=None).again
    assert run.log.find(("end", cycle), base=0) is not None


def test_a_damaged_target_is_passed_over_and_named(run: History) -> None:
    masks = next(pair.masks for pair in run.log.tail().state.pairs if pair.record == 5)
    assert masks is not None
    run.store.delete(masks.path)
    rolled = roll_back(run.store, run.log, asked(run), trust=None)
    assert rolled.record.tip is not None
    assert rolled.record.tip.record == 3
    assert "masks.safetensors" in rolled.passed_over[5]


def test_a_named_pair_without_its_objects_is_refused_and_nothing_moves(run: History) -> None:
    run.store.delete(layout.checkpoint("200-0-000000c8", "model.safetensors"))
    with pytest.raises(NoLoadableTarget, match=r"model\.safetensors.*--to N"):
        roll_back(run.store, run.log, asked(run, "named", to=3), trust=None)
    assert run.log.tail().state.tip == 7


def test_a_truncated_object_is_seen_by_its_size(run: History) -> None:
    spoil(run, layout.checkpoint("200-0-000000c8", "model.safetensors"), lambda data: data[:-1])
    with pytest.raises(NoLoadableTarget, match=r"bytes, its manifest says"):
        roll_back(run.store, run.log, asked(run, "named", to=3), trust=None)


def test_a_flipped_byte_of_a_small_object_is_seen(run: History) -> None:
    spoil(run, layout.checkpoint("200-0-000000c8", "model.safetensors"), lambda data: data[:-1] + b"\x99")
    with pytest.raises(NoLoadableTarget, match="SHA-256"):
        roll_back(run.store, run.log, asked(run, "named", to=3), trust=None)


def test_a_flipped_byte_of_a_large_object_is_seen_when_asked(run: History, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objects, "SMALL", 16)
    spoil(run, layout.checkpoint("200-0-000000c8", "model.safetensors"), lambda data: data[:-1] + b"\x99")
    with pytest.raises(NoLoadableTarget, match="SHA-256"):
        roll_back(run.store, run.log, asked(run, "named", to=3), trust=None, deep=True)
    assert roll_back(run.store, run.log, asked(run, "named", to=3), trust=None).record.n == 8


def test_an_exchanged_ready_is_not_what_the_log_names(run: History) -> None:
    key = layout.checkpoint("200-0-000000c8", layout.READY)
    spoil(run, key, lambda _: run.store.get(layout.checkpoint("300-0-0000012c", layout.READY)))
    with pytest.raises(NoLoadableTarget, match="exchanged"):
        roll_back(run.store, run.log, asked(run, "named", to=3), trust=None)


def test_a_store_that_refuses_moves_nothing(run: History) -> None:
    folder = Path(run.store.uri.removeprefix("file://")) / "checkpoints/200-0-000000c8/model.safetensors"
    target = folder.with_name("elsewhere")
    folder.rename(target)
    folder.symlink_to(target)  # O_NOFOLLOW: refused, which says nothing of the bytes behind it
    with pytest.raises(Refused):
        roll_back(run.store, run.log, asked(run, "named", to=3), trust=None)
    assert run.log.tail().state.tip == 7


def test_progressive_takes_the_first_target_that_the_validator_finds_sound(run: History) -> None:
    tried: list[int] = []

    def validate(record: int) -> str | None:
        tried.append(record)
        return "it does not load" if record == 5 else None

    rolled = roll_back(run.store, run.log, asked(run, "progressive"), trust=None, validate=validate)
    assert tried == [5, 3]
    assert run.log.tail().state.tip == 3
    assert rolled.passed_over == {5: "it does not load"}


def test_progressive_stops_where_the_validator_itself_fails(run: History) -> None:
    def validate(record: int) -> str | None:
        raise NoAnswer(f"no torch for record {record}")

    with pytest.raises(NoAnswer):
        roll_back(run.store, run.log, asked(run, "progressive"), trust=None, validate=validate)
    assert run.log.tail().state.tip == 7


def test_progressive_ends_where_nothing_is_sound(run: History) -> None:
    with pytest.raises(NoLoadableTarget, match="record 5: bad; record 3: bad; record 2: bad"):
        roll_back(run.store, run.log, asked(run, "progressive"), trust=None, validate=lambda _: "bad")


def test_a_persons_immediate_rollback_never_returns_to_what_another_condemned_meanwhile(run: History) -> None:
    """It was decided while 5 was good; then the trainer rolled back to 3."""
    roll_back(run.store, run.log, asked(run, "named", to=3), trust=None)
    late = Draft(id="late", checkpoint="x", body=Rollback(to=5, by="person", strategy="immediate"))
    with pytest.raises(NotAllowed, match="condemned"):
        run.log.append(late, base=0)
    named = Draft(id="named", checkpoint="x", body=Rollback(to=5, by="person", strategy="named"))
    assert run.log.append(named, base=0).state.tip == 5


def test_the_newest_settings_are_those_of_the_last_admitted_cycle(run: History) -> None:
    settings = Settings.from_yaml("rollback: {depth: 3}")
    run.admit(settings)
    assert newest_settings(run.log).rollback.depth == 3


# --- probation --------------------------------------------------------------------------------------------------------


@pytest.fixture
def pruned(tmp_path: Path) -> History:
    """Records 2, 3 and 5, the tip: pruned on 3, whose trainer reported 0.9; the validator's 0.95 is another set's."""
    history = History(LocalStore(tmp_path / "run"))
    history.publish(100)
    history.publish(200, report=packet(200, correct=90, n=100))
    history.prune({"conv1": [1, 2]}, accuracy=0.95)
    return history


def found(run: History, report: object = None) -> Finding | None:
    state = run.log.tail().state
    pair_and_finding = probation_finding(state, list(run.log.since(0)), report)  # type: ignore[arg-type]
    return pair_and_finding[1] if pair_and_finding else None


def test_an_unstable_report_after_the_masks_ends_probation_badly(pruned: History) -> None:
    finding = found(pruned, packet(210, state="unstable", loss=9.0, record=5))
    assert finding is not None
    assert finding.reason is Reason.PROBATION
    assert "record 5" in finding.message


def test_a_report_from_before_the_masks_says_nothing_of_them(pruned: History) -> None:
    assert found(pruned, packet(210, state="unstable", record=3)) is None


def test_a_report_that_lost_more_than_the_gate_allows(pruned: History) -> None:
    assert found(pruned, packet(210, correct=87, n=100, record=5)) is not None
    assert found(pruned, packet(210, correct=89, n=100, record=5)) is None


def test_a_stable_report_is_no_reason(pruned: History) -> None:
    assert found(pruned, packet(210, record=5)) is None
    assert found(pruned) is None


def test_a_provisional_publish_ends_no_probation_and_its_report_counts_for_nothing(pruned: History) -> None:
    pruned.publish(300, report=packet(300, state="unstable"))
    assert on_probation(pruned.log.tail().state) is not None
    assert found(pruned) is None


def test_a_baked_publish_with_a_bad_report_is_a_reason(pruned: History) -> None:
    pruned.publish(300, baked=True, report=packet(300, correct=80, n=100))
    finding = found(pruned)
    assert finding is not None
    assert "0.800" in finding.message


def test_a_good_baked_publish_ends_probation(pruned: History) -> None:
    pruned.publish(300, baked=True, report=packet(300, correct=90, n=100))
    assert on_probation(pruned.log.tail().state) is None
    assert found(pruned, packet(310, state="unstable", record=6)) is None


def test_after_the_rollback_there_is_no_probation_left(pruned: History) -> None:
    state = pruned.log.tail().state
    pair = on_probation(state)
    assert pair is not None
    finding = found(pruned, packet(210, state="unstable", record=5))
    assert finding is not None
    request = Request(
        id=f"probation-{pair.record}", strategy="immediate", by="operator", finding=finding, before=pair.record
    )
    roll_back(pruned.store, pruned.log, request, trust=None)
    assert pruned.log.tail().state.tip == 3
    assert found(pruned, packet(210, state="unstable", record=5)) is None


# --- recovery ---------------------------------------------------------------------------------------------------------


def sound(_: int) -> str | None:
    return None


def test_recovery_is_pending_until_the_trainer_comes_back_and_is_then_kept(run: History) -> None:
    record = roll_back(run.store, run.log, asked(run), trust=None).record
    first = recover(run.store, run.log, record, validate=sound)
    assert {look.name: look.outcome for look in first.looks} == {
        "state": "passed",
        "model": "passed",
        "training": "pending",
        "telemetry": "passed",
    }
    assert recovery.read(run.store, record.n) is None
    report = packet(410, record=record.n)
    run.store.put_if_absent(layout.report(record.term, report.step), report.canonical())
    second = recover(run.store, run.log, record, validate=lambda _: "what it said of the pair is kept")
    assert second.outcome == "passed"
    assert recover(run.store, run.log, record, validate=lambda _: "never asked again") == second


def test_a_report_of_the_term_before_is_not_the_trainers_return(run: History) -> None:
    record = roll_back(run.store, run.log, asked(run), trust=None).record
    run.store.put_if_absent(layout.report(record.term - 1, 410), packet(410).canonical())
    assert recover(run.store, run.log, record, validate=sound).outcome == "pending"


def test_a_publish_is_the_trainers_return_too(run: History) -> None:
    record = roll_back(run.store, run.log, asked(run), trust=None).record
    run.publish(500)
    assert recover(run.store, run.log, record, validate=sound).outcome == "passed"


def test_an_unstable_first_report_fails(run: History) -> None:
    record = roll_back(run.store, run.log, asked(run), trust=None).record
    run.store.put_if_absent(layout.report(record.term, 410), packet(410, state="unstable").canonical())
    found = recover(run.store, run.log, record, validate=sound)
    assert [look.name for look in found.looks if look.outcome == "failed"] == ["training"]


def test_a_model_that_does_not_load_fails_and_a_broken_validator_is_pending(run: History) -> None:
    record = roll_back(run.store, run.log, asked(run), trust=None).record

    def broken(_: int) -> str | None:
        raise NoAnswer("no torch here")

    assert recover(run.store, run.log, record, validate=broken).outcome == "pending"
    failed = recover(run.store, run.log, record, validate=lambda _: "conv1.weight is missing")
    assert failed.outcome == "failed"
    assert "conv1.weight is missing" in [look.message for look in failed.looks]


def test_counters_that_differ_from_the_log_fail(run: History) -> None:
    record = roll_back(run.store, run.log, asked(run), trust=None).record
    found = recover(run.store, run.log, record, validate=sound, counted={"Committed/Pruned": 2})
    failed = [look for look in found.looks if look.outcome == "failed"]
    assert [look.name for look in failed] == ["telemetry"]
    assert failed[0].message == "Committed/Pruned was counted 2 times, the log says 1"


def test_a_record_exchanged_in_the_middle_fails_the_state(run: History) -> None:
    record = roll_back(run.store, run.log, asked(run), trust=None).record
    run.log.tail()
    spoil(run, layout.record(3), lambda _: run.store.get(layout.record(2)))
    found = recover(run.store, run.log, record, validate=sound)
    assert next(look.name for look in found.looks if look.outcome == "failed") == "state"


def spoil(run: History, key: str, change: object) -> None:
    """Exchange an object's bytes, as nobody of ours ever does."""
    data = change(run.store.get(key))  # type: ignore[operator]
    run.store.delete(key)
    run.store.put_if_absent(key, data)
