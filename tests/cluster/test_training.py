"""From `helm install` to a committed, masked checkpoint of a real training, with nobody touching anything."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from cluster import copies
from cluster.cluster import Cluster
from cluster.images import ROOT
from cluster.release import Images, Release
from cluster.seaweedfs import SeaweedFS
from cluster.tenant import Body, Tenant
from leyline import layout
from leyline.digest import sha256_hex
from leyline.local import LocalStore
from leyline.records import Admit, Prune
from leyline.store import ObjectStore

EXAMPLES = ROOT / "examples" / "cluster"
EPOCHS = 5
"""The first that may commit is the third."""
FILES = ("namespace.yaml", "store.yaml", "policy.yaml", "training.yaml")

pytestmark = pytest.mark.timeout(1200)


@pytest.fixture(scope="module")
def trained(cluster: Cluster, installed: Release, store: SeaweedFS, images: Images) -> Tenant:
    """The examples as they stand, but for the trainer's image and fewer epochs; returns once the Job is complete."""
    installed.wait_ready()
    cluster.kubectl("delete", "namespace", "digits", "--ignore-not-found")  # of an earlier session
    for name in FILES:
        text = (EXAMPLES / name).read_text()
        text = text.replace("image: emrakul/trainer:0.1.0", f"image: {images.trainer}")
        text = text.replace('--epochs, "9"', f'--epochs, "{EPOCHS}"')
        cluster.kubectl("apply", "--filename=-", input=text)
    tenant = Tenant(cluster, "digits", store.run("digits"))
    wait = ("wait", "job/digits-training", "--for=condition=Complete", "--timeout=1000s")
    try:
        tenant.kubectl(*wait, seconds=1060)
    except RuntimeError as error:
        error.add_note(tenant.told())
        error.add_note(tenant.kubectl("logs", "job/digits-training"))
        raise
    return tenant


def test_a_training_ends_with_masks_that_a_cycle_committed(trained: Tenant) -> None:
    pruned = trained.records(Prune)
    assert pruned, trained.told()
    committed = [one for one in trained.list("pruningcycles") if one["status"].get("outcome") == "Committed"]
    assert {one["status"]["record"] for one in committed} == {one.n for one in pruned}
    tip = trained.log.tail().state.tip_pair
    assert tip is not None and tip.masks is not None and tip.masks.counts["channel"] > 0
    for one in committed:
        status = one["status"]
        assert float(status["accuracy"]["drop"]) <= 0.02
        masks = trained.store.get(status["masks"]["uri"].removeprefix(f"{trained.store.uri}/"))
        assert status["masks"]["digest"] == sha256_hex(masks)
    worn = trained.get("pruningpolicy", "digits")["status"]
    assert worn["tip"]["counts"] == tip.masks.counts
    assert worn["cycles"]["Committed/Pruned"] == len(pruned)


def test_the_command_line_gives_the_same_bytes(trained: Tenant, tmp_path: Path) -> None:
    """The run as it was when the last committed cycle began, and the same policy."""
    pruned = trained.records(Prune)[-1]
    (admitted,) = (one for one in trained.records(Admit) if one.id == pruned.id)
    here = LocalStore(tmp_path / "run")
    copies.before(trained.store, admitted, here)
    manifest = tmp_path / "cycle.yaml"
    manifest.write_text(yaml.safe_dump_all(same_cycle(admitted.checkpoint, run=tmp_path / "run")))

    done = subprocess.run(
        [sys.executable, "-m", "emrakul", "run", str(manifest), "--output=json"],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["cycle"] == pruned.id
    there = results(trained.store, pruned.id, admitted.body.base)
    assert results(here, pruned.id, admitted.body.base) == there
    assert layout.decision(pruned.id) in there and any(key.endswith("masks.safetensors") for key in there)


def test_a_person_s_cycle_that_goes_too_far_is_refused(trained: Tenant) -> None:
    """A fifth of all channels at once, important or not: the gate sees that the digits suffer."""
    harsh = policy_of("harsh")
    harsh["spec"]["every"] = 1000  # no cycles of its own
    harsh["spec"]["settings"] |= {"safetyMargin": "0"}
    rates = dict.fromkeys(("conservativeThreshold", "moderateThreshold", "aggressiveThreshold"), "0.5")
    structured = harsh["spec"]["settings"]["structuredPruning"]
    structured["progressiveSchedule"] |= rates
    structured["safetyConstraints"] = {"minChannelRetention": "0.1"}
    (cycle,) = yaml.safe_load_all((EXAMPLES / "cycle.yaml").read_text())
    cycle["spec"]["policyRef"]["name"] = "harsh"
    tip = trained.log.tail().state.tip
    trained.apply(harsh, cycle)

    status = trained.ended(cycle["metadata"]["name"], seconds=300)

    assert (status["outcome"], status["reason"]) == ("RolledBack", "AccuracyDrop"), status["message"]
    assert float(status["accuracy"]["drop"]) > 0.02
    assert trained.log.tail().state.tip == tip


def policy_of(name: str) -> Body:
    found: Body = yaml.safe_load((EXAMPLES / "policy.yaml").read_text())
    found["metadata"]["name"] = name
    return found


def same_cycle(checkpoint: str | None, *, run: Path) -> tuple[Body, Body]:
    policy = policy_of("digits")
    policy["spec"]["run"] = str(run)
    del policy["spec"]["store"]
    cycle = {
        "apiVersion": "emrakul.dev/v1alpha1",
        "kind": "PruningCycle",
        "metadata": {"name": "again"},
        "spec": {"checkpoint": checkpoint, "policyRef": {"name": "digits"}},
    }
    return policy, cycle


def results(store: ObjectStore, cycle: str, base: int) -> dict[str, str]:
    """SHA-256 of the decision and of everything that belongs to the candidate, masks among it."""
    keys = [layout.decision(cycle), *(head.key for head in store.list(layout.candidate(cycle, base)))]
    return {key: sha256_hex(store.get(key)) for key in keys}
