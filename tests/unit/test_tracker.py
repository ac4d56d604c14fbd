"""The tracker in a training loop: what it averages, that it leaves no trace, and that it can go on where it stopped."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from kasmina.topology import trace_topology
from kasmina.tracker import ImportanceTracker
from leyline.model import Malformed
from leyline.topology import Topology

torch.set_num_threads(1)


class Net(nn.Module):
    """BatchNorm and dropout: both would show a second forward, a changed mode or a drawn random number."""

    def __init__(self, checkpointing: str = "") -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 4, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 6, 3, bias=False)
        self.bn2 = nn.BatchNorm2d(6)
        self.fc = nn.Linear(6, 3)
        self.checkpointing = checkpointing

    def stem(self, x: Tensor) -> Tensor:
        return F.relu(self.bn1(self.conv1(x)))

    def forward(self, x: Tensor) -> Tensor:
        if self.checkpointing:
            y = checkpoint(self.stem, x, use_reentrant=self.checkpointing == "reentrant")
        else:
            y = self.stem(x)
        y = F.dropout(y, 0.3, self.training)
        return self.fc(F.relu(self.bn2(self.conv2(y))).mean((2, 3)))


def made(seed: int = 0, checkpointing: str = "") -> tuple[Net, Topology]:
    torch.manual_seed(seed)
    model = Net(checkpointing)
    plain = Net()
    plain.load_state_dict(model.state_dict())
    return model, trace_topology(plain, torch.randn(2, 1, 7, 7), model_id="net")


def batches(count: int, size: int = 8) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(size, 1, 7, 7, generator=generator), torch.randint(3, (size,), generator=generator))
        for _ in range(count)
    ]


def train(model: nn.Module, tracker: ImportanceTracker | None, data: list[tuple[Tensor, Tensor]]) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for x, y in data:
        optimizer.zero_grad()
        if tracker is None:
            F.cross_entropy(model(x), y).backward()
        else:
            with tracker.step(len(x)):
                F.cross_entropy(model(x), y).backward()
        optimizer.step()


def arrays_of(tracker: ImportanceTracker) -> dict[str, Any]:
    return tracker.stats(checkpoint="c", run_id="r")[1]


def same(a: dict[str, Any], b: dict[str, Any], rtol: float = 0.0) -> None:
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_allclose(a[name], b[name], rtol=rtol, atol=rtol * 1e-3, err_msg=name)


@pytest.mark.parametrize("weights", ["none", "dense", "count-min"])
@pytest.mark.parametrize("every", [1, 3])
def test_training_is_the_same_bit_for_bit_with_and_without(every: int, weights: Any) -> None:
    (bare, _), (tracked, topology) = made(), made()
    tracker = ImportanceTracker(tracked, topology, sample_every=every, weights=weights)
    for model, with_tracker in ((bare, None), (tracked, tracker)):
        torch.manual_seed(7)
        train(model, with_tracker, batches(8))
        if with_tracker is None:
            state = torch.get_rng_state()
    assert torch.equal(torch.get_rng_state(), state)
    for (name, p), (_, q) in zip(bare.named_parameters(), tracked.named_parameters(), strict=True):
        assert torch.equal(p, q), name
        assert torch.equal(p.grad, q.grad), name
    for (name, b), (_, c) in zip(bare.named_buffers(), tracked.named_buffers(), strict=True):
        assert torch.equal(b, c), name
    assert tracker.stats(checkpoint="c", run_id="r")[0].sampled_steps == 8 // every


def hooks_in(model: nn.Module) -> int:
    held = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    return held + sum(len(p._backward_hooks or ()) for p in model.parameters())


def test_hooks_exist_only_inside_a_sampled_step() -> None:
    model, topology = made()
    tracker = ImportanceTracker(model, topology, sample_every=2, weights="dense")
    seen = []
    for x, _ in batches(4):
        with tracker.step(len(x)):
            seen.append(hooks_in(model))
        assert hooks_in(model) == 0
    assert [n > 0 for n in seen] == [False, True, False, True]


def test_averages_decay_by_sampled_step_and_halves_alternate() -> None:
    model, topology = made()
    model.eval()  # without dropout, one mini-batch can be compared with another
    data = batches(5)
    single = []
    for x, y in data:
        tracker = ImportanceTracker(model, topology, sample_every=1)
        tracker.begin(8)
        F.cross_entropy(model(x), y).backward()
        tracker.end()
        single.append(arrays_of(tracker)["conv1/odd/abs"])
    tracker = ImportanceTracker(model, topology, sample_every=1, decay=0.9)
    for x, y in data:
        with tracker.step(8):
            F.cross_entropy(model(x), y).backward()
    stats, arrays = tracker.stats(checkpoint="c", run_id="r", lineage=("b", "a"))
    odd = single[0] * 0.9**4 + single[2] * 0.9**2 + single[4]
    even = single[1] * 0.9**3 + single[3] * 0.9
    np.testing.assert_allclose(arrays["conv1/odd/abs"], odd, rtol=1e-6)
    np.testing.assert_allclose(arrays["conv1/even/abs"], even, rtol=1e-6)
    np.testing.assert_allclose(arrays["conv1/odd/n"], [8 * (0.9**4 + 0.9**2 + 1), 8 * (0.9**8 + 0.9**4 + 1)])
    weights = [0.9**k for k in range(5)]
    assert stats.samples == round(8 * sum(weights) ** 2 / sum(w * w for w in weights))
    assert (stats.first_step, stats.last_step, stats.step, stats.sampled_steps) == (1, 5, 5, 5)
    assert stats.lineage == ("b", "a")
    assert stats.reduction == "per-sample"
    assert stats.mini_batch == ()


def test_steps_are_counted_in_the_trainings_own_count() -> None:
    model, topology = made()
    tracker = ImportanceTracker(model, topology, sample_every=3)
    train(model, tracker, batches(10))
    stats, _ = tracker.stats(checkpoint="c", run_id="r", step=5010)
    assert (stats.step, stats.first_step, stats.last_step) == (5010, 5003, 5009)


def test_a_part_of_the_mini_batch_is_spread_over_it() -> None:
    """Samples 0, 3 and 6 of 9 or 10: a sorted mini-batch does not show one class only."""
    model, topology = made()
    model.eval()
    x, y = batches(1, size=10)[0]
    part = ImportanceTracker(model, topology, sample_every=1, samples_per_step=3)
    with part.step(10):
        F.cross_entropy(model(x), y).backward()
    whole = ImportanceTracker(model, topology, sample_every=1)
    with whole.step(3):
        F.cross_entropy(model(x[:9:3]), y[:9:3]).backward()
    same(arrays_of(part), arrays_of(whole), rtol=1e-4)


def test_a_scaled_loss_gives_the_same_statistics() -> None:
    """GradScaler's scale, 1/k of accumulation, and a summed loss."""
    model, topology = made()
    model.eval()
    x, y = batches(1)[0]
    found = []
    for scale in (1.0, 1024.0, 0.25, 8.0):
        tracker = ImportanceTracker(model, topology, sample_every=1, weights="dense")
        with tracker.step(8, scale=scale):
            loss = F.cross_entropy(model(x), y) * scale if scale != 8 else F.cross_entropy(model(x), y, reduction="sum")
            loss.backward()
        found.append(arrays_of(tracker))
    for other in found[1:]:
        same(found[0], other, rtol=1e-4)


def test_a_loss_that_overflowed_adds_nothing() -> None:
    model, topology = made()
    model.eval()
    (x, y), *_ = batches(1)
    tracker = ImportanceTracker(model, topology, sample_every=1, weights="dense")
    with tracker.step(8):
        F.cross_entropy(model(x), y).backward()
    before = arrays_of(tracker)
    with tracker.step(8, scale=1e30):
        (F.cross_entropy(model(x), y) * 1e30 * 1e30).backward()
    after = arrays_of(tracker)
    assert all(np.isfinite(a).all() for a in after.values())
    np.testing.assert_allclose(after["conv1/odd/abs"], before["conv1/odd/abs"] * 0.97)
    np.testing.assert_allclose(after["conv1/odd/n"], before["conv1/odd/n"] * [0.97, 0.97**2])
    assert not after["conv1/even/n"].any()


def test_autocast_and_accumulation_leave_the_statistics_what_they_are() -> None:
    model, topology = made()
    model.eval()
    (x, y), *_ = batches(1)
    found = []
    for low in (False, True):
        tracker = ImportanceTracker(model, topology, sample_every=1)
        with tracker.step(8), torch.autocast("cpu", torch.bfloat16, enabled=low):
            F.cross_entropy(model(x).float(), y).backward()  # gradients of the first pass stay in .grad
        found.append(arrays_of(tracker))
    exact, low_precision = (f["conv1/odd/abs"] for f in found)
    assert not np.array_equal(exact, low_precision)
    np.testing.assert_allclose(low_precision, exact, rtol=0.1, atol=0.05 * exact.max())


@pytest.mark.parametrize("kind", ["reentrant", "without"])
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_activation_checkpointing_counts_nothing_twice(kind: str) -> None:
    (plain, topology), (saving, _) = made(), made(checkpointing=kind)
    (x, y), *_ = batches(1)
    found = []
    for model in (plain, saving):
        model.eval()
        tracker = ImportanceTracker(model, topology, sample_every=1)
        with tracker.step(8):
            F.cross_entropy(model(x.clone().requires_grad_()), y).backward()
        found.append(arrays_of(tracker))
    for name in ("conv1/odd/abs", "conv1/odd/sq", "conv1/odd/n"):
        np.testing.assert_allclose(found[1][name], found[0][name], rtol=1e-5, err_msg=name)


def test_a_step_that_raises_adds_nothing_and_leaves_no_hook() -> None:
    model, topology = made()
    tracker = ImportanceTracker(model, topology, sample_every=1)

    def broken_step(x: Tensor) -> None:
        with tracker.step(len(x)):
            model(x).sum().backward()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        broken_step(batches(1)[0][0])
    assert hooks_in(model) == 0
    assert tracker.stats(checkpoint="c", run_id="r")[0].samples == 0
    train(model, tracker, batches(2))
    assert tracker.stats(checkpoint="c", run_id="r")[0].sampled_steps == 2


def test_wrong_calls_are_refused() -> None:
    model, topology = made()
    with pytest.raises(ValueError, match="decay is 1"):
        ImportanceTracker(model, topology, decay=1)
    with pytest.raises(ValueError, match="sample_every is 0"):
        ImportanceTracker(model, topology, sample_every=0)
    tracker = ImportanceTracker(model, topology, sample_every=1)
    with pytest.raises(ValueError, match="batch_size 0"):
        tracker.begin(0)
    tracker.begin(4)
    with pytest.raises(RuntimeError, match="inside a step"):
        tracker.begin(4)
    with pytest.raises(RuntimeError, match="a step was begun"):
        tracker.refresh(lambda m, b: m(b).sum(), [torch.zeros(2, 1, 7, 7)])
    tracker.end()
    with pytest.raises(LookupError, match=r"no refreshed statistics; call refresh\(\) first"):
        tracker.stats(checkpoint="c", run_id="r", source="refreshed")
    with pytest.raises(ValueError, match="no mini-batch to measure"):
        tracker.refresh(lambda m, b: m(b).sum(), [])


def test_refresh_leaves_the_model_as_it_was() -> None:
    model, topology = made()
    model.train()
    model.bn2.eval()  # a frozen norm stays frozen
    train(model, None, batches(2))
    before = copy.deepcopy(model.state_dict())
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    stepped: list[str] = []
    for name, p in model.named_parameters():  # an optimizer that steps inside the backward pass
        p.register_post_accumulate_grad_hook(lambda _, n=name: stepped.append(n))
    state = torch.get_rng_state()
    tracker = ImportanceTracker(model, topology)
    data = batches(3)
    assert tracker.refresh(lambda m, b: F.cross_entropy(m(b[0]), b[1]), data, samples=20) == 20
    assert torch.equal(torch.get_rng_state(), state)
    assert (model.training, model.bn1.training, model.bn2.training) == (True, True, False)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert all(torch.equal(p.grad, gradients[n]) for n, p in model.named_parameters())
    assert stepped == []
    assert hooks_in(model) == 0
    stats, _ = tracker.stats(checkpoint="c", run_id="r", source="refreshed")
    assert (stats.source, stats.samples, stats.decay) == ("refreshed", 20, 1.0)
    with pytest.raises(ZeroDivisionError):
        tracker.refresh(lambda m, b: 1 / 0, data)
    assert (model.training, model.bn2.training) == (True, False)
    assert hooks_in(model) == 0


@pytest.mark.parametrize("weights", ["none", "dense"])
def test_a_restored_tracker_goes_on_as_if_it_had_not_stopped(weights: Any) -> None:
    data = batches(9)
    model, topology = made()
    tracker = ImportanceTracker(model, topology, sample_every=2, weights=weights)
    torch.manual_seed(3)
    train(model, tracker, data[:4])
    kept, weights_then, random_then = tracker.state(), copy.deepcopy(model.state_dict()), torch.get_rng_state()
    train(model, tracker, data[4:])  # what is rolled back
    resumed, _ = made(seed=5)
    resumed.load_state_dict(weights_then)
    other = ImportanceTracker(resumed, topology, sample_every=2, weights=weights)
    for going_on, fresh in ((tracker, model), (other, resumed)):
        fresh.load_state_dict(weights_then)
        going_on.load_state(kept)
        assert going_on.state() == kept
        torch.set_rng_state(random_then)
        train(fresh, going_on, data[4:])
    same(arrays_of(tracker), arrays_of(other))
    assert tracker.state() == other.state()
    assert tracker.stats(checkpoint="c", run_id="r")[0].sampled_steps == 4


def test_a_foreign_or_damaged_state_is_refused() -> None:
    model, topology = made()
    tracker = ImportanceTracker(model, topology, sample_every=1)
    train(model, tracker, batches(2))
    kept = tracker.state()
    fewer = topology.model_copy(update={"groups": topology.groups[:-1]})
    with pytest.raises(Malformed, match="has topology"):
        ImportanceTracker(model, fewer).load_state(kept)
    with pytest.raises(Malformed, match=r"has decay '0\.97', this tracker '0\.9'"):
        ImportanceTracker(model, topology, decay=0.9).load_state(kept)
    with pytest.raises(Malformed, match=r"truncated|speaks of"):
        tracker.load_state(kept[:-8])
    assert tracker.state() == kept


def test_dense_fisher_is_the_average_of_squared_mini_batch_gradients() -> None:
    model, topology = made()
    model.eval()
    tracker = ImportanceTracker(model, topology, sample_every=1, weights="dense", decay=0.5)
    squares = []
    for x, y in batches(3):
        model.zero_grad()
        with tracker.step(8):
            F.cross_entropy(model(x), y).backward()
        squares.append(8 * model.conv2.weight.grad.double().square())
    expected = (squares[0] * 0.25 + squares[1] * 0.5 + squares[2]) / 1.75
    np.testing.assert_allclose(arrays_of(tracker)["weight/conv2.weight"], expected.numpy(), rtol=1e-5)
    tracker.refresh(lambda m, b: F.cross_entropy(m(b[0]), b[1]), batches(3), samples=24)
    refreshed = tracker.stats(checkpoint="c", run_id="r", source="refreshed")[1]
    np.testing.assert_allclose(refreshed["weight/conv2.weight"], (sum(squares) / 3).numpy(), rtol=1e-5)


def test_small_parameters_are_dense_although_a_sketch_was_asked_for() -> None:
    model, topology = made()
    tracker = ImportanceTracker(model, topology, sample_every=1, weights="count-min")
    train(model, tracker, batches(2))
    stats, arrays = tracker.stats(checkpoint="c", run_id="r")
    assert stats.sketch is not None
    assert stats.sketch.startswith("dense: no parameter is bigger")
    assert arrays["weight/conv2.weight"].shape == tuple(model.conv2.weight.shape)


def test_statistics_become_valid_messages_that_survive_the_wire() -> None:
    model, topology = made()
    tracker = ImportanceTracker(model, topology, sample_every=1)
    train(model, tracker, batches(2))
    stats, arrays = tracker.stats(checkpoint="4-1-0f3a9b2c", run_id="r")
    assert type(stats).parse(stats.canonical(), name="stats") == stats
    assert stats.idempotency_key == "r/4-1-0f3a9b2c/importance"
    assert set(stats.groups) == {name.partition("/")[0] for name in arrays}
    assert all(a.dtype == np.float64 for a in arrays.values())
