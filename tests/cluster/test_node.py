"""The cluster is a real one: what the operator counts on happens in it."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pytest

from cluster import registry
from cluster.cluster import Cluster
from cluster.debian import BUSYBOX
from cluster.processes import wait_until


@pytest.fixture(scope="session")
def busybox(cluster: Cluster) -> str:
    return cluster.publish(registry.image_from_scratch("emrakul-tests/busybox:1", BUSYBOX))


@pytest.fixture
def namespace(cluster: Cluster) -> Iterator[str]:
    name = f"test-{uuid.uuid4().hex[:8]}"
    cluster.kubectl("create", "namespace", name)
    yield name
    cluster.kubectl("delete", "namespace", name, "--wait=false")


@pytest.fixture
def job(cluster: Cluster, namespace: str, busybox: str) -> Callable[..., Mapping[str, Any]]:
    def run(script: str, *, until: str, memory: str = "32Mi", **spec: object) -> Mapping[str, Any]:
        """The Job `probe` once its condition `until` is true; it runs `script` in busybox's shell."""
        manifest = job_manifest(script, image=busybox, memory=memory, spec=spec)
        cluster.kubectl("create", f"--namespace={namespace}", "--filename=-", input=json.dumps(manifest))
        try:
            cluster.kubectl(
                "wait", "job/probe", f"--namespace={namespace}", f"--for=condition={until}", "--timeout=60s"
            )
        except RuntimeError as error:
            error.add_note(cluster.kubectl("describe", "pods", f"--namespace={namespace}"))
            raise
        return get(cluster, namespace, "job/probe")

    return run


def job_manifest(script: str, *, image: str, memory: str, spec: Mapping[str, object]) -> Mapping[str, object]:
    container = {
        "name": "probe",
        "image": image,
        "command": ["/busybox", "sh", "-c", script],
        "resources": {"requests": {"cpu": "10m", "memory": memory}, "limits": {"memory": memory}},
        "securityContext": {"runAsNonRoot": True, "runAsUser": 65532, "readOnlyRootFilesystem": True},
    }
    template = {"spec": {"restartPolicy": "Never", "containers": [container]}}
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": "probe"},
        "spec": {"template": template, **spec},
    }


def get(cluster: Cluster, namespace: str, what: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(cluster.kubectl("get", what, f"--namespace={namespace}", "--output=json"))
    return found


def logs(cluster: Cluster, namespace: str, what: str) -> Sequence[str]:
    return cluster.kubectl("logs", what, f"--namespace={namespace}").splitlines()


def test_a_pod_resolves_a_service(cluster: Cluster, namespace: str, job: Callable[..., Mapping[str, Any]]) -> None:
    cluster.kubectl("create", "service", "clusterip", "weed", "--tcp=8333", f"--namespace={namespace}")
    address = get(cluster, namespace, "service/weed")["spec"]["clusterIP"]

    job(f"/busybox nslookup weed.{namespace}.svc.cluster.local", until="complete")

    assert any(line.endswith(address) for line in logs(cluster, namespace, "job/probe"))


def test_a_pod_reaches_the_api_server_by_its_service(job: Callable[..., Mapping[str, Any]]) -> None:
    """By name and through the service's address: DNS, kube-proxy and the bridge all have their part."""
    job("/busybox nc -w 5 kubernetes.default.svc.cluster.local 443 </dev/null", until="complete")


def test_an_indexed_job_ends_each_index_by_itself(
    cluster: Cluster, namespace: str, job: Callable[..., Mapping[str, Any]]
) -> None:
    give_up = {"action": "FailIndex", "onExitCodes": {"operator": "In", "values": [3]}}
    done = job(
        'echo "index $JOB_COMPLETION_INDEX"; [ "$JOB_COMPLETION_INDEX" != 1 ] || exit 3',
        until="failed",
        completionMode="Indexed",
        completions=3,
        parallelism=3,
        backoffLimitPerIndex=2,
        podReplacementPolicy="Failed",
        podFailurePolicy={"rules": [give_up]},
    )["status"]

    assert done["completedIndexes"] == "0,2"
    assert done["failedIndexes"] == "1"
    assert done["failed"] == 1, "the exit code says that trying again is of no use"
    assert logs(cluster, namespace, "--selector=batch.kubernetes.io/job-completion-index=2") == ["index 2"]


def test_a_pod_over_its_memory_limit_is_killed(
    cluster: Cluster, namespace: str, job: Callable[..., Mapping[str, Any]]
) -> None:
    job("/busybox tail /dev/zero; exit $?", until="failed", backoffLimit=0)

    (pod,) = get(cluster, namespace, "pods")["items"]
    (container,) = pod["status"]["containerStatuses"]
    assert container["state"]["terminated"]["reason"] == "OOMKilled"


def test_the_api_server_may_go_away_for_a_while(
    cluster: Cluster, namespace: str, job: Callable[..., Mapping[str, Any]]
) -> None:
    cluster.stop_component("kube-apiserver")
    with pytest.raises(RuntimeError, match="refused"):
        cluster.kubectl("get", "--raw=/readyz")
    cluster.start_component("kube-apiserver")

    job("echo still here", until="complete")
    wait_until("its log", lambda: list(logs(cluster, namespace, "job/probe")) == ["still here"], seconds=20)
