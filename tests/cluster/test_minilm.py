"""A cycle that a person writes in eight lines, on a real transformer, and what kubectl tells of it."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable

import pytest

from cluster.images import ROOT
from cluster.release import Release
from cluster.tenant import Tenant
from leyline.local import LocalStore
from leyline.log import Log

EIGHT_LINES = """\
apiVersion: emrakul.dev/v1alpha1
kind: PruningCycle
metadata:
  name: first
  namespace: {namespace}
spec:
  checkpoint: {checkpoint}
"""

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def minilm(tmp_path_factory: pytest.TempPathFactory) -> LocalStore:
    """The run as examples/minilm.py publishes it."""
    folder = tmp_path_factory.mktemp("minilm") / "run"
    subprocess.run(
        [sys.executable, str(ROOT / "examples" / "minilm.py"), "--run", str(folder)], check=True, timeout=600
    )
    return LocalStore(folder)


def test_eight_lines_are_a_cycle(minilm: LocalStore, new_tenant: Callable[..., Tenant], release: Release) -> None:
    tenant = new_tenant(run=minilm)
    tip = Log(minilm).tail().state.tip_pair
    assert tip is not None
    text = EIGHT_LINES.format(namespace=tenant.namespace, checkpoint=f"{tenant.store.uri}/checkpoints/{tip.checkpoint}")
    assert len(text.splitlines()) <= 8
    tell(tenant, "apply", "--filename=-", input=text)
    tenant.until("it analyses", lambda: tenant.get("pruningcycle", "first").get("status", {}).get("progress"))
    tell(tenant, "get", "pruningcycles")
    tell(tenant, "wait", "pruningcycle/first", "--for=condition=Complete", "--timeout=10m")
    status = tenant.ended("first", seconds=10)

    assert (status["outcome"], status["reason"]) == ("ValidatedOnly", "CheckpointPruningDisabled")
    assert "enableCheckpointPruning" in status["message"]
    assert status["counts"]["channel"] > 0
    assert tenant.log.tail().state.tip == tip.record

    row = columns(tell(tenant, "get", "pruningcycles"))
    assert row["NAME"] == "first" and row["STATE"] == "ValidatedOnly"
    assert row["CHECKPOINT"] == tip.checkpoint
    assert re.fullmatch(r"\d+/\d+ .*", row["PRUNED"])
    described = tell(tenant, "describe", "pruningcycle", "first")
    assert "Complete" in described and "Events:" in described
    assert "A checkpoint's name" in tell(tenant, "explain", "pruningcycle.spec.checkpoint")


def tell(tenant: Tenant, *arguments: str, input: str | None = None) -> str:
    """Run kubectl, and show what it says: the README's session is this test's (`-s`)."""
    said = tenant.kubectl(*arguments, input=input, seconds=660)
    print(f"$ kubectl {' '.join(arguments)}\n{said}")
    return said


def columns(table: str) -> dict[str, str]:
    """The only row of a table, by the names of its columns."""
    head, row = table.splitlines()
    starts = [(found.start(), found.group()) for found in re.finditer(r"\S+(?: \S+)*", head)]
    ends = [start for start, _ in starts[1:]] + [len(row)]
    return {name: row[start:end].strip() for (start, name), end in zip(starts, ends, strict=True)}
