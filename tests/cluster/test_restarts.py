"""The operator or the API server goes away in the middle of a cycle: the same end, and each Job was made once."""

from __future__ import annotations

import time
from collections import Counter

from cluster.cluster import Cluster
from cluster.release import Release
from cluster.tenant import Tenant, policy
from leyline.records import Outcome, Prune


def test_the_operator_is_killed_once_in_each_phase(tenant: Tenant, release: Release, tmp_path) -> None:
    tenant.apply(policy(tenant.store))
    name = tenant.cycle()
    said = release.kill()
    for phase in ("analyse", "apply", "validate"):
        tenant.job(phase)
        said += release.kill()
    status = tenant.ended(name, seconds=240)
    said += release.kill()

    assert (status["outcome"], status["reason"]) == ("Committed", "Pruned")
    assert once(jobs_made(tenant)), jobs_made(tenant)
    assert len(tenant.records(Prune)) == 1
    release.wait_ready()
    tenant.until("the Jobs of the cycle go", lambda: not tenant.list("jobs"))
    assert tenant.status(name) == status
    assert not faults(said + release.log())


def test_the_api_server_restarts(cluster: Cluster, tenant: Tenant, release: Release) -> None:
    tenant.apply(policy(tenant.store))
    name = tenant.cycle()
    tenant.job("analyse")
    before = release.restarts()
    cluster.stop_component("kube-apiserver")
    time.sleep(5)
    cluster.start_component("kube-apiserver")
    status = tenant.ended(name, seconds=240)

    assert (status["outcome"], status["reason"]) == ("Committed", "Pruned")
    assert once(jobs_made(tenant)), jobs_made(tenant)
    assert len(tenant.records(Prune)) == 1
    assert not tenant.records(Outcome)
    assert release.restarts() == before
    assert not faults(release.log())


def jobs_made(tenant: Tenant) -> Counter[str]:
    """How often each Job had its first pod, by the Jobs' own events."""
    made = {
        (event["involvedObject"]["name"], event["involvedObject"]["uid"])
        for event in tenant.list("events")
        if event["involvedObject"]["kind"] == "Job"
    }
    return Counter(name for name, _ in made)


def once(made: Counter[str]) -> bool:
    return len(made) == 3 and set(made.values()) == {1}


def faults(said: str) -> list[str]:
    return [line for line in said.splitlines() if "a fault of ours" in line or "Traceback" in line]
