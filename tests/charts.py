"""The chart as helm renders it, offline, and values to render it with."""

from __future__ import annotations

import json
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.places import CACHE
from emrakul.runtime.config import OperatorConfig, load_config

ROOT = Path(__file__).parents[1]
CHART = ROOT / "charts" / "emrakul-operator"

_FOUND = next((CACHE / "bin").glob("helm-*/helm"), shutil.which("helm"))
HELM = str(_FOUND or "")
needs_helm = pytest.mark.skipif(not HELM, reason="there is no helm: `make e2e` builds one, or put one on the PATH")

KUBERNETES = "1.34.0"
DIGEST = f"sha256:{'0a' * 32}"
NAMESPACED: dict[str, Any] = {"namespaces": ["team-a", "team-b"]}
TENANTS: dict[str, Any] = {"allowedRunPrefixes": {"team-a": ["s3://models/team-a"], "team-b": ["s3://models/team-b"]}}
FULL: dict[str, Any] = {
    **NAMESPACED,
    "operatorClass": "blue",
    "allowedRunPrefixes": {"team-a": ["s3://models/team-a"], "*": ["s3://shared/all"]},
    "defaults": {
        "store": {
            "endpoint": "https://store.example:8333",
            "region": "eu-1",
            "credentialsSecretRef": {"name": "store"},
            "workerCredentialsSecretRef": {"name": "store-workers"},
            "caBundleRef": {"name": "store-ca"},
        },
        "settings": {
            "enableCheckpointPruning": True,
            "analysisMemoryLimit": 3_000_000_000,
            "validationTimeout": "90s",
            "safetyMargin": "0.25",
            "structuredPruning": {"kinds": ["channel"], "safetyConstraints": {"accuracyDropThreshold": "0.01"}},
            "consensus": {"replicas": 3},
        },
    },
    "sink": "https://events.example/in?a=1&b=<2>",
    "image": {"tag": "1.2.3", "digest": DIGEST, "pullPolicy": "Always"},
    "workerImage": {"repository": "registry.example:5000/worker", "digest": DIGEST},
    "validatorImage": {"tag": "nightly"},
    "imagePullSecrets": [{"name": "pull"}],
    "keys": {"trustSecret": "trust", "signingKeySecret": "validator", "dataKeySecret": "data"},
    "operatorKeys": {"trustSecret": "all-trust", "signingKeySecret": "operator", "dataKeySecret": "all-data"},
    "caBundle": {"configMap": "cas", "key": "bundle.pem"},
    "workers": {
        "serviceAccount": {"create": True, "annotations": {"eks.amazonaws.com/role-arn": "arn:aws:iam::1:role/w"}},
        "podOverrides": {"nodeSelector": {"pool": "spot"}, "securityContext": {"runAsUser": None}},
    },
    "serviceAccount": {"name": "pruner", "annotations": {"eks.amazonaws.com/role-arn": "arn:aws:iam::1:role/o"}},
    "secretNames": ["store", "store-ca"],
    "crds": {"keep": False},
    "logLevel": "debug",
    "logFormat": "text",
    "nodeSelector": {"pool": "system"},
    "tolerations": [{"key": "system", "operator": "Exists"}],
    "affinity": {"nodeAffinity": {}},
    "priorityClassName": "high",
    "runAsUser": 1_000_660_000,
    "podAnnotations": {"team": "platform"},
    "podLabels": {"team": "platform"},
    "extraEnv": [{"name": "HTTPS_PROXY", "value": "http://proxy:3128"}],
    "extraVolumes": [{"name": "scratch", "emptyDir": {}}],
    "extraVolumeMounts": [{"name": "scratch", "mountPath": "/scratch"}],
    "metrics": {"serviceMonitor": {"enabled": True, "labels": {"release": "prometheus"}}, "rules": {"enabled": True}},
    "networkPolicy": {"enabled": True, "storePorts": [8333], "sinkPorts": [8443]},
}
MODES = pytest.mark.parametrize(
    "given", [{}, NAMESPACED, TENANTS, FULL], ids=["default", "namespaced", "tenants", "full"]
)


def helm(*arguments: str, given: dict[str, Any]) -> subprocess.CompletedProcess[str]:
    """`helm arguments...` with these values; the test looks at what became of it."""
    command = (HELM, *arguments, f"--kube-version={KUBERNETES}", "--values=-")
    return subprocess.run(command, input=json.dumps(given), capture_output=True, text=True, timeout=60)


@cache
def _rendered(given: str, release: str) -> subprocess.CompletedProcess[str]:
    return helm("template", release, str(CHART), "--namespace=ops", given=json.loads(given))


def render(given: dict[str, Any], *, release: str = "emrakul") -> list[dict[str, Any]]:
    done = _rendered(json.dumps(given), release)
    assert done.returncode == 0, done.stderr
    return [one for one in yaml.safe_load_all(done.stdout) if one]


def refusal(given: dict[str, Any]) -> str:
    done = _rendered(json.dumps(given), "emrakul")
    assert done.returncode != 0, "it was rendered"
    return done.stderr


def of(objects: list[dict[str, Any]], *kinds: str) -> list[dict[str, Any]]:
    return [one for one in objects if one["kind"] in kinds]


def only(objects: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    (one,) = of(objects, kind)
    return one


def config_of(objects: list[dict[str, Any]]) -> OperatorConfig:
    return load_config(only(objects, "ConfigMap")["data"]["config.yaml"])


def assert_restricted(pod: dict[str, Any]) -> None:
    """As the Pod Security Standard of that name asks, and with a read-only root."""
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert not pod.keys() & {"hostNetwork", "hostPID", "hostIPC"}
    for container in pod["containers"]:
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
    assert all(volume.keys() & {"configMap", "secret", "emptyDir"} for volume in pod.get("volumes", ()))
