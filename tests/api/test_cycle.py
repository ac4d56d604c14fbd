"""What becomes of a cycle in a cluster, step by step, with everything around it as it may be."""

from __future__ import annotations

from api.apiclient import CYCLES, EVENTS, JOBS, Body
from api.jobs import arguments, fail, run_workers, start_time
from api.stage import SETTINGS, Stage, condition
from emrakul.control import Controller
from emrakul.core.snapshot import Ask, Job
from emrakul.settings import Settings
from leyline import layout
from leyline.log import Log
from leyline.records import Kind
from leyline.store import ObjectStore

BY_HAND = """
apiVersion: emrakul.dev/v1alpha1
kind: PruningCycle
metadata:
  name: by-hand
spec:
  checkpoint: {checkpoint}
"""
CONDITIONS = {
    "Admitted": "True",
    "Analyzed": "True",
    "Validated": "True",
    "Committed": "True",
    "Complete": "True",
    "Failed": "False",
}


def conditions(status: Body) -> dict[str, str]:
    return {one["type"]: one["status"] for one in status["conditions"]}


def names(jobs: list[tuple[str, str]]) -> list[str]:
    return [name for name, _ in jobs]


def test_a_policys_cycle_is_made_and_commits(stage: Stage) -> None:
    stage.begin()
    stage.policy()
    status = stage.reached("Committed")

    assert conditions(status) == CONDITIONS
    assert status["pruned"] == "3/3 channels"
    assert status["masks"]["uri"].startswith(f"{stage.run}/cycles/")
    prune = stage.records()[-1]
    assert (status["record"], status["cycle"]) == (prune.n, prune.id)
    assert status["masks"]["digest"] == prune.masks.digest
    (cycle,) = stage.cycles()
    made = [f"{cycle['metadata']['name']}-{phase}" for phase in ("a0-0", "w2-0", "v2-0")]
    assert names(stage.jobs.made) == made
    stage.wait(lambda: not stage.api.list(JOBS, stage.namespace))
    told = [one["reason"] for one in stage.api.list(EVENTS, stage.namespace)]
    assert sorted(told) == ["Admitted", "Decided", "Passed", "Pruned"]
    assert "finalizers" not in cycle["metadata"]
    assert "annotations" not in cycle["metadata"]
    assert stage.jobs.trouble == []
    assert stage.errors() == []
    assert stage.operator.stop() == 0


def test_eight_lines_by_hand_say_which_key_is_to_be_changed(stage: Stage) -> None:
    settings = {name: value for name, value in SETTINGS.items() if name != "enableCheckpointPruning"}
    stage.begin(defaults={"store": stage.store_spec, "settings": settings})
    stage.paste(BY_HAND.format(checkpoint=stage.checkpoint))
    status = stage.reached("ValidatedOnly", "by-hand")
    assert "Set enableCheckpointPruning: true" in status["message"]
    assert conditions(status) == {**CONDITIONS, "Committed": "False"}
    assert "masks" not in status


def test_a_suspended_cycle_has_no_jobs_and_goes_on_when_it_is_resumed(stage: Stage) -> None:
    stage.jobs.hold = lambda job: job["metadata"]["labels"]["emrakul.dev/launch"] == "0"
    stage.begin()
    stage.policy()
    stage.launched("analyse")
    (name,) = [one["metadata"]["name"] for one in stage.cycles()]

    stage.change(CYCLES, name, suspend=True)
    stage.reached("Suspended")
    stage.wait(lambda: not stage.api.list(JOBS, stage.namespace))
    assert condition(stage.status(), "Admitted")["status"] == "True"

    stage.jobs.hold = lambda _: False
    stage.change(CYCLES, name, suspend=False)
    status = stage.reached("Committed")
    assert conditions(status) == CONDITIONS
    assert stage.errors() == []


def test_resuming_after_workers_had_begun_is_a_new_launch(stage: Stage) -> None:
    def begin(job: Body, store: ObjectStore) -> bool:
        """The first launch marks its start and gets no further."""
        if not job["metadata"]["name"].endswith("-a0-0"):
            return run_workers(job, store)
        cycle = arguments(job)["cycle"].rpartition("/")[2]
        store.put_if_absent(layout.started(cycle, "analyse", 0), b"started")
        return False

    stage.jobs.work = begin
    stage.begin()
    stage.policy()
    (name,) = [job["metadata"]["labels"]["emrakul.dev/cycle"] for job in [stage.launched("analyse")]]
    stage.change(CYCLES, name, suspend=True)
    stage.reached("Suspended")
    stage.change(CYCLES, name, suspend=False)
    stage.launched("analyse", launch=1)
    stage.reached("Committed")


def test_a_cycle_suspended_from_the_beginning_is_not_admitted(stage: Stage) -> None:
    before = len(stage.records())
    stage.policy("idle", operatorClass="nobody")
    stage.cycle("later", suspend=True, policyRef={"name": "idle"})
    stage.begin()
    stage.reached("Suspended", "later")
    assert len(stage.records()) == before, "a live cycle would stand in the way of all others"
    stage.change(CYCLES, "later", suspend=False)
    stage.reached("Committed", "later")


def test_the_reconcile_annotation_leaves_a_cycle_alone(stage: Stage) -> None:
    stage.begin()
    stage.api.create(
        CYCLES,
        stage.namespace,
        {
            "apiVersion": "emrakul.dev/v1alpha1",
            "kind": "PruningCycle",
            "metadata": {"name": "paused", "annotations": {"emrakul.dev/reconcile": "disabled"}},
            "spec": {"checkpoint": "latest", "policyRef": {"name": "digits"}},
        },
    )
    stage.cycle("other", policyRef={"name": "none"})
    stage.reached("Waiting", "other")
    assert "there is no PruningPolicy none" in stage.status("other")["message"]
    assert stage.status("paused") == {}


def test_a_cycle_whose_base_moved_goes_on_after_a_restart(stage: Stage) -> None:
    """A checkpoint is published while it analyses, and the operator is killed while the candidate is written."""
    held = {"analyse", "apply"}
    stage.jobs.hold = lambda job: job["metadata"]["labels"]["emrakul.dev/phase"] in held
    stage.begin()
    stage.policy()
    stage.launched("analyse")
    first = stage.records()[-1]
    stage.trains_on(200)
    held.discard("analyse")
    stage.launched("apply")
    stage.operator.kill()
    stage.operator.start()
    held.clear()
    stage.wait(lambda: stage.records()[-1].kind is Kind.PRUNE)
    prune = stage.records()[-1]
    assert prune.id == first.id
    assert prune.checkpoint.startswith("200-"), (
        "the candidate is of the newest checkpoint, not of the one that was admitted"
    )
    name = first.body.resource.split("/")[1]
    assert stage.reached("Committed", name)["record"] == prune.n
    assert stage.errors() == []


# --- one live cycle a run ---------------------------------------------------------------------------------------------


def test_a_policys_waiting_cycle_is_overtaken_and_a_persons_is_not(stage: Stage) -> None:
    held: set[str] = set()
    stage.jobs.hold = lambda job: job["metadata"]["labels"]["emrakul.dev/cycle"] in held
    stage.policy("idle", operatorClass="nobody")
    for name, margin in (("one", "0.4"), ("two", "0.3")):
        stage.policy(name, operatorClass="nobody", settings={**SETTINGS, "safetyMargin": margin})
    held.add("first")
    stage.cycle("first", policyRef={"name": "one"})
    stage.begin()
    stage.launched("analyse")
    stage.cycle("by-hand", policyRef={"name": "two"})
    stage.made_by("idle", "older", base=2)
    stage.reached("Waiting", "older")
    assert "is live" in stage.reached("Waiting", "by-hand")["message"]
    stage.made_by("idle", "newer", base=4)
    status = stage.reached("Skipped", "older")
    assert status["reason"] == "Superseded"
    assert "newer" in status["message"]
    stage.reached("Waiting", "newer")
    assert stage.status("by-hand")["state"] == "Waiting"

    held.clear()
    stage.reached("Committed", "first")
    stage.wait(lambda: all(one["status"].get("outcome") for one in stage.cycles()))
    admitted = [record.body.resource.split("/")[1] for record in stage.records() if record.kind is Kind.ADMIT]
    assert sorted(admitted) == ["by-hand", "first", "newer"]


def test_a_cycle_of_another_runtime_that_nobody_drives_is_not_waited_for_for_ever(stage: Stage) -> None:
    """As `emrakul run` leaves it when its machine is gone. Only the policy is there to notice."""
    settings = {"startup_timeout": 1, "checkpoint_analysis_timeout": 1, "validation_timeout": 1}
    local = Ask(base=2, settings=Settings.model_validate(settings), runtime="local")
    Controller(stage.store, Log(stage.store), local, lambda _: Nobody()).step()
    assert stage.records()[-1].kind is Kind.ADMIT
    stage.begin()
    stage.policy()
    stage.trains_on(200)
    stage.wait(lambda: "Committed" in outcomes(stage), seconds=240)
    ends = [(record.body.outcome, record.reason) for record in stage.records() if hasattr(record.body, "outcome")]
    assert ends == [("Skipped", "Abandoned"), ("Committed", "Pruned")]


def outcomes(stage: Stage) -> set[str | None]:
    return {(one.get("status") or {}).get("outcome") for one in stage.cycles()}


class Nobody:
    """A runtime that never starts anything."""

    name = "local"

    def start(self, *_: object, **__: object) -> None:
        pass

    def jobs(self) -> tuple[Job, ...]:
        return ()

    def stop(self, *_: object) -> None:
        pass


# --- what the cluster does to Jobs ------------------------------------------------------------------------------------


def test_a_queue_lets_jobs_go_and_nobody_else(stage: Stage) -> None:
    seen: list[Body] = []
    stage.jobs.watch = seen.append
    stage.begin()
    stage.policy(queue="team-a")
    for phase in ("analyse", "apply", "validate"):
        job = stage.launched(phase)
        assert job["spec"]["suspend"] is True
        assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "team-a"
        name = job["metadata"]["name"]
        if phase == "analyse":
            stage.wait(lambda: "suspended by queue team-a" in stage.status().get("message", ""))
        stage.api.patch(JOBS, stage.namespace, name, {"spec": {"suspend": False}})
    stage.reached("Committed")
    owners = {one["manager"] for job in seen for one in job["metadata"]["managedFields"] if "f:suspend" in str(one)}
    changed = {
        one["manager"]
        for job in seen
        for one in job["metadata"]["managedFields"]
        if one["operation"] == "Update" and one["manager"] == "emrakul-operator" and one.get("subresource")
    }
    assert owners
    assert changed == set()
    assert stage.errors() == []


def test_all_answers_are_enough_whatever_became_of_some_indexes(stage: Stage) -> None:
    """The store decides: a Job with failed indexes has done its work once nothing is missing."""

    def half_failed(job: Body, store: ObjectStore) -> bool:
        run_workers(job, store)
        if job["spec"].get("completions", 1) > 1:
            start_time(stage.api, job, failedIndexes="1")
            return False
        return True

    stage.jobs.work = half_failed
    stage.begin()
    stage.policy()
    stage.reached("Committed")
    stage.wait(lambda: not stage.api.list(JOBS, stage.namespace))


def test_a_job_that_ended_with_answers_missing_is_workers_failed(stage: Stage) -> None:
    def lost(job: Body, _store: ObjectStore) -> bool:
        fail(stage.api, job)
        return False

    stage.jobs.work = lost
    stage.begin()
    stage.policy()
    status = stage.reached("Skipped")
    assert status["reason"] == "WorkersFailed"
    assert conditions(status)["Failed"] == "False"
    stage.wait(lambda: not stage.api.list(JOBS, stage.namespace))


def test_a_job_that_never_gets_a_pod_ends_with_what_forbade_it(stage: Stage) -> None:
    """As under a quota; the overrides are in the Job."""
    stage.jobs.hold = lambda _: True
    stage.begin()
    overrides = {
        "tolerations": [{"key": "gpu", "operator": "Exists"}],
        "nodeSelector": {"pool": "spot"},
        "labels": {"team": "a"},
        "priorityClassName": "low",
        "securityContext": {"runAsUser": 1234},
        "env": [{"name": "HTTPS_PROXY", "value": "http://proxy:3128"}],
    }
    stage.policy(settings={**SETTINGS, "startupTimeout": "4s"}, podOverrides=overrides)
    job = stage.launched("analyse")
    pod = job["spec"]["template"]["spec"]
    assert pod["tolerations"] == overrides["tolerations"]
    assert pod["nodeSelector"] == {"pool": "spot"}
    assert job["spec"]["template"]["metadata"]["labels"]["team"] == "a"
    assert pod["priorityClassName"] == "low"
    assert pod["securityContext"]["runAsUser"] == 1234
    assert {"name": "HTTPS_PROXY", "value": "http://proxy:3128"} in pod["containers"][0]["env"]

    why = "Error creating: pods is forbidden: exceeded quota: small, requested: limits.memory=2G"
    stage.warn(job, "FailedCreate", why)
    status = stage.reached("Skipped")
    assert status["reason"] == "NotScheduled"
    assert why in status["message"]
    stage.wait(lambda: not stage.api.list(JOBS, stage.namespace))


def test_images_are_those_of_admission_whatever_the_operator_has_now(stage: Stage) -> None:
    stage.jobs.hold = lambda _: True
    stage.begin()
    stage.policy()
    stage.launched("analyse")
    stage.operator.kill()
    stage.operator.again(images={"worker": "worker@sha256:1", "validator": "validator@sha256:1"})
    stage.jobs.hold = lambda _: False
    image = {
        phase: stage.launched(phase)["spec"]["template"]["spec"]["containers"][0]["image"]
        for phase in ("apply", "validate")
    }
    assert image == {"apply": "worker@sha256:0", "validate": "validator@sha256:0"}
    status = stage.reached("Committed")
    assert status["images"] == {"worker": "worker@sha256:0", "validator": "validator@sha256:0"}
