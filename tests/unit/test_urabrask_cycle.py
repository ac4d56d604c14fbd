"""A candidate judged from front to back by `python -m urabrask`, on a small real network."""

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from builders import Tensor as Stored
from builders import masks_of, tensor
from candidates import BASE, CYCLE, publish, stage
from kasmina.evaluation import export_evaluation
from leyline import exits, layout
from leyline.envelope import generate_key
from leyline.ids import parameter_uuid
from leyline.messages import Verdict
from leyline.open import open_store
from leyline.store import ObjectStore
from leyline.topology import Group, Kind, Member, Parameter, Topology
from leyline.verdict import open_verdict
from urabrask.__main__ import main

torch.set_num_threads(1)

N = 400


class Net(nn.Module):
    """Eight channels between two convolutions; the first two hardly matter."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.norm2 = nn.Conv2d(8, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.fc = nn.Linear(6, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm1(self.conv1(x)))
        return self.fc(torch.relu(self.norm2(self.conv2(x))).amax((2, 3)))


def net() -> Net:
    torch.manual_seed(0)
    model = Net()
    with torch.no_grad():
        for _ in range(20):
            model.train()(torch.randn(32, 1, 6, 6))
        model.norm1.bias.add_(0.1)
        model.conv2.weight[:, :2] *= 1e-4
    return model.eval()


MODEL = net()


@cache
def evaluation() -> tuple[bytes, bytes]:
    """The model's program, with samples that have no labels."""
    return export_evaluation(MODEL, (torch.randn(N, 1, 6, 6, generator=torch.Generator().manual_seed(1)),), None)


def topology() -> Topology:
    group = Group(
        id="conv1",
        kind=Kind.CHANNEL,
        units=8,
        members=(
            Member(parameter="conv1.weight", role="producer", axis=0),
            Member(parameter="norm1.weight", role="norm", axis=0),
            Member(parameter="norm1.bias", role="norm", axis=0),
            Member(parameter="conv2.weight", role="consumer", axis=1),
        ),
        gates=("norm1",),
    )
    parameters = {
        name: Parameter(uuid=parameter_uuid(name, p.shape, "net"), shape=tuple(p.shape))
        for name, p in MODEL.named_parameters()
    }
    return Topology(model_id="net", parameters=parameters, groups=(group,))


def weights(model: nn.Module = MODEL) -> dict[str, Stored]:
    return {
        name: tensor(value.numpy(), "I64" if value.dtype is torch.int64 else "F32")
        for name, value in model.state_dict().items()
    }


def run(
    folder: Path,
    pruned: Iterable[int],
    *,
    published: Mapping[str, Any] | None = None,
    found: Topology | None = None,
    **staged: Any,
) -> tuple[int, ObjectStore]:
    """Publish, prune and judge in this process: the exit code, and the store."""
    store = open_store(str(folder / "run"))
    found = found or topology()
    metadata = publish(store, found, weights(), **{"evaluation": evaluation(), **(published or {})})
    stage(store, metadata, found, weights(), {"conv1": list(pruned)}, **staged)
    return main(["--cycle", f"{store.uri}/cycles/{CYCLE}", "--base", str(BASE), "--launch", "0"]), store


def verdict(store: ObjectStore) -> Verdict:
    key = layout.verdict(CYCLE, BASE)
    return open_verdict(store.get(key), None, name=key)


def by_hand(unit: int) -> dict[str, Stored]:
    """The weights with one channel gone, written without any of our code."""
    values = {name: value.numpy().copy() for name, value in MODEL.state_dict().items()}
    for name in ("conv1.weight", "norm1.weight", "norm1.bias"):
        values[name][unit] = 0
    values["conv2.weight"][:, unit] = 0
    return {name: tensor(v, "I64" if v.dtype == np.int64 else "F32") for name, v in values.items()}


def test_a_candidate_made_by_hand_passes_in_a_process_of_its_own(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "run"))
    metadata = publish(store, topology(), weights(), evaluation=evaluation())
    staged = stage(store, metadata, topology(), weights(), {"conv1": [1]}, copy=by_hand(1))
    command = [sys.executable, "-m", "urabrask", "--cycle", f"{store.uri}/cycles/{CYCLE}", "--base", "1", "--launch"]
    done = subprocess.run([*command, "3"], capture_output=True, text=True, timeout=120, env=os.environ)
    assert done.returncode == exits.DONE, done.stderr
    found = verdict(store)
    assert (found.outcome, found.reason, found.trusted) == ("PASS", "", False)
    assert (found.candidate, found.masks) == (staged.request.candidate, staged.candidate.masks.digest)
    assert [gate.against for gate in found.gates] == ["base", "unmasked"]
    assert all(gate.right_reference == gate.n == N for gate in found.gates)
    assert {"masks", "constraints", "bytes", "dead units"} <= {check.name for check in found.checks if check.passed}
    assert store.head(layout.started(CYCLE, "validate", 3))
    seconds = json.loads(store.get(layout.validation_telemetry(CYCLE, BASE)))
    assert {"structure", "evaluation", "proof"} <= set(seconds)
    assert json.loads(done.stderr.splitlines()[-1])["seconds"] == seconds


def test_the_same_candidate_gets_the_same_verdict_byte_for_byte(tmp_path: Path) -> None:
    _, first = run(tmp_path / "a", [1])
    _, second = run(tmp_path / "b", [1])
    assert first.get(layout.verdict(CYCLE, BASE)) == second.get(layout.verdict(CYCLE, BASE))
    command = ["--cycle", f"{first.uri}/cycles/{CYCLE}", "--base", str(BASE), "--launch", "1"]
    assert main(command) == exits.DONE, "a second launch keeps the verdict that stands"


def test_heavy_pruning_is_refused_for_its_accuracy(tmp_path: Path) -> None:
    code, store = run(tmp_path, [2, 4, 5, 7])
    found = verdict(store)
    assert (code, found.outcome, found.reason) == (exits.DONE, "FAIL", "AccuracyDrop")
    assert found.gates[0].drop > 0.02
    assert found.checks[-1].message == found.message
    assert not found.checks[-1].passed


def test_a_drop_against_the_unmasked_weights_refuses_what_the_last_step_would_not(tmp_path: Path) -> None:
    inherited = masks_of(topology(), {"conv1": [2, 4, 5]})
    code, store = run(tmp_path, [1], inherited=inherited, accuracy_drop=0.02)
    found = verdict(store)
    assert (code, found.outcome, found.reason) == (exits.DONE, "FAIL", "CumulativeAccuracyDrop")
    assert found.gates[0].outcome == "PASS"


def test_without_the_unmasked_weights_the_baseline_is_the_reference(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "run"))
    baseline = publish(store, topology(), weights(net()), step=7)
    inherited = masks_of(topology(), {"conv1": [0]})
    code, store = run(tmp_path, [1], inherited=inherited, reference=None, baseline=baseline.name)
    assert (code, verdict(store).outcome) == (exits.DONE, "PASS")
    assert verdict(store).gates[1].against == "baseline"


def test_too_few_samples_are_inconclusive_and_say_how_many_are_needed(tmp_path: Path) -> None:
    few = export_evaluation(MODEL, (torch.randn(40, 1, 6, 6),), None)
    _, store = run(tmp_path, [1], published={"evaluation": few})
    found = verdict(store)
    assert (found.outcome, found.reason) == ("INCONCLUSIVE", "GateInconclusive")
    assert found.gates[0].needed == 81
    assert "81 samples" in found.message


def test_no_evaluation_set_is_inconclusive(tmp_path: Path) -> None:
    _, store = run(tmp_path, [1], published={"evaluation": None})
    assert (verdict(store).outcome, verdict(store).reason) == ("INCONCLUSIVE", "NoEvaluation")


def test_a_broken_constraint_is_refused_before_anything_is_measured(tmp_path: Path) -> None:
    _, store = run(tmp_path, [1, 2, 3], min_channel_retention=0.75)
    found = verdict(store)
    assert (found.outcome, found.reason, found.gates) == ("FAIL", "ConstraintBroken", ())


def test_masks_that_nobody_decided_are_refused(tmp_path: Path) -> None:
    _, store = run(tmp_path, [1], masks=masks_of(topology(), {"conv1": [1, 2]}))
    found = verdict(store)
    assert (found.outcome, found.reason) == ("FAIL", "StructureChanged")
    assert "nobody decided" in found.message


def test_a_candidate_without_the_inherited_masks_is_refused(tmp_path: Path) -> None:
    inherited = masks_of(topology(), {"conv1": [0]})
    _, store = run(tmp_path, [1], inherited=inherited, masks=masks_of(topology(), {"conv1": [1]}))
    assert (verdict(store).reason, "give back" in verdict(store).message) == ("StructureChanged", True)


def test_a_changed_byte_is_refused(tmp_path: Path) -> None:
    copy = by_hand(1)
    raw = bytearray(copy["fc.bias"].raw)
    raw[0] ^= 1
    copy["fc.bias"] = Stored("F32", copy["fc.bias"].shape, bytes(raw))
    _, store = run(tmp_path, [1], copy=copy)
    assert (verdict(store).outcome, verdict(store).reason) == ("FAIL", "StructureChanged")


def test_a_group_without_its_consumer_fails_the_proof(tmp_path: Path) -> None:
    whole = topology()
    (group,) = whole.groups
    less = whole.model_copy(update={"groups": (group.model_copy(update={"members": group.members[:-1]}),)})
    _, store = run(tmp_path, [4], found=less, accuracy_drop=1.0, cumulative_drop=1.0)
    found = verdict(store)
    assert (found.outcome, found.reason) == ("FAIL", "DeadUnitProofFailed")
    assert "unit 4 of group conv1" in found.message


def test_a_member_that_the_evaluation_never_uses_proves_nothing(tmp_path: Path) -> None:
    class Shallow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = MODEL.fc

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x.flatten(1)[:, :6])

    shallow = export_evaluation(Shallow(), (torch.randn(N, 1, 6, 6),), None)
    _, store = run(tmp_path, [1], published={"evaluation": shallow})
    assert verdict(store).reason == "DeadUnitProofFailed"
    assert "does not use conv1.weight" in verdict(store).message


def test_a_users_function_evaluates_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "users_model.py").write_text(
        "import torch\n"
        "from torch.func import functional_call\n"
        "from test_urabrask_cycle_model import MODEL\n"
        "def logits(tensors, inputs):\n"
        "    return functional_call(MODEL, tensors, inputs)\n"
    )
    (tmp_path / "test_urabrask_cycle_model.py").write_text("MODEL = None\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    import test_urabrask_cycle_model as users

    users.MODEL = MODEL
    _, store = run(tmp_path, [1], published={"function": "users_model:logits"})
    assert verdict(store).outcome == "PASS"


def test_a_function_that_is_not_there_is_bad_input(tmp_path: Path) -> None:
    code, store = run(tmp_path, [1], published={"function": "nowhere:logits"})
    error = json.loads(store.get(layout.validation_error(CYCLE, BASE)))
    assert code == exits.BAD_INPUT
    assert error["reason"] == "InvalidInput"
    assert "nowhere:logits is not in this image" in error["message"]


def test_nan_weights_are_bad_input_and_no_verdict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = open_store(str(tmp_path / "run"))
    broken = weights()
    broken["fc.bias"] = tensor(np.full(10, np.nan, "f4"), "F32")
    metadata = publish(store, topology(), broken, evaluation=evaluation())
    stage(store, metadata, topology(), broken, {"conv1": [1]})
    command = ["--cycle", f"{store.uri}/cycles/{CYCLE}", "--base", str(BASE), "--launch", "0"]
    assert main(command) == exits.BAD_INPUT
    assert "fc.bias is nan; weights must be finite" in capsys.readouterr().err
    assert not list(store.list(layout.verdict(CYCLE, BASE)))


def test_an_unsigned_checkpoint_is_refused_where_keys_are_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = generate_key(tmp_path / "trainer.pem")
    (tmp_path / "trust").mkdir()
    (tmp_path / "trainer.pub.pem").rename(tmp_path / "trust" / "trainer.pem")
    monkeypatch.setenv("EMRAKUL_TRUST", str(tmp_path / "trust"))
    code, store = run(tmp_path / "unsigned", [1])
    assert code == exits.BAD_INPUT
    assert json.loads(store.get(layout.validation_error(CYCLE, BASE)))["reason"] == "Untrusted"
    code, store = run(tmp_path / "signed", [1], published={"keys": (key,)})
    assert (code, verdict(store).outcome, verdict(store).trusted) == (exits.DONE, "PASS", True)


def test_a_cycle_that_is_not_there_is_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    uri = open_store(str(tmp_path / "run")).uri
    assert main(["--cycle", f"{uri}/cycles/{CYCLE}", "--base", "1", "--launch", "0"]) == exits.BAD_INPUT
    assert "the cycle names it" in capsys.readouterr().err
