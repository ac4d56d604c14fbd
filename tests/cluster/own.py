"""Our own cluster: every component a process of this machine, in a network namespace. It needs root, and no Docker."""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping
from pathlib import Path

from cluster import cgroups, containerd, debian, leftovers, network, node, registry
from cluster.apiserver import ApiServer, Listening
from cluster.builds import OWN, PAUSE, built
from cluster.cluster import Cluster
from cluster.places import STATE
from cluster.processes import Daemon, wait_until
from cluster.programs import CommandFailed

_SANDBOX = "emrakul-tests/pause:1"
_LISTENING = Listening(
    port=6443,
    etcd_port=2379,
    etcd_peer_port=2380,
    enter=network.ENTER,
    hosts=(network.NODE_ADDRESS, "10.96.0.1", "kubernetes", "kubernetes.default"),
    flags=(
        f"--advertise-address={network.NODE_ADDRESS}",
        "--allow-privileged",
        "--kubelet-preferred-address-types=InternalIP",  # or `kubectl logs` looks for the node's name in DNS
    ),
)
_STOP_ORDER = (
    "kubelet",
    "kube-proxy",
    "kube-scheduler",
    "kube-controller-manager",
    "coredns",
    "kube-apiserver",
    "etcd",
    "containerd",
    "registry",
)


class OwnCluster(Cluster):
    """There is one at most for each working copy; each object and each process finds it again by its folder."""

    @property
    def server(self) -> ApiServer:
        return ApiServer(STATE, _LISTENING)

    @property
    def kubeconfig(self) -> Path:
        return self.server.admin

    def prepare(self) -> None:
        debian.install_missing()
        for program in OWN:
            built(program)

    def up(self) -> None:
        self.prepare()
        STATE.mkdir(parents=True, exist_ok=True)
        network.make()
        cgroups.make()
        self.start_component("registry")
        self.publish(registry.image_from_scratch(_SANDBOX, built(PAUSE) / "pause"))
        for name in reversed(_STOP_ORDER):
            self.start_component(name)
        wait_until("the node is Ready, and pods have their service account", self._pods_can_run, seconds=60)

    def down(self) -> None:
        for name in _STOP_ORDER:
            Daemon(name=name, command=(), folder=STATE).stop()
        leftovers.remove(STATE)
        network.remove()

    def enter(self, *command: str) -> tuple[str, ...]:
        return (*network.ENTER, *command)

    def connect(self, host: str, port: int) -> socket.socket:
        return network.connect(host, port)

    def publish(self, image: str) -> str:
        return registry.push(image)

    def stop_component(self, name: str) -> None:
        self._daemons[name].stop(grace=5)

    def start_component(self, name: str) -> None:
        match name:
            case "etcd":
                self.server.start_etcd()
            case "kube-apiserver":
                self.server.start_kube_apiserver()
            case _:
                self._daemons[name].start()
                ready: Mapping[str, Callable[[], bool]] = {
                    "containerd": lambda: containerd.serves(STATE),
                    "coredns": node.dns_serves,
                    "registry": registry.serves,
                }
                self._daemons[name].wait(ready.get(name, lambda: True), seconds=30)

    @property
    def _daemons(self) -> Mapping[str, Daemon]:
        around = (
            containerd.daemon(STATE, sandbox_image=f"{registry.ADDRESS}/{_SANDBOX}"),
            registry.daemon(STATE),
            node.controller_manager(STATE, self.server),
            node.scheduler(STATE, self.server),
            node.proxy(STATE, self.server),
            node.dns(STATE, self.server),
            node.kubelet(STATE, self.server),
        )
        return {daemon.name: daemon for daemon in (self.server.etcd, self.server.kube_apiserver, *around)}

    def _pods_can_run(self) -> bool:
        condition = 'jsonpath={.status.conditions[?(@.type=="Ready")].status}'
        try:
            self.kubectl("get", "serviceaccount", "default", "--namespace=default")
            return self.kubectl("get", "node", node.NODE, f"--output={condition}") == "True"
        except CommandFailed:
            return False
