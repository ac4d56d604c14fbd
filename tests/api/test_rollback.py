"""A person moves a run back by its policy: once for each id, and cycles commit nothing until the person says so."""

from __future__ import annotations

from api.apiclient import JOBS, POLICIES, Body
from api.jobs import fail, run_workers
from api.stage import Stage
from leyline import exits
from leyline.records import Kind
from leyline.store import ObjectStore


def of(stage: Stage, kind: Kind) -> list[int]:
    return [record.n for record in stage.records() if record.kind is kind]


def policy(stage: Stage) -> Body:
    return stage.status("digits", kind=POLICIES)


def test_once_for_each_id_and_held_until_resumed(stage: Stage) -> None:
    stage.begin()
    stage.policy()
    committed = stage.reached("Committed")
    (first,) = [one["metadata"]["name"] for one in stage.cycles()]
    stage.change(POLICIES, "digits", rollback={"id": "oops", "to": "last-good"})
    status = stage.wait(lambda: (s := policy(stage)).get("hold") and s)

    (record,) = of(stage, Kind.ROLLBACK)
    assert status["rollback"]["id"] == "oops"
    assert status["rollback"]["record"] == record
    assert status["tip"]["record"] < committed["record"]
    assert "resumeAfterRollback: oops" in status["message"]
    undone = stage.wait(lambda: stage.status(first).get("rollback"), seconds=90)
    assert (undone["record"], undone["id"]) == (record, "oops")
    assert stage.status(first)["outcome"] == "Committed", "that is what it did; what became of it stands beside it"

    # another operator finds it done
    stage.operator.kill()
    stage.operator.start()
    stage.trains_on(200)
    status = stage.wait(lambda: (s := policy(stage)).get("recovery") == "passed" and s)
    assert of(stage, Kind.ROLLBACK) == [record]

    # held: the new checkpoint's cycle goes all the way, and no masks enter the log
    held = stage.wait(lambda: next((c for c in stage.cycles() if c["metadata"]["name"] != first), None))
    told = stage.reached("ValidatedOnly", held["metadata"]["name"])
    assert told["stage"] == "ValidationOnly"
    assert policy(stage)["hold"] == "oops"

    stage.change(POLICIES, "digits", resumeAfterRollback="oops")
    stage.wait(lambda: "hold" not in policy(stage))
    assert len(of(stage, Kind.RESUME)) == 1
    assert of(stage, Kind.ROLLBACK) == [record]
    assert stage.errors() == []


def test_what_the_validator_says_of_the_older_pair_is_told(stage: Stage) -> None:
    """Its Job ends with exit code 42: no other attempt would say anything else."""
    why = "checkpoint 100-1-dbbaeb45: model.safetensors has another digest than READY.json says"

    def bad(job: Body, store: ObjectStore) -> bool:
        if job["metadata"]["labels"]["emrakul.dev/phase"] != "recheck":
            return run_workers(job, store)
        stage.failed_pod(job, code=exits.BAD_INPUT, message=why)
        fail(stage.api, job, reason="PodFailurePolicy")
        return False

    stage.jobs.work = bad
    stage.begin()
    stage.policy()
    stage.reached("Committed")
    stage.change(POLICIES, "digits", rollback={"id": "oops", "to": "baseline"})
    stage.wait(lambda: policy(stage).get("recovery") == "failed")
    stage.wait(lambda: not stage.api.list(JOBS, stage.namespace))
    rechecks = [name for name, _ in stage.jobs.made if name.startswith("digits-r")]
    assert len(rechecks) == 1


def test_a_rollback_that_is_not_possible_says_so_and_cycles_go_on(stage: Stage) -> None:
    stage.begin()
    stage.policy(rollback={"id": "early", "to": 77})
    status = stage.wait(lambda: (s := policy(stage)).get("rollback") and s)
    assert "record 77 is no pair" in status["message"]
    assert "record" not in status["rollback"]
    stage.reached("Committed")
    assert of(stage, Kind.ROLLBACK) == []


def test_a_live_cycle_ends_with_the_rollback(stage: Stage) -> None:
    stage.jobs.hold = lambda _: True
    stage.begin()
    stage.policy()
    name = stage.launched("analyse")["metadata"]["labels"]["emrakul.dev/cycle"]
    stage.change(POLICIES, "digits", rollback={"id": "stop", "to": "baseline"})
    status = stage.reached("Skipped", name)
    assert status["reason"] == "RunRolledBack"
    stage.wait(lambda: not [job for job in stage.api.list(JOBS, stage.namespace) if name in job["metadata"]["name"]])
