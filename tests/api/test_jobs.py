"""The Jobs that are built are ones that a real API server takes, and a real Job controller runs as they are meant."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import jobs as make
from cluster.alone import controllers
from cluster.apiserver import ApiServer
from cluster.processes import wait_until
from cluster.programs import CommandFailed
from emrakul.api.policy import KeyRef, SecretRef, StoreSpec
from emrakul.core.snapshot import Phase
from emrakul.runtime.jobstatus import events_from, job_of, needs_pods
from leyline import exits

EVERYTHING = {
    "config": make.config(
        operatorClass="blue",
        keys={"trustSecret": "trust", "signingKeySecret": "sign", "dataKeySecret": "data"},
        workers={"serviceAccountName": "worker"},
    ),
    "store": StoreSpec(
        endpoint="https://s3.example.org",
        region="eu-1",
        credentials_secret_ref=SecretRef(name="s3"),
        ca_bundle_ref=KeyRef(name="ca"),
    ),
    "queue": "gpus",
    "overrides": make.overrides(
        tolerations=[{"key": "spot", "operator": "Exists"}],
        nodeSelector={"disk": "fast"},
        affinity={"nodeAffinity": {}},
        topologySpreadConstraints=[{"topologyKey": "zone", "maxSkew": 1, "whenUnsatisfiable": "ScheduleAnyway"}],
        labels={"team": "vision"},
        annotations={"sidecar.istio.io/inject": "false"},
        imagePullSecrets=[{"name": "registry"}],
        resources={"requests": {"cpu": "2"}, "limits": {"ephemeral-storage": "2Gi"}},
        env=[{"name": "HTTPS_PROXY", "value": "http://proxy:3128"}],
        volumes=[{"name": "extra", "configMap": {"name": "extra"}}],
        volumeMounts=[{"name": "extra", "mountPath": "/extra"}],
        securityContext={"runAsUser": 1000, "supplementalGroups": [2000]},
    ),
}
WITHOUT_USER = {"overrides": make.overrides(securityContext={"runAsUser": None, "runAsGroup": None, "fsGroup": None})}
VARIANTS = [(phase, values) for phase in Phase for values in ({}, EVERYTHING, WITHOUT_USER)]


@pytest.fixture
def namespace(server: ApiServer) -> str:
    """One that takes only pods that keep to "restricted"."""
    name = f"jobs-{uuid.uuid4().hex[:8]}"
    server.kubectl("create", "namespace", name)
    server.kubectl("label", "namespace", name, "pod-security.kubernetes.io/enforce=restricted")
    return name


def owned(job: make.Body, namespace: str) -> make.Body:
    return {**job, "metadata": {**job["metadata"], "namespace": namespace}}


def dry_run(server: ApiServer, namespace: str, body: make.Body) -> make.Body:
    strict = ("--dry-run=server", "--validate=strict", "--output=json", f"--namespace={namespace}")
    found: make.Body = json.loads(server.kubectl("create", "--filename=-", *strict, input=json.dumps(body)))
    return found


def pod_from(job: make.Body) -> make.Body:
    template = job["spec"]["template"]
    return {"apiVersion": "v1", "kind": "Pod", **template, "metadata": {**template["metadata"], "name": "worker"}}


@pytest.mark.parametrize(("phase", "values"), VARIANTS)
def test_every_job_and_its_pods_are_taken(
    server: ApiServer, namespace: str, phase: Phase, values: dict[str, Any]
) -> None:
    job = owned(make.job(phase, **{**values}), namespace)
    dry_run(server, namespace, job)
    dry_run(server, namespace, pod_from(job))


@pytest.mark.parametrize("values", [{}, EVERYTHING, WITHOUT_USER])
def test_so_is_every_recheck(server: ApiServer, namespace: str, values: dict[str, Any]) -> None:
    job = owned(make.recheck(**values), namespace)
    dry_run(server, namespace, job)
    dry_run(server, namespace, pod_from(job))


def test_the_namespace_would_refuse_a_pod_that_is_not_restricted(server: ApiServer, namespace: str) -> None:
    pod = pod_from(owned(make.job(), namespace))
    del pod["spec"]["containers"][0]["securityContext"]["capabilities"]
    with pytest.raises(CommandFailed, match="violates PodSecurity"):
        dry_run(server, namespace, pod)


def test_the_longest_name_that_is_built_is_taken(server: ApiServer, namespace: str) -> None:
    job = make.job(Phase.APPLY, step=10**9 - 1, launch=99, workers=1000, owner=make.owner("c" * 63))
    dry_run(server, namespace, owned(job, namespace))


class Played:
    """A namespace in which the real Job controller works, and the test plays scheduler and kubelet."""

    def __init__(self, server: ApiServer, namespace: str) -> None:
        self.server = server
        self.namespace = namespace

    def create(self, job: make.Body) -> str:
        """Its name, once it is made."""
        body = owned(job, self.namespace)
        self.server.kubectl("create", "--filename=-", "--validate=strict", input=json.dumps(body))
        return str(body["metadata"]["name"])

    def job(self, name: str) -> make.Body:
        return self._get("job", name)

    def pods(self, name: str) -> list[make.Body]:
        found: list[make.Body] = self._get("pods", f"--selector=batch.kubernetes.io/job-name={name}")["items"]
        return found

    def events(self, uid: str) -> list[make.Body]:
        found: list[make.Body] = self._get("events", f"--field-selector=involvedObject.uid={uid}")["items"]
        return found

    def pods_of(self, name: str, count: int) -> list[make.Body]:
        wait_until(f"{name} has {count} pods", lambda: len(self.pods(name)) == count, seconds=60)
        return self.pods(name)

    def end(self, pod: make.Body, code: int, said: str = "", *, reason: str = "Error", disrupted: bool = False) -> None:
        """What a kubelet writes when a container has ended; `disrupted` as an eviction does."""
        phase = "Failed" if code else "Succeeded"
        terminated = {"exitCode": code, "reason": reason, "message": said, "finishedAt": "2026-01-01T12:00:00Z"}
        status: make.Body = {"phase": phase, "containerStatuses": [_container(pod, terminated)]}
        if disrupted:
            status["conditions"] = [{"type": "DisruptionTarget", "status": "True", "reason": "PreemptionByScheduler"}]
        place = (f"--namespace={self.namespace}", "--subresource=status", "--type=merge")
        self.server.kubectl(
            "patch", "pod", pod["metadata"]["name"], *place, f"--patch={json.dumps({'status': status})}"
        )

    def wait(self, name: str, what: str, fits: Callable[[make.Body], bool]) -> make.Body:
        wait_until(what, lambda: fits(self.job(name)), seconds=60)
        return self.job(name)

    def _get(self, *arguments: str) -> make.Body:
        text = self.server.kubectl("get", *arguments, f"--namespace={self.namespace}", "--output=json")
        found: make.Body = json.loads(text)
        return found


def _container(pod: make.Body, terminated: make.Body) -> make.Body:
    image = pod["spec"]["containers"][0]["image"]
    return {
        "name": "worker",
        "image": image,
        "imageID": "",
        "ready": False,
        "restartCount": 0,
        "state": {"terminated": terminated},
    }


@pytest.fixture(scope="module")
def job_controller(server: ApiServer) -> Iterator[None]:
    with controllers(server, "job-controller"):
        yield


@pytest.fixture
def played(server: ApiServer, namespace: str, job_controller: None) -> Played:
    return Played(server, namespace)


def index(pod: make.Body) -> int:
    return int(pod["metadata"]["annotations"]["batch.kubernetes.io/job-completion-index"])


def by_index(pods: list[make.Body]) -> list[make.Body]:
    return sorted(pods, key=index)


def terminal(job: make.Body) -> bool:
    return not job_of(job).running


class TestWithTheJobController:
    def test_pods_keep_to_restricted_and_know_their_number(self, played: Played) -> None:
        name = played.create(make.job(workers=2))
        first, second = by_index(played.pods_of(name, 2))
        for pod in (first, second):
            (container,) = pod["spec"]["containers"]
            (variable,) = (one for one in container["env"] if one["name"] == "JOB_COMPLETION_INDEX")
            assert "job-completion-index" in variable["valueFrom"]["fieldRef"]["fieldPath"]
            assert "$(JOB_COMPLETION_INDEX)" in container["args"]

    def test_bad_input_ends_the_job_at_once(self, played: Played) -> None:
        name = played.create(make.job(workers=2))
        bad, _ = by_index(played.pods_of(name, 2))
        played.end(bad, exits.BAD_INPUT, "conv1.weight holds NaN")
        found = job_of(played.wait(name, "the job has ended", terminal), played.pods(name))
        assert (found.exits, found.message) == ((exits.BAD_INPUT,), "conv1.weight holds NaN")

    def test_a_worker_that_gave_up_is_not_tried_again_and_the_others_go_on(self, played: Played) -> None:
        name = played.create(make.job(workers=2))
        gave_up, other = by_index(played.pods_of(name, 2))
        played.end(gave_up, exits.GAVE_UP, "request 0-1 died three times")
        job = played.wait(name, "index 0 has failed", lambda job: job["status"].get("failedIndexes") == "0")
        assert job_of(job).running
        played.end(other, exits.DONE)
        job = played.wait(name, "the job has ended", terminal)
        found = job_of(job, played.pods(name))
        assert (found.exits, found.message) == ((exits.GAVE_UP,), "request 0-1 died three times")

    def test_a_disrupted_worker_begins_again_and_it_costs_nothing(self, played: Played) -> None:
        name = played.create(make.job(workers=1))
        (pod,) = played.pods_of(name, 1)
        played.end(pod, 137, disrupted=True)
        played.pods_of(name, 2)
        counts = [
            pod["metadata"]["annotations"]["batch.kubernetes.io/job-index-failure-count"] for pod in played.pods(name)
        ]
        assert counts == ["0", "0"]

    def test_memory_is_told_with_its_limit_while_the_next_attempt_begins(self, played: Played) -> None:
        name = played.create(make.job(workers=1))
        (pod,) = played.pods_of(name, 1)
        played.end(pod, 137, reason="OOMKilled")
        job = played.wait(name, "the failure counts", lambda job: bool(job["status"].get("failed")))
        assert needs_pods(job)
        found = job_of(job, played.pods(name))
        assert (found.running, found.exits) == (True, ())
        assert found.out_of_memory == "a worker was OOMKilled at its limit of 2000 MB"

    def test_a_quota_that_forbids_the_pods_is_told(self, played: Played) -> None:
        _limit_memory(played, "1M")
        name = played.create(make.job(workers=2))
        wait_until("the job says it", lambda: bool(_told(played, name)), seconds=60)
        assert "exceeded quota" in _told(played, name)

    def test_a_queue_holds_the_job_until_it_lets_it_go(self, played: Played) -> None:
        name = played.create(make.job(queue="gpus", workers=1))
        job = played.wait(name, "the controller saw it", lambda job: bool(job["status"].get("conditions")))
        held = job_of(job)
        assert (held.suspended, held.message) == (True, "suspended by queue gpus")
        place = (f"--namespace={played.namespace}", "--type=merge")
        played.server.kubectl("patch", "job", name, *place, '--patch={"spec":{"suspend":false}}')
        played.pods_of(name, 1)
        job = played.wait(name, "it has a start time", lambda job: bool(job["status"].get("startTime")))
        assert not job_of(job).suspended


def _limit_memory(played: Played, hard: str) -> None:
    """A quota, and what the quota controller writes of it: before that all pods are refused for another reason."""
    place = f"--namespace={played.namespace}"
    played.server.kubectl("create", "quota", "memory", f"--hard=requests.memory={hard}", place)
    status = json.dumps({"status": {"hard": {"requests.memory": hard}, "used": {"requests.memory": "0"}}})
    patch = ("--subresource=status", "--type=merge", f"--patch={status}")
    played.server.kubectl("patch", "quota", "memory", place, *patch)


def _told(played: Played, name: str) -> str:
    job = played.job(name)
    source = events_from(job, played.pods(name))
    return job_of(job, [], played.events(source)).message if source else ""
