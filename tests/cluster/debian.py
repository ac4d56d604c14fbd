"""What the node needs of the machine: a few of Debian's packages, installed where they are missing."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

PLUGINS = Path("/usr/lib/cni")
BUSYBOX = Path("/bin/busybox")

# A file that shows that a package is there, or the name of a command.
_NEEDED = {
    "buildah": "buildah",
    "conntrack": "conntrack",
    "containerd": "containerd",
    "debootstrap": "debootstrap",
    "iproute2": "ip",
    "iptables": "iptables",
    "runc": "runc",
    "util-linux": "nsenter",
    "containernetworking-plugins": str(PLUGINS / "portmap"),
    "busybox-static": str(BUSYBOX),
}


def install_missing() -> None:
    """Installs what is missing, or says in one sentence what it is and why it cannot."""
    if os.geteuid() != 0:
        raise SystemExit("the node of the test cluster needs root: it makes a network namespace and runs containers")
    missing = _missing()
    if not missing:
        return
    if shutil.which("apt-get") is None:
        raise SystemExit(f"this machine lacks {', '.join(missing)}, and has no apt-get to install them with")
    print(f"installing {', '.join(missing)} ...", flush=True)
    quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in (["update"], ["install", "--yes", "--no-install-recommends", *missing]):
        done = subprocess.run(["apt-get", "-qq", *command], env=quiet, stdout=subprocess.DEVNULL, check=False)
        if done.returncode:
            raise SystemExit(f"apt-get {' '.join(command)} ended with {done.returncode}; its output is above")
    if still := _missing():
        raise SystemExit(f"{', '.join(still)}: installed, but its files are not where the test cluster looks for them")


def _missing() -> list[str]:
    return [package for package, sign in _NEEDED.items() if not (Path(sign).exists() or shutil.which(sign))]
