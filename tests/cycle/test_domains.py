"""A host with two seed modules: gradients, budgets and masks stay on their own side of the border."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import trained
from kasmina import ImportanceTracker, IsolationLeak, TrainingRun, trace_topology
from kasmina.isolation import IsolationUnchecked
from leyline.local import LocalStore
from leyline.log import Entry
from leyline.masks import Masks
from leyline.ready import read_ready
from leyline.topology import HOST, Kind, Topology
from trained import cycle, outcome, settings

MODEL = "grown"
SEEDS = ("seed_a", "seed_b")
SETTINGS = settings("safety_margin: 0.1\n")


class Grown(nn.Module):
    """Digits of 7 x 7 pixels through two layers; two seeds add what they have learned to the second one's output."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(49, 120)
        self.body = nn.Linear(120, 48)
        self.fc = nn.Linear(48, 10)
        self.seed_a = nn.Sequential(nn.Linear(48, 100), nn.ReLU(), nn.Linear(100, 48))
        self.seed_b = nn.Sequential(nn.Linear(48, 100), nn.ReLU(), nn.Linear(100, 48))

    def features(self, x: Tensor) -> Tensor:
        return F.relu(self.body(F.relu(self.stem(x))))

    def forward(self, x: Tensor) -> Tensor:
        h = self.features(x)
        return self.fc(h + self.seed_a(h) + self.seed_b(h))


def losses(model: Grown, x: Tensor, y: Tensor, *, leak: str = "") -> dict[str, Tensor]:
    """Everybody's own loss; a seed learns beside a host that stands still. `leak`: the seed that forgets to detach."""
    h = model.features(x)
    said = {name: model.get_submodule(name)(h if name == leak else h.detach()) for name in SEEDS}
    found = {HOST: F.cross_entropy(model.fc(h + sum(each.detach() for each in said.values())), y)}
    for name in SEEDS:
        z = h.detach() + sum(each if other == name else each.detach() for other, each in said.items())
        found[name] = F.cross_entropy(F.linear(z, model.fc.weight.detach(), model.fc.bias.detach()), y)
    return found


@cache
def pixels(data: str) -> tuple[Tensor, Tensor]:
    found = trained.digits()
    x, y = found.train if data == "train" else found.evaluation
    return F.avg_pool2d(x, 4).flatten(1), y


@cache
def topology() -> Topology:
    return trace_topology(Grown(), torch.randn(2, 49), model_id=MODEL, seeds=SEEDS)


@dataclass
class Trainer:
    model: Grown
    tracker: ImportanceTracker
    run: TrainingRun
    optimizer: torch.optim.Optimizer

    def train(self, steps: int, *, leak: str = "", told: bool = True) -> None:
        x, y = pixels("train")
        for batch in torch.randint(len(x), (steps, 64), generator=torch.Generator().manual_seed(0)):
            self.optimizer.zero_grad()
            with self.tracker.step(64):
                for domain, loss in losses(self.model, x[batch], y[batch], leak=leak).items():
                    if told:
                        self.tracker.backward(loss, domain=domain, retain_graph=bool(leak))
                    else:
                        loss.backward()
            self.optimizer.step()

    def publish(self, step: int) -> Entry:
        def together(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
            assert isinstance(model, Grown)
            return torch.stack([*losses(model, *batch).values()]).sum()

        return self.run.publish(
            step=step, epoch=1, evaluation=pixels("evaluation"), refresh=1000, data=(together, _batches())
        )


def _batches() -> Iterator[tuple[Tensor, Tensor]]:
    return zip(*(part[:1000].split(50) for part in pixels("train")), strict=True)


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "run")


@pytest.fixture
def trainer(store: LocalStore) -> Trainer:
    torch.manual_seed(0)
    model = Grown()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
    tracker = ImportanceTracker(model, topology(), sample_every=5)
    run = TrainingRun.start(store, model=model, model_id=MODEL, optimizer=optimizer, tracker=tracker)
    return Trainer(model, tracker, run, optimizer)


def test_isolation_holds_and_each_domain_has_its_own_budget_and_masks(store: LocalStore, trainer: Trainer) -> None:
    trainer.train(200)
    name = trainer.publish(100).record.checkpoint
    assert name is not None
    statistics = read_ready(store, name, trust=None).statistics
    assert statistics is not None
    assert statistics.isolation.model_dump() == {"checked_steps": 40, "domains": (HOST, *SEEDS), "leak": None}

    # what the host and the seeds share is nobody's to prune
    found = {group.id: group.domain for group in topology().groups if group.kind is Kind.CHANNEL}
    assert found == {"stem": HOST, "seed_a.0": "seed_a", "seed_b.0": "seed_b"}
    assert "crosses the domains" in next(one.reason for one in topology().declined if one.name == "body")

    before = {key: value.clone() for key, value in trainer.model.state_dict().items()}
    ended = cycle(store, SETTINGS)
    assert outcome(ended) == "Committed/Pruned"
    assert ended.decision is not None
    # 1 % of 120 and of 100, never 1 % of 320 wherever it hurts least; 0.2 of a unit is the host's alone
    assert {(b.domain, b.live, b.achieved, b.carry_out) for b in ended.decision.budgets} == {
        (HOST, 120, 1, "1/5"),
        ("seed_a", 100, 1, "0"),
        ("seed_b", 100, 1, "0"),
    }
    assert set(ended.decision.limits) == {f"{domain}/channel" for domain in (HOST, *SEEDS)}
    assert trained.state(store).carry == {"host/channel": "1/5", "seed_a/channel": "0", "seed_b/channel": "0"}
    masks = _masks(store)
    for id_, group in masks.groups.items():
        assert {masks.parameters[m.parameter].domain for m in group.members} == {group.domain}, id_

    news = trainer.run.sync()
    assert news.masks is not None
    assert news.masks.counts == {"channel": 3}
    _only_masked_rows_changed(trainer.model, before, masks)


def test_masks_of_one_domain_touch_no_other(store: LocalStore, trainer: Trainer) -> None:
    trainer.train(200)
    trainer.publish(100)
    before = {key: value.clone() for key, value in trainer.model.state_dict().items()}
    weakest = _weakest(trainer.model.seed_a)
    # what one seed may give is not the others' to take up
    greedy = cycle(store, SETTINGS, forced=trained.decision({"seed_a.0": weakest[:21]}))
    assert outcome(greedy) == "RolledBack/ConstraintBroken"
    assert "group seed_a.0 may give 20 more of its 100 units" in greedy.end.message  # type: ignore[union-attr]

    ended = cycle(store, SETTINGS, forced=trained.decision({"seed_a.0": weakest[:3]}))
    assert outcome(ended) == "Committed/Pruned", ended.end
    assert trainer.run.sync().masks is not None
    changed = {key for key, value in trainer.model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {"seed_a.0.weight", "seed_a.0.bias", "seed_a.2.weight"}
    _only_masked_rows_changed(trainer.model, before, _masks(store))


@pytest.mark.parametrize("seed", SEEDS)
def test_a_leak_refuses_the_publish_and_names_the_parameter(seed: str, store: LocalStore, trainer: Trainer) -> None:
    trainer.train(20)
    trainer.publish(100)
    before = _keys(store)
    trainer.train(5, leak=seed)
    with pytest.raises(IsolationLeak, match=rf"the loss of domain {seed} gave (body|stem)\.bias of domain host"):
        trainer.publish(200)
    assert _keys(store) == before


def test_a_training_that_does_not_say_whose_loss_it_is_publishes_nothing(store: LocalStore, trainer: Trainer) -> None:
    before = _keys(store)
    trainer.train(20, told=False)
    with pytest.raises(IsolationUnchecked, match=r"call tracker\.backward"):
        trainer.publish(100)
    assert _keys(store) == before


def _masks(store: LocalStore) -> Masks:
    tip = trained.state(store).tip_pair
    assert tip is not None
    assert tip.masks is not None
    return Masks.from_bytes(store.get(tip.masks.path), name=tip.masks.path)


def _only_masked_rows_changed(model: Grown, before: dict[str, Tensor], masks: Masks) -> None:
    for name, value in model.state_dict().items():
        dead = masks.dead(name)
        pruned = np.zeros(tuple(value.shape), np.bool_) if dead is None else dead.full()
        assert not value[torch.from_numpy(pruned)].any()
        assert torch.equal(value[torch.from_numpy(~pruned)], before[name][torch.from_numpy(~pruned)])


def _weakest(seed: nn.Module) -> list[int]:
    """Hidden units of a seed, those first whose weights say least."""
    assert isinstance(seed, nn.Sequential)
    first, last = seed[0].weight, seed[2].weight
    assert isinstance(first, Tensor)
    assert isinstance(last, Tensor)
    return (first.norm(dim=1) * last.norm(dim=0)).argsort().tolist()


def _keys(store: LocalStore) -> list[str]:
    return sorted(head.key for head in store.list(""))
