"""Small real runs that cycles work on: a torch model trained for nothing, published by kasmina, pruned by everybody.

Publishing costs seconds (the model is exported), so it is done once and copied; the copies are equal byte for byte.
"""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import Tensor, nn

from emrakul.control import Controller, Scale
from emrakul.core.snapshot import Ask, Snapshot
from emrakul.settings import Settings
from inprocess import InProcess
from kasmina import ImportanceTracker, TrainingRun, trace_topology
from kasmina.publish import EvaluationExport
from leyline.local import LocalStore
from leyline.log import Entry, Log
from leyline.store import ObjectStore
from leyline.topology import Topology

MODEL = "small"
WIDTH = 16
GROUPS = 4
WEAK = 2
"""Channels of each group, the first ones, that hardly matter: what a cycle takes, and the gate lets go."""
X = torch.randn(256, 1, 6, 6, generator=torch.Generator().manual_seed(7))
Y = torch.randint(0, 4, (256,), generator=torch.Generator().manual_seed(8))

SETTINGS = """
enable_checkpoint_pruning: true
min_importance_samples: 200
structured_pruning:
  progressive_schedule:
    {phase_1_epochs: 1, phase_2_start_epoch: 2,
     conservative_threshold: 0.05, moderate_threshold: 0.05, aggressive_threshold: 0.05}
"""
"""3.2 of the model's 64 channels each cycle."""

_EXPORTS = EvaluationExport()
"""Of all trainers here: exporting the same model again would take seconds."""

torch.set_num_threads(1)


class Small(nn.Module):
    """Four convolutions, each with a norm: four groups of 16 channels."""

    def __init__(self) -> None:
        super().__init__()
        widths = [1, *[WIDTH] * GROUPS]
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1, bias=False) for a, b in pairwise(widths))
        self.norms = nn.ModuleList(nn.BatchNorm2d(WIDTH) for _ in range(GROUPS))
        self.fc = nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = torch.relu(norm(conv(x)))
        return self.fc(x.mean((2, 3)))


def small() -> Small:
    """Always the same weights: statistics are those of the data, and the first channels of each group are weak."""
    torch.manual_seed(0)
    model = Small()
    with torch.no_grad():
        for _ in range(20):
            model.train()(X)
        for norm in model.norms:
            norm.weight[:WEAK] *= torch.linspace(1e-3, 2e-3, WEAK)
            norm.bias.uniform_(0.0, 0.2)
            norm.bias[:WEAK] = 0.0
    return model.eval()


@cache
def topology() -> Topology:
    return trace_topology(small(), X[:2], model_id=MODEL)


def settings(text: str = "") -> Settings:
    """The cycle's settings; `text` are more lines of YAML."""
    return Settings.from_yaml(SETTINGS + text)


@dataclass
class Trainer:
    """A process that publishes the same model again and again."""

    model: Small
    run: TrainingRun

    def publish(self, step: int) -> Entry:
        batches = list(zip(X.split(32), Y.split(32), strict=True))
        return self.run.publish(step=step, epoch=2, evaluation=(X, Y), refresh=len(X), data=(_loss, batches))


def _loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def trainer(store: ObjectStore) -> Trainer:
    """Opens the run and loads its tip."""
    model = small()
    tracker = ImportanceTracker(model, topology(), sample_every=1)
    run = TrainingRun.start(store, model=model, model_id=MODEL, tracker=tracker, run_id="small-run")
    run._exports = _EXPORTS
    return Trainer(model, run)


def drive(store: ObjectStore, ask: Ask, *, workers: int | None = None, **options: Any) -> Snapshot:
    """One cycle to its end, its workers in this process, as `emrakul run` would do it with processes."""
    controller = Controller(
        store,
        Log(store),
        ask,
        lambda uri: InProcess(store, uri),
        scale=Scale(cores=2, override=workers),
        **options,
    )
    return controller.run()[0]


def asked(store: ObjectStore, chosen: Settings | None = None) -> Ask:
    """A cycle on the tip."""
    tip = Log(store).tail().state.tip
    assert tip is not None
    return Ask(base=tip, settings=chosen or settings(), runtime="local")


@cache
def _templates() -> tuple[Path, Path]:
    """A run with one checkpoint, and the same run one cycle later: pruned, synced and published again."""
    folder = Path(tempfile.mkdtemp(prefix="emrakul-runs-"))
    first, second = folder / "first", folder / "second"
    one = trainer(LocalStore(first))
    one.publish(100)
    _copy(LocalStore(first), LocalStore(second))
    again = LocalStore(second)
    one.run._store, one.run._log = again, Log(again)  # the same trainer goes on in the copy
    assert drive(again, asked(again)).end.body.outcome == "Committed"
    assert one.run.sync().masks is not None
    one.publish(200)
    return first, second


def _copy(source: ObjectStore, target: ObjectStore) -> None:
    if isinstance(target, LocalStore):  # without an fsync for each file
        shutil.copytree(urlsplit(source.uri).path, urlsplit(target.uri).path)
        return
    for head in source.list(""):
        target.put_if_absent(head.key, source.get(head.key))


def published_run(target: ObjectStore, *, masked: bool = False) -> ObjectStore:
    """`target` becomes a run with a published checkpoint. `masked`: a cycle has gone over it before."""
    _copy(LocalStore(_templates()[masked]), target)
    return target


def contents(store: ObjectStore) -> dict[str, bytes]:
    """Every object of a run by its key, those apart that say who worked when."""
    keys = [head.key for head in store.list("")]
    return {key: store.get(key) for key in keys if not _who_and_when(key)}


def _who_and_when(key: str) -> bool:
    return key.startswith("cycles/") and key.split("/")[2] in ("attempts", "responses", "started")
