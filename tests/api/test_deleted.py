"""Resources that go away: what was admitted ends in the log, nothing comes back, nothing hangs."""

from __future__ import annotations

from api.apiclient import CYCLES, POLICIES
from api.stage import SETTINGS, Stage, condition
from cluster.alone import controllers
from leyline import layout
from leyline.records import Kind

SECOND_LOOK = 90.0
"""A resource is looked for twice, a minute apart, before its cycle is ended."""


def test_a_cycle_that_is_deleted_ends_and_is_not_made_again(stage: Stage) -> None:
    stage.jobs.hold = lambda _: True
    stage.begin()
    stage.policy()
    name = stage.launched("analyse")["metadata"]["labels"]["emrakul.dev/cycle"]
    stage.api.delete(CYCLES, stage.namespace, name)

    end = stage.wait(lambda: (last := stage.records()[-1]).kind is Kind.OUTCOME and last, seconds=SECOND_LOOK)
    assert (end.body.outcome, end.reason) == ("Skipped", "Deleted")
    stage.wait(lambda: stage.status("digits", kind=POLICIES).get("cycles") == {"Skipped/Deleted": 1})
    assert stage.cycles() == []
    assert "live" not in stage.status("digits", kind=POLICIES)
    assert stage.errors() == []


def test_a_cycle_deleted_while_nobody_looked_stands_in_nobodys_way(stage: Stage) -> None:
    """No policy follows the run: the next cycle finds out."""
    stage.jobs.hold = lambda job: job["metadata"]["labels"]["emrakul.dev/cycle"] == "gone"
    stage.begin(defaults={"store": stage.store_spec, "settings": {**SETTINGS}})
    stage.cycle("gone")
    stage.launched("analyse")
    stage.operator.kill()
    stage.api.delete(CYCLES, stage.namespace, "gone")
    stage.policy("other", operatorClass="nobody", settings={**SETTINGS, "safetyMargin": "0.4"})
    stage.cycle("next", policyRef={"name": "other"})
    stage.operator.start()
    stage.reached("Committed", "next", seconds=SECOND_LOOK)
    ends = [(record.body.outcome, record.reason) for record in stage.records() if hasattr(record.body, "outcome")]
    assert ends == [("Skipped", "Deleted"), ("Committed", "Pruned")]


def test_a_deleted_policys_cycle_finishes_and_none_begins(stage: Stage) -> None:
    stage.jobs.hold = lambda _: True
    stage.begin()
    stage.policy()
    name = stage.launched("analyse")["metadata"]["labels"]["emrakul.dev/cycle"]
    stage.made_by("digits", "waiting", base=9)
    stage.reached("Waiting", "waiting")
    stage.api.delete(POLICIES, stage.namespace, "digits")
    stage.api.patch(CYCLES, stage.namespace, "waiting", {"metadata": {"labels": {"seen": "yes"}}})
    status = stage.reached("Skipped", "waiting")
    assert status["reason"] == "Superseded"
    assert "policy digits was deleted" in status["message"]

    stage.jobs.hold = lambda _: False
    status = stage.reached("Committed", name)
    assert status["frozen"]["store"] == stage.store_spec
    stage.trains_on(200)
    made = len(stage.cycles())
    stage.operator.kill()
    stage.operator.start()
    stage.wait(lambda: (stage.operator.health() or {}).get("ready"))
    assert len(stage.cycles()) == made


def test_a_cycle_goes_after_its_time_once_its_record_was_read_back(stage: Stage) -> None:
    stage.begin()
    stage.policy(ttlSecondsAfterFinished=5)
    status = stage.reached("Committed")
    key = layout.record(status["record"])
    record = stage.store.get(key)
    stage.store.delete(key)
    log = stage.operator.log
    stage.wait(lambda: f"log/0/{status['record']}" in log.read_text(), seconds=30)
    assert stage.status()["outcome"] == "Committed", "the record is not there: the resource is all that is left"
    stage.store.put_if_absent(key, record)
    stage.wait(lambda: not stage.cycles(), seconds=90)
    assert stage.records()[-1].body.outcome == "Committed"


def test_ended_cycles_beyond_the_history_limit_go(stage: Stage) -> None:
    stage.begin()
    stage.policy(historyLimit=0)
    stage.reached("Committed")
    stage.cycle("by-hand", policyRef={"name": "digits"})
    stage.wait(lambda: stage.status("by-hand").get("outcome"))
    stage.operator.kill()
    stage.operator.start()  # history is looked at once a minute, and at the start
    stage.wait(lambda: [one["metadata"]["name"] for one in stage.cycles()] == ["by-hand"])


def test_a_namespace_goes_with_everything_in_it(stage: Stage) -> None:
    stage.jobs.hold = lambda _: True
    stage.begin()
    stage.policy()
    stage.launched("analyse")
    with controllers(stage.server, "garbage-collector-controller", "namespace-controller"):
        stage.server.kubectl("delete", "namespace", stage.namespace, "--timeout=60s")
    assert stage.operator.process.poll() is None
    assert stage.records()[-1].kind is Kind.ADMIT, "nothing was decided"
    assert stage.errors() == []
    assert stage.operator.stop() == 0


def test_deleting_a_waiting_cycle_leaves_no_trace(stage: Stage) -> None:
    stage.begin()
    stage.cycle("early", policyRef={"name": "none"})
    assert condition(stage.reached("Waiting", "early"), "Admitted") == {}
    before = len(stage.records())
    stage.api.delete(CYCLES, stage.namespace, "early")
    stage.wait(lambda: stage.cycles() == [])
    assert len(stage.records()) == before
