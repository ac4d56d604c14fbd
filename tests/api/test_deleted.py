"""Resources that go away: what was admitted ends in the log, nothing comes back, nothing hangs."""

from __future__ import annotations

import time

from api.apiclient import CYCLES, JOBS, POLICIES
from api.history import History
from api.proxy import proxy
from api.rights import installed
from api.sinks import sink
from api.stage import SETTINGS, Stage, condition
from charts import needs_helm
from cluster.alone import controllers
from cluster.apiserver import ApiServer
from emrakul.api import labels
from emrakul.api.policy import PolicySpec
from emrakul.asking import ask_for
from emrakul.cluster.main import LISTING_SECONDS
from emrakul.control import name_of
from leyline import layout
from leyline.records import Kind

SECOND_LOOK = 90.0
"""A resource is looked for twice, a minute apart, before its cycle is ended."""


def test_a_cycle_that_is_deleted_ends_and_is_not_made_again(stage: Stage) -> None:
    stage.jobs.hold = lambda _: True
    with sink() as received:
        stage.begin()
        stage.policy(sink=received.url)
        name = stage.launched("analyse")["metadata"]["labels"]["emrakul.dev/cycle"]
        stage.api.delete(CYCLES, stage.namespace, name)

        end = stage.wait(lambda: (last := stage.records()[-1]).kind is Kind.OUTCOME and last, seconds=SECOND_LOOK)
        assert (end.body.outcome, end.reason) == ("Skipped", "Deleted")
        stage.wait(lambda: stage.status("digits", kind=POLICIES).get("cycles") == {"Skipped/Deleted": 1})
        event = stage.wait(lambda: received.events and received.events[0])
    assert (event["subject"], event["data"]["outcome"]) == (end.id, "Skipped")
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


def test_a_policy_deleted_and_applied_again_gets_the_cycle_that_waited(stage: Stage) -> None:
    """What the old policy's resource never began stands in nobody's way, although it has the name."""
    stage.jobs.hold = lambda job: job["metadata"]["labels"]["emrakul.dev/cycle"] == "first"
    stage.begin(defaults={"store": stage.store_spec, "settings": {**SETTINGS}})
    stage.cycle("first")
    stage.launched("analyse")
    stage.trains_on(200)
    newest = stage.records()[-1].n
    spec = PolicySpec.model_validate(stage.policy()["spec"])
    ask = ask_for(newest, spec, store=stage.store, runtime="kubernetes")
    name = labels.cycle_name("digits", name_of(ask))
    stage.made_by("digits", name, base=newest)
    stage.reached("Waiting", name)
    stage.api.delete(POLICIES, stage.namespace, "digits")
    stage.api.patch(CYCLES, stage.namespace, name, {"metadata": {"labels": {"seen": "yes"}}})
    stage.reached("Skipped", name)
    stage.policy()
    stage.api.delete(CYCLES, stage.namespace, "first")
    stage.wait(lambda: stage.status(name).get("outcome") == "Committed", seconds=SECOND_LOOK)


def test_a_policy_deleted_after_the_admission_that_no_status_tells(stage: Stage, server: ApiServer) -> None:
    """The operator is gone between the log's record and the status of it: the log says that the cycle has begun."""
    stage.jobs.hold = lambda _: True
    with proxy(server, stage.folder) as between:
        stage.kubeconfig = between.kubeconfig
        stage.begin()
        between.refuse = lambda method, path: method == "PATCH" and "cycles" in path and admitted(stage)
        stage.policy()
        stage.wait(lambda: admitted(stage))
        stage.operator.kill()
        assert condition(stage.status(), "Admitted").get("status") != "True"
        stage.api.delete(POLICIES, stage.namespace, "digits")
        between.refuse = None
        stage.jobs.hold = lambda _: False
        stage.operator.start()
        stage.reached("Committed")
        assert stage.errors() == []


def admitted(stage: Stage) -> bool:
    return stage.records()[-1].kind is Kind.ADMIT


def test_a_cycle_deleted_and_applied_again_begins_anew(stage: Stage) -> None:
    stage.jobs.hold = lambda _: True
    stage.begin(defaults={"store": stage.store_spec, "settings": {**SETTINGS}})
    stage.cycle("again")
    stage.launched("analyse")
    with controllers(stage.server, "garbage-collector-controller"):
        stage.api.delete(CYCLES, stage.namespace, "again")
        stage.wait(lambda: not stage.api.list(JOBS, stage.namespace))
    stage.jobs.hold = lambda _: False
    stage.cycle("again")
    status = stage.reached("Committed", "again", seconds=SECOND_LOOK)
    ends = [record for record in stage.records() if hasattr(record.body, "outcome")]
    assert [(end.body.outcome, end.reason) for end in ends] == [("Skipped", "Deleted"), ("Committed", "Pruned")]
    assert (status["record"], status["cycle"]) == (ends[1].n, f"{ends[0].id}-2")


def test_a_cycle_that_was_refused_is_not_made_again_when_its_time_is_over(stage: Stage) -> None:
    """No record says that it was made: its resource stays until a newer checkpoint has one."""
    history = History(stage.api, stage.namespace)
    stage.begin(workers={"podOverrides": {"securityContext": {"runAsNonRoot": True}}})
    stage.policy(ttlSecondsAfterFinished=0, historyLimit=0, podOverrides={"volumes": [{"name": "emrakul-x"}]})
    stage.reached("Failed")
    time.sleep(12)  # two polls
    assert set(history.made.values()) == {1}
    stage.trains_on(200)
    stage.wait(lambda: any(history.deleted.values()), seconds=90)
    assert len(stage.cycles()) == 1


def test_a_paused_cycle_stays_whatever_the_history_limit(stage: Stage) -> None:
    stage.begin()
    stage.policy(historyLimit=5)
    stage.reached("Committed")
    (name,) = [one["metadata"]["name"] for one in stage.cycles()]
    paused = {"metadata": {"annotations": {"emrakul.dev/reconcile": "disabled"}}}
    stage.api.patch(CYCLES, stage.namespace, name, paused)
    stage.change(POLICIES, "digits", historyLimit=0)
    stage.operator.kill()
    stage.operator.start()  # history is looked at once a minute, and at the start
    stage.trains_on(200)
    stage.wait(lambda: len(stage.cycles()) > 1)
    assert name in {one["metadata"]["name"] for one in stage.cycles()}


def test_a_cycle_goes_after_its_time_once_its_record_was_read_back(stage: Stage) -> None:
    stage.begin()
    stage.policy(ttlSecondsAfterFinished=5)
    status = stage.reached("Committed")
    key = layout.record(status["record"])
    record = stage.store.get(key)
    stage.store.delete(key)
    log = stage.operator.log
    gone = (f"log/0/{status['record']}", f"record {status['record']} was seen before and is gone")
    stage.wait(lambda: any(what in log.read_text() for what in gone), seconds=30)
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


@needs_helm
def test_a_tenants_namespace_goes_and_another_tenant_notices_nothing(stage: Stage, other: Stage) -> None:
    """As the chart installs it for two namespaces; with the first one goes its Role."""
    given = {"namespaces": [stage.namespace, other.namespace]}
    stage.kubeconfig, config = installed(stage.server, other.namespace, given)
    stage.begin(**config)
    stage.policy()
    stage.reached("Committed")
    with controllers(stage.server, "garbage-collector-controller", "namespace-controller"):
        stage.server.kubectl("delete", "namespace", stage.namespace, "--timeout=60s")
    with other.jobs:
        other.policy()
        other.reached("Committed")
        time.sleep(LISTING_SECONDS + 5)
        assert stage.operator.process is not None
        assert stage.operator.process.poll() is None
        stage.operator.kill()
        stage.operator.start()
        other.trains_on(200)
        other.wait(lambda: len(other.cycles()) == 2)


def test_deleting_a_waiting_cycle_leaves_no_trace(stage: Stage) -> None:
    stage.begin()
    stage.cycle("early", policyRef={"name": "none"})
    assert condition(stage.reached("Waiting", "early"), "Admitted") == {}
    before = len(stage.records())
    stage.api.delete(CYCLES, stage.namespace, "early")
    stage.wait(lambda: stage.cycles() == [])
    assert len(stage.records()) == before
