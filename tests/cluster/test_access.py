"""Who may do what to a run: worker pods with an identity that cannot write the log, tenants with foreign prefixes."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from cluster import seaweedfs
from cluster.release import Release
from cluster.seaweedfs import SeaweedFS
from cluster.tenant import Tenant, policy
from leyline import layout
from leyline.records import Prune
from leyline.store import Refused


def test_workers_cannot_write_the_log(store: SeaweedFS, new_tenant: Callable[..., Tenant], release: Release) -> None:
    tenant = new_tenant(seaweedfs.GUARDED)
    tenant.apply(seaweedfs.secret("workers", seaweedfs.WORKER))
    made = policy(tenant.store)
    made["spec"]["store"]["workerCredentialsSecretRef"] = {"name": "workers"}
    tenant.apply(made)
    status = tenant.ended(tenant.cycle())

    assert status["outcome"] == "Committed"
    assert len(tenant.records(Prune)) == 1
    as_worker = store.run(seaweedfs.GUARDED, seaweedfs.WORKER)
    next_ = layout.record(tenant.log.tail().record.n + 1)
    with pytest.raises(Refused):
        as_worker.put_if_absent(next_, b"{}")
    with pytest.raises(Refused):
        as_worker.put_if_absent(layout.checkpoint("mine", "model.safetensors"), b"{}")


def test_a_tenant_that_names_a_foreign_prefix(tenant: Tenant) -> None:
    """The release allows s3://emrakul to all, and nothing else."""
    cycle = {
        "apiVersion": "emrakul.dev/v1alpha1",
        "kind": "PruningCycle",
        "metadata": {"name": "curious"},
        "spec": {"checkpoint": "s3://emrakul-secrets/run/checkpoints/100-1-0f3a9b2c"},
    }
    tenant.apply(cycle)
    status = tenant.ended("curious")

    assert (status["outcome"], status["reason"]) == ("Failed", "RunNotAllowed")
    assert "s3://emrakul-secrets/run" in status["message"] and "allowedRunPrefixes" in status["message"]
    assert not tenant.list("jobs")
