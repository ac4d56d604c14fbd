"""What must hold of each image: who it runs as, what is in it, and that it works with a root that nobody can write."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest

from cluster import images
from cluster.programs import CommandFailed, output
from cluster.registry import BUILDAH

pytestmark = pytest.mark.timeout(1800)  # the first build of torch's layer takes minutes

# As a container runtime would: a read-only root, its own /tmp, no privileges.
_ENTER = """
mount --bind --options ro "$0" "$0"
for folder in dev proc; do mount --rbind "/$folder" "$0/$folder"; done
mount -t tmpfs tmpfs "$0/tmp"
exec chroot --userspec "$1" "$0" env --chdir "$2" --ignore-environment "${@:3}"
"""

_TRACES = """
from digits_train import ResNet, digits, trace_topology
assert trace_topology(ResNet(), digits().evaluation[0][:2], model_id="digits").groups
"""


@dataclass(frozen=True, kw_only=True)
class Image:
    name: str
    config: Mapping[str, Any]
    layers: Sequence[str]

    @contextmanager
    def root(self) -> Iterator[str]:
        container = output(*BUILDAH, "from", "--pull-never", self.name).strip()
        try:
            yield output(*BUILDAH, "mount", container).strip()
        finally:
            output(*BUILDAH, "rm", container)

    def run(self, *command: str) -> str:
        with self.root() as root:
            of_image = (self.config["User"], self.config.get("WorkingDir") or "/", *self.config["Env"])
            return output("unshare", "--mount", "bash", "-ec", _ENTER, root, *of_image, *command)

    def python(self, code: str) -> Any:
        return json.loads(self.run("python", "-c", code))


def image(target: str) -> Image:
    name = images.built(target)
    described = json.loads(output(*BUILDAH, "inspect", "--type=image", name))["OCIv1"]
    return Image(name=name, config=described["config"], layers=described["rootfs"]["diff_ids"])


@pytest.fixture(scope="session")
def built() -> Mapping[str, Image]:
    return {target: image(target) for target in ("operator", "worker", "validator", "trainer")}


@pytest.fixture(params=("operator", "worker", "validator", "trainer"))
def one(request: pytest.FixtureRequest, built: Mapping[str, Image]) -> Image:
    return built[request.param]


def test_the_user_is_a_number_and_not_root(one: Image) -> None:
    """Kubernetes cannot tell of a name that it is not root's."""
    user, _, group = one.config["User"].partition(":")
    assert user.isdecimal() and int(user) > 0
    assert group.isdecimal() and int(group) > 0


def test_labels_say_what_it_is(one: Image) -> None:
    project = tomllib.loads((images.ROOT / "pyproject.toml").read_text())["project"]
    labels = one.config["Labels"]
    assert labels["org.opencontainers.image.version"] == project["version"]
    assert labels["org.opencontainers.image.licenses"] == project["license"]
    assert labels["org.opencontainers.image.title"].startswith("emrakul ")


@pytest.mark.parametrize(
    ("target", "command"),
    [
        ("operator", ("emrakul", "operator", "--help")),
        ("operator", ("python", "-c", "import kopf, kubernetes")),
        ("worker", ("python", "-m", "elesh", "--help")),
        ("worker", ("python", "-m", "kasmina.apply", "--help")),
        ("validator", ("python", "-m", "urabrask", "--help")),
        ("validator", ("python", "-c", "import urabrask.measure; import torch; torch.linalg.inv(torch.eye(2))")),
        ("trainer", ("python", "digits_train.py", "--help")),
        ("trainer", ("python", "-c", _TRACES)),
    ],
)
def test_it_works_with_a_read_only_root(built: Mapping[str, Image], target: str, command: Sequence[str]) -> None:
    built[target].run(*command)


def test_the_root_of_these_tests_is_read_only(built: Mapping[str, Image]) -> None:
    with pytest.raises(CommandFailed, match="Read-only file system"):
        built["worker"].run("touch", "/opt/emrakul/x")


def test_torch_is_only_where_it_computes(built: Mapping[str, Image]) -> None:
    code = "import json, importlib.util as u; print(json.dumps(u.find_spec('torch') is not None))"
    assert {target: one.python(code) for target, one in built.items()} == {
        "operator": False,
        "worker": False,
        "validator": True,
        "trainer": True,
    }


def test_every_package_is_the_one_that_the_constraints_name(one: Image) -> None:
    code = "import json, importlib.metadata as m; print(json.dumps({d.name: d.version for d in m.distributions()}))"
    found = one.python(code)
    assert found.pop("emrakul")
    lines = (images.ROOT / "constraints.txt").read_text().splitlines()
    pinned = {tuple(line.partition(" ")[0].split("==")) for line in lines}
    assert {(re.sub("[-_.]+", "-", name).lower(), version) for name, version in found.items()} <= pinned


def test_neither_pip_nor_uv_is_left(one: Image) -> None:
    code = (
        "import json, shutil, importlib.util as u; print(json.dumps([u.find_spec('pip') is None, shutil.which('uv')]))"
    )
    assert one.python(code) == [True, None]


def test_all_code_is_compiled(one: Image) -> None:
    """Nobody can write bytecode where the root is read-only: without it each start would compile everything again."""
    code = """
import importlib.util, json, pathlib, sysconfig
folders = pathlib.Path(sysconfig.get_path("purelib")), pathlib.Path(importlib.util.__file__).parent
files = [file for folder in folders for file in folder.rglob("*.py")]
assert len(files) > 500
print(json.dumps([str(file) for file in files if not pathlib.Path(importlib.util.cache_from_source(file)).exists()]))
"""
    assert [file for file in one.python(code) if "/torch/testing/" not in file] == []  # it has a file for Python 3.12


def test_code_is_the_last_layer_and_torch_the_one_below(built: Mapping[str, Image]) -> None:
    *dependencies, _ = built["worker"].layers
    *below, requirements, torch, code = built["validator"].layers
    assert below == dependencies
    assert built["trainer"].layers[: len(below) + 2] == [*below, requirements, torch]
    assert code not in built["trainer"].layers[: len(below) + 2]
