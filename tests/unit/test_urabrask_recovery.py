"""Recovery validation: a pair is sound if a trainer could load it now, and the sentence says why it could not."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import drafts
from builders import masks_of, tensor
from candidates import WEIGHTS, publish, stage
from kasmina.evaluation import export_evaluation
from leyline import exits, layout
from leyline.digest import sha256_hex
from leyline.ids import parameter_uuid
from leyline.log import Log
from leyline.messages import CheckpointMetadata
from leyline.open import open_store
from leyline.store import ObjectStore
from leyline.topology import Group, Kind, Member, Parameter, Topology
from urabrask.__main__ import main

torch.set_num_threads(1)

MODEL = nn.Linear(4, 3)
SHAPES = {name: tuple(p.shape) for name, p in MODEL.named_parameters()}
TOPOLOGY = Topology(
    model_id="model",
    parameters={n: Parameter(uuid=parameter_uuid(n, shape, "model"), shape=shape) for n, shape in SHAPES.items()},
    groups=(
        Group(
            id="rows",
            kind=Kind.CHANNEL,
            units=3,
            members=tuple(Member(parameter=name, role="producer", axis=0) for name in SHAPES),
            gates=("rows",),
        ),
    ),
)


@pytest.fixture
def store(tmp_path: Path) -> ObjectStore:
    return open_store(str(tmp_path / "run"))


def begin(
    store: ObjectStore, *, bias: float = 0.0, target: torch.Tensor | None = None
) -> tuple[Log, CheckpointMetadata]:
    """A run with one checkpoint, record 2."""
    weights = {name: tensor(np.full(shape, 0.5 + bias, "f4"), "F32") for name, shape in SHAPES.items()}
    evaluation = export_evaluation(MODEL, (torch.randn(5, 4),), target)
    metadata = publish(store, TOPOLOGY, weights, evaluation=evaluation)
    log = Log(store)
    log.create(drafts.genesis())
    log.append(drafts.opened("a"), base=0)
    ready = layout.checkpoint(metadata.name, layout.READY)
    evidence = {ready: sha256_hex(store.get(ready))}
    draft = drafts.published(metadata.name, term=log.tail().state.term, step=100)
    log.append(draft.model_copy(update={"evidence": evidence}), base=0)
    return log, metadata


def recheck(store: ObjectStore, record: int) -> int:
    return main(["--run", store.uri, "--record", str(record)])


def spoil(store: ObjectStore, key: str) -> None:
    path = Path(store.uri.removeprefix("file://")) / key
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.chmod(0o644)
    path.write_bytes(data)


def test_a_whole_checkpoint_is_sound(store: ObjectStore, capsys: pytest.CaptureFixture[str]) -> None:
    begin(store, target=torch.zeros(5, dtype=torch.int64))
    assert recheck(store, 2) == exits.DONE
    assert "is whole; it loads and answers 5 of 5 samples right" in capsys.readouterr().out


@pytest.mark.parametrize("path", [WEIGHTS, "evaluation.safetensors"])
def test_a_damaged_object_is_found(store: ObjectStore, capsys: pytest.CaptureFixture[str], path: str) -> None:
    _, metadata = begin(store)
    spoil(store, layout.checkpoint(metadata.name, path))
    assert recheck(store, 2) == exits.BAD_INPUT
    assert path in capsys.readouterr().err


def test_a_missing_object_is_found(store: ObjectStore, capsys: pytest.CaptureFixture[str]) -> None:
    _, metadata = begin(store)
    store.delete(layout.checkpoint(metadata.name, WEIGHTS))
    assert recheck(store, 2) == exits.BAD_INPUT
    assert WEIGHTS in capsys.readouterr().err


def test_an_exchanged_checkpoint_is_found(store: ObjectStore, capsys: pytest.CaptureFixture[str]) -> None:
    _, metadata = begin(store)
    path = Path(store.uri.removeprefix("file://")) / layout.checkpoint(metadata.name, layout.READY)
    data = path.read_bytes().rstrip() + b" "
    path.chmod(0o644)
    path.write_bytes(data)
    assert recheck(store, 2) == exits.BAD_INPUT
    assert "the log rests on" in capsys.readouterr().err


def test_weights_that_answer_with_nan_are_not_sound(store: ObjectStore, capsys: pytest.CaptureFixture[str]) -> None:
    begin(store, bias=float("inf"))
    assert recheck(store, 2) == exits.BAD_INPUT
    assert "with NaN or Inf" in capsys.readouterr().err


@pytest.mark.parametrize(("record", "sentence"), [(1, "it made no pair"), (9, "the log has no record 9")])
def test_a_record_without_a_pair_is_refused(
    store: ObjectStore, capsys: pytest.CaptureFixture[str], record: int, sentence: str
) -> None:
    begin(store)
    assert recheck(store, record) == exits.BAD_INPUT
    assert sentence in capsys.readouterr().err


def commit(store: ObjectStore) -> str:
    """A pruned pair, record 4; the candidate's folder."""
    log, metadata = begin(store)
    weights = {name: tensor(np.full(shape, 0.5, "f4"), "F32") for name, shape in SHAPES.items()}
    cycle = drafts.cycle(2)
    staged = stage(store, metadata, TOPOLOGY, weights, {"rows": [1]}, cycle=cycle, base=2)
    log.append(drafts.admitted(2), base=2)
    draft = drafts.pruned(2, masks=staged.candidate.masks)
    manifest = layout.manifest(cycle, 2)
    log.append(
        draft.model_copy(update={"evidence": {**draft.evidence, manifest: sha256_hex(store.get(manifest))}}), base=2
    )
    assert log.tail().record.n == 4
    assert masks_of(TOPOLOGY, {"rows": [1]}).to_bytes() == store.get(staged.candidate.masks.path)
    return layout.candidate(cycle, 2)


def test_a_pruned_pair_is_sound(store: ObjectStore, capsys: pytest.CaptureFixture[str]) -> None:
    commit(store)
    assert recheck(store, 4) == exits.DONE
    assert "is whole, and so is its candidate" in capsys.readouterr().out


def test_a_damaged_candidate_is_no_harm_while_base_and_masks_stand(
    store: ObjectStore, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(store, f"{commit(store)}{WEIGHTS}")
    assert recheck(store, 4) == exits.DONE
    assert "so the masks are put on when it is loaded" in capsys.readouterr().out


def test_damaged_masks_are_found(store: ObjectStore, capsys: pytest.CaptureFixture[str]) -> None:
    spoil(store, f"{commit(store)}masks.safetensors")
    assert recheck(store, 4) == exits.BAD_INPUT
    assert "masks.safetensors has SHA-256" in capsys.readouterr().err


def test_the_command_wants_one_question(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--run", "x", "--record", "1", "--cycle", "y"])
    assert "give --cycle with --base and --launch, or --run with --record" in capsys.readouterr().err
