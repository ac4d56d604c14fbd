"""A cluster that somebody else runs and named with an environment variable."""

from __future__ import annotations

import os
from pathlib import Path

from cluster.cluster import Cluster
from cluster.programs import output
from cluster.registry import BUILDAH

KUBECONFIG = "EMRAKUL_E2E_KUBECONFIG"
REGISTRY = "EMRAKUL_E2E_REGISTRY"


class GivenCluster(Cluster):
    def __init__(self, kubeconfig: Path) -> None:
        self._kubeconfig = kubeconfig

    @property
    def kubeconfig(self) -> Path:
        return self._kubeconfig

    def up(self) -> None:
        self.prepare()
        self.kubectl("wait", "nodes", "--all", "--for=condition=Ready", "--timeout=60s")

    def down(self) -> None:
        """It is not ours to take away."""

    def publish(self, image: str) -> str:
        registry = os.environ.get(REGISTRY)
        if not registry:
            raise SystemExit(f"{REGISTRY} is not set: it names a registry that the cluster of {KUBECONFIG} pulls from")
        name = f"{registry}/{image.removeprefix('localhost/')}"
        output(*BUILDAH, "push", image, f"docker://{name}", seconds=600)
        return name

    def stop_component(self, name: str) -> None:
        raise NotImplementedError(f"{name} of a cluster that was given by {KUBECONFIG} cannot be stopped")

    def start_component(self, name: str) -> None:
        raise NotImplementedError(f"{name} of a cluster that was given by {KUBECONFIG} cannot be started")
