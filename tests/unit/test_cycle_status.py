"""A cycle's status from one look: every field from the facts, and conditions that never go back."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from emrakul.api.cycle import CycleStatus
from emrakul.cluster.announce import events
from emrakul.cluster.status import Facts, cycle_status, in_resource_words, refused, unable
from emrakul.control import Controller, Scale
from emrakul.core.plan import Plan
from emrakul.core.snapshot import Snapshot
from inprocess import InProcess
from leyline.local import LocalStore
from leyline.log import Log
from leyline.reasons import REMEDY, Outcome, Reason
from runs import asked, published_run, settings

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)
BODY = {"metadata": {"name": "one", "namespace": "team", "uid": "u"}}


@pytest.fixture(scope="module")
def looks(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Snapshot, Plan]]:
    """Every look of a real cycle that commits."""
    store = published_run(LocalStore(tmp_path_factory.mktemp("status") / "run"))
    ask = asked(store, settings())
    controller = Controller(store, Log(store), ask, lambda uri: InProcess(store, uri), scale=Scale(cores=2))
    found: list[tuple[Snapshot, Plan]] = []
    controller.run(watch=lambda snapshot, plan: found.append((snapshot, plan)))
    return found


def statuses(looks: list[tuple[Snapshot, Plan]]) -> list[CycleStatus]:
    status, found = CycleStatus(), []
    for number, (snapshot, plan) in enumerate(looks):
        facts = Facts(run="s3://runs/one", seen=(4, "a" * 64), seconds={"analyse": 1.5, "cycle": 4})
        status = cycle_status(status, snapshot, plan, facts, generation=1, now=NOON + timedelta(seconds=number))
        found.append(status)
    return found


def test_a_commit_is_told_whole(looks: list[tuple[Snapshot, Plan]]) -> None:
    status = statuses(looks)[-1]
    assert (status.outcome, status.reason, status.state) == (Outcome.COMMITTED, Reason.PRUNED, "Committed")
    assert status.pruned == "3/3 channels"
    assert status.counts == {"channel": 3}
    assert status.masks is not None and status.masks.counts == {"channel": 3}
    assert status.decision is not None and status.decision.uri.endswith("/decision.json")
    assert status.accuracy is not None and status.accuracy.drop is not None
    assert status.timings is not None and status.timings.analysis == "1.500"
    assert REMEDY[Reason.PRUNED] in (status.message or "")
    true = {c.type.value for c in status.conditions if c.status == "True"}
    assert true == {"Admitted", "Analyzed", "Validated", "Committed", "Complete"}


def test_a_condition_that_was_true_stays_so(looks: list[tuple[Snapshot, Plan]]) -> None:
    reached: set[str] = set()
    for status in statuses(looks):
        now = {c.type.value for c in status.conditions if c.status == "True"}
        assert reached <= now
        reached = now


def test_the_same_look_gives_the_same_status(looks: list[tuple[Snapshot, Plan]]) -> None:
    for (snapshot, plan), status in zip(looks, statuses(looks), strict=True):
        facts = Facts(run="s3://runs/one", seen=(4, "a" * 64), seconds={"analyse": 1.5, "cycle": 4})
        later = NOON + timedelta(days=1)
        assert cycle_status(status, snapshot, plan, facts, generation=1, now=later) == status


def test_every_condition_carries_the_generation_it_speaks_of(looks: list[tuple[Snapshot, Plan]]) -> None:
    snapshot, plan = looks[-1]
    status = cycle_status(CycleStatus(), snapshot, plan, Facts(run="s3://runs/one"), generation=7, now=NOON)
    assert {c.observed_generation for c in status.conditions} == {7}


def test_a_message_of_any_length_fits(looks: list[tuple[Snapshot, Plan]]) -> None:
    snapshot, plan = looks[0]
    long = replace(plan, message="x" * 10_000)
    status = cycle_status(CycleStatus(), snapshot, long, Facts(run="s3://runs/one"), generation=1, now=NOON)
    assert len(status.message or "") == 4096


def test_an_outcome_is_never_taken_back_by_trouble(looks: list[tuple[Snapshot, Plan]]) -> None:
    ended = statuses(looks)[-1]
    after = unable(ended, "Waiting", "the store is away", run=None, generation=2)
    assert (after.outcome, after.state) == (Outcome.COMMITTED, "Committed")
    before = unable(CycleStatus(), "Waiting", "the store is away", run=None, generation=2)
    assert (before.outcome, before.state, before.message) == (None, "Waiting", "the store is away")


def test_a_refusal_is_complete_and_says_what_to_do() -> None:
    status = refused(CycleStatus(), Reason.RUN_NOT_ALLOWED, "no", run="s3://x/y", generation=1, now=NOON)
    assert {c.type.value: c.status for c in status.conditions} == {
        "Admitted": "False",
        "Complete": "True",
        "Failed": "True",
    }
    assert "allowedRunPrefixes" in (status.message or "")


def test_an_event_for_each_condition_that_flipped_and_none_twice(looks: list[tuple[Snapshot, Plan]]) -> None:
    found, before = [], CycleStatus()
    for status in statuses(looks):
        found += events(BODY, before, status)
        before = status
    assert [event["reason"] for event in found] == ["Admitted", "Decided", "Passed", "Pruned"] or {
        event["reason"] for event in found
    } == {"Admitted", "Decided", "Passed", "Pruned"}
    assert len({event["metadata"]["name"] for event in found}) == 4
    assert not events(BODY, before, before)


def test_settings_are_named_as_a_resource_writes_them() -> None:
    said = in_resource_words("enable_checkpoint_pruning is false; raise checkpoint_analysis_timeout, not my_own_key")
    assert said == "enableCheckpointPruning is false; raise checkpointAnalysisTimeout, not my_own_key"
