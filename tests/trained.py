"""The digits network of the examples, trained once for all tests of a session, and real runs that begin with it."""

from __future__ import annotations

import fcntl
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from emrakul.control import Controller, Runtime, Scale
from emrakul.core.snapshot import Ask, Snapshot
from emrakul.runtime.local import LocalRuntime
from emrakul.settings import Settings
from inprocess import InProcess
from kasmina import ImportanceTracker, TrainingRun, trace_topology
from kasmina.publish import EvaluationExport
from leyline import layout
from leyline.fold import RunState
from leyline.log import Entry, Log
from leyline.messages import Decision, GroupDecision, Stage, Verdict
from leyline.store import ObjectStore
from leyline.topology import Topology
from leyline.verdict import open_verdict

sys.path.append(str(Path(__file__).parents[1] / "examples"))

from digits_model import ResNet
from digits_train import BATCH, RATE, digits

MODEL = "digits-resnet"
EPOCHS = 3
SPARE = "layer3.1.bn2"
"""Where the branch ends that the network learned to do without: one layer that may go."""
SAMPLES = 1000
"""Importance samples of each checkpoint: the default of min_importance_samples."""

torch.set_num_threads(1)

Data = tuple[Tensor, Tensor]
"""Images [n, 1, 28, 28] and labels [n]."""


@dataclass(frozen=True)
class Trained:
    """What training gave: 4,000 images seen, 1,000 not."""

    train: Data
    evaluation: Data
    weights: dict[str, Tensor]
    moments: dict[str, Any]
    topology: Topology

    def model(self) -> ResNet:
        model = ResNet()
        model.load_state_dict(self.weights)
        return model

    def batches(self, size: int, *, seed: int = 0) -> Iterator[Data]:
        """Mini-batches of the training images, without end."""
        chance = torch.Generator().manual_seed(seed)
        while True:
            for batch in torch.randperm(len(self.train[0]), generator=chance).split(size):
                yield self.train[0][batch], self.train[1][batch]


def trained(factory: pytest.TempPathFactory) -> Trained:
    """The network: trained by the first test process that asks, read by the others."""
    base = factory.getbasetemp()
    return _trained(base.parent if "PYTEST_XDIST_WORKER" in os.environ else base)


@cache
def _trained(folder: Path) -> Trained:
    path = folder / "digits.pt"
    with _locked(folder / "digits.lock"):
        if not path.exists():
            torch.save(_train(), path.with_suffix(".part"))
            path.with_suffix(".part").rename(path)
    found = torch.load(path, weights_only=True)
    return Trained(**found | {"topology": Topology.parse(found["topology"], name=str(path))})


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _train() -> dict[str, Any]:
    torch.manual_seed(0)
    data, model = digits(), ResNet()
    optimizer = sgd(model)
    topology = trace_topology(model, data.evaluation[0][:2], model_id=MODEL)
    skipped = model.get_submodule(SPARE).register_forward_hook(_every_other())
    batches = [batch for _ in range(EPOCHS) for batch in torch.randperm(len(data.train[0])).split(BATCH)]
    for number, batch in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = RATE * (1 - number / len(batches))
        optimizer.zero_grad()
        loss(model, (data.train[0][batch], data.train[1][batch])).backward()
        optimizer.step()
    skipped.remove()
    return {
        "train": data.train,
        "evaluation": data.evaluation,
        "weights": model.state_dict(),
        "moments": optimizer.state_dict(),
        "topology": topology.canonical(),
    }


def _every_other() -> Callable[[nn.Module, Any, Tensor], Tensor]:
    """Stochastic depth: a hook that leaves a branch out of every other step."""
    steps = count()
    return lambda _module, _inputs, output: output * (next(steps) % 2)


def sgd(model: nn.Module, rate: float = RATE) -> Optimizer:
    return torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9, weight_decay=5e-4)


def loss(model: nn.Module, batch: Data) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def right(model: nn.Module, data: Data) -> int:
    """How many of `data` are right, in eval mode."""
    mode = model.training
    model.eval()
    with torch.no_grad():
        found = int((model(data[0]).argmax(1) == data[1]).sum())
    model.train(mode)
    return found


# --- a trainer --------------------------------------------------------------------------------------------------------

_EXPORTS: dict[str, EvaluationExport] = {}
"""By model: exporting it takes seconds, and the program holds no weights."""


@dataclass
class Trainer:
    """A process that holds the trained network, and publishes it as one checkpoint after the other."""

    data: Trained
    model: nn.Module
    optimizer: Optimizer
    tracker: ImportanceTracker
    run: TrainingRun
    epoch: int = 0

    def publish(self, *, state: str | None = "stable", refresh: int = SAMPLES) -> Entry:
        """The next epoch's checkpoint. `state` is what the trainer reports before; None: it reports nothing."""
        self.epoch += 1
        step = 100 * self.epoch
        if state is not None:
            n = len(self.data.evaluation[0])
            self.run.report(
                step=step,
                epoch=self.epoch,
                loss=0.1,
                correct=right(self.model, self.data.evaluation),
                n=n,
                state=state,  # type: ignore[arg-type]
            )
        measured = (loss, list(zip(*(part[:SAMPLES].split(50) for part in self.data.train), strict=True)))
        return self.run.publish(
            step=step, epoch=self.epoch, evaluation=self.data.evaluation, refresh=refresh, data=measured
        )

    def train(self, steps: int, *, batch: int = BATCH, step_loss: Callable[[nn.Module, Data], Tensor] = loss) -> None:
        self.model.train()
        for number, each in enumerate(self.data.batches(batch, seed=self.epoch)):
            if number == steps:
                return
            self.optimizer.zero_grad()
            with self.tracker.step(batch):
                step_loss(self.model, each).backward()
            self.optimizer.step()


def start(
    store: ObjectStore, data: Trained, *, model: nn.Module | None = None, optimizer: Optimizer | None = None
) -> Trainer:
    """A fresh process with the trained weights, or with the tip's where the run has one."""
    model = data.model() if model is None else model
    if optimizer is None:
        optimizer = sgd(model)
        optimizer.load_state_dict(data.moments)
    tracker = ImportanceTracker(model, data.topology)
    run = TrainingRun.start(
        store, model=model, model_id=MODEL, optimizer=optimizer, tracker=tracker, run_id="digits-run"
    )
    run._exports = _EXPORTS.setdefault(MODEL, run._exports)
    return Trainer(data, model, optimizer, tracker, run, run.resumed.epoch if run.resumed else 0)


# --- cycles -----------------------------------------------------------------------------------------------------------


def settings(text: str = "", **constraints: float) -> Settings:
    """Masks are wanted from the first epoch on. `text`: more lines of YAML; `constraints`: of safety_constraints."""
    return Settings.from_yaml(
        f"""
enable_checkpoint_pruning: true
structured_pruning:
  progressive_schedule: {{phase_1_epochs: 0, phase_2_start_epoch: 1}}
  safety_constraints: {{{", ".join(f"{name}: {value}" for name, value in constraints.items())}}}
"""
        + text
    )


def cycle(store: ObjectStore, chosen: Settings, *, forced: Decision | None = None, processes: bool = False) -> Snapshot:
    """One cycle on the tip, to its end. `processes`: workers are processes of their own, as `emrakul run` has them."""
    log = Log(store)
    tip = log.tail().state.tip
    assert tip is not None

    def runtime(uri: str) -> Runtime:
        return LocalRuntime(uri) if processes else InProcess(store, uri)

    ask = Ask(base=tip, settings=chosen, runtime="local", forced=forced.sha256() if forced else None)
    controller = Controller(store, log, ask, runtime, scale=Scale(cores=1), forced=forced)
    try:
        return controller.run()[0]
    finally:
        torch.set_num_threads(1)  # the validator takes all it can get


def outcome(ended: Snapshot) -> str:
    """ "Committed/Pruned" and the like."""
    assert ended.end is not None
    return f"{ended.end.body.outcome}/{ended.end.reason}"  # type: ignore[union-attr]


def verdict(store: ObjectStore, ended: Snapshot) -> Verdict:
    assert ended.here is not None
    key = layout.verdict(ended.cycle, ended.here.base)
    return open_verdict(store.get(key), None, name=key)


def state(store: ObjectStore) -> RunState:
    return Log(store).tail().state


def decision(groups: dict[str, list[int]]) -> Decision:
    """A person's decision; what is not theirs to say, the control plane fills in."""
    return Decision(
        cycle="-",
        base=0,
        checkpoint="-",
        stage=Stage.CONSERVATIVE,
        method="forced",
        policy_state="",
        settings="",
        groups=tuple(GroupDecision(group=id_, pruned=tuple(sorted(units))) for id_, units in groups.items()),
    )
