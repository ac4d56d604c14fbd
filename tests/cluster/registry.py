"""The registry that images reach the node through: only layers that changed travel."""

from __future__ import annotations

from pathlib import Path

from cluster import network
from cluster.builds import REGISTRY, built
from cluster.places import CACHE, keep
from cluster.processes import Daemon
from cluster.programs import output

ADDRESS = "127.0.0.1:5000"  # loopback of the namespace: containerd speaks plain HTTP to loopback without being told
BUILDAH = ("buildah", "--storage-driver=overlay")


def daemon(state: Path) -> Daemon:
    """Its content is outside of `state`: images pushed before need not be pushed to the next cluster."""
    text = f"""\
version: 0.1
log: {{level: warn, accesslog: {{disabled: true}}}}
storage: {{filesystem: {{rootdirectory: {CACHE / "registry"}}}}}
http: {{addr: {ADDRESS}}}
"""
    configuration = keep(state / "registry.yaml", text)
    return Daemon(
        name="registry",
        command=(*network.ENTER, str(built(REGISTRY) / "registry"), "serve", str(configuration)),
        folder=state,
        environment={"OTEL_TRACES_EXPORTER": "none"},
    )


def serves() -> bool:
    host, port = ADDRESS.split(":")
    return network.accepts(host, int(port))


def push(image: str) -> str:
    """Sends an image of buildah's storage to the registry; returns the name that pods can use."""
    name = f"{ADDRESS}/{image.removeprefix('localhost/')}"
    options = ("--tls-verify=false", "--disable-compression")  # the way is short, and unpacking would cost more
    output(*network.ENTER, *BUILDAH, "push", *options, image, f"docker://{name}", seconds=600)
    return name


def image_from_scratch(name: str, program: Path) -> str:
    """An image in buildah's storage with one static program and nothing else."""
    container = output(*BUILDAH, "from", "scratch").strip()
    try:
        output(*BUILDAH, "copy", container, str(program), f"/{program.name}")
        output(*BUILDAH, "config", f'--entrypoint=["/{program.name}"]', container)
        output(*BUILDAH, "commit", "--quiet", container, f"localhost/{name}")
    finally:
        output(*BUILDAH, "rm", container)
    return f"localhost/{name}"
