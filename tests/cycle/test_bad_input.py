"""What people give by mistake: one sentence that names the thing and the remedy, an exit code, and nothing written."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import hostile
from commands import MANIFEST
from hostile import WEIGHTS, Shell
from leyline import layout
from leyline.local import LocalStore
from runs import published_run
from servers import free_ports


@pytest.fixture(autouse=True)
def _no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("EMRAKUL_", "AWS_")):
            monkeypatch.delenv(name)


@pytest.fixture
def run(tmp_path: Path) -> LocalStore:
    store = LocalStore(tmp_path / "run")
    published_run(store)
    return store


@pytest.fixture
def shell(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(tmp_path, capsys)


def manifest(uri: str, more: str = "") -> str:
    return MANIFEST.format(run=uri, structured="true", more=more)


def test_settings_may_be_a_file_with_the_emrakul_block(run: LocalStore, tmp_path: Path) -> None:
    """The feature flag is off in this block, whatever the policy says."""
    (tmp_path / "cycle.yaml").write_text(manifest(run.uri))
    block = tmp_path / "settings.yaml"
    block.write_text("emrakul:\n  enable_checkpoint_pruning: false\n  worker_time_budget: 60\n")
    command = [sys.executable, "-m", "emrakul", "run", str(tmp_path / "cycle.yaml"), "--settings", str(block)]
    refused = subprocess.run(command, capture_output=True, text=True, check=False)
    assert refused.returncode == 4
    assert "worker_time_budget" in refused.stderr  # the formula says 300
    assert "Traceback" not in refused.stderr


# --- manifests --------------------------------------------------------------------------------------------------------

CYCLE = manifest("x").partition("---\n")[2]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            lambda text: text.replace("enableCheckpointPruning", "enableCheckpointPrunning"),
            "enableCheckpointPrunning is no known key; did you mean enableCheckpointPruning?",
        ),
        (
            lambda text: text.replace("minImportanceSamples", "min_importance_samples"),
            "did you mean minImportanceSampl",
        ),
        (lambda text: text.replace('"0.05"', "0.05"), 'fractions in a resource are text, write "0.05"'),
        (
            lambda text: text.replace("minImportanceSamples: 200", "minImportanceSamples: lots"),
            "minImportanceSamples is",
        ),
        (lambda text: text + "spec: [", "is not readable YAML: line"),
        (lambda text: text + "---\n" + CYCLE, "has 2 PruningCycle documents; exactly one is run at a time"),
        (lambda text: text.partition("---\n")[0], "has 0 PruningCycle documents"),
        (lambda text: text.partition("---\n")[2], "or give it with --policy"),
        (lambda text: text.replace("kind: PruningCycle", "kind: PrunningCycle"), "did you mean PruningCycle?"),
        (
            lambda text: text.replace("checkpoint: latest", "checkpoint: 900-1-0f3a9b2c"),
            "has no checkpoint 900-1-0f3a9b2c in its log",
        ),
        (lambda text: text.replace("v1alpha1", "v2"), "it should be emrakul.dev/v1alpha1"),
        (
            lambda text: text.replace("file://", "ftp://"),
            "expected: The run's prefix: s3://bucket/prefix, or on one machine file:///",
        ),
        (lambda text: text.replace("/run\n", "/run/checkpoints\n"), "lies inside the run"),
        (lambda text: text.replace("/run\n", "/elsewhere\n"), "elsewhere holds no run"),
        (lambda _: "- a\n- b\n", "a resource is a mapping of keys to values"),
    ],
)
def test_a_manifest_that_is_wrong(
    run: LocalStore, shell: Shell, tmp_path: Path, change: Callable[[str], str], says: str
) -> None:
    before = hostile.keys(run)
    shell("run", shell.manifest(change(manifest(run.uri))), code=4)
    assert says in shell.sentence
    assert hostile.keys(run) == before
    assert not (tmp_path / "elsewhere").exists()


def test_a_manifest_that_is_not_there(shell: Shell, tmp_path: Path) -> None:
    shell("run", str(tmp_path / "nothing.yaml"), code=4)
    assert "nothing.yaml cannot be read: No such file" in shell.sentence


def test_a_checkpoint_that_the_run_does_not_have(run: LocalStore, shell: Shell) -> None:
    before = hostile.keys(run)
    text = manifest(run.uri).replace("latest", f"{run.uri}/checkpoints/900-1-0f3a9b2c")
    shell("run", shell.manifest(text), code=4)
    assert "has no checkpoint 900-1-0f3a9b2c in its log; the newest are 100-1-" in shell.sentence
    assert hostile.keys(run) == before


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "decision.json is not a valid Decision"),
        ('{"cycle": "c"}', "decision.json is not a valid Decision: base: Field required"),
        (None, "decision.json cannot be read: No such file"),
    ],
)
def test_a_decision_file_that_is_wrong(
    run: LocalStore, shell: Shell, tmp_path: Path, content: str | None, says: str
) -> None:
    path = tmp_path / "decision.json"
    if content is not None:
        path.write_text(content)
    before = hostile.keys(run)
    shell("run", shell.manifest(manifest(run.uri)), "--decision", str(path), code=4)
    assert says in shell.sentence
    assert hostile.keys(run) == before


def test_guidance_that_is_wrong(run: LocalStore, shell: Shell) -> None:
    run.put_if_absent("guidance/1.json", json.dumps({"rate_factor": 2}).encode())
    before = hostile.keys(run)
    shell.run(run, code=4)
    assert "guidance/1.json" in shell.sentence
    assert hostile.keys(run) == before


# --- checkpoints ------------------------------------------------------------------------------------------------------


def _missing_ready(run: LocalStore) -> None:
    hostile.publish(run)
    run.delete(hostile.key(run, layout.READY))


def _foreign_ready(run: LocalStore) -> None:
    other = run.get(hostile.key(run, layout.READY))
    hostile.publish(run)
    hostile.replace(run, hostile.key(run, layout.READY), lambda _: other)


def _truncated_shard(run: LocalStore) -> None:
    hostile.publish(run, shards=2)
    hostile.replace(run, hostile.key(run, "model-00002-of-00002.safetensors"), lambda data: data[:-4])


def _missing_shard(run: LocalStore) -> None:
    hostile.publish(run, shards=2, missing=["model-00001-of-00002.safetensors"])


def _lying_header(run: LocalStore) -> None:
    hostile.publish(run, {WEIGHTS: hostile.lying(hostile.objects(run)[WEIGHTS])})


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (_missing_ready, "READY.json in file:"),
        (_foreign_ready, "it was copied there, publish it again"),
        (_truncated_shard, "model-00002-of-00002.safetensors is"),
        (_missing_shard, "model-00001-of-00002.safetensors does not exist"),
        (_lying_header, "its header speaks of"),
    ],
)
def test_a_checkpoint_that_is_not_whole(
    run: LocalStore, shell: Shell, make: Callable[[LocalStore], None], says: str
) -> None:
    name = hostile.publish(run).record.checkpoint  # a good one before it
    make(run)
    before = hostile.keys(run)
    tip = hostile.tip(run)
    said = shell.ended(run, "Failed/InvalidInput", code=4)
    assert says in said
    assert tip in said and tip != name
    assert hostile.only_work(before, run)


# --- stores -----------------------------------------------------------------------------------------------------------


def _run_alone(*before: str, path: str, environment: dict[str, str] | None = None) -> tuple[int, str]:
    """Exit code and sentence of `emrakul run` as a process of its own."""
    done = subprocess.run(
        [*before, sys.executable, "-m", "emrakul", "run", path],
        env={**os.environ, **(environment or {})},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.stdout == ""
    return done.returncode, done.stderr


def test_a_store_that_does_not_answer_within_half_a_minute(shell: Shell) -> None:
    (port,) = free_ports(1)
    keys = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"}
    code, said = _run_alone(path=shell.manifest(manifest("s3://runs/mine")), environment=keys)
    assert (code, said.count("\n")) == (75, 1)
    assert f"127.0.0.1:{port}" in said and "check the endpoint" in said


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("unshare"), reason="needs a mount of its own")
def test_a_folder_that_may_only_be_read(run: LocalStore, shell: Shell) -> None:
    before = hostile.keys(run)
    folder = str(hostile.folder(run))
    script = f'mount --bind "{folder}" "{folder}" && mount -o remount,bind,ro "{folder}" && exec "$@"'
    mount = ("unshare", "--mount", "sh", "-c", script, "sh")
    if subprocess.run([*mount, "true"], capture_output=True, check=False).returncode:
        pytest.skip("mounting is not allowed here")
    code, said = _run_alone(*mount, path=shell.manifest(manifest(run.uri)))
    assert (code, said.count("\n")) == (75, 1)
    assert "Read-only file system" in said and "give this user access" in said
    assert hostile.keys(run) == before
