"""The chart over its life: tested, upgraded, removed and installed again while cycles live."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest

from cluster.cluster import Cluster
from cluster.programs import CommandFailed
from cluster.release import Images, Release
from cluster.tenant import Tenant, policy, stays
from leyline.records import Outcome, Prune

CRDS = ("pruningcycles.emrakul.dev", "pruningpolicies.emrakul.dev")


def test_helm_test_asks_the_operator_for_its_health(release: Release) -> None:
    assert "Phase:          Succeeded" in release.test()


def test_health_and_metrics_answer_through_the_service(release: Release, tenant: Tenant) -> None:
    tenant.apply(policy(tenant.store))
    tenant.ended(tenant.cycle())

    health = release.health()
    assert health["ready"] and not health["watch"]["deaf"]
    assert health["store"]["reachable"] and health["store"]["answering"] >= 1
    assert health["slos"].keys() == {"analysisSuccess", "checkpointOverheadSeconds", "trainingTimeShare"}
    assert 'emrakul_cycles_total{outcome="Committed",reason="Pruned"}' in release.metrics()


def test_an_upgrade_in_the_middle_of_a_cycle(release: Release, tenant: Tenant) -> None:
    tenant.apply(policy(tenant.store))
    name = tenant.cycle()
    tenant.job("analyse")
    release.install(logFormat="text")

    assert tenant.ended(name)["outcome"] == "Committed"
    assert len(tenant.records(Prune)) == 1
    assert not release.log().startswith("{"), "it is another operator than before"


def test_uninstalled_in_the_middle_and_installed_under_another_name(
    cluster: Cluster, images: Images, release: Release, tenant: Tenant
) -> None:
    tenant.apply(policy(tenant.store))
    name = tenant.cycle()
    tenant.job("analyse")
    began = time.monotonic()
    release.uninstall()
    assert time.monotonic() - began < 60, "nothing hangs"

    log = tenant.log.tail().record.n
    stays("nothing is committed", lambda: tenant.log.tail().record.n == log, seconds=10)
    assert "outcome" not in tenant.status(name)
    for crd in CRDS:
        cluster.kubectl("get", "crd", crd)

    successor = Release(cluster, images, "pruner", "pruner-system")
    successor.install()
    try:
        assert tenant.ended(name)["outcome"] == "Committed"
        assert len(tenant.records(Prune)) == 1 and not tenant.records(Outcome)
        assert successor.service == "pruner-emrakul"
    finally:
        successor.uninstall()
        release.install()


@pytest.fixture
def narrow(cluster: Cluster, images: Images) -> Iterator[Release]:
    """Not installed yet; beside the operator of all tests it is one of a class of its own."""
    release = Release(cluster, images, "emrakul-narrow", "narrow-system", values={"operatorClass": "narrow"})
    yield release
    release.uninstall()


def test_an_operator_of_one_namespace(
    cluster: Cluster, narrow: Release, release: Release, new_tenant: Callable[..., Tenant]
) -> None:
    ours, other = new_tenant(), new_tenant()
    narrow.install(namespaces=[ours.namespace], allowedRunPrefixes={})
    for tenant in (ours, other):
        tenant.apply(policy(tenant.store, operatorClass="narrow"))

    assert ours.ended(ours.cycle())["outcome"] == "Committed"
    assert not other.list("pruningcycles"), "nobody watches it there"
    account = f"--as=system:serviceaccount:{narrow.namespace}:emrakul-narrow"
    assert may(ours, "create", "jobs", account)
    assert not may(other, "list", "pruningcycles", account)
    assert not may(ours, "create", "pods", account)
    assert "fault of ours" not in narrow.log()


def may(tenant: Tenant, verb: str, kind: str, account: str) -> bool:
    try:
        return tenant.kubectl("auth", "can-i", verb, kind, account).strip() == "yes"
    except CommandFailed as refused:
        if refused.code == 1 and not refused.error.startswith("error"):
            return False
        raise
