"""Small real trainings: a model of a hundred milliseconds, and a cycle that prunes what it published."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import builders
import drafts
from kasmina import ImportanceTracker, TrainingRun, apply, trace_topology
from leyline import layout
from leyline.digest import sha256_hex
from leyline.log import Entry, Log
from leyline.messages import Candidate
from leyline.ready import read_ready
from leyline.store import ObjectStore
from leyline.topology import Topology

MODEL = "tiny"
X = torch.randn(32, 1, 6, 6, generator=torch.Generator().manual_seed(7))
Y = torch.randint(0, 3, (32,), generator=torch.Generator().manual_seed(8))

torch.set_num_threads(1)


class Tiny(nn.Module):
    """Three convolutions, a norm and a linear layer; `head.bias` and `twin` are one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.second = nn.Conv2d(6, 5, 3)
        self.third = nn.Conv2d(5, 4, 3)
        self.head = nn.Linear(4, 3)
        self.twin = self.head.bias

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.first(x)))
        return self.head(torch.relu(self.third(torch.relu(self.second(x)))).mean((2, 3)))


@cache
def topology() -> Topology:
    torch.manual_seed(0)
    return trace_topology(Tiny(), X[:2], model_id=MODEL)


@dataclass
class Trainer:
    """A process that trains."""

    model: nn.Module
    optimizer: Optimizer
    tracker: ImportanceTracker
    run: TrainingRun

    def train(self, steps: int) -> None:
        self.model.train()
        for _ in range(steps):
            self.optimizer.zero_grad()
            with self.tracker.step(len(X)):
                nn.functional.cross_entropy(self.model(X.to(self.dtype)).float(), Y).backward()
            self.optimizer.step()

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    def publish(self, step: int, **options: Any) -> Entry:
        return self.run.publish(step=step, epoch=step // 10, **options)


def start(run: str | ObjectStore, *, seed: int = 0, dtype: torch.dtype = torch.float32, **options: Any) -> Trainer:
    """A fresh process: new weights (by `seed`), which the run's tip replaces where there is one."""
    found = topology()
    torch.manual_seed(seed)
    model = Tiny().to(dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    tracker = ImportanceTracker(model, found, sample_every=1)
    held = TrainingRun.start(run, model=model, model_id=MODEL, optimizer=optimizer, tracker=tracker, **options)
    return Trainer(model, optimizer, tracker, held)


def prune(
    store: ObjectStore, units: Mapping[int, Iterable[int]], *, base: int | None = None, of: Topology | None = None
) -> Entry:
    """A whole cycle on the tip (or on `base`), its analysis and verdict apart: `units` go, by number of the group."""
    log, of = Log(store), of or topology()
    state = log.tail().state
    pair = state.pair(state.tip if base is None else base)  # type: ignore[arg-type]
    assert pair is not None
    name = drafts.cycle(pair.record)
    log.append(drafts.admitted(pair.record), base=pair.record)
    metadata = read_ready(store, pair.checkpoint, trust=None)
    written = builders.Run(store, metadata, of, {}, {})
    pruned = {of.groups[number].id: tuple(gone) for number, gone in units.items()}
    builders.decide(written, pruned, inherited=pair.masks, cycle=name, base=pair.record)
    assert apply.apply(store, apply.read_plan(store, cycle=name, base=pair.record, trust=None), worker=0, of=1) == ()
    key = layout.manifest(name, pair.record)
    data = store.get(key)
    draft = drafts.pruned(pair.record, masks=Candidate.parse(data, name=key).masks)
    draft = draft.model_copy(update={"evidence": {**draft.evidence, key: sha256_hex(data)}})
    return log.append(draft, base=pair.record)


def everything(trainer: Trainer) -> dict[str, Tensor]:
    """Weights, buffers and slots, copied."""
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    found = {name: tensor.detach().clone() for name, tensor in trainer.model.state_dict().items()}
    for parameter, slots in trainer.optimizer.state.items():
        found |= {f"{names[id(parameter)]}/{slot}": value.clone() for slot, value in slots.items()}
    return found


def equal(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    """Bit for bit, dtype for dtype."""
    same = (a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)
    return a.keys() == b.keys() and all(same)
