"""What the chart renders: least rights, restricted pods, and definitions that outlive a release."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

import jobs
from charts import (
    FULL,
    MODES,
    NAMESPACED,
    ROOT,
    TENANTS,
    assert_restricted,
    config_of,
    needs_helm,
    of,
    only,
    refusal,
    render,
)


def pod_specs(objects: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    yield only(objects, "Deployment")["spec"]["template"]["spec"]
    yield only(objects, "Pod")["spec"]


# --- rights ---


@needs_helm
@MODES
def test_rights_name_what_they_are_for(given: dict[str, Any]) -> None:
    for role in of(render(given), "Role", "ClusterRole"):
        granted = {
            (resource, verb) for rule in role["rules"] for resource in rule["resources"] for verb in rule["verbs"]
        }
        assert granted == {
            *(("pruningcycles", verb) for verb in ("get", "list", "watch", "create", "delete")),
            *(("pruningpolicies", verb) for verb in ("get", "list", "watch")),
            ("pruningcycles/status", "patch"),
            ("pruningpolicies/status", "patch"),
            *(("jobs", verb) for verb in ("get", "list", "watch", "create", "delete")),
            ("pods", "list"),
            ("events", "list"),
            ("events", "create"),
            ("secrets", "get"),
        }
        assert not any("*" in part for rule in role["rules"] for part in rule.values())


@needs_helm
@pytest.mark.parametrize("given", [NAMESPACED, FULL], ids=["namespaced", "full"])
def test_with_namespaces_nothing_is_granted_outside_of_them(given: dict[str, Any]) -> None:
    objects = render(given)
    assert not of(objects, "ClusterRole", "ClusterRoleBinding")
    for kind in ("Role", "RoleBinding"):
        assert [one["metadata"]["namespace"] for one in of(objects, kind)] == ["team-a", "team-b"]
    account = only(objects, "Deployment")["spec"]["template"]["spec"]["serviceAccountName"]
    for binding in of(objects, "RoleBinding"):
        assert binding["roleRef"]["kind"] == "Role"
        assert binding["subjects"] == [{"kind": "ServiceAccount", "name": account, "namespace": "ops"}]


@needs_helm
@pytest.mark.parametrize("given", [{}, TENANTS], ids=["default", "tenants"])
def test_without_namespaces_one_cluster_role_is_bound_once(given: dict[str, Any]) -> None:
    objects = render(given)
    assert not of(objects, "Role", "RoleBinding")
    assert only(objects, "ClusterRoleBinding")["roleRef"]["name"] == only(objects, "ClusterRole")["metadata"]["name"]
    assert only(objects, "ClusterRoleBinding")["subjects"][0]["name"] == "emrakul"


@needs_helm
def test_secrets_are_any_or_these_or_none() -> None:
    def rule(given: dict[str, Any]) -> list[dict[str, Any]]:
        return [rule for rule in only(render(given), "ClusterRole")["rules"] if rule["resources"] == ["secrets"]]

    assert rule({}) == [{"apiGroups": [""], "resources": ["secrets"], "verbs": ["get"]}]
    assert rule({"secretNames": ["store", "ca"]})[0]["resourceNames"] == ["store", "ca"]
    assert rule({"secretNames": []}) == []


# --- the operator ---


@needs_helm
@MODES
def test_pods_keep_to_the_restricted_standard(given: dict[str, Any]) -> None:
    for pod in pod_specs(render(given)):
        assert_restricted(pod)
        assert pod["securityContext"]["runAsUser"] == given.get("runAsUser", 65532)


@needs_helm
def test_who_runs_may_be_left_to_the_cluster() -> None:
    for pod in pod_specs(render({"runAsUser": None})):
        assert_restricted(pod)
        assert "runAsUser" not in pod["securityContext"]


@needs_helm
@MODES
def test_one_operator_that_never_runs_beside_its_successor(given: dict[str, Any]) -> None:
    deployment = only(render(given), "Deployment")["spec"]
    assert deployment["replicas"] == 1 and deployment["strategy"] == {"type": "Recreate"}
    pod = deployment["template"]["spec"]
    (container,) = pod["containers"]
    assert container["args"][:2] == ["operator", "--config=/etc/emrakul/config.yaml"]
    assert container["ports"] == [{"name": "http", "containerPort": 8080}]
    for probe, path in (("startup", "/healthz"), ("liveness", "/healthz"), ("readiness", "/readyz")):
        assert container[f"{probe}Probe"]["httpGet"] == {"path": path, "port": "http"}
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]} >= {"config", "tmp"}


@needs_helm
def test_the_operator_has_its_keys_its_cas_and_its_environment() -> None:
    pod = only(render(FULL), "Deployment")["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert {one["name"]: one["value"] for one in container["env"]} == {
        "EMRAKUL_TRUST": "/etc/emrakul-keys/trust",
        "EMRAKUL_SIGNING_KEY": "/etc/emrakul-keys/signing-key/signing.pem",
        "EMRAKUL_DATA_KEY": "/etc/emrakul-keys/data-key/data.key",
        "AWS_CA_BUNDLE": "/etc/emrakul-ca/ca.crt",
        "SSL_CERT_FILE": "/etc/emrakul-ca/ca.crt",
        "HTTPS_PROXY": "http://proxy:3128",
    }
    secrets = {volume["name"]: volume["secret"]["secretName"] for volume in pod["volumes"] if "secret" in volume}
    assert secrets == {"trust": "all-trust", "signing-key": "operator", "data-key": "all-data"}
    paths = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert {paths[name] for name in secrets} == {f"/etc/emrakul-keys/{name}" for name in secrets}
    (bundle,) = (volume["configMap"] for volume in pod["volumes"] if volume["name"] == "ca-bundle")
    assert bundle == {"name": "cas", "items": [{"key": "bundle.pem", "path": "ca.crt"}]}


@needs_helm
def test_another_configuration_is_another_pod() -> None:
    def checksum(given: dict[str, Any]) -> str:
        sum_: str = only(render(given), "Deployment")["spec"]["template"]["metadata"]["annotations"]["checksum/config"]
        return sum_

    assert checksum({}) == checksum({"metrics": {"serviceMonitor": {"enabled": True}}})
    assert checksum({}) != checksum({"defaults": {"settings": {"enableCheckpointPruning": True}}})


@needs_helm
@pytest.mark.parametrize(
    ("release", "name"),
    [
        ("emrakul", "emrakul"),
        ("emrakul-operator", "emrakul-operator"),
        ("blue", "blue-emrakul"),
        ("my.emrakul", "my-emrakul"),
        ("2.blue", "r2-blue-emrakul"),
    ],
)
def test_names_follow_the_release(release: str, name: str) -> None:
    objects = render(FULL, release=release)
    assert only(objects, "Deployment")["metadata"]["name"] == name
    assert config_of(objects).workers.service_account_name == f"{name}-worker"
    service = only(objects, "Service")["metadata"]
    assert service["name"] == name and re.fullmatch("[a-z]([-a-z0-9]*[a-z0-9])?", name)
    assert service["labels"]["app.kubernetes.io/instance"] == release


@needs_helm
def test_the_longest_release_name_leaves_room_for_what_is_named_after_it() -> None:
    for one in render(FULL, release="r" * 53):
        assert len(one["metadata"]["name"]) <= 63 or one["kind"] in ("Role", "RoleBinding")


# --- resource definitions ---


@needs_helm
def test_definitions_are_those_of_crds_and_are_kept() -> None:
    rendered = of(render({}), "CustomResourceDefinition")
    of_api = [yaml.safe_load(path.read_text()) for path in sorted((ROOT / "crds").glob("*.yaml"))]
    assert [(one["metadata"]["name"], one["spec"]) for one in rendered] == [
        (one["metadata"]["name"], one["spec"]) for one in of_api
    ]
    assert all(one["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep" for one in rendered)
    assert all(re.fullmatch("[0-9a-f]{32}", one["metadata"]["annotations"]["emrakul.dev/schema"]) for one in rendered)


@needs_helm
def test_definitions_go_with_the_release_or_are_left_out_if_one_asks_for_it() -> None:
    for one in of(render({"crds": {"keep": False}}), "CustomResourceDefinition"):
        assert "helm.sh/resource-policy" not in one["metadata"]["annotations"]
    assert not of(render({"crds": {"enabled": False}}), "CustomResourceDefinition")


# --- worker pods ---


@needs_helm
@pytest.mark.parametrize("given", [NAMESPACED, TENANTS], ids=["namespaced", "tenants"])
def test_workers_get_an_account_without_rights_in_each_namespace(given: dict[str, Any]) -> None:
    objects = render(given | {"workers": {"serviceAccount": {"create": True, "annotations": {"role": "w"}}}})
    accounts = [one for one in of(objects, "ServiceAccount") if one["metadata"]["name"] == "emrakul-worker"]
    assert [one["metadata"]["namespace"] for one in accounts] == ["team-a", "team-b"]
    assert all(one["automountServiceAccountToken"] is False for one in accounts)
    assert all(one["metadata"]["annotations"] == {"role": "w"} for one in accounts)
    subjects = [one["subjects"] for one in of(objects, "RoleBinding", "ClusterRoleBinding")]
    assert "emrakul-worker" not in json.dumps(subjects)


@needs_helm
def test_an_account_that_is_there_is_only_named() -> None:
    objects = render({"workers": {"serviceAccount": {"name": "pruning"}}})
    assert config_of(objects).workers.service_account_name == "pruning"
    assert [one["metadata"]["name"] for one in of(objects, "ServiceAccount")] == ["emrakul"]


@needs_helm
@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"workers": {"serviceAccount": {"create": True}}}, "name tenants in `namespaces` or `allowedRunPrefixes`"),
        (
            {"workers": {"serviceAccount": {"create": True}}, "allowedRunPrefixes": {"*": ["s3://"], "a": ["s3://"]}},
            'allowedRunPrefixes has "*"',
        ),
        ({"serviceAccount": {"create": False}}, "name the account that the operator runs as"),
    ],
    ids=["workers-nowhere", "workers-anywhere", "operator-nobody"],
)
def test_an_account_that_would_be_missing_is_refused_with_the_remedy(given: dict[str, Any], said: str) -> None:
    assert said in refusal(given)


@needs_helm
def test_network_policies_let_nobody_in_and_only_to_the_store() -> None:
    operator, *workers = of(render(FULL), "NetworkPolicy")
    assert operator["metadata"]["namespace"] == "ops"
    assert operator["spec"]["ingress"] == [{"ports": [{"protocol": "TCP", "port": "http"}]}]
    assert _ports(operator) == {53, 443, 6443, 8333, 8443}
    template = only(render(FULL), "Deployment")["spec"]["template"]["metadata"]["labels"]
    assert operator["spec"]["podSelector"]["matchLabels"].items() <= template.items()

    assert [one["metadata"]["namespace"] for one in workers] == ["team-a", "team-b"]
    for one in workers:
        assert one["spec"]["policyTypes"] == ["Ingress", "Egress"] and one["spec"]["ingress"] == []
        assert _ports(one) == {53, 8333}
        chosen = one["spec"]["podSelector"]["matchLabels"].items()
        for made in (jobs.job(), jobs.recheck()):
            assert chosen <= made["spec"]["template"]["metadata"]["labels"].items()
        assert chosen.isdisjoint(template.items())
    assert not of(render({}), "NetworkPolicy")


def _ports(policy: dict[str, Any]) -> set[int]:
    return {port["port"] for rule in policy["spec"]["egress"] for port in rule["ports"]}
