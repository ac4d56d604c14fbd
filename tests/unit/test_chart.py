"""The chart's values are the models': no key is missing, none is unknown, and mistakes are refused by name."""

from __future__ import annotations

import json
import subprocess
import tomllib
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest
import yaml
from pydantic import BaseModel

from charts import (
    CHART,
    DIGEST,
    FULL,
    HELM,
    MODES,
    ROOT,
    assert_restricted,
    config_of,
    helm,
    needs_helm,
    only,
    refusal,
    render,
)
from emrakul.api.manifest import load_manifest, load_policy
from emrakul.cluster import values
from emrakul.cluster.values import Values
from emrakul.runtime.config import Keys, OperatorConfig
from emrakul.settings import Settings

EXAMPLES = ROOT / "examples" / "cluster"
SCHEMA = json.loads((CHART / "values.schema.json").read_text())
WRITTEN = yaml.safe_load((CHART / "values.yaml").read_text())

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"replicas": 2}, "replicas"),
    ({"namespaces": "team-a"}, "namespaces"),
    ({"namespaces": ["*"]}, "namespaces"),
    ({"operatorClass": "Blue"}, "operatorClass"),
    ({"allowedRunPrefixes": {"team-a": "s3://models"}}, "allowedRunPrefixes"),
    ({"allowedRunPrefixes": {"team-a": ["models/team-a"]}}, "allowedRunPrefixes"),
    ({"defaults": {"settings": {"enable_checkpoint_pruning": True}}}, "enable_checkpoint_pruning"),
    ({"defaults": {"settings": {"safetyMargin": 0.25}}}, "safetyMargin"),
    ({"defaults": {"settings": {"safetyMargin": "25%"}}}, "safetyMargin"),
    ({"defaults": {"settings": {"consensus": {"replicas": 2}}}}, "replicas"),
    ({"defaults": {"store": {"credentialsSecretRef": "store"}}}, "credentialsSecretRef"),
    ({"defaults": {"store": {"endpoint": "store:8333"}}}, "endpoint"),
    ({"sink": "kafka://events"}, "sink"),
    ({"image": {"digest": "sha256:123"}}, "digest"),
    ({"image": {"pullPolicy": "always"}}, "pullPolicy"),
    ({"keys": {"trustKey": "trust"}}, "trustKey"),
    ({"workers": {"podOverrides": {"node_selector": {"pool": "spot"}}}}, "node_selector"),
    ({"serviceAccount": {"annotations": {"exists": True}}}, "annotations"),
    ({"secretNames": "store"}, "secretNames"),
    ({"logLevel": "trace"}, "logLevel"),
    ({"metrics": {"rules": {"enabled": "yes"}}}, "enabled"),
    ({"networkPolicy": {"storePorts": [70000]}}, "storePorts"),
    # what the API server would refuse, or take for something else
    ({"podLabels": {"app.kubernetes.io/name": "mine"}}, "podLabels"),
    ({"podAnnotations": {"checksum/config": "mine"}}, "podAnnotations"),
    ({"namespaces": ["team-a", "team-a"]}, "namespaces"),
    ({"allowedRunPrefixes": {"Team_A": ["s3://models"]}}, "allowedRunPrefixes"),
    ({"extraVolumes": [{"name": "tmp", "emptyDir": {}}]}, "extraVolumes"),
    ({"extraVolumes": [{"emptyDir": {}}]}, "extraVolumes"),
    ({"extraVolumeMounts": [{"name": "scratch", "mountPath": "/tmp/"}]}, "extraVolumeMounts"),
    ({"networkPolicy": {"apiServerPorts": [], "storePorts": [], "sinkPorts": []}}, "apiServerPorts"),
]


def test_the_schema_and_the_copies_of_the_definitions_are_what_the_models_say() -> None:
    assert values.schema() == SCHEMA, "run `make contracts` and commit the result"
    of_api = {path.name: path.read_text() for path in (ROOT / "crds").glob("*.yaml")}
    assert {path.name: path.read_text() for path in (CHART / "files" / "crds").glob("*")} == of_api
    assert len(of_api) == 2


def test_values_yaml_says_every_key_and_its_default() -> None:
    jsonschema.validate(WRITTEN, SCHEMA)
    assert Values.model_validate(WRITTEN, by_alias=True, by_name=False) == Values()
    assert sorted(_keys(WRITTEN, Values)) == sorted(_keys(json.loads(Values().model_dump_json(by_alias=True)), Values))


def _keys(written: dict[str, Any], model: type[BaseModel], path: str = "") -> Iterator[str]:
    """Every key; what the chart hands on as it is (store, settings, pod overrides) is a policy's to explain."""
    of_alias = {field.alias: field for field in model.model_fields.values()}
    for key, value in written.items():
        yield f"{path}{key}"
        inner = of_alias[key].annotation
        if isinstance(inner, type) and inner.__module__ in (values.__name__, OperatorConfig.__module__):
            yield from _keys(value, inner, f"{path}{key}.")


def test_keys_have_the_same_names_for_workers_and_the_operator() -> None:
    assert values.KeySecrets.model_fields.keys() == Keys.model_fields.keys()


def test_every_setting_is_in_the_schema() -> None:
    inside = SCHEMA["$defs"]["Settings"]
    assert inside["additionalProperties"] is False
    assert inside["properties"].keys() == {field.alias for field in Settings.model_fields.values()}


@pytest.mark.parametrize(("given", "key"), REFUSED, ids=[json.dumps(given) for given, _ in REFUSED])
def test_a_wrong_value_is_refused_with_its_key(given: dict[str, Any], key: str) -> None:
    with pytest.raises(jsonschema.ValidationError) as caught:
        jsonschema.validate(_merged(WRITTEN, given), SCHEMA)
    assert key in f"{caught.value.json_path} {caught.value.message}"
    if HELM:
        assert key in refusal(given)


def _merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """As Helm does it."""
    both = {k: _merged(below[k], v) for k, v in above.items() if isinstance(v, dict) and isinstance(below.get(k), dict)}
    return {**below, **above, **both}


def test_versions_are_the_packages() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert chart["version"] == chart["appVersion"] == version
    assert chart["kubeVersion"] == ">=1.34.0-0"


@needs_helm
@MODES
def test_helm_finds_no_fault(given: dict[str, Any]) -> None:
    done = helm("lint", "--strict", str(CHART), given=given)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_helm
def test_a_cluster_that_is_too_old_is_refused() -> None:
    command = (HELM, "template", "emrakul", str(CHART), "--kube-version=1.33.9")
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode != 0 and "kubeVersion: >=1.34.0-0" in done.stderr


@needs_helm
def test_the_operator_reads_what_the_chart_writes() -> None:
    assert config_of(render({})) == OperatorConfig.model_validate(
        {"images": {"worker": "emrakul/worker:0.1.0", "validator": "emrakul/validator:0.1.0"}}
    )
    config = config_of(render(FULL))
    assert config.operator_class == "blue" and config.namespaces == ("team-a", "team-b")
    assert config.images.worker == f"registry.example:5000/worker@{DIGEST}"
    assert config.images.validator == "emrakul/validator:nightly" and config.images.pull_policy == "Always"
    assert config.defaults.store.dump() == FULL["defaults"]["store"] | {
        "caBundleRef": {"name": "store-ca", "key": "ca.crt"}
    }
    assert config.defaults.settings == Settings.from_resource(FULL["defaults"]["settings"], name="settings")
    assert config.allows("team-a", "s3://models/team-a/run") and config.allows("team-b", "s3://shared/all/run")
    assert not config.allows("team-b", "s3://models/team-a/run")
    assert config.keys == Keys(trust_secret="trust", signing_key_secret="validator", data_key_secret="data")
    assert config.workers.service_account_name == "emrakul-worker"
    assert config.workers.pod_overrides.node_selector == {"pool": "spot"}
    assert config.workers.pod_overrides.security_context == {"runAsUser": None}
    assert config.sink == FULL["sink"]


@needs_helm
def test_every_key_of_the_operators_configuration_is_written() -> None:
    written = yaml.safe_load(only(render(FULL), "ConfigMap")["data"]["config.yaml"])
    assert written.keys() == {field.alias for field in OperatorConfig.model_fields.values()}


def test_the_example_is_one_run_in_one_namespace() -> None:
    text = {path.stem: path.read_text() for path in EXAMPLES.glob("*.yaml")}
    assert text.keys() == {"namespace", "store", "training", "policy", "cycle"}
    objects = {name: yaml.safe_load(one) for name, one in text.items()}
    namespace = objects.pop("namespace")
    assert namespace["metadata"]["labels"] == {"pod-security.kubernetes.io/enforce": "restricted"}
    assert {one["metadata"]["namespace"] for one in objects.values()} == {namespace["metadata"]["name"]}

    policy = load_policy(text["policy"])
    cycle, _ = load_manifest(text["cycle"], policy=policy)
    assert cycle.spec.policy_ref is not None and cycle.spec.policy_ref.name == policy.metadata.name
    assert len([line for line in text["cycle"].splitlines() if not line.startswith("#")]) == 8

    pod = objects["training"]["spec"]["template"]["spec"]
    assert_restricted(pod)
    (container,) = pod["containers"]
    assert (ROOT / "examples" / container["args"][0]).exists() and container["args"][1] == policy.spec.run
    assert {"name": "AWS_ENDPOINT_URL_S3", "value": policy.spec.store.endpoint} in container["env"]
    secret = policy.spec.store.credentials_secret_ref
    assert secret is not None and container["envFrom"] == [{"secretRef": {"name": secret.name}}]
    assert objects["store"]["metadata"]["name"] == secret.name
    assert objects["store"]["stringData"].keys() == {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"}
