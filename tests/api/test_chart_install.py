"""The chart on an API server: cycles outlive every release, and an account has its rights and no others."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from charts import CHART, HELM, needs_helm
from cluster.alone import api_server
from cluster.apiserver import ApiServer
from cluster.programs import CommandFailed, output

pytestmark = needs_helm

CRDS = ("pruningcycles.emrakul.dev", "pruningpolicies.emrakul.dev")
CYCLE = """\
apiVersion: emrakul.dev/v1alpha1
kind: PruningCycle
metadata: {name: kept, namespace: default}
spec: {checkpoint: "s3://bucket/run/checkpoints/4000-1-0f3a9b2c"}
"""


@pytest.fixture(scope="module")
def own() -> Iterator[ApiServer]:
    """A server of our own: definitions are the whole cluster's, and other tests count on them."""
    with api_server() as server:
        yield server


@pytest.fixture
def newer(tmp_path: Path) -> Path:
    """A chart of a later version, with another schema."""
    shutil.copytree(CHART, chart := tmp_path / "newer")
    for path in (chart / "files" / "crds").iterdir():
        path.write_text(f"{path.read_text()}# and one field more\n")
    return chart


def helm(server: ApiServer, *arguments: str) -> str:
    return output(HELM, *arguments, f"--kubeconfig={server.admin}")


def install(server: ApiServer, release: str, *arguments: str, chart: Path = CHART) -> str:
    return helm(server, "install", release, str(chart), f"--namespace={release}", "--create-namespace", *arguments)


def uninstall(server: ApiServer, release: str) -> None:
    helm(server, "uninstall", release, f"--namespace={release}")


def owner(server: ApiServer) -> set[str]:
    path = r"--output=jsonpath={.items[*].metadata.annotations.meta\.helm\.sh/release-name}"
    return set(server.kubectl("get", "crd", path).split())


def hand_over(server: ApiServer, refusal: str) -> None:
    """Do what the message says, letter by letter."""
    for command in re.findall(r"^ +kubectl (.*)$", refusal, re.MULTILINE):
        server.kubectl(*command.split())


def test_cycles_outlive_releases_of_any_name_and_version(own: ApiServer, newer: Path) -> None:
    install(own, "first")
    own.kubectl("wait", "--for=condition=Established", "crd", *CRDS)
    own.kubectl("apply", "--filename=-", input=CYCLE)
    uid = own.kubectl("get", "prune", "kept", "--output=jsonpath={.metadata.uid}")

    uninstall(own, "first")
    install(own, "second")  # another name, the same schema: nothing to do
    helm(own, "upgrade", "second", str(CHART), "--namespace=second", "--set=logLevel=debug")
    assert owner(own) == {"first"}
    uninstall(own, "second")

    with pytest.raises(CommandFailed, match="made by the release first/first, and its schema is not") as refused:
        install(own, "third", chart=newer)
    install(own, "third", "--set=crds.enabled=false", chart=newer)
    uninstall(own, "third")
    hand_over(own, refused.value.error)
    install(own, "third", chart=newer)
    assert owner(own) == {"third"}
    uninstall(own, "third")

    assert own.kubectl("get", "prune", "kept", "--output=jsonpath={.metadata.uid}") == uid
    own.kubectl("delete", "crd", *CRDS)


def test_definitions_of_kubectl_are_left_alone_or_handed_over(own: ApiServer) -> None:
    own.kubectl("apply", *(f"--filename={path}" for path in (CHART.parents[1] / "crds").iterdir()))
    with pytest.raises(CommandFailed, match="made by other means than Helm") as refused:
        install(own, "fourth")
    install(own, "fourth", "--set=crds.enabled=false")
    assert owner(own) == set()
    hand_over(own, refused.value.error)
    helm(own, "upgrade", "fourth", str(CHART), "--namespace=fourth")
    assert owner(own) == {"fourth"}
    uninstall(own, "fourth")
    own.kubectl("delete", "crd", *CRDS)


@pytest.mark.parametrize(
    ("settings", "here", "elsewhere"),
    [(("--set=namespaces={default}",), True, False), ((), True, True)],
    ids=["namespaced", "cluster-wide"],
)
def test_rights_end_where_the_operator_watches(
    own: ApiServer, settings: tuple[str, ...], here: bool, elsewhere: bool
) -> None:
    install(own, "rights", *settings)
    try:
        for namespace, wanted in (("default", here), ("kube-system", elsewhere)):
            for verb, what in (
                ("watch", "pruningcycles.emrakul.dev"),
                ("patch", "pruningcycles.emrakul.dev --subresource=status"),
                ("create", "jobs.batch"),
                ("get", "secrets"),
            ):
                assert may(own, verb, what, f"--namespace={namespace}") == wanted, (namespace, verb, what)
        assert may(own, "list", "pruningpolicies.emrakul.dev", "--all-namespaces") == elsewhere
        for verb, what in (
            ("create", "pods"),
            ("watch", "pods"),
            ("list", "secrets"),
            ("update", "jobs.batch"),
            ("update", "pruningcycles.emrakul.dev --subresource=finalizers"),
            ("list", "namespaces"),
            ("list", "customresourcedefinitions"),
        ):
            assert not may(own, verb, what, "--namespace=default"), (verb, what)
    finally:
        uninstall(own, "rights")
        own.kubectl("delete", "crd", *CRDS)


def may(server: ApiServer, verb: str, what: str, where: str) -> bool:
    who = "--as=system:serviceaccount:rights:rights-emrakul"
    try:
        return server.kubectl("auth", "can-i", verb, *what.split(), where, who).strip() == "yes"
    except CommandFailed as answer:
        if answer.code == 1 and not answer.error.strip().startswith("error"):
            return False
        raise
