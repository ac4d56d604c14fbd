"""Which cluster the tests get: the one that was given, else kind where Docker works, else our own."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from cluster import given
from cluster.cluster import Cluster
from cluster.given import GivenCluster
from cluster.kind import KindCluster
from cluster.own import OwnCluster


def a_cluster() -> Cluster:
    """By its own variable and not by KUBECONFIG: tests must never run on a cluster that was set for other work."""
    if kubeconfig := os.environ.get(given.KUBECONFIG):
        return GivenCluster(Path(kubeconfig))
    return KindCluster() if _docker_works() else OwnCluster()


def _docker_works() -> bool:
    if shutil.which("docker") is None:
        return False
    return subprocess.run(["docker", "info"], capture_output=True, check=False, timeout=30).returncode == 0
