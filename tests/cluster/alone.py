"""An API server with nothing around it: no scheduler, no kubelet, no controllers unless a test starts some."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cluster.apiserver import ApiServer, Listening
from cluster.builds import COMPONENTS, built
from cluster.places import CACHE
from cluster.processes import Daemon, identity
from servers import free_ports

_OWNER = "owner.pid"
_FLAGS = (
    "--bind-address=127.0.0.1",
    "--advertise-address=127.0.0.1",
    "--endpoint-reconciler-type=none",  # it would refuse loopback, again and again
    "--disable-admission-plugins=ServiceAccount",  # no controller makes the default account that pods must have
)


@contextmanager
def api_server() -> Iterator[ApiServer]:
    """A new API server on free ports of loopback, ended and removed afterwards."""
    servers = CACHE / "api"
    _end_forsaken(servers)
    folder = servers / uuid.uuid4().hex[:8]
    folder.mkdir(parents=True)
    (folder / _OWNER).write_text(identity(os.getpid()) or "")
    port, etcd_port, etcd_peer_port = free_ports(3)
    listening = Listening(port=port, etcd_port=etcd_port, etcd_peer_port=etcd_peer_port, flags=_FLAGS)
    server = ApiServer(folder, listening)
    try:
        server.start()
        yield server
    finally:
        server.stop()
        shutil.rmtree(folder)


@contextmanager
def controllers(server: ApiServer, *names: str) -> Iterator[None]:
    """Runs a few of Kubernetes' own controllers, such as `garbage-collector-controller` or `namespace-controller`."""
    (port,) = free_ports(1)
    manager = Daemon(
        name="kube-controller-manager",
        command=(
            str(built(COMPONENTS) / "kube-controller-manager"),
            f"--kubeconfig={server.admin}",
            f"--controllers={','.join(names)}",
            "--leader-elect=false",
            "--bind-address=127.0.0.1",
            f"--secure-port={port}",
        ),
        folder=server.folder,
    )
    manager.start()
    try:
        yield
    finally:
        manager.stop()


def _end_forsaken(servers: Path) -> None:
    """Ends the servers of test runs that were killed before they could do it."""
    for mark in servers.glob(f"*/{_OWNER}"):
        owner = mark.read_text()
        if owner and identity(int(owner.split()[0])) != owner:
            for name in ("kube-controller-manager", "kube-apiserver", "etcd"):
                Daemon(name=name, command=(), folder=mark.parent).stop()
            shutil.rmtree(mark.parent, ignore_errors=True)  # another run may be at it too
