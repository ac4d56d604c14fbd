"""The API server that the other tests count on is a real one, and can go through a disaster."""

from __future__ import annotations

import json
import uuid
from pathlib import Path

import pytest

from cluster.alone import controllers
from cluster.apiserver import ApiServer
from cluster.processes import wait_until
from cluster.programs import CommandFailed


@pytest.fixture
def namespace(server: ApiServer) -> str:
    name = f"test-{uuid.uuid4().hex[:8]}"
    server.kubectl("create", "namespace", name)
    return name


def owned(name: str, *, owner: str, uid: str) -> str:
    reference = {"apiVersion": "v1", "kind": "ConfigMap", "name": owner, "uid": uid, "blockOwnerDeletion": True}
    return json.dumps(
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name, "ownerReferences": [reference]}}
    )


def many(count: int) -> str:
    items = [{"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": f"after-{n}"}} for n in range(count)]
    return json.dumps({"apiVersion": "v1", "kind": "List", "items": items})


def make_owner(server: ApiServer, namespace: str) -> str:
    server.kubectl("create", "configmap", "owner", f"--namespace={namespace}")
    return server.kubectl("get", "configmap", "owner", f"--namespace={namespace}", "--output=jsonpath={.metadata.uid}")


def revision(server: ApiServer) -> int:
    return int(json.loads(server.kubectl("get", "--raw=/api/v1/configmaps"))["metadata"]["resourceVersion"])


def test_an_owner_that_one_may_not_finalize_cannot_be_blocked(server: ApiServer, namespace: str) -> None:
    uid = make_owner(server, namespace)
    server.kubectl("create", "role", "writer", "--verb=create,get", "--resource=configmaps", f"--namespace={namespace}")
    server.kubectl("create", "rolebinding", "writer", "--role=writer", "--user=alice", f"--namespace={namespace}")
    alice = server.kubeconfig("alice", namespace=namespace)

    with pytest.raises(CommandFailed, match="cannot set blockOwnerDeletion"):
        server.kubectl("create", "--filename=-", input=owned("child", owner="owner", uid=uid), kubeconfig=alice)
    server.kubectl("create", "--filename=-", f"--namespace={namespace}", input=owned("child", owner="owner", uid=uid))


def test_a_service_account_has_only_what_rbac_grants(server: ApiServer, namespace: str) -> None:
    server.kubectl("create", "serviceaccount", "reader", f"--namespace={namespace}")
    server.kubectl("create", "role", "reader", "--verb=list", "--resource=jobs", f"--namespace={namespace}")
    account = f"--serviceaccount={namespace}:reader"
    server.kubectl("create", "rolebinding", "reader", "--role=reader", account, f"--namespace={namespace}")
    reader = server.service_account_kubeconfig("reader", namespace=namespace)

    server.kubectl("get", "jobs", kubeconfig=reader)
    with pytest.raises(CommandFailed, match="Forbidden"):
        server.kubectl("get", "pods", kubeconfig=reader)


def test_what_is_stored_outlives_the_api_server(server: ApiServer, namespace: str) -> None:
    server.kubectl("create", "configmap", "kept", f"--namespace={namespace}")
    server.restart_kube_apiserver(grace=0)
    server.kubectl("get", "configmap", "kept", f"--namespace={namespace}")


@pytest.mark.parametrize("bump_revision", [None, 1_000_000])
def test_a_snapshot_takes_everything_back(
    server: ApiServer, namespace: str, tmp_path: Path, bump_revision: int | None
) -> None:
    server.kubectl("create", "configmap", "before", f"--namespace={namespace}")
    snapshot = server.snapshot(tmp_path / "etcd.db")
    server.kubectl("create", "--filename=-", f"--namespace={namespace}", input=many(100))
    lost = revision(server)

    server.restore(snapshot, bump_revision=bump_revision)

    names = server.kubectl("get", "configmaps", f"--namespace={namespace}", "--output=name")
    assert names.split() == ["configmap/before"]
    goes_on = revision(server) > lost
    assert goes_on == (bump_revision is not None), "a plain restore hands out resource versions a second time"


def test_the_garbage_collector_follows_owners(server: ApiServer, namespace: str) -> None:
    uid = make_owner(server, namespace)
    server.kubectl("create", "--filename=-", f"--namespace={namespace}", input=owned("child", owner="owner", uid=uid))

    def children() -> str:
        return server.kubectl("get", "configmaps", f"--namespace={namespace}", "--output=name")

    with controllers(server, "garbage-collector-controller", "namespace-controller"):
        server.kubectl("delete", "configmap", "owner", f"--namespace={namespace}", "--wait=false")
        wait_until("the child is gone", lambda: not children(), seconds=60)
        server.kubectl("delete", "namespace", namespace, "--timeout=60s")
