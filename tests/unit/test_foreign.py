"""What cannot be imported is refused in a sentence, and nothing is written then."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

import builders
from emrakul.cli import main as emrakul
from histories import History
from kasmina import TrainingRun, load_tip, trace_topology
from kasmina.foreign import adopt, main
from kasmina.pair import PairDamaged
from leyline import exits
from leyline.envelope import Trust, Untrusted, generate_key
from leyline.local import LocalStore
from leyline.log import Entry, Log, NoRun, NotAllowed
from leyline.messages import CheckpointMetadata
from leyline.model import Malformed
from leyline.ready import read_ready, seal_ready
from leyline.records import Draft, Kind
from leyline.store import StoreError
from leyline.topology import Topology

WEIGHTS = builders.toy_weights(builders.toy_topology())


@pytest.fixture
def run(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "run")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """One file, among what else a trainer leaves there."""
    found = tmp_path / "elsewhere" / "final"
    found.mkdir(parents=True)
    (found / "model.safetensors").write_bytes(builders.safetensors(WEIGHTS))
    (found / "config.json").write_text("{}")
    (found / "optimizer.pt").write_bytes(b"pickle")
    return found


def nothing(run: LocalStore) -> bool:
    return not list(run.list(""))


def test_matrices_and_kernels_are_parameters_and_no_structure_is_known(run: LocalStore, folder: Path) -> None:
    done = adopt(run, str(folder), epoch=3)
    metadata = read_ready(run, done.checkpoint, None)
    assert (metadata.step, metadata.epoch, metadata.model_id) == (0, 3, "run")
    assert metadata.weights == ("model.safetensors",)
    assert (metadata.importance, metadata.evaluation, metadata.optimizer) == (None, None, None)
    topology = Topology.parse(run.get(f"checkpoints/{done.checkpoint}/topology.json"), name="topology")
    wanted = {name for name, t in WEIGHTS.items() if len(t.shape) >= 2 and name != "empty"}
    assert set(topology.parameters) == wanted
    assert not topology.groups
    assert done.parameters == sum(topology.parameters[name].size for name in wanted)
    assert adopt(run, str(folder / "model.safetensors"), epoch=3).record == done.record


def test_integers_alone_are_nothing_to_prune(run: LocalStore, folder: Path) -> None:
    quantized = {"w": builders.tensor(np.ones((4, 4), np.int64), "I64"), "scale": builders.tensor(np.ones(4), "F32")}
    (folder / "model.safetensors").write_bytes(builders.safetensors(quantized))
    with pytest.raises(Malformed, match="no float tensor of two axes or more"):
        adopt(run, str(folder))
    assert nothing(run)


def test_a_folder_without_weights_or_with_too_many(run: LocalStore, folder: Path) -> None:
    for nowhere in (folder.parent / "empty", folder.parent / "nowhere"):
        with pytest.raises(Malformed, match="holds no checkpoint"):
            adopt(run, str(nowhere))
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    (folder / "b.safetensors").write_bytes(builders.safetensors(WEIGHTS))
    with pytest.raises(Malformed, match="holds 2 checkpoints"):
        adopt(run, str(folder))
    assert nothing(run)
    assert adopt(run, str(folder / "b.safetensors")).new


def test_an_index_and_its_shards_must_agree(run: LocalStore, tmp_path: Path) -> None:
    folder = tmp_path / "sharded"
    folder.mkdir()
    for path, data in builders.sharded(WEIGHTS, 3).items():
        (folder / path).write_bytes(data)
    (folder / "model-00002-of-00003.safetensors").unlink()
    index = folder / "model.safetensors.index.json"
    with pytest.raises(Malformed, match=r"model-00002-of-00003.safetensors', which does not stand beside it"):
        adopt(run, str(folder))
    with pytest.raises(StoreError, match=r"model-00002-of-00003.safetensors in file:.* does not exist"):
        adopt(run, str(index))
    index.write_text(json.dumps({"weight_map": dict.fromkeys(WEIGHTS, "../run.safetensors")}))
    with pytest.raises(Malformed, match="which does not stand beside it"):
        adopt(run, str(folder))
    with pytest.raises(Malformed, match="which does not stand beside it"):
        adopt(run, str(index))
    assert nothing(run)


# one process saves alone here, and torch says so
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized:UserWarning")
@pytest.mark.parametrize("name", ["pytorch_model.bin", "epoch=3.ckpt", "dcp"])
def test_torchs_own_formats(run: LocalStore, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    kernel = torch.arange(12.0).reshape(3, 4)
    model = {"fc.weight": kernel, "twin.weight": kernel, "other.weight": kernel + 1, "fc.bias": torch.zeros(3)}
    if name == "dcp":
        torch.distributed.checkpoint.save(model, checkpoint_id=folder, no_dist=True)
    else:
        torch.save(model, folder / name)
    done = adopt(run, str(folder))
    assert adopt(run, str(folder if name == "dcp" else folder / name)).record == done.record
    topology = Topology.parse(run.get(f"checkpoints/{done.checkpoint}/topology.json"), name="topology")
    loaded = load_tip(run)
    assert all(torch.equal(loaded[key], value) for key, value in model.items())
    if name == "dcp":  # it stores every name for itself
        assert set(topology.parameters) == {"fc.weight", "twin.weight", "other.weight"}
    else:
        assert {key: one.aliases for key, one in topology.parameters.items()} == {
            "fc.weight": ("twin.weight",),
            "other.weight": (),
        }


def flattened(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return get_optimizer_state_dict(model, optimizer, options=StateDictOptions(flatten_optimizer_state_dict=True))


LAYOUTS = {
    "beside the model": lambda model, optimizer: {"model": model, "optimizer": optimizer, "epoch": 3},
    "beside a network": lambda model, optimizer: {"net": model, "optimizer": optimizer},
    "inside of an app": lambda model, optimizer: {"app": {"model": model, "optim": optimizer}},
    "in a list": lambda model, optimizer: {"state_dict": model, "optimizer_states": [optimizer]},
    "among the weights": lambda model, optimizer: {**model, "adam": optimizer},
    "flattened": lambda model, optimizer: {**model, "optimizer": optimizer},
    "flattened among the weights": lambda model, optimizer: {**model, **optimizer},
    "by names": lambda model, optimizer: {"model": model, "adam": optimizer},
}


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized:UserWarning")
@pytest.mark.parametrize("form", ["torch.save", "dcp", "before 1.6"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_optimizers_moments_are_no_weights(run: LocalStore, tmp_path: Path, form: str, layout: str) -> None:
    """Pruned by magnitude, the second moments would be the first to go."""
    model = torch.nn.Linear(4, 3)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    assert optimizer.state[model.weight]["exp_avg"].shape == (3, 4)
    moments: dict[str, Any] = optimizer.state_dict()
    if layout.startswith("flattened"):
        moments = flattened(model, optimizer)
    elif layout == "by names":
        moments = get_optimizer_state_dict(model, optimizer)
    saved = LAYOUTS[layout](model.state_dict(), moments)
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    if form == "dcp":
        torch.distributed.checkpoint.save(saved, checkpoint_id=folder, no_dist=True)
    elif form == "torch.save":
        torch.save(saved, folder / "last.ckpt")
    else:
        torch.save(saved, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
        command = (sys.executable, "-m", "kasmina.convert", tmp_path / "old.pt", folder / "model.safetensors")
        subprocess.run(command, check=True)  # it limits its own process
    done = adopt(run, str(folder))
    topology = Topology.parse(run.get(f"checkpoints/{done.checkpoint}/topology.json"), name="topology")
    (name,) = topology.parameters
    assert name.split(".")[-1] == "weight"
    assert done.parameters == 12


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized:UserWarning")
def test_a_distributed_checkpoint_is_whole_or_refused(run: LocalStore, tmp_path: Path) -> None:
    """The weights are there; what the format's own loader asks for beside them is cut off."""
    folder = tmp_path / "elsewhere"
    state = {"model": {"weight": torch.ones(64, 64)}, "optimizer": {"state": {0: {"exp_avg": torch.ones(3, 4)}}}}
    torch.distributed.checkpoint.save(state, checkpoint_id=folder, no_dist=True)
    (data,) = folder.glob("*.distcp")
    infos = torch.distributed.checkpoint.FileSystemReader(folder).read_metadata().storage_data
    last = max(infos, key=lambda index: infos[index].offset)
    assert last.fqn.startswith("optimizer")
    data.write_bytes(data.read_bytes()[:-1])
    with pytest.raises(Malformed, match=r"has a piece there at bytes .*; it is truncated, copy it again"):
        adopt(run, str(folder))
    assert nothing(run)


def test_damage_is_told_where_it_is(run: LocalStore, folder: Path) -> None:
    adopt(run, str(folder))
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(PairDamaged, match=f"model.safetensors in {folder.as_uri()}: chunk 0 of 1 is not what"):
        load_tip(run)


def test_names_cannot_act_on_a_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = "w\nCommitted: all \x1b[31mfine\x9b\u202e"
    weight = builders.Tensor("F32", (2, 2), bytes(16))
    (tmp_path / "model.safetensors").write_bytes(builders.safetensors({name: weight}))
    assert main(["--from", str(tmp_path), "--run", str(tmp_path / "run"), "--exclude", "fc*"]) == exits.BAD_INPUT
    assert emrakul(["import", str(tmp_path / "model.safetensors"), str(tmp_path / "run"), "--exclude", "fc*"]) == 4
    first, second, rest = capsys.readouterr().err.split("\n")
    assert "would lie in" in first and not rest
    assert second.isprintable() and r"there are w\nCommitted: all \x1b[31mfine\x9b\u202e, ..." in second


def test_what_may_be_a_moment_is_refused_by_name(run: LocalStore, tmp_path: Path) -> None:
    for number, (key, kind) in enumerate({"fc": "velocity", "model": "fc.weight"}.items()):
        folder = tmp_path / str(number)
        folder.mkdir()
        torch.save(
            {"state": {key: {kind: torch.ones(3, 4)}}, "net": {"fc.weight": torch.ones(3, 4)}},
            folder / "pytorch_model.bin",
        )
        with pytest.raises(Malformed, match=rf"state\.{key}\.{kind} lies where optimizers keep moments, and is none"):
            adopt(run, str(folder))
    assert nothing(run)


def test_an_apps_model_is_found(run: LocalStore, folder: Path) -> None:
    model = nn.Linear(4, 3)
    (folder / "model.safetensors").unlink()
    torch.save({"app": {"model": model.state_dict(), "steps": torch.ones(1)}}, folder / "pytorch_model.bin")
    adopt(run, str(folder))
    assert load_tip(run).keys() == {"weight", "bias"}


class Attention(nn.Module):
    def __init__(self, *, saved: bool) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.register_buffer("mask", torch.ones(4, 4).tril(), persistent=saved)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x)


def test_a_table_that_the_model_saves_no_longer_is_no_misfit(run: LocalStore, folder: Path) -> None:
    old, new = Attention(saved=True), Attention(saved=False)
    torch.save(old.state_dict(), folder / "pytorch_model.bin")
    adopt(run, str(folder / "pytorch_model.bin"))
    topology = trace_topology(new, torch.ones(1, 4), model_id="run")
    TrainingRun.start(run, model=new, model_id="run", topology=topology).close()
    assert torch.equal(new.fc.weight, old.fc.weight)


def test_numbers_with_another_sign_than_their_bytes_are_refused(run: LocalStore, folder: Path) -> None:
    weight = torch.conj(torch.randn(8, 8, dtype=torch.complex64)).imag
    assert weight.is_neg()
    (folder / "model.safetensors").unlink()
    torch.save({"weight": weight, "other": torch.ones(2, 2)}, folder / "pytorch_model.bin")
    with pytest.raises(Malformed, match=r"negated or conjugated; save tensor\.resolve_conj\(\)\.resolve_neg\(\)"):
        adopt(run, str(folder))
    torch.save({"weight": weight.resolve_neg(), "other": torch.ones(2, 2)}, folder / "pytorch_model.bin")
    assert adopt(run, str(folder)).parameters == 68


def test_a_name_that_takes_megabytes_is_refused(run: LocalStore, folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"k" * 100_000: {str(number): torch.ones(2, 2) for number in range(60)}}, folder / "pytorch_model.bin")
    with pytest.raises(Malformed, match=r"is longer than 1,024 characters; rename that tensor"):
        adopt(run, str(folder))


def test_tensors_that_no_cycle_may_touch(run: LocalStore, folder: Path) -> None:
    whole, part = adopt(run, str(folder)), adopt(run, str(folder), exclude=["fc*"])
    assert part.record > whole.record and part.checkpoint != whole.checkpoint
    topology = Topology.parse(run.get(f"checkpoints/{part.checkpoint}/topology.json"), name="topology")
    assert topology.parameters and not any(name.startswith("fc") for name in topology.parameters)
    assert load_tip(run).keys() == WEIGHTS.keys(), "they are loaded all the same"
    with pytest.raises(Malformed, match=r"no tensor is called 'fd\*', which is to be excluded; there are "):
        adopt(run, str(folder), exclude=["fd*"])


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("step_4000", 4000), ("global_step12", 12), ("checkpoint-70", 70), ("500", 500), ("epoch=3-step=100", 100),
        ("epoch=3", 0), ("my-gpt2", 0), ("v2", 0),
    ],
)  # fmt: skip
def test_the_step_that_a_name_ends_with(run: LocalStore, tmp_path: Path, name: str, step: int) -> None:
    folder = tmp_path / "some"
    folder.mkdir()
    (folder / f"{name}.safetensors").write_bytes(builders.safetensors(WEIGHTS))
    done = adopt(run, str(folder))
    assert done.checkpoint.startswith(f"{step}-")
    assert adopt(run, str(folder / f"{name}.safetensors")).record == done.record


def test_checkpoints_on_the_way_stand_beneath_the_last_one(run: LocalStore, folder: Path) -> None:
    (folder / "checkpoint-5").mkdir()
    (folder / "checkpoint-5" / "model.safetensors").write_bytes(builders.safetensors(WEIGHTS))
    adopt(run, str(folder))
    (folder / "model.safetensors").rename(folder / "checkpoint-5" / "other.safetensors")
    with pytest.raises(Malformed, match=r"holds no checkpoint: .*; there is one in checkpoint-5, name that folder"):
        adopt(run, str(folder))


def test_what_lies_beneath_is_never_taken_for_what_was_named(run: LocalStore, folder: Path) -> None:
    older = folder / "checkpoint-500"
    older.mkdir()
    shard = builders.safetensors({name: builders.Tensor("F32", (2, 2), bytes(16)) for name in WEIGHTS})
    (older / "model.safetensors").write_bytes(shard)
    (older / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {}}))
    assert adopt(run, str(folder)).bytes == (folder / "model.safetensors").stat().st_size
    (folder / "model.safetensors").unlink()
    torch.save({"fc.weight": torch.ones(3, 4)}, folder / "pytorch_model.bin")
    assert adopt(run, str(folder)).weights == "pytorch_model.bin"


def test_transformers_order_is_kept_and_other_pairs_are_refused(run: LocalStore, folder: Path) -> None:
    torch.save({"fc.weight": torch.ones(3, 4)}, folder / "pytorch_model.bin")
    (folder / "flax_model.msgpack.index.json").write_text(json.dumps({"weight_map": {"a": "flax-1.msgpack"}}))
    for beside in ("optimizer.pt", "scheduler.pt", "rng_state_0.pth", "training_args.bin"):
        torch.save({"moment": torch.ones(3, 4)}, folder / beside)
    assert adopt(run, str(folder)).weights == "model.safetensors"
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    (folder / "pytorch_model.bin").rename(folder / "adapter_model.bin")
    with pytest.raises(Malformed, match=r"holds 2 checkpoints \(adapter_model.bin, adapter_model.safetensors\); name"):
        adopt(run, str(folder))
    assert adopt(run, str(folder / "adapter_model.bin")).weights == "adapter_model.bin"
    (folder / "adapter_model.bin").unlink()
    assert adopt(run, str(folder)).weights == "adapter_model.safetensors"


@pytest.mark.parametrize("name", ["model.pth.tar", "model.pkl", "UPPER.PT", "model"])
def test_a_named_file_may_be_called_as_one_likes(tmp_path: Path, run: LocalStore, name: str) -> None:
    torch.save({"fc.weight": torch.ones(3, 4)}, tmp_path / name)
    assert adopt(run, str(tmp_path / name)).weights == name
    np.savez(tmp_path / "x.npz", weight=np.ones((3, 4)))
    with pytest.raises(Malformed, match=r"x\.npz .*holds 0 data\.pkl"):
        adopt(run, str(tmp_path / "x.npz"))


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized:UserWarning")
def test_a_folder_may_be_called_like_a_file(tmp_path: Path, run: LocalStore) -> None:
    """As Lightning calls what it shards."""
    model = {"fc.weight": torch.arange(12.0).reshape(3, 4)}
    torch.distributed.checkpoint.save(model, checkpoint_id=tmp_path / "step=8.ckpt", no_dist=True)
    done = adopt(run, str(tmp_path / "step=8.ckpt"))
    assert (done.weights, done.checkpoint.partition("-")[0]) == (".metadata", "8")


def test_a_run_inside_of_the_checkpoint_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(folder)
    for inside, origin in ((folder / "run", folder), (folder / "run", tmp_path / "link"), (folder, folder)):
        with pytest.raises(StoreError, match="would lie in the checkpoint's own folder"):
            adopt(LocalStore(inside), str(origin))
        assert nothing(LocalStore(folder / "run"))
    with pytest.raises(StoreError, match="would lie in the checkpoint's own folder"):
        adopt(LocalStore(folder), str(folder / "model.safetensors"))
    # beside one named file there is room
    assert adopt(LocalStore(folder / "run"), str(folder / "model.safetensors")).new


def test_a_header_that_lies_is_refused(run: LocalStore, folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(Malformed, match=r"model\.safetensors"):
        adopt(run, str(folder))
    assert nothing(run)


def test_a_checkpoint_inside_a_run_may_be_deleted_by_its_gc(run: LocalStore, folder: Path, tmp_path: Path) -> None:
    adopt(run, str(folder))
    inside = tmp_path / "run" / "cycles" / "c" / "candidate"
    inside.mkdir(parents=True)
    (inside / "model.safetensors").write_bytes(builders.safetensors(WEIGHTS))
    (tmp_path / "link").symlink_to(inside)
    for other in (run, LocalStore(tmp_path / "other")):
        for named in (inside, tmp_path / "link"):
            with pytest.raises(StoreError, match=r"lies in the run file://.*copy it out of there"):
                adopt(other, str(named))


def test_a_trainers_run_is_left_to_its_trainer(run: LocalStore, folder: Path) -> None:
    History(run).publish(100)
    newest = Log(run).tail().record.n
    with pytest.raises(NotAllowed, match=r"a trainer opened the run .* \(record 1\).*import into a run of its own"):
        adopt(run, str(folder), model_id="toy")
    with pytest.raises(NotAllowed, match="is a run of model toy, not other"):
        adopt(run, str(folder), model_id="other")
    assert Log(run).tail().record.n == newest


def test_what_is_trusted_must_be_signed_by_a_trainer(
    run: LocalStore, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    generate_key(tmp_path / "trainer.pem")
    other = generate_key(tmp_path / "stranger.pem")
    trusted = tmp_path / "trust"
    trusted.mkdir()
    (trusted / "trainer.pem").write_bytes((tmp_path / "trainer.pub.pem").read_bytes())
    trust = Trust.from_folder(trusted)
    for keys in ((), (other,)):
        with pytest.raises(Untrusted, match="set EMRAKUL_SIGNING_KEY to a key that is trusted for trainer"):
            adopt(run, str(folder), keys=keys, trust=trust)
        assert nothing(run)
    # as the command does it
    monkeypatch.setenv("EMRAKUL_TRUST", str(trusted))
    assert main(["--from", str(folder), "--run", run.uri]) == exits.BAD_INPUT
    assert "EMRAKUL_TRUST is set" in capsys.readouterr().err
    monkeypatch.setenv("EMRAKUL_SIGNING_KEY", str(tmp_path / "trainer.pem"))
    assert main(["--from", str(folder), "--run", run.uri]) == exits.DONE
    done = json.loads(capsys.readouterr().out)
    assert read_ready(run, done["checkpoint"], trust).imported_from == folder.as_uri()


def test_an_interrupted_import_is_finished_by_the_next(
    run: LocalStore, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Log.append

    def killed(log: Log, draft: Draft, *, base: int) -> Entry:
        if draft.kind is Kind.PUBLISH:
            raise KeyboardInterrupt
        return whole(log, draft, base=base)

    with monkeypatch.context() as patched:
        patched.setattr(Log, "append", killed)
        with pytest.raises(KeyboardInterrupt):
            adopt(run, str(folder))
    done = adopt(run, str(folder))
    assert (done.new, done.record) == (True, 2)


def test_ready_that_names_no_folder_is_malformed(run: LocalStore, folder: Path) -> None:
    done = adopt(run, str(folder))
    said = read_ready(run, done.checkpoint, None).model_dump()
    forged = CheckpointMetadata.model_validate({**said, "imported_from": "s3://elsewhere/x"})
    key = f"checkpoints/{done.checkpoint}/READY.json"
    run.delete(key)
    run.put_if_absent(key, seal_ready(forged, ()))
    with pytest.raises(Malformed, match="was imported from elsewhere: s3://elsewhere/x is in another kind of store"):
        read_ready(run, done.checkpoint, None)


def test_no_run_is_made_for_nothing(run: LocalStore, tmp_path: Path) -> None:
    assert main(["--from", str(tmp_path / "nowhere"), "--run", run.uri]) == exits.BAD_INPUT
    with pytest.raises(NoRun):
        Log(run).tail()
