"""What a namespace may name and reach, and that the operator itself has no right that it does not need."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from api.apiclient import JOBS, POLICIES, Body, Refused
from api.proxy import proxy
from api.stage import Stage, condition
from charts import needs_helm, only, render
from leyline.records import Kind


def test_a_foreign_prefix_is_refused(stage: Stage) -> None:
    stage.begin(allowedRunPrefixes={stage.namespace: [f"s3://{stage.s3.bucket}/{stage.namespace}"]})
    other = f"s3://{stage.s3.bucket}/{stage.namespace}-other/one"
    stage.policy("foreign", run=other)
    status = stage.wait(lambda: stage.status("foreign", kind=POLICIES))
    ready = condition(status, "Ready")
    assert (ready["status"], ready["reason"]) == ("False", "RunNotAllowed")
    assert "add the run's prefix to allowedRunPrefixes" in status["message"]

    stage.cycle("foreign", checkpoint=f"{other}/checkpoints/100-1-dbbaeb45")
    status = stage.reached("Failed", "foreign")
    assert status["reason"] == "RunNotAllowed"
    assert f"namespace {stage.namespace} may not name the run {other}" in status["message"]
    assert "Ask whoever installed the operator to add the run's prefix to allowedRunPrefixes" in status["message"]

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
    objects = render(given, release=stage.namespace)
    config = yaml.safe_load(only(objects, "ConfigMap")["data"]["config.yaml"])
    account = only(objects, "ServiceAccount")["metadata"]["name"]
    for one in objects:
        if one["kind"] in ("ServiceAccount", "Role", "RoleBinding", "ClusterRole", "ClusterRoleBinding"):
            home = one["metadata"].pop("namespace", None)
            into = () if home is None else (f"--namespace={stage.namespace}",)
            for subject in one.get("subjects", ()):
                subject["namespace"] = stage.namespace
            stage.server.kubectl("create", "--filename=-", *into, input=json.dumps(one))
    identity = stage.server.service_account_kubeconfig(account, namespace=stage.namespace)
    with proxy(stage.server, stage.folder, kubeconfig=identity) as between:
        stage.kubeconfig = between.kubeconfig
        stage.begin(**{name: value for name, value in config.items() if name not in ("images", "healthPort")})
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
