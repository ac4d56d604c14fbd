"""What happens to a training after a commit: it goes on with the masks, or the masks go back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

import runs
import trained
from emrakul.cli import main
from emrakul.settings import Settings
from leyline.local import LocalStore
from leyline.log import Log
from leyline.masks import Masks
from leyline.messages import Stage
from leyline.records import Kind, Record
from trained import Trainer, cycle, outcome, state

# --- it goes on -------------------------------------------------------------------------------------------------------

SETTINGS = Settings.from_yaml(
    """
enable_checkpoint_pruning: true
safety_margin: 0.1
structured_pruning:
  progressive_schedule: {phase_1_epochs: 0, phase_2_start_epoch: 1, conservative_threshold: 0.03}
"""
)


def _sgd(model: nn.Module) -> Optimizer:
    return trained.sgd(model, 0.001)


def _adamw(model: nn.Module) -> Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=0.05)


@pytest.mark.slow
@pytest.mark.parametrize(("optimizer", "slots"), [(_sgd, 1), (_adamw, 2)], ids=["sgd", "adamw"])
def test_a_restarted_training_goes_on_from_the_masked_tip(
    optimizer: Callable[[nn.Module], Optimizer], slots: int, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    data = trained.trained(tmp_path_factory)
    store = LocalStore(tmp_path / "run")
    model = data.model()
    first = trained.start(store, data, model=model, optimizer=optimizer(model))
    first.train(3)  # so that there are moments
    first.publish()
    assert outcome(cycle(store, SETTINGS)) == "Committed/Pruned"

    # another process, which knows nothing but the run
    torch.manual_seed(1)
    other = trained.ResNet()
    trainer = trained.start(store, data, model=other, optimizer=optimizer(other))
    assert trainer.run.resumed is not None
    assert trainer.run.resumed.epoch == trainer.epoch == 1
    masks = _masks(store)
    assert sum(int((~active).sum()) for active in masks.units.values()) == 10
    assert _masked(trainer, masks, slots) == 0
    pruned = state(store).tip_pair
    assert pruned is not None
    assert pruned.accuracy is not None
    before = trained.right(trainer.model, data.evaluation)
    assert before == round(1000 * pruned.accuracy)  # the very weights that were judged

    live = {name: value.clone() for name, value in trainer.model.named_parameters()}
    trainer.train(100, batch=32)
    assert _masked(trainer, masks, slots) == 0
    assert all(not torch.equal(value, live[name]) for name, value in trainer.model.named_parameters())
    # the same batches by the process that never heard of the masks: what a hundred steps change, masks or not
    first.train(100, batch=32)
    unmasked = trained.right(first.model, data.evaluation)
    assert trained.right(trainer.model, data.evaluation) >= unmasked - 10

    # the masks are in its weights: the next checkpoint is whole, and good by its own report
    trainer.publish(refresh=0)
    tip = state(store).tip_pair
    assert tip is not None
    assert (tip.provisional, tip.good, tip.baked) == (False, True, tip.masks)


def _masks(store: LocalStore) -> Masks:
    tip = state(store).tip_pair
    assert tip is not None
    assert tip.masks is not None
    return Masks.from_bytes(store.get(tip.masks.path), name=tip.masks.path)


def _masked(trainer: Trainer, masks: Masks, slots: int) -> int:
    """How many pruned elements of weights and slots are not +0.0, bit for bit; every slot is looked at."""
    wrong = 0
    for name, parameter in trainer.model.named_parameters():
        dead = masks.dead(name)
        if dead is None:
            continue
        where = torch.from_numpy(dead.full())
        assert where.any()
        held = [s for s in trainer.optimizer.state[parameter].values() if s.shape == parameter.shape]
        assert len(held) == slots
        for tensor in (parameter.detach(), *held):
            wrong += int((tensor[where].view(torch.int32) != 0).sum())
    return wrong


# --- or it goes back --------------------------------------------------------------------------------------------------

POLICY = """
apiVersion: emrakul.dev/v1alpha1
kind: PruningPolicy
metadata: {{name: p}}
spec:
  run: {run}
  settings:
    enableCheckpointPruning: true
    minImportanceSamples: 200
    structuredPruning:
      progressiveSchedule:
        {{phase1Epochs: 1, phase2StartEpoch: 2,
         conservativeThreshold: "0.05", moderateThreshold: "0.05", aggressiveThreshold: "0.05"}}
"""


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "run")


@pytest.fixture
def watch(store: LocalStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[[], str]:
    """`emrakul watch POLICY.yaml --once`, and what it said."""
    policy = tmp_path / "policy.yaml"
    policy.write_text(POLICY.format(run=store.uri))

    def once() -> str:
        capsys.readouterr()
        assert main(["watch", str(policy), "--once", "--workers", "1"]) == 0
        return capsys.readouterr().out

    return once


@pytest.mark.slow
def test_masks_that_make_a_training_unstable_go_back_by_themselves(store: LocalStore, watch: Callable[[], str]) -> None:
    trainer = runs.trainer(store)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    base = trainer.publish(100).record.n
    assert "Conservative: Committed/Pruned" in watch()
    # a report from before the masks says nothing of them
    trainer.run.report(step=101, epoch=2, loss=9.0, state="unstable")
    assert watch() == ""
    assert trainer.run.sync().masks is not None
    assert any(not torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())

    trainer.run.report(step=110, epoch=2, loss=9.0, state="unstable")
    assert "the training is unstable at step 110" in watch()
    rolled = _last(store)
    assert (rolled.kind, rolled.reason) == (Kind.ROLLBACK, "WorseAfterPruning")
    assert state(store).tip == base
    assert state(store).hold is None  # nobody has to resume
    assert watch() == ""  # once is enough

    news = trainer.run.sync()
    assert news.restart
    assert news.masks is None
    trainer.run.load()
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())


@pytest.mark.slow
def test_a_persons_rollback_holds_until_it_is_resumed(
    store: LocalStore, watch: Callable[[], str], capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = runs.trainer(store)
    base = trainer.publish(100).record.n
    assert "Conservative: Committed/Pruned" in watch()
    trainer.run.sync()
    assert main(["rollback", store.uri, "--to", str(base)]) == 0
    assert state(store).tip == base
    assert state(store).hold is not None

    assert trainer.run.sync().restart
    trainer.run.load()
    trainer.publish(200)
    assert f"{Stage.VALIDATION_ONLY.value}: ValidatedOnly/HeldAfterRollback" in watch()
    assert state(store).tip_pair.masks is None  # type: ignore[union-attr]

    assert main(["resume", store.uri]) == 0
    assert state(store).hold is None
    trainer.publish(300)
    assert "Conservative: Committed/Pruned" in watch()
    assert state(store).tip_pair.masks is not None  # type: ignore[union-attr]


def _last(store: LocalStore) -> Record:
    return Log(store).tail().record
