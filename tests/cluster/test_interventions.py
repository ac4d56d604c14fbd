"""What people do to a cycle while it runs: each ends as they wanted, and nothing hangs."""

from __future__ import annotations

import time
from collections.abc import Callable

from cluster.cluster import Cluster
from cluster.processes import wait_until
from cluster.release import Release
from cluster.tenant import POLICY, Body, Tenant, policy, stays
from leyline.records import Admit, Outcome, Prune
from runs import trainer


def test_rollback_by_the_policy_and_its_end(new_tenant: Callable[..., Tenant], release: Release) -> None:
    tenant = new_tenant(masked=True)
    tip = tenant.log.tail().state.tip
    tenant.apply(policy(tenant.store, rollback={"id": "bad-day", "to": "baseline"}))

    done = tenant.until("the rollback", lambda: status_of_policy(tenant).get("rollback", {}).get("record"))
    state = tenant.log.tail().state
    assert state.rolled_back == done
    assert state.tip != tip
    told = tenant.until("the hold", lambda: status_of_policy(tenant).get("hold") and status_of_policy(tenant))
    assert told["hold"] == "bad-day"
    assert "resumeAfterRollback: bad-day" in told["message"]
    trainer(tenant.store).publish(300)  # it was restarted from the tip
    held = tenant.ended(tenant.cycle())
    assert (held["outcome"], held["reason"]) == ("ValidatedOnly", "HeldAfterRollback")
    tenant.until("the run stands", lambda: status_of_policy(tenant).get("recovery") == "passed", seconds=120)

    tenant.patch("pruningpolicy", POLICY, {"resumeAfterRollback": "bad-day"})
    tenant.until("the hold is over", lambda: "hold" not in status_of_policy(tenant))
    assert tenant.log.tail().state.rolled_back == done, "once for each id"


def test_a_suspended_cycle_has_no_workers_and_goes_on_later(tenant: Tenant) -> None:
    tenant.apply(policy(tenant.store))
    name = tenant.cycle()
    first = tenant.job("analyse")["metadata"]["uid"]
    tenant.patch("pruningcycle", name, {"suspend": True})
    tenant.until("it is suspended", lambda: tenant.status(name)["state"] == "Suspended")
    tenant.until("its Jobs are gone", lambda: not tenant.list("jobs"))
    stays("no Job", lambda: not tenant.list("jobs"), seconds=5)

    tenant.patch("pruningcycle", name, {"suspend": False})
    status = tenant.ended(name)

    assert (status["outcome"], status["reason"]) == ("Committed", "Pruned")
    created = [
        event["involvedObject"]["uid"] for event in tenant.list("events") if event["reason"] == "SuccessfulCreate"
    ]
    assert first in created and len(set(created)) >= 3
    assert len(tenant.records(Prune)) == 1


def test_a_deleted_cycle_ends_and_is_not_made_again(tenant: Tenant) -> None:
    tenant.apply(policy(tenant.store))
    name = tenant.cycle()
    tenant.job("analyse")
    tenant.kubectl("delete", "pruningcycle", name, "--timeout=20s")

    tenant.until("its Jobs and pods are collected", lambda: not tenant.list("jobs,pods"))
    ended = tenant.until("the log says so", lambda: tenant.records(Outcome), seconds=150)
    assert [record.reason for record in ended] == ["Deleted"]
    assert not tenant.records(Prune)
    stays("no other cycle", lambda: not tenant.list("pruningcycles"), seconds=12)


def test_cycles_of_a_deleted_policy_end_as_they_began_and_no_more_come(tenant: Tenant) -> None:
    tenant.apply(policy(tenant.store))
    name = tenant.cycle()
    tenant.job("analyse")
    tenant.kubectl("delete", "pruningpolicy", POLICY, "--timeout=20s")

    status = tenant.ended(name)
    assert (status["outcome"], status["frozen"]["store"]["credentialsSecretRef"]["name"]) == ("Committed", "store")

    again = trainer(tenant.store)
    again.run.sync()
    again.publish(300)
    stays(
        "no cycle for the newer checkpoint",
        lambda: [one["metadata"]["name"] for one in tenant.list("pruningcycles")] == [name],
        seconds=12,
    )
    assert len(tenant.records(Admit)) == 1


def test_a_deleted_namespace_goes_at_once(cluster: Cluster, tenant: Tenant, release: Release) -> None:
    tenant.apply(policy(tenant.store))
    tenant.cycle()
    tenant.job("analyse")
    before = release.restarts()
    began = time.monotonic()
    cluster.kubectl("delete", "namespace", tenant.namespace, "--timeout=60s")

    assert time.monotonic() - began < 60
    assert not tenant.records(Prune)
    assert release.restarts() == before
    wait_until("the operator is ready", lambda: release.health()["ready"], seconds=30)


def status_of_policy(tenant: Tenant) -> Body:
    return tenant.get("pruningpolicy", POLICY).get("status") or {}
