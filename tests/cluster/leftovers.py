"""Takes away what containerd and the kubelet leave when they just end: shims, mounts, pods' networks, links."""

from __future__ import annotations

import json
import os
import shutil
import signal
from contextlib import suppress
from pathlib import Path

from cluster import cgroups, containerd
from cluster.programs import CommandFailed, output


def remove(state: Path) -> None:
    """After kubelet and containerd have ended. It finds all by itself, so a crash before does not matter."""
    networks, files = _made_outside(state)
    _end_shims(state)
    cgroups.remove()
    for network in networks:
        with suppress(CommandFailed):
            output("ip", "netns", "delete", network.name)
    for file in files:
        file.unlink(missing_ok=True)
    _unmount(state)
    _remove_links(state)
    if state.exists():
        shutil.rmtree(state)


def _made_outside(state: Path) -> tuple[set[Path], list[Path]]:
    """What containers have outside of `state`: pods' network namespaces; shims' sockets and the networks' notes."""
    networks: set[Path] = set()
    files: list[Path] = []
    for task in (state / "containers").glob("io.containerd.runtime.v2.task/k8s.io/*"):
        with suppress(FileNotFoundError, ValueError, KeyError):
            namespaces = json.loads((task / "config.json").read_text())["linux"]["namespaces"]
            networks |= {Path(one["path"]) for one in namespaces if one["type"] == "network" and "path" in one}
        with suppress(FileNotFoundError):
            files.append(Path((task / "address").read_text().removeprefix("unix://")))
        files += Path("/var/lib/cni/results").glob(f"*-{task.name}-*")
    return {network for network in networks if network.name.startswith("cni-")}, files


def _end_shims(state: Path) -> None:
    """A shim outlives containerd by design; ours are those that were told our socket."""
    address = str(containerd.socket(state))
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(FileNotFoundError, ProcessLookupError):
            command = (process / "cmdline").read_bytes().decode(errors="replace").split("\0")
            if Path(command[0]).name.startswith("containerd-shim") and address in command:
                os.kill(int(process.name), signal.SIGKILL)


def _unmount(state: Path) -> None:
    mounts = (line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines())
    for mount in sorted((mount for mount in mounts if Path(mount).is_relative_to(state)), reverse=True):
        output("umount", "--lazy", mount)


def _remove_links(state: Path) -> None:
    """The kubelet links every container's log there; the folder is in its code."""
    for link in Path("/var/log/containers").glob("*.log"):
        if link.is_symlink() and link.readlink().is_relative_to(state):
            link.unlink()
