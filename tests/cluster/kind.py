"""A cluster of kind, where a Docker daemon answers. Its node is a container, its components are static pods in it."""

from __future__ import annotations

import tempfile
from pathlib import Path

from cluster.builds import KIND, built
from cluster.cluster import Cluster
from cluster.places import CACHE, NAME
from cluster.processes import wait_until
from cluster.programs import CommandFailed, output
from cluster.registry import BUILDAH

_NODE = f"{NAME}-control-plane"
_MANIFESTS = "/etc/kubernetes/manifests"


class KindCluster(Cluster):
    @property
    def kubeconfig(self) -> Path:
        return CACHE / "kind.yaml"

    def prepare(self) -> None:
        super().prepare()
        built(KIND)

    def up(self) -> None:
        self.prepare()
        if NAME not in self._kind("get", "clusters").split():
            self._kind("create", "cluster", f"--name={NAME}", f"--kubeconfig={self.kubeconfig}", "--wait=120s")

    def down(self) -> None:
        self._kind("delete", "cluster", f"--name={NAME}", f"--kubeconfig={self.kubeconfig}")

    def publish(self, image: str) -> str:
        with tempfile.TemporaryDirectory() as folder:
            archive = Path(folder) / "image.tar"
            output(*BUILDAH, "push", image, f"docker-archive:{archive}:{image}", seconds=600)
            self._kind("load", "image-archive", str(archive), f"--name={NAME}")
        return image

    def stop_component(self, name: str) -> None:
        """The kubelet ends a static pod whose manifest has gone."""
        output("docker", "exec", _NODE, "mv", f"{_MANIFESTS}/{name}.yaml", f"/root/{name}.yaml")
        wait_until(f"{name} has ended", lambda: not self._runs(name), seconds=90)

    def start_component(self, name: str) -> None:
        output("docker", "exec", _NODE, "mv", f"/root/{name}.yaml", f"{_MANIFESTS}/{name}.yaml")
        wait_until(f"{name} serves", self._serves, seconds=90)

    def _runs(self, name: str) -> bool:
        return bool(output("docker", "exec", _NODE, "crictl", "ps", "--quiet", f"--name={name}").strip())

    def _serves(self) -> bool:
        try:
            self.kubectl("get", "--raw=/readyz", "--request-timeout=2s")
        except CommandFailed:
            return False
        return True

    @staticmethod
    def _kind(*arguments: str) -> str:
        return output(str(built(KIND) / "kind"), *arguments, seconds=600)
