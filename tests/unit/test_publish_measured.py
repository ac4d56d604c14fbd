"""What a model that nobody trains is published with: forward statistics, and the answers of a module around it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from kasmina import ImportanceTracker, TrainingRun
from leyline import layout
from leyline.local import LocalStore
from leyline.messages import CheckpointMetadata
from leyline.model import Malformed
from leyline.ready import read_ready
from trainers import MODEL, Tiny, X, topology
from urabrask.interpret import Interpreter, load_program


class Alike(nn.Module):
    """Which sample of its batch is most like each other one: [N, N]."""

    def __init__(self, tiny: nn.Module) -> None:
        super().__init__()
        self.encoder = tiny
        self.scale = nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))

    def forward(self, one: Tensor, other: Tensor) -> Tensor:
        return (self.encoder(one) * self.scale) @ self.encoder(other).transpose(0, 1)


def look(model: nn.Module, batch: Tensor) -> None:
    model(batch)


@pytest.fixture
def held(tmp_path: Path) -> tuple[TrainingRun, Tiny, LocalStore]:
    """A run of a model that nothing trains: no optimizer."""
    store = LocalStore(tmp_path / "run")
    torch.manual_seed(0)
    model = Tiny()
    run = TrainingRun.start(store, model=model, model_id=MODEL, tracker=ImportanceTracker(model, topology()))
    return run, model, store


def ready(store: LocalStore, run: TrainingRun, **options: object) -> CheckpointMetadata:
    entry = run.publish(step=0, epoch=1, **options)  # type: ignore[arg-type]
    return read_ready(store, entry.record.id, trust=None)


def test_forward_passes_are_statistics_of_their_own_source(held: tuple[TrainingRun, Tiny, LocalStore]) -> None:
    run, model, store = held
    metadata = ready(store, run, refresh=32, data=(look, X.split(8)), gradients=False)
    assert metadata.optimizer is None
    assert metadata.statistics is not None
    assert (metadata.statistics.source, metadata.statistics.samples) == ("forward", 32)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_another_module_answers_with_the_published_weights(held: tuple[TrainingRun, Tiny, LocalStore]) -> None:
    run, model, store = held
    whole = Alike(model)
    metadata = ready(store, run, evaluation=((X, X), None), evaluation_model=whole, evaluation_batch=16)
    program = program_of(store, metadata)
    assert program.program.batch == 16
    assert set(program.program.tensors) <= set(model.state_dict())
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        assert torch.allclose(program(tensors, (X[:16], X[:16])), whole.eval()(X[:16], X[:16]), atol=1e-6)
        tensors["head.weight"] *= 2
        assert not torch.allclose(program(tensors, (X[:16], X[:16])), whole(X[:16], X[:16])), "the checkpoint's tensors"


def test_the_module_that_answers_must_hold_the_model(held: tuple[TrainingRun, Tiny, LocalStore]) -> None:
    run, _, store = held
    with pytest.raises(Malformed, match="does not hold the Tiny that is published"):
        run.publish(step=0, epoch=1, evaluation=((X, X), None), evaluation_model=Alike(Tiny()))
    assert not list(store.list("checkpoints/"))


def program_of(store: LocalStore, metadata: CheckpointMetadata) -> Interpreter:
    assert metadata.evaluation is not None and metadata.evaluation.program is not None
    key = layout.checkpoint(metadata.name, metadata.evaluation.program)
    return load_program(store.get(key), name=key)
