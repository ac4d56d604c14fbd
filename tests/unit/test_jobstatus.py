"""A Job as the core sees it: nothing is guessed, everything is read from the Job, its pods and events."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

import jobs as make
from emrakul.core.snapshot import Job, Phase
from emrakul.runtime.jobstatus import events_from, job_of, needs_pods

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)


def running(**status: Any) -> make.Body:
    return make.seen(make.job(), **{"active": 4, "ready": 4, **status})


def failed(*, message: str = "Job has failed indexes", **status: Any) -> make.Body:
    return make.seen(make.job(), failed=3, conditions=make.ended("Failed", message), **status)


def disrupted(pod: make.Body) -> make.Body:
    pod["status"]["conditions"] = [{"type": "DisruptionTarget", "status": "True", "reason": "EvictionByEvictionAPI"}]
    return pod


class TestWhichLaunch:
    def test_it_is_what_its_labels_say(self) -> None:
        found = job_of(make.seen(make.job(Phase.APPLY, step=12, launch=3)))
        assert found == Job(phase=Phase.APPLY, launch=3, step=12, created=NOON, running=True)

    def test_what_a_queue_let_go_starts_then(self) -> None:
        job = make.seen(make.job(queue="gpus"), suspend=False, startTime="2026-01-01T12:30:00Z", active=4, ready=4)
        assert job_of(job).created == NOON.replace(minute=30)

    def test_a_queue_may_hold_it_back_again_and_again(self) -> None:
        assert job_of(make.seen(make.job(queue="gpus"))).queued
        assert not job_of(make.seen(make.job())).queued


class TestRunning:
    @pytest.mark.parametrize("kind", ["Complete", "Failed"])
    def test_until_it_is_complete_or_failed(self, kind: str) -> None:
        assert not job_of(make.seen(make.job(), conditions=make.ended(kind))).running

    @pytest.mark.parametrize("kind", ["FailureTarget", "SuccessCriteriaMet", "Suspended"])
    def test_while_pods_may_still_be_there(self, kind: str) -> None:
        assert job_of(make.seen(make.job(), conditions=make.ended(kind))).running

    def test_a_condition_that_is_not_true_says_nothing(self) -> None:
        assert job_of(make.seen(make.job(), conditions=make.ended("Failed", status="False"))).running

    def test_a_job_without_a_status_yet(self) -> None:
        job = make.seen(make.job())
        del job["status"]
        assert job_of(job).running


class TestSuspended:
    def test_by_a_queue(self) -> None:
        found = job_of(make.seen(make.job(queue="gpus")))
        assert (found.running, found.suspended) == (True, True)
        assert found.message == "suspended by queue gpus"

    def test_by_somebody(self) -> None:
        assert job_of(make.seen(make.job(), suspend=True)).message == "suspended"

    def test_as_long_as_the_job_controller_has_not_seen_that_it_was_let_go(self) -> None:
        job = make.seen(make.job(queue="gpus"), suspend=False, conditions=make.ended("Suspended"))
        assert job_of(job).suspended

    def test_no_more_once_it_is_let_go_or_has_ended(self) -> None:
        assert not job_of(make.seen(make.job(queue="gpus"), suspend=False)).suspended
        assert not job_of(make.seen(make.job(queue="gpus"), conditions=make.ended())).suspended


class TestExits:
    def test_of_workers_that_ended_for_good(self) -> None:
        pods = [make.failed(1, index=0), make.failed(75, index=1), make.pod("Succeeded", index=2)]
        assert sorted(job_of(failed(), pods).exits) == [1, 75]

    def test_each_worker_counts_with_its_newest_attempt(self) -> None:
        pods = [make.failed(75, second=40), make.failed(44, second=10), make.failed(1, second=20)]
        assert job_of(failed(), pods).exits == (75,)

    def test_a_worker_that_succeeded_in_the_end_has_not_failed(self) -> None:
        pods = [make.failed(1, index=0), make.pod("Succeeded", index=0), make.failed(43, index=1)]
        assert job_of(failed(), pods).exits == (43,)

    def test_disrupted_pods_do_not_count(self) -> None:
        pods = [disrupted(make.failed(137, "killed", second=50)), make.failed(1, "boom", index=1)]
        assert (job_of(failed(), pods).exits, job_of(failed(), pods).message) == ((1,), "boom")

    def test_nor_do_those_that_somebody_deleted(self) -> None:
        pods = [make.failed(143, "stopped", deleted=True, second=50), make.failed(42, "conv1 holds NaN", index=1)]
        assert (job_of(failed(), pods).exits, job_of(failed(), pods).message) == ((42,), "conv1 holds NaN")

    def test_none_while_it_runs(self) -> None:
        assert job_of(running(failed=1), [make.failed(1)]).exits == ()

    def test_a_pod_that_never_ran_has_no_exit_code(self) -> None:
        pod = make.pod("Failed", reason="OutOfcpu", message="Node didn't have enough resource: cpu")
        found = job_of(failed(), [pod])
        assert found.exits == ()
        assert found.message == "Node didn't have enough resource: cpu"

    def test_a_sidecars_end_is_not_the_workers(self) -> None:
        pod = make.failed(1, "boom")
        sidecar = {"name": "proxy", "state": {"terminated": {"exitCode": 42, "message": "bye"}}}
        pod["status"]["containerStatuses"].insert(0, sidecar)
        assert job_of(failed(), [pod]).exits == (1,)

    def test_a_job_without_indices(self) -> None:
        job = make.seen(make.job(Phase.VALIDATE), failed=3, conditions=make.ended())
        pods = [make.failed(1, index=None, second=n, name=f"pod-{n}") for n in (1, 3, 2)]
        assert job_of(job, pods).exits == (1,)


class TestOutOfMemory:
    def test_the_kubelet_says_it(self) -> None:
        found = job_of(failed(), [make.failed(137, reason="OOMKilled", memory="64M")])
        assert found.out_of_memory == "a worker was OOMKilled at its limit of 64 MB"
        assert found.exits == (137,)

    @pytest.mark.parametrize(
        ("quantity", "said"), [("2G", "2000 MB"), ("2147483648", "2147 MB"), ("100500k", "100 MB"), ("2Gi", "2Gi")]
    )
    def test_the_limit_is_in_mb_however_the_api_server_writes_it(self, quantity: str, said: str) -> None:
        found = job_of(failed(), [make.failed(137, reason="OOMKilled", memory=quantity)])
        assert found.out_of_memory.endswith(f"its limit of {said}")

    def test_the_worker_says_it_itself(self) -> None:
        found = job_of(failed(), [make.failed(44, "memory ran out; raise analysis_memory_limit")])
        assert found.out_of_memory == "memory ran out; raise analysis_memory_limit (the limit is 2000 MB)"

    def test_a_kill_for_another_reason_is_not_it(self) -> None:
        assert job_of(failed(), [make.failed(137, "Killed")]).out_of_memory == ""

    def test_it_is_known_while_others_still_try(self) -> None:
        assert job_of(running(failed=1), [make.failed(137, reason="OOMKilled")]).out_of_memory


class TestMessage:
    def test_the_last_line_of_who_failed_last(self) -> None:
        pods = [make.failed(1, "Traceback …\nValueError: new\n", index=0, second=30), make.failed(1, "old", index=1)]
        assert job_of(failed(), pods).message == "ValueError: new"

    def test_bad_input_is_told_whoever_failed_after_it(self) -> None:
        pods = [make.failed(42, "conv1.weight holds NaN", index=0), make.failed(75, "no answer", index=1, second=9)]
        assert job_of(failed(), pods).message == "conv1.weight holds NaN"

    def test_what_the_job_says_where_no_pod_is_left(self) -> None:
        job = failed(message="Job was active longer than specified deadline")
        assert job_of(job).message == "Job was active longer than specified deadline"

    def test_a_complete_job_has_nothing_to_say(self) -> None:
        job = make.seen(make.job(), succeeded=4, conditions=make.ended("Complete", "Reached expected number"))
        assert job_of(job).message == ""

    @pytest.mark.parametrize("reason", ["ImagePullBackOff", "CreateContainerConfigError", "InvalidImageName"])
    def test_why_a_container_does_not_start(self, reason: str) -> None:
        pods = [make.waiting("ContainerCreating", index=0, name="a"), make.waiting(reason, "because", name="b")]
        assert job_of(running(ready=0), pods).message == f"{reason}: because"

    def test_why_no_node_takes_it(self) -> None:
        said = "0/1 nodes are available: 1 Insufficient memory."
        condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": said}
        assert job_of(running(ready=0), [make.pod("Pending", conditions=[condition])]).message == said

    def test_why_no_pod_was_made(self) -> None:
        events = [make.warning("old", second=1), make.warning("exceeded quota: compute", second=9)]
        assert job_of(running(active=0, ready=0), [], events).message == "exceeded quota: compute"

    def test_events_of_every_age_of_the_api_are_ordered(self) -> None:
        fields = {"lastTimestamp": None, "eventTime": "2026-01-01T12:00:30.123456Z"}
        series = {**fields, "series": {"count": 3, "lastObservedTime": "2026-01-01T12:00:50.000000Z"}}
        events = [make.warning("b", **fields), make.warning("c", **series), make.warning("a", second=20)]
        assert job_of(running(active=0, ready=0), [], events).message == "c"

    def test_what_is_no_warning_explains_nothing(self) -> None:
        events = [{**make.warning("Created pod: x"), "type": "Normal"}]
        assert job_of(running(active=0, ready=0), [], events).message == ""

    def test_a_worker_that_runs_says_nothing(self) -> None:
        assert job_of(running(), [make.pod("Running", state={"running": {}})]).message == ""


class TestWhatMustBeRead:
    @pytest.mark.parametrize(
        ("status", "expected"),
        [
            ({"active": 4, "ready": 4}, False),
            ({"active": 4}, True),
            ({"active": 4, "ready": 3}, True),
            ({"active": 3, "ready": 3, "succeeded": 1}, False),
            ({"active": 3, "ready": 3, "failed": 1}, True),
            ({"failed": 1, "conditions": make.ended()}, True),
            ({"succeeded": 4, "conditions": make.ended("Complete")}, False),
            ({}, False),
        ],
    )
    def test_pods_only_where_the_job_does_not_say_enough(self, status: dict[str, Any], expected: bool) -> None:
        assert needs_pods(make.seen(make.job(), **status)) is expected

    def test_a_suspended_job_is_understood(self) -> None:
        assert not needs_pods(make.seen(make.job(queue="gpus")))
        assert events_from(make.seen(make.job(queue="gpus")), []) is None

    def test_events_of_the_job_while_it_has_no_pod(self) -> None:
        assert events_from(make.seen(make.job()), []) == "job-uid"

    def test_events_of_a_pod_that_hangs_without_a_word(self) -> None:
        pods = [make.waiting("ImagePullBackOff", name="a"), make.waiting("ContainerCreating", name="b")]
        assert events_from(running(ready=0), pods) == "b-uid"

    def test_none_where_the_pods_say_it(self) -> None:
        assert events_from(running(ready=0), [make.waiting("ImagePullBackOff")]) is None

    @pytest.mark.parametrize("status", [{"ready": 1}, {"succeeded": 1}, {"failed": 1}, {"conditions": make.ended()}])
    def test_none_once_a_worker_has_begun_or_all_have_ended(self, status: dict[str, Any]) -> None:
        assert events_from(make.seen(make.job(), **status), []) is None
