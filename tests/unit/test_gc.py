"""Deletion: a record first, never what a pair needs, and a killed gc is finished by the next."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from builders import make_run
from emrakul import gc
from emrakul.finding import Finding
from emrakul.gc import Policy, collect, preview
from emrakul.objects import faults, parts
from emrakul.rollback import Request, roll_back
from emrakul.settings import Settings
from histories import History, packet
from leyline import layout
from leyline.fold import RunState
from leyline.ids import cycle_name
from leyline.local import LocalStore
from leyline.log import NotAllowed
from leyline.reasons import Reason
from leyline.records import Draft, Kind, Rollback
from leyline.rules import kept, protected
from leyline.store import ObjectStore, StoreError

NOW = Policy(keep=0, age=timedelta(), grace=timedelta())
"""Everything that may go, at once."""


@pytest.fixture
def store(tmp_path: Path) -> ObjectStore:
    return LocalStore(tmp_path / "run")


@pytest.fixture
def run(store: ObjectStore) -> History:
    """Nine checkpoints (2 to 4, 7 to 12), a commit on 4 (record 6), a refused cycle on the tip (13, 14)."""
    history = History(store)
    for step in (100, 200, 300):
        history.publish(step)
    history.prune({"conv1": [1, 2]})
    for step in (400, 500, 600, 700, 800, 900):
        history.publish(step, baked=True, report=packet(step, correct=90, n=100))
    cycle = history.admit()
    store.put_if_absent(layout.candidate(cycle, 12, "model.safetensors"), b"refused")
    store.put_if_absent(f"{layout.responses(cycle, '0-0')}0-0", b"answer")
    store.put_if_absent(layout.decision(cycle), b"decision")
    history.end(cycle)
    return history


def keys(store: ObjectStore) -> set[str]:
    return {head.key for head in store.list("")}


def whole(run: History) -> bool:
    """Every pair of the log still has every object."""
    return all(
        not list(faults(run.store, parts(run.store, run.log, pair, None), deep=True))
        for pair in run.log.tail().state.pairs
    )


def test_what_nothing_protects_is_retired_by_a_record_and_then_deleted(run: History) -> None:
    done = collect(run.store, run.log, NOW)
    assert done.retired == (3, 4, 6)
    newest = run.log.tail().record
    assert newest.kind is Kind.RETIRE
    left = keys(run.store)
    assert not any(key.startswith(layout.checkpoint("200-0-000000c8")) for key in left)
    assert layout.checkpoint("100-0-00000064", layout.READY) in left  # the baseline
    assert whole(run)


def test_a_mask_file_outlives_its_candidate(run: History) -> None:
    collect(run.store, run.log, NOW)
    tip = run.log.tail().state.tip_pair
    assert tip is not None
    assert tip.masks is not None
    left = {key for key in keys(run.store) if "/candidate/" in key}
    assert left == {tip.masks.path}


def test_an_ended_cycles_leftovers_go_and_its_audit_stays(run: History) -> None:
    collect(run.store, run.log, NOW)
    cycle = run.log.find(("end", cycle_name(12, Settings().digest())), base=0)
    assert cycle is not None
    assert {key for key in keys(run.store) if key.startswith(f"cycles/{cycle.id}/")} == {layout.decision(cycle.id)}


def test_a_live_cycle_is_not_touched_nor_its_base(run: History) -> None:
    run.publish(1000, baked=True)
    cycle = run.admit()
    mine = [f"{layout.attempts(cycle, '0-0')}0", layout.candidate(cycle, 15, "model.safetensors")]
    for key in mine:
        run.store.put_if_absent(key, b"at work")
    collect(run.store, run.log, NOW)
    assert set(mine) <= keys(run.store)
    assert whole(run)


def test_the_newest_pairs_and_the_young_ones_stay(run: History) -> None:
    assert preview(run.store, run.log, replace(NOW, keep=8)).retire == (3,)
    assert preview(run.store, run.log, replace(NOW, keep=9)).retire == ()
    assert preview(run.store, run.log, replace(NOW, age=timedelta(hours=1))).retire == ()


def test_a_deeper_rollback_keeps_more(run: History) -> None:
    assert preview(run.store, run.log, replace(NOW, depth=6)).retire == (3, 4)


def test_within_the_grace_time_a_retired_pair_keeps_its_objects(run: History) -> None:
    before = keys(run.store)
    done = collect(run.store, run.log, replace(NOW, grace=timedelta(hours=1)))
    assert done.retired == (3, 4, 6)
    assert done.deleted == 0
    assert before <= keys(run.store)
    assert layout.checkpoint("200-0-000000c8", layout.READY) in {head.key for head in done.later}


def test_a_retired_pair_can_not_come_back_even_by_name(run: History) -> None:
    collect(run.store, run.log, replace(NOW, grace=timedelta(hours=1)))
    back = Draft(id="back", checkpoint="x", body=Rollback(to=4, by="person", strategy="named"))
    with pytest.raises(NotAllowed, match="retired"):
        run.log.append(back, base=0)


def test_a_dry_run_writes_nothing_and_lists_what_would_go(run: History) -> None:
    before = keys(run.store)
    plan = preview(run.store, run.log, NOW)
    assert keys(run.store) == before
    collect(run.store, run.log, NOW)
    assert {head.key for head in plan.delete} == before - keys(run.store)


def test_a_gc_that_was_killed_is_finished_by_the_next(run: History, tmp_path: Path) -> None:
    whole_plan = {head.key for head in preview(run.store, run.log, NOW).delete}
    left = 0

    class Killed(Exception):
        pass

    def stop(_: object) -> None:
        nonlocal left
        left += 1
        if left == 4:
            raise Killed

    with pytest.raises(Killed):
        collect(run.store, run.log, NOW, progress=stop)
    assert whole(run)
    collect(run.store, run.log, NOW)
    assert not whole_plan & keys(run.store)
    assert sum(record.kind is Kind.RETIRE for record in run.log.since(0)) == 1


def test_a_checkpoint_stops_existing_before_its_objects_go(run: History) -> None:
    gone: list[str] = []
    collect(run.store, run.log, NOW, progress=lambda head: gone.append(head.key))
    mine = [key for key in gone if key.startswith(layout.checkpoint("200-0-000000c8"))]
    assert mine[0].endswith("READY.json")


def test_a_checkpoint_that_its_trainer_may_still_publish_stays(run: History) -> None:
    term = run.log.tail().state.term
    name = f"2000-{term}-{2000:08x}"
    for key in (layout.checkpoint(name, "model.safetensors"), layout.checkpoint(name, layout.READY)):
        run.store.put_if_absent(key, b"waiting for its record")
    collect(run.store, run.log, NOW)
    assert layout.checkpoint(name, layout.READY) in keys(run.store)


def test_a_checkpoint_that_a_newer_term_has_fenced_goes(run: History) -> None:
    unnamed = make_run(run.store, step=5000).metadata.name  # term 0, and the run's is 1
    collect(run.store, run.log, NOW)
    assert not any(key.startswith(layout.checkpoint(unnamed)) for key in keys(run.store))


def test_an_unfinished_checkpoint_goes_after_the_grace_time_only(run: History) -> None:
    key = layout.checkpoint("2000-1-000007d0", "model.safetensors")
    run.store.put_if_absent(key, b"half of it")
    collect(run.store, run.log, replace(NOW, grace=timedelta(hours=1)))
    assert key in keys(run.store)
    collect(run.store, run.log, NOW)
    assert key not in keys(run.store)


def test_folders_that_are_not_ours_stay(run: History) -> None:
    run.store.put_if_absent("checkpoints/notes/READY.json", b"a person's")
    run.store.put_if_absent("reports/notes.txt", b"a person's")
    collect(run.store, run.log, NOW)
    assert {"checkpoints/notes/READY.json", "reports/notes.txt"} <= keys(run.store)


def test_the_log_and_the_states_are_never_deleted(run: History) -> None:
    before = {key for key in keys(run.store) if key.startswith(("log/", "state/"))}
    collect(run.store, run.log, NOW)
    assert before <= keys(run.store)


def test_after_a_rollback_the_condemned_go_and_the_new_line_stays(run: History) -> None:
    request = Request(id="back", strategy="named", finding=Finding(Reason.ASKED, "the loss rose"), to=7)
    roll_back(run.store, run.log, request, trust=None)
    done = collect(run.store, run.log, NOW)
    assert set(done.retired) == {8, 9, 10, 11, 12}
    assert whole(run)


def test_a_deletion_that_is_refused_stops_with_its_sentence(run: History, tmp_path: Path) -> None:
    class Guarded(LocalStore):
        def delete(self, key: str) -> None:
            raise StoreError(f"{key} may not be deleted")

    with pytest.raises(StoreError, match="may not be deleted"):
        collect(Guarded(tmp_path / "run"), run.log, NOW)
    assert whole(run)


def test_unfinished_files_of_killed_writers_are_swept(run: History, tmp_path: Path) -> None:
    folder = tmp_path / "run" / ".tmp"
    old, young = folder / "old", folder / "young"
    old.write_bytes(b"x")
    young.write_bytes(b"x")
    past = time.time() - 7200
    os.utime(old, (past, past))
    done = collect(run.store, run.log, replace(NOW, grace=timedelta(hours=1)))
    assert done.uploads == 1
    assert (old.exists(), young.exists()) == (False, True)


def test_the_pure_plan_never_touches_what_is_kept(run: History) -> None:
    """Whatever the ages: nothing that a pair needs is in the plan."""
    state, facts = gc.survey(run.store, run.log)
    heads = list(run.store.list(""))
    for grace in (timedelta(), timedelta(days=400)):
        plan = gc.plan(state, facts, heads, replace(NOW, grace=grace), datetime.now(UTC) + timedelta(days=365))
        needed = kept(state)
        for head in (*plan.delete, *plan.later):
            assert head.key not in needed.masks
            assert head.key.split("/")[1] not in needed.checkpoints
            assert not any(head.key.startswith(folder) for folder in needed.candidates)


def test_retirable_pairs_are_never_protected(run: History) -> None:
    state: RunState = run.log.tail().state
    _, facts = gc.survey(run.store, run.log)
    assert not set(gc.retirable(state, facts.written, NOW, datetime.now(UTC))) & set(protected(state))
