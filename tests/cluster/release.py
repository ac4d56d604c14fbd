"""The chart, installed with helm as its users do it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from cluster import seaweedfs
from cluster.cluster import Cluster
from cluster.images import ROOT
from cluster.processes import wait_until
from cluster.programs import CommandFailed

Body = dict[str, Any]

CHART = ROOT / "charts" / "emrakul-operator"
_SELECTOR = "--selector=app.kubernetes.io/name=emrakul-operator"


@dataclass(frozen=True)
class Images:
    """Names that pods can use."""

    operator: str
    worker: str
    validator: str
    trainer: str
    weed: str


@dataclass
class Release:
    """One installation; its namespace is its own."""

    cluster: Cluster
    images: Images
    name: str
    namespace: str
    values: Mapping[str, Any] = field(default_factory=dict)

    def install(self, **more: Any) -> None:
        """Installs or upgrades, and waits until the operator is ready; `more` are further values."""
        values = {**self._common(), **self.values, **more}
        given = [f"--set-json={key}={json.dumps(value)}" for key, value in values.items()]
        options = ("--install", f"--namespace={self.namespace}", "--create-namespace", "--wait", "--timeout=180s")
        self.cluster.helm("upgrade", self.name, str(CHART), *options, *given)

    def uninstall(self) -> None:
        self.cluster.helm("uninstall", self.name, f"--namespace={self.namespace}", "--wait", "--timeout=60s")

    def test(self) -> str:
        return self.cluster.helm("test", self.name, f"--namespace={self.namespace}", "--timeout=120s")

    def kill(self) -> str:
        """As a machine that fails, no time to say goodbye; another pod follows by itself. What this one's log said."""
        said = ""
        with suppress(CommandFailed):  # a pod that has not begun has said nothing
            said = self.log()
        self.cluster.kubectl(
            "delete", "pod", _SELECTOR, f"--namespace={self.namespace}", "--grace-period=0", "--force", "--wait=false"
        )
        return said

    def wait_ready(self) -> None:
        wait_until(f"the operator of release {self.name} is ready", self._is_ready, seconds=120)

    def health(self) -> Body:
        """Through the Service, as the API server reaches it."""
        found: Body = json.loads(self._get("health/emrakul"))
        return found

    def metrics(self) -> str:
        return self._get("metrics")

    def restarts(self) -> int:
        """Of the operator's container: it never ends by itself."""
        pods = json.loads(
            self.cluster.kubectl("get", "pods", _SELECTOR, f"--namespace={self.namespace}", "--output=json")
        )
        return sum(one["restartCount"] for pod in pods["items"] for one in pod["status"].get("containerStatuses", ()))

    def log(self) -> str:
        return self.cluster.kubectl("logs", _SELECTOR, f"--namespace={self.namespace}", "--tail=-1")

    @property
    def service(self) -> str:
        """The chart's own name where the release's says what it is."""
        return self.name if "emrakul" in self.name else f"{self.name}-emrakul"

    def _get(self, path: str) -> str:
        service = f"services/{self.service}:8080/proxy"
        return self.cluster.kubectl("get", f"--raw=/api/v1/namespaces/{self.namespace}/{service}/{path}")

    def _is_ready(self) -> bool:
        with suppress(CommandFailed):
            return bool(self.health()["ready"])
        return False

    def _common(self) -> Body:
        return {
            "image": _image(self.images.operator),
            "workerImage": _image(self.images.worker),
            "validatorImage": _image(self.images.validator),
            "allowedRunPrefixes": {"*": [f"s3://{seaweedfs.BUCKET}"]},
            # the node has two cores, and everything else runs on it too
            "workers": {"podOverrides": {"resources": {"requests": {"cpu": "50m"}}}},
            "defaults": {
                "store": {
                    "endpoint": seaweedfs.ENDPOINT,
                    "region": seaweedfs.REGION,
                    "credentialsSecretRef": {"name": "store"},
                },
                "settings": {"safetyMargin": "0.2", "validationTimeout": 600},
            },
        }


def _image(name: str) -> Body:
    repository, _, tag = name.rpartition(":")
    return {"repository": repository, "tag": tag}
