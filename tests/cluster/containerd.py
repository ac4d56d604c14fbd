"""containerd with a folder and a socket of its own, beside any other that the machine runs."""

from __future__ import annotations

from pathlib import Path

from cluster import network
from cluster.debian import PLUGINS
from cluster.places import keep
from cluster.processes import Daemon
from cluster.programs import CommandFailed, output


def socket(state: Path) -> Path:
    return state / "containerd.sock"


def daemon(state: Path, *, sandbox_image: str) -> Daemon:
    networks = state / "networks"
    networks.mkdir(exist_ok=True)
    keep(networks / "10-pods.conflist", network.pod_networks(state))
    text = _configuration(state, networks=networks, sandbox_image=sandbox_image)
    configuration = keep(state / "containerd.toml", text)
    command = (*network.ENTER, "containerd", f"--config={configuration}")
    return Daemon(name="containerd", command=command, folder=state)


def serves(state: Path) -> bool:
    try:
        output("ctr", f"--address={socket(state)}", "version")
    except CommandFailed:
        return False
    return True


def _configuration(state: Path, *, networks: Path, sandbox_image: str) -> str:
    """restrict_oom_score_adj: without CAP_SYS_RESOURCE no sandbox starts ("can't get final child's PID from pipe")."""
    return f"""\
version = 2
root = "{state}/containerd"
state = "{state}/containers"

[grpc]
address = "{socket(state)}"

[plugins."io.containerd.internal.v1.opt"]
path = "{state}/opt"

[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "{sandbox_image}"
restrict_oom_score_adj = true

[plugins."io.containerd.grpc.v1.cri".containerd]
snapshotter = "overlayfs"
default_runtime_name = "runc"
discard_unpacked_layers = true

[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"

[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
SystemdCgroup = false

[plugins."io.containerd.grpc.v1.cri".cni]
bin_dir = "{PLUGINS}"
conf_dir = "{networks}"
"""
