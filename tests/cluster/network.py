"""The node's own network namespace: nothing in it touches the machine's interfaces, ports or iptables."""

from __future__ import annotations

import ctypes
import json
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from cluster.places import NAME
from cluster.programs import CommandFailed, output

NODE_ADDRESS = "10.88.0.1"
_BRIDGE = "cni0"
_SUBNET = "10.88.0.0/16"
_FIRST_POD = "10.88.0.10"
_NAMESPACE = Path("/run/netns") / NAME

# nsenter and not `ip netns exec`: that one mounts /sys anew, without the cgroups, and the kubelet ends.
ENTER = ("nsenter", f"--net={_NAMESPACE}")


def make() -> None:
    """The namespace with loopback and a bridge that carries the node's address, unless it is there."""
    if not _exists():
        output("ip", "netns", "add", NAME)
    if _BRIDGE not in output(*ENTER, "ip", "-brief", "link"):
        output(*ENTER, "ip", "link", "add", _BRIDGE, "type", "bridge")
    for command in (
        ("ip", "link", "set", "lo", "up"),
        ("ip", "address", "replace", f"{NODE_ADDRESS}/16", "dev", _BRIDGE),
        ("ip", "link", "set", _BRIDGE, "up"),
        ("ip", "route", "replace", "default", "dev", _BRIDGE),  # services' addresses need a route to be translated
        ("sysctl", "--quiet", "--write", "net.ipv4.ip_forward=1"),
    ):
        output(*ENTER, *command)


def remove() -> None:
    if _exists():
        output("ip", "netns", "delete", NAME)


def pod_networks(state: Path) -> str:
    """The CNI configuration that gives each pod an address on the bridge."""
    routes = [{"dst": "0.0.0.0/0"}]
    addresses = {
        "type": "host-local",
        "ranges": [[{"subnet": _SUBNET, "rangeStart": _FIRST_POD, "gateway": NODE_ADDRESS}]],
        "routes": routes,
        "dataDir": str(state / "addresses"),
    }
    bridge = {
        "type": "bridge",
        "bridge": _BRIDGE,
        "isGateway": True,
        "ipMasq": True,
        "hairpinMode": True,
        "ipam": addresses,
    }
    portmap = {"type": "portmap", "capabilities": {"portMappings": True}}
    return json.dumps({"cniVersion": "0.4.0", "name": NAME, "plugins": [bridge, portmap]}, indent=2)


def accepts(host: str, port: int) -> bool:
    """Whether someone in the namespace takes connections; by bash, as no other client is certain to be there."""
    try:
        output(*ENTER, "bash", "-c", f"exec 3<>/dev/tcp/{host}/{port}")
    except CommandFailed:
        return False
    return True


def connect(host: str, port: int) -> socket.socket:
    """A connection of this process that begins in the namespace."""
    with ThreadPoolExecutor(1) as thread:  # one that ends: only it is moved, and a socket stays where it was made
        return thread.submit(_connect_inside, host, port).result()


def _connect_inside(host: str, port: int) -> socket.socket:
    clone_newnet = 0x40000000
    with _NAMESPACE.open() as namespace:
        if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), clone_newnet):
            raise OSError(ctypes.get_errno(), f"cannot enter {_NAMESPACE}")
    return socket.create_connection((host, port), timeout=None)


def _exists() -> bool:
    return _NAMESPACE.exists()
