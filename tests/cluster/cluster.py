"""What the tests see of a cluster, whichever of the three kinds it is."""

from __future__ import annotations

import socket
from abc import ABC, abstractmethod
from pathlib import Path

from cluster.builds import COMPONENTS, HELM, built
from cluster.places import CACHE
from cluster.programs import output


class Cluster(ABC):
    """A cluster with one node that tests have for themselves."""

    @property
    @abstractmethod
    def kubeconfig(self) -> Path:
        """Of a user who may do everything."""

    @abstractmethod
    def up(self) -> None:
        """Brings it up unless it is; returns when a pod can run."""

    def prepare(self) -> None:
        """Builds and installs: minutes the first time, nothing later. `up` does it too."""
        built(COMPONENTS)
        built(HELM)

    @abstractmethod
    def down(self) -> None:
        """Takes it away, with everything that `up` made. May be called twice, and after a crash."""

    @abstractmethod
    def publish(self, image: str) -> str:
        """Makes an image of buildah's storage (`localhost/NAME:TAG`) known to the node; returns its name for pods."""

    @abstractmethod
    def stop_component(self, name: str) -> None:
        """Stops one of Kubernetes' own processes, such as `kube-apiserver`."""

    @abstractmethod
    def start_component(self, name: str) -> None:
        """Starts it again, and waits until it serves."""

    def enter(self, *command: str) -> tuple[str, ...]:
        """The command that runs `command` where the API server and the registry are reached."""
        return command

    def connect(self, host: str, port: int) -> socket.socket:
        """A connection of this process to an address of the node."""
        return socket.create_connection((host, port))

    def run(self, *command: str, input: str | None = None, seconds: float = 120) -> str:
        """The output of a command that talks to the cluster; CommandFailed unless it ends with 0."""
        environment = {"KUBECONFIG": str(self.kubeconfig), "KUBECACHEDIR": str(CACHE / "kubectl")}
        return output(*self.enter(*command), input=input, environment=environment, seconds=seconds)

    def kubectl(self, *arguments: str, input: str | None = None, seconds: float = 120) -> str:
        return self.run(str(built(COMPONENTS) / "kubectl"), *arguments, input=input, seconds=seconds)

    def helm(self, *arguments: str, seconds: float = 300) -> str:
        return self.run(str(built(HELM) / "helm"), *arguments, seconds=seconds)
