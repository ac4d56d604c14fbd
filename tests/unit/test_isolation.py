"""Host losses give seeds no gradient and the other way round; what leaks is named, and nothing is published."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kasmina.isolation import IsolationLeak, IsolationUnchecked
from kasmina.topology import trace_topology
from kasmina.tracker import ImportanceTracker

torch.set_num_threads(1)


class Grown(nn.Module):
    """A host with two seeds that learn to reconstruct its features; `leak` names a seed that forgets to detach."""

    def __init__(self, leak: str = "") -> None:
        super().__init__()
        self.stem = nn.Linear(5, 8)
        self.body = nn.Linear(8, 8)
        self.fc = nn.Linear(8, 3)
        self.seed_a = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 8))
        self.seed_b = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 8))
        self.leak = leak

    def features(self, x: Tensor) -> Tensor:
        return F.relu(self.body(F.relu(self.stem(x))))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = self.features(x)
        given = {name: self.features(x) if self.leak == name else h.detach() for name in ("seed_a", "seed_b")}
        return self.fc(h), self.seed_a(given["seed_a"]), self.seed_b(given["seed_b"])


def losses(model: Grown, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    logits, a, b = model(x)
    target = model.features(x).detach()
    return {"host": F.cross_entropy(logits, y), "seed_a": F.mse_loss(a, target), "seed_b": F.mse_loss(b, target)}


def tracked(model: Grown, *, every: int = 1) -> ImportanceTracker:
    torch.manual_seed(0)
    topology = trace_topology(Grown(), torch.randn(2, 5), model_id="g", seeds=("seed_a", "seed_b"))
    assert topology.domains == ("host", "seed_a", "seed_b")
    return ImportanceTracker(model, topology, sample_every=every)


def train(model: Grown, tracker: ImportanceTracker, steps: int) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(steps):
        x, y = torch.randn(16, 5), torch.randint(3, (16,))
        optimizer.zero_grad()
        with tracker.step(16):
            for domain, loss in losses(model, x, y).items():
                tracker.backward(loss, domain=domain)
        optimizer.step()


def test_isolated_domains_are_recorded_as_such() -> None:
    model = Grown()
    tracker = tracked(model, every=2)
    train(model, tracker, 6)
    tracker.check_isolation()
    stats, arrays = tracker.stats(checkpoint="c", run_id="r")
    assert stats.isolation.checked_steps == 3
    assert stats.isolation.domains == ("host", "seed_a", "seed_b")
    assert stats.isolation.leak is None
    assert {"stem", "seed_a.0", "seed_b.0"} <= set(stats.groups)  # each domain's loss scored its own units
    assert all(arrays[f"{group}/odd/abs"].any() for group in ("stem", "seed_a.0", "seed_b.0"))


@pytest.mark.parametrize("seed", ["seed_a", "seed_b"])
def test_a_seed_that_reaches_the_host_is_named(seed: str) -> None:
    model = Grown(leak=seed)
    tracker = tracked(model)
    train(model, tracker, 2)
    with pytest.raises(IsolationLeak, match=rf"the loss of domain {seed} gave body\.bias of domain host a gradient"):
        tracker.check_isolation()
    assert tracker.stats(checkpoint="c", run_id="r")[0].isolation.leak == "body.bias"


def test_a_host_loss_that_reaches_a_seed_is_named() -> None:
    model = Grown()
    tracker = tracked(model)
    with tracker.step(16):
        _, a, _ = model(torch.randn(16, 5))
        tracker.backward(a.square().mean(), domain="host")
    with pytest.raises(IsolationLeak, match=r"domain host gave seed_a\.0\.bias of domain seed_a"):
        tracker.check_isolation()


def test_a_leak_is_found_although_gradients_were_there_before() -> None:
    """Compared with what this backward pass brings, not with the sum in .grad."""
    model = Grown(leak="seed_a")
    tracker = tracked(model)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    train_once = losses(model, torch.randn(16, 5), torch.randint(3, (16,)))
    with tracker.step(16):
        tracker.backward(train_once["seed_a"], domain="seed_a")
    with pytest.raises(IsolationLeak):
        tracker.check_isolation()


def test_a_gradient_of_zero_is_no_leak() -> None:
    model = Grown(leak="seed_a")
    tracker = tracked(model)
    with tracker.step(16):
        tracker.backward(losses(model, torch.randn(16, 5), torch.randint(3, (16,)))["seed_a"] * 0, domain="seed_a")
    tracker.check_isolation()


def test_a_leak_is_not_forgotten() -> None:
    model = Grown(leak="seed_a")
    tracker = tracked(model)
    train(model, tracker, 1)
    kept = tracker.state()
    model.leak = ""
    train(model, tracker, 3)
    with pytest.raises(IsolationLeak):
        tracker.check_isolation()
    restored = tracked(model)
    restored.load_state(kept)
    with pytest.raises(IsolationLeak, match=r"domain seed_a gave body\.bias"):
        restored.check_isolation()


def test_several_domains_that_nobody_checked_are_refused() -> None:
    model = Grown()
    tracker = tracked(model)
    tracker.check_isolation()  # nothing was trained, so nothing can have leaked
    with tracker.step(16):
        sum(losses(model, torch.randn(16, 5), torch.randint(3, (16,))).values()).backward()
    with pytest.raises(IsolationUnchecked, match=r"none of 1 sampled steps said whose loss it was; call tracker"):
        tracker.check_isolation()


def test_an_unknown_domain_is_refused() -> None:
    model = Grown()
    tracker = tracked(model)
    with (
        pytest.raises(ValueError, match="no domain seed_c; this model's domains are host, seed_a, seed_b"),
        tracker.step(16),
    ):
        tracker.backward(model(torch.randn(16, 5))[0].sum(), domain="seed_c")


def test_one_domain_needs_no_say() -> None:
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))
    topology = trace_topology(model, torch.randn(2, 5), model_id="g")
    tracker = ImportanceTracker(model, topology, sample_every=1)
    with tracker.step(4):
        model(torch.randn(4, 5)).sum().backward()
    tracker.check_isolation()
    assert tracker.stats(checkpoint="c", run_id="r")[0].isolation.domains == ("host",)
