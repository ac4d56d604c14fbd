"""What goes wrong in a real cluster: the cycle says so, and the training has lost nothing."""

from __future__ import annotations

from functools import partial

from cluster.tenant import POLICY, Body, Tenant, policy
from leyline.records import Prune

SLOW = {"resources": {"limits": {"cpu": "100m"}}}
"""A worker that takes seconds for what it would do in no time."""


def ends(tenant: Tenant, made: Body) -> Body:
    """The status of the cycle that the policy makes, which committed nothing and left no Job."""
    before = tenant.log.tail().state.tip
    tenant.apply(made)
    name = tenant.cycle()
    status = tenant.ended(name)
    assert tenant.log.tail().state.tip == before
    tenant.until("its Jobs are gone", lambda: not tenant.list("jobs"))
    return status


def running(tenant: Tenant, phase: str) -> list[str]:
    pods = tenant.list("pods", labels=f"emrakul.dev/phase={phase}")
    return [pod["metadata"]["name"] for pod in pods if pod["status"]["phase"] == "Running"]


def pods_made(tenant: Tenant, job: str) -> set[str]:
    """Names of a Job's pods, by the Job's own events."""
    made = [event["message"] for event in tenant.list("events") if event["reason"] == "SuccessfulCreate"]
    return {message for message in made if job in message}


def outcome(status: Body) -> str:
    return f"{status['outcome']}/{status['reason']}"


def test_a_worker_over_its_memory_limit(tenant: Tenant) -> None:
    """Torch alone is more than the least limit that there is."""
    status = ends(tenant, policy(tenant.store, settings={"validationMemoryLimit": "96MB"}))

    assert outcome(status) == "Skipped/OutOfMemory"
    assert "validate: a worker was OOMKilled at its limit of 96 MB" in status["message"]
    assert "validationMemoryLimit" in status["message"]


def test_a_pod_that_can_never_be_scheduled(tenant: Tenant) -> None:
    chosen = policy(
        tenant.store, settings={"startupTimeout": 10}, podOverrides={"nodeSelector": {"disk": "there-is-none"}}
    )
    status = ends(tenant, chosen)

    assert outcome(status) == "Skipped/NotScheduled"
    assert "didn't match Pod's node affinity/selector" in status["message"]


def test_a_quota_that_forbids_the_workers(tenant: Tenant) -> None:
    tenant.kubectl("create", "quota", "none", "--hard=count/pods=0")
    status = ends(tenant, policy(tenant.store, settings={"startupTimeout": 10}))

    assert outcome(status) == "Skipped/NotScheduled"
    assert "exceeded quota: none" in status["message"]


def test_credentials_of_workers_that_do_not_exist(tenant: Tenant) -> None:
    """The pod's own words are in the message."""
    made = policy(tenant.store, settings={"startupTimeout": 10})
    made["spec"]["store"]["workerCredentialsSecretRef"] = {"name": "nowhere"}
    status = ends(tenant, made)

    assert outcome(status) == "Skipped/NotScheduled"
    assert 'secret "nowhere" not found' in status["message"]


def test_a_validator_over_its_time(tenant: Tenant) -> None:
    status = ends(tenant, policy(tenant.store, settings={"validationTimeout": 1}, podOverrides=SLOW))

    assert outcome(status) == "Skipped/ValidationTimeout"
    assert "validate took more than 1 s" in status["message"]


def test_a_candidate_that_the_gate_does_not_let_through(tenant: Tenant) -> None:
    """256 samples cannot show a drop as small as the policy allows."""
    structured = {"safetyConstraints": {"accuracyDropThreshold": "0.0001"}}
    made = policy(tenant.store, settings={"safetyMargin": "0"}, structured=structured)
    made["spec"]["settings"]["structuredPruning"]["progressiveSchedule"] |= dict.fromkeys(
        ("conservativeThreshold", "moderateThreshold", "aggressiveThreshold"), "0.2"
    )
    status = ends(tenant, made)

    assert outcome(status) == "RolledBack/GateInconclusive"
    assert "candidate" in status and "masks" not in status


def test_killed_worker_pods_are_replaced(tenant: Tenant) -> None:
    """With a second analysis worker none would have to be: it would do all the work."""
    tenant.apply(policy(tenant.store, settings={"analysisParallelWorkers": 1}, podOverrides=SLOW))
    name = tenant.cycle()
    for phase in ("analyse", "validate"):
        pod = tenant.until(f"a pod for {phase} runs", partial(running, tenant, phase), seconds=240)[0]
        tenant.kubectl("delete", "pod", pod, "--grace-period=1")  # by force it would go on for its own five

    assert outcome(tenant.ended(name)) == "Committed/Pruned"
    assert len(tenant.records(Prune)) == 1
    assert len(pods_made(tenant, "-a0-0-")) == 2
    assert len(pods_made(tenant, "-v2-0-")) == 2
    assert tenant.get("pruningpolicy", POLICY)["status"]["tip"]["counts"] == {"channel": 3}
