"""Builds the cluster's programs from source, once: a folder per digest of the inputs, so that a change rebuilds."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cluster.places import CACHE, SOURCES

KUBERNETES = "1.34.4"
_MAJOR, _MINOR, _ = KUBERNETES.split(".")
_VERSION = "k8s.io/component-base/version"
_KUBERNETES_FLAGS = (
    f"-X {_VERSION}.gitVersion=v{KUBERNETES} -X {_VERSION}.gitMajor={_MAJOR} -X {_VERSION}.gitMinor={_MINOR}"
)


@dataclass(frozen=True, kw_only=True)
class Program:
    """What one `go build` makes: `package` is a folder of `module`; without one it is a `path@version` to install."""

    name: str
    package: str
    module: Path | None = None
    link_flags: str = ""
    also_called: tuple[str, ...] = ()


COMPONENTS = Program(
    name="components",
    package=".",
    module=SOURCES / "components",
    link_flags=_KUBERNETES_FLAGS,
    also_called=(
        "etcd",
        "etcdctl",
        "etcdutl",
        "kube-apiserver",
        "kube-controller-manager",
        "kube-proxy",
        "kube-scheduler",
        "kubectl",
        "kubelet",
    ),
)
PAUSE = Program(name="pause", package="./pause", module=SOURCES / "components")
COREDNS = Program(name="coredns", package="./dns", module=SOURCES / "services")
REGISTRY = Program(name="registry", package="./registry", module=SOURCES / "services")
HELM = Program(name="helm", package="helm.sh/helm/v3/cmd/helm@v3.22.0")
OWN = (COMPONENTS, PAUSE, COREDNS, REGISTRY, HELM)
KIND = Program(name="kind", package="sigs.k8s.io/kind@v0.30.0")


def built(program: Program) -> Path:
    """The folder that holds `program`, and each name it is also called by; builds it where it is not there yet."""
    folder = CACHE / "bin" / f"{program.name}-{_digest(program)}"
    if folder.exists():
        return folder
    with _alone(program.name):
        if not folder.exists():
            _build(program, folder)
    return folder


def _build(program: Program, folder: Path) -> None:
    began = time.monotonic()
    print(f"building {program.name} ...", flush=True)
    _remove_older(program)
    unfinished = folder.with_suffix(".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    flags = ["-trimpath", "-buildvcs=false", "-ldflags", f"-s -w {program.link_flags}".strip()]
    if program.module is None:
        _go("install", *flags, program.package, folder=CACHE, environment={"GOBIN": str(unfinished)})
    else:
        _go("build", *flags, "-o", str(unfinished / program.name), program.package, folder=program.module)
    for name in program.also_called:
        (unfinished / name).symlink_to(program.name)
    unfinished.rename(folder)
    print(f"building {program.name} took {time.monotonic() - began:.0f} s", flush=True)


def _go(*arguments: str, folder: Path, environment: Mapping[str, str] | None = None) -> None:
    if shutil.which("go") is None:
        raise SystemExit("go is not installed: the test cluster is built from source with Go 1.26 or newer")
    # The images are FROM scratch, so nothing may look for a C library; `go.work` of a folder above is not ours.
    static = {"CGO_ENABLED": "0", "GOWORK": "off"}
    done = subprocess.run(
        ["go", *arguments], cwd=folder, env={**os.environ, **static, **(environment or {})}, check=False
    )
    if done.returncode:
        raise SystemExit(f"go {' '.join(arguments)} in {folder} ended with {done.returncode}; its output is above")


def _digest(program: Program) -> str:
    """Of all that decides what is built, but for the Go toolchain: its patch releases need no rebuild."""
    digest = hashlib.sha256(repr((program.name, program.package, program.link_flags, program.also_called)).encode())
    for path in sorted(program.module.rglob("*")) if program.module else ():
        if path.is_file():
            digest.update(f"{path.relative_to(program.module or path)}\0".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _remove_older(program: Program) -> None:
    for older in (CACHE / "bin").glob(f"{program.name}-*"):
        shutil.rmtree(older)


@contextmanager
def _alone(name: str) -> Iterator[None]:
    """One builder at a time; the others wait, and find it built."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
