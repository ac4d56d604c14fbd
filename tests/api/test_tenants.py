"""What a namespace may name and reach, and that the operator itself has no right that it does not need."""

from __future__ import annotations

import asyncio
import base64
import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from api.apiclient import JOBS, POLICIES, SECRETS, Body, Refused
from api.proxy import proxy
from api.rights import installed
from api.stage import Stage, condition
from charts import needs_helm
from emrakul.api.policy import StoreSpec
from emrakul.cluster import access
from emrakul.cluster.access import Access, Runs
from emrakul.cluster.kube import Kube
from emrakul.runtime.config import Images, OperatorConfig
from leyline.records import Kind


def test_a_foreign_prefix_is_refused(stage: Stage) -> None:
    stage.begin(allowedRunPrefixes={stage.namespace: [f"s3://{stage.s3.bucket}/{stage.namespace}"]})
    other = f"s3://{stage.s3.bucket}/{stage.namespace}-other/one"
    stage.policy("foreign", run=other)
    status = stage.wait(lambda: stage.status("foreign", kind=POLICIES))
    ready = condition(status, "Ready")
    assert (ready["status"], ready["reason"]) == ("False", "RunNotAllowed")
    assert "add the prefix to allowedRunPrefixes" in status["message"]

    stage.cycle("foreign", checkpoint=f"{other}/checkpoints/100-1-dbbaeb45")
    status = stage.reached("Failed", "foreign")
    assert status["reason"] == "RunNotAllowed"
    assert f"namespace {stage.namespace} may not name the run {other}" in status["message"]
    assert "Ask whoever installed the operator to add the prefix to allowedRunPrefixes" in status["message"]

    stage.policy()
    stage.wait(lambda: any((c.get("status") or {}).get("outcome") == "Committed" for c in stage.cycles()))


def test_nothing_is_allowed_cluster_wide_until_it_is_said(stage: Stage) -> None:
    stage.begin(namespaces=[], operatorClass=stage.namespace)
    stage.policy(operatorClass=stage.namespace)
    status = stage.wait(lambda: stage.status("digits", kind=POLICIES))
    assert condition(status, "Ready")["reason"] == "RunNotAllowed"
    assert stage.cycles() == []


def test_a_file_is_no_run_in_a_cluster(stage: Stage, tmp_path: Path) -> None:
    with pytest.raises(Refused, match="write s3://bucket/prefix: in a cluster a run lies in an object store"):
        stage.policy("file", run=f"file://{tmp_path}")
    with pytest.raises(Refused, match="in a cluster runs lie in an object store"):
        stage.cycle("file", checkpoint=f"file://{tmp_path}/checkpoints/100-1-dbbaeb45")


def test_a_secret_that_comes_later_is_waited_for(stage: Stage) -> None:
    stage.begin()
    store = {**stage.store_spec, "credentialsSecretRef": {"name": "late"}}
    stage.policy(store=store)
    why = f"Secret {stage.namespace}/late does not exist"
    stage.wait(lambda: why in stage.status("digits", kind=POLICIES).get("message", ""))
    stage.secret("late")
    stage.reached("Committed")
    assert condition(stage.status("digits", kind=POLICIES), "Ready")["status"] == "True"


def test_the_operators_own_identity_is_shown_to_no_endpoint_of_a_tenant(stage: Stage) -> None:
    with tells_all_requests() as (endpoint, heard):
        stage.begin(environment=stage.s3.environment)
        stage.policy(store={"endpoint": endpoint, "region": "us-east-1"})
        stage.wait(lambda: "so name a Secret" in stage.status("digits", kind=POLICIES).get("message", ""))
        stage.cycle("by-hand", policyRef={"name": "digits"})
        stage.reached("Waiting", "by-hand")
    assert heard == []


@contextmanager
def tells_all_requests() -> Iterator[tuple[str, list[str]]]:
    """An endpoint, and what it was asked."""
    heard: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            heard.append(self.requestline)
            self.send_error(403)

        do_HEAD = do_PUT = do_POST = do_GET

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", heard
        server.shutdown()


def test_a_rotated_secret_is_used_and_the_old_connection_let_go(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fifty rotations, each with a connection of its own, leave no more behind than a few."""
    monkeypatch.setattr(access, "SECRET_SECONDS", 0.0)
    monkeypatch.setattr("kubernetes.aio.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(stage.server.admin))

    async def rotate() -> tuple[int, int]:
        kube = await Kube.connect()
        runs = Runs(kube, OperatorConfig(images=Images(worker="w", validator="v")))
        try:
            spec = {**stage.store_spec, "caBundleRef": {"name": "s3", "key": "ca.crt"}}
            wanted = Access(namespace=stage.namespace, run=stage.run, store=StoreSpec.model_validate(spec))
            sizes, before = [], None
            for turn in range(60):
                secret = {"ca.crt": base64.b64encode(f"authority {turn}".encode()).decode()}
                stage.api.patch(SECRETS, stage.namespace, "s3", {"data": secret})
                opened = await runs.open(wanted)
                assert opened is not before, "another Secret is another connection"
                assert await runs.open(wanted) is opened, "the same Secret is the same"
                before = opened
                gc.collect()
                sizes.append(memory())
            return sizes[9], sizes[-1]
        finally:
            runs.close()
            await kube.close()

    early, late = asyncio.run(rotate())
    assert late - early < 50e6, f"{(late - early) / 50 / 1e6:.1f} MB for each rotated key"


def memory() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


# --- the operator's own rights ----------------------------------------------------------------------------------------


@needs_helm
@pytest.mark.parametrize("wide", [False, True], ids=["namespaced", "cluster-wide"])
def test_the_charts_rights_are_enough_for_all_that_a_cycle_needs(stage: Stage, wide: bool) -> None:
    """As the chart's service account, with OwnerReferencesPermissionEnforcement on."""
    given: Body = {
        "operatorClass": stage.namespace,
        "allowedRunPrefixes": {stage.namespace: [f"s3://{stage.s3.bucket}/{stage.namespace}"]},
        "namespaces": [] if wide else [stage.namespace],
    }
    identity, config = installed(stage.server, stage.namespace, given)
    with proxy(stage.server, stage.folder, kubeconfig=identity) as between:
        stage.kubeconfig = between.kubeconfig
        stage.begin(**config)
        stage.policy(operatorClass=stage.namespace, ttlSecondsAfterFinished=1)
        stage.wait(lambda: stage.records()[-1].kind is Kind.PRUNE)
        stage.wait(lambda: not stage.cycles())
        stage.wait(lambda: not stage.api.list(JOBS, stage.namespace))
        assert [one for one in between.asked if one.code in (401, 403)] == []
        paths = {one.path.partition("?")[0] for one in between.asked}
        asked = {path for path in paths if "/namespaces/" not in path and not is_discovery(path)}
        if wide:
            assert {path.rpartition("/")[2] for path in asked} == {"pruningcycles", "pruningpolicies", "jobs"}
        else:
            assert asked == set()
            assert all(f"/namespaces/{stage.namespace}/" in path for path in paths if not is_discovery(path))
        assert stage.operator.stop() == 0
    assert stage.errors() == []


def is_discovery(path: str) -> bool:
    """What every client may ask: which kinds there are."""
    return path.strip("/").count("/") < 3
