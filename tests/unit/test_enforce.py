"""What is pruned stays exactly zero: weights, gradients, slots, masters and copies, whatever steps them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kasmina.enforce import MaskEnforcer, MasksDoNotFit
from leyline.ids import parameter_uuid
from leyline.masks import Masks
from leyline.topology import Group, Kind, Member, Parameter

torch.set_num_threads(1)

DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device")
    ),
]


class Net(nn.Module):
    """A sigmoid keeps the gradients of masked columns alive: sigmoid(0) is a half."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.second = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.sigmoid(self.first(x)))


def masks_of(model: nn.Module, *, model_id: str = "net") -> Masks:
    """Units 1 and 5 of `first` (rows, bias, columns of `second`), and five single weights of `second.weight`."""
    parameters = {
        name: Parameter(uuid=parameter_uuid(name, p.shape, model_id), shape=tuple(p.shape))
        for name, p in model.named_parameters()
    }
    group = Group(
        id="first",
        kind=Kind.CHANNEL,
        units=8,
        members=(
            Member(parameter="first.weight", role="producer", axis=0),
            Member(parameter="first.bias", role="producer", axis=0),
            Member(parameter="second.weight", role="consumer", axis=1),
        ),
        gates=("first",),
    )
    active = np.ones(8, dtype=np.bool_)
    active[[1, 5]] = False
    single = np.ones(32, dtype=np.bool_)
    single[[0, 3, 10, 20, 31]] = False
    return Masks(model_id, {"first": group}, {"first": active}, parameters, {"second.weight": single})


class Orthogonal(torch.optim.Optimizer):
    """As Muon does: momentum, then rows mixed through a matrix factor, so a zero gradient row moves all the same."""

    def __init__(self, params: Iterable[nn.Parameter], lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                state.setdefault("momentum", torch.zeros_like(p)).mul_(0.9).add_(p.grad)
                if p.ndim == 2:
                    factor = state.setdefault("factor", torch.eye(len(p), device=p.device, dtype=p.dtype))
                    factor.add_(torch.ones_like(factor), alpha=0.01)
                    p.add_(factor @ state["momentum"], alpha=-group["lr"])
                else:
                    p.add_(state["momentum"] + 0.1, alpha=-group["lr"])


Make = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Make] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.01),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, eps=1e-4, weight_decay=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, eps=1e-4, weight_decay=0.1, amsgrad=True),
    "orthogonal": lambda p: Orthogonal(p, lr=0.01),
}


def train(model: nn.Module, optimizer: torch.optim.Optimizer, *, steps: int, seed: int = 0) -> None:
    parameter = next(model.parameters())
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        x = torch.randn(16, 6, generator=generator).to(parameter)
        y = torch.randint(4, (16,), generator=generator).to(parameter.device)
        optimizer.zero_grad()
        F.cross_entropy(model(x).float(), y).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()


def pruned(masks: Masks, named: Iterable[tuple[str, Tensor]]) -> Tensor:
    """Every pruned element of these tensors, as float32."""
    found = [t.detach().float().cpu()[torch.from_numpy(dead.full())] for name, t in named if (dead := masks.dead(name))]
    return torch.cat(found)


def slots(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[tuple[str, Tensor]]:
    return [
        (name, slot)
        for name, p in model.named_parameters()
        for slot in optimizer.state[p].values()
        if isinstance(slot, Tensor) and slot.shape == p.shape
    ]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_hundred_steps_leave_everything_pruned_exactly_zero(name: str, dtype: torch.dtype, device: str) -> None:
    torch.manual_seed(0)
    model = Net().to(device, dtype)
    optimizer = OPTIMIZERS[name](model.parameters())
    train(model, optimizer, steps=3)  # slots exist and are not zero when the masks come
    masks = masks_of(model)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with MaskEnforcer(model, masks, optimizers=[optimizer]):
        train(model, optimizer, steps=100, seed=1)
    assert torch.count_nonzero(pruned(masks, model.named_parameters())) == 0
    held = slots(model, optimizer)
    assert held
    assert torch.count_nonzero(pruned(masks, held)) == 0
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())
    assert all(not torch.equal(p, before[n]) for n, p in model.named_parameters())  # the rest goes on learning


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_without_enforcement_the_masks_do_not_hold(name: str) -> None:
    torch.manual_seed(0)
    model = Net()
    optimizer = OPTIMIZERS[name](model.parameters())
    train(model, optimizer, steps=3)
    masks = masks_of(model)
    MaskEnforcer(model, masks, optimizers=[optimizer]).remove()
    assert torch.count_nonzero(pruned(masks, model.named_parameters())) == 0
    train(model, optimizer, steps=100, seed=1)
    assert torch.count_nonzero(pruned(masks, model.named_parameters())) > 0
    assert torch.count_nonzero(pruned(masks, slots(model, optimizer))) > 0


def test_masking_gradients_alone_would_not_do() -> None:
    """An optimizer that mixes rows moves weights whose gradient is zero: hence the masking after the step."""
    torch.manual_seed(0)
    model = Net()
    optimizer = Orthogonal(model.parameters(), lr=0.01)
    masks = masks_of(model)
    with MaskEnforcer(model, masks):  # no optimizer: gradients are masked, nothing happens after the step
        train(model, optimizer, steps=3)
        assert torch.count_nonzero(pruned(masks, ((n, p.grad) for n, p in model.named_parameters()))) == 0
        assert torch.count_nonzero(pruned(masks, model.named_parameters())) > 0


def test_gradients_are_masked_before_clipping_sees_them() -> None:
    torch.manual_seed(0)
    model = Net()
    masks = masks_of(model)
    x, y = torch.randn(16, 6), torch.randint(4, (16,))
    with MaskEnforcer(model, masks):
        F.cross_entropy(model(x), y).backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1e9)
    bare = copy.deepcopy(model)
    bare.zero_grad()
    F.cross_entropy(bare(x), y).backward()
    live, whole = 0.0, 0.0
    for name, p in bare.named_parameters():
        dead = masks.dead(name)
        bits = torch.from_numpy(dead.full()) if dead else torch.zeros(p.shape, dtype=torch.bool)
        live += float(p.grad.masked_fill(bits, 0).square().sum())
        whole += float(p.grad.square().sum())
    assert float(norm) == pytest.approx(live**0.5, rel=1e-6)
    assert whole > live * 1.001  # the pruned part would have counted


def test_masked_gradients_stay_masked_through_accumulation() -> None:
    model = Net()
    masks = masks_of(model)
    with MaskEnforcer(model, masks):
        for _ in range(3):
            model(torch.randn(4, 6)).square().sum().backward()
        assert torch.count_nonzero(pruned(masks, ((n, p.grad) for n, p in model.named_parameters()))) == 0


def test_zero_is_assigned_so_nan_and_minus_zero_go_too() -> None:
    model = Net()
    masks = masks_of(model)
    with torch.no_grad():
        model.first.weight[1] = float("nan")
        model.first.weight[5] = -1.0
    MaskEnforcer(model, masks).remove()
    rows = model.first.weight.detach()[[1, 5]]
    assert torch.equal(rows, torch.zeros_like(rows))
    assert not torch.signbit(rows).any()


def test_masters_and_averaged_copies_are_masked() -> None:
    """bf16 weights, an optimizer that steps fp32 masters, an averaged module and a mapping of shadows."""
    torch.manual_seed(0)
    model = Net().to(torch.bfloat16)
    names = [name for name, _ in model.named_parameters()]
    master = {name: nn.Parameter(p.detach().float().clone()) for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(master.values(), lr=0.01, weight_decay=0.1)
    average = torch.optim.swa_utils.AveragedModel(model)
    shadow = {name: p.detach().float().clone() for name, p in model.named_parameters()}
    masks = masks_of(model)
    with MaskEnforcer(model, masks, optimizers=[optimizer], ema=[average, shadow], fp32_master=master):
        for _ in range(100):
            F.cross_entropy(model(torch.randn(16, 6).bfloat16()).float(), torch.randint(4, (16,))).backward()
            for name, p in model.named_parameters():
                master[name].grad = p.grad.float()
                p.grad = None
            optimizer.step()
            with torch.no_grad():
                for name, p in model.named_parameters():
                    p.copy_(master[name])
                    shadow[name].lerp_(master[name], 0.1)
            average.update_parameters(model)
    for named in (model.named_parameters(), master.items(), shadow.items()):
        assert torch.count_nonzero(pruned(masks, named)) == 0
    assert torch.count_nonzero(pruned(masks, average.module.named_parameters())) == 0
    moments = [(name, optimizer.state[master[name]]["exp_avg"]) for name in names]
    assert torch.count_nonzero(pruned(masks, moments)) == 0
    assert all(torch.count_nonzero(m) > 0 for _, m in moments)


def test_new_masks_take_over_and_untouched_parameters_are_left_alone() -> None:
    model = Net()
    masks = masks_of(model)
    only_weights = Masks(masks.model_id, {}, {}, masks.parameters, masks.weights)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    versions = {n: p._version for n, p in model.named_parameters()}
    with MaskEnforcer(model, only_weights, optimizers=[optimizer]) as enforcer:
        assert {n for n, p in model.named_parameters() if p._version != versions[n]} == {"second.weight"}
        enforcer.update(masks)
        train(model, optimizer, steps=5)
        assert torch.count_nonzero(pruned(masks, model.named_parameters())) == 0
    train(model, optimizer, steps=5)  # removed: nothing holds them any more
    assert torch.count_nonzero(pruned(masks, model.named_parameters())) > 0


def test_wrapped_models_are_known_by_their_canonical_names() -> None:
    model = nn.Module()
    model.module = Net()  # as DistributedDataParallel names it
    masks = masks_of(model.module)
    MaskEnforcer(model, masks).remove()
    assert torch.count_nonzero(pruned(masks, model.module.named_parameters())) == 0


def test_masks_of_another_model_are_refused() -> None:
    model = Net()
    good = masks_of(model)
    with pytest.raises(MasksDoNotFit, match=r"first\.bias, which this model does not have|first\.weight, which"):
        MaskEnforcer(nn.Linear(3, 3), good)
    wide = Net()
    wide.second = nn.Linear(8, 5)
    with pytest.raises(MasksDoNotFit, match=r"second\.weight has shape \[5, 8\] .* masks are for \[4, 8\]"):
        MaskEnforcer(wide, good)
    with pytest.raises(MasksDoNotFit, match="another UUID in model other"):
        MaskEnforcer(model, good, model_id="other")
    with pytest.raises(MasksDoNotFit, match="averaged copy 0 has no such tensor"):
        MaskEnforcer(model, good, ema=[{}])
    with pytest.raises(MasksDoNotFit, match=r"fp32 master of first\.bias has shape \[9\]"):
        MaskEnforcer(model, good, fp32_master={"first.bias": torch.zeros(9)})


def test_a_refused_update_changes_nothing() -> None:
    model = Net()
    with MaskEnforcer(model, masks_of(model), model_id="net") as enforcer:
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(MasksDoNotFit):
            enforcer.update(masks_of(model, model_id="foreign"))
        assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
        model(torch.randn(4, 6)).sum().backward()
        assert torch.count_nonzero(model.first.weight.grad[[1, 5]]) == 0  # the old masks still hold


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_the_same_elements_are_zero_in_any_dtype(dtype: torch.dtype) -> None:
    model = Net().to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(1)
    masks = masks_of(model)
    MaskEnforcer(model, masks).remove()
    for name, p in model.named_parameters():
        dead = masks.dead(name)
        expected = dead.full() if dead else np.zeros(tuple(p.shape), dtype=np.bool_)
        assert np.array_equal((p == 0).numpy(), expected)


def test_the_master_of_a_tied_parameter_is_masked_under_any_of_its_names() -> None:
    model = nn.ModuleDict({"a": nn.Linear(4, 4, bias=False), "b": nn.Linear(4, 4, bias=False)})
    model["b"].weight = model["a"].weight
    known = Parameter(uuid=parameter_uuid("a.weight", (4, 4), "m"), shape=(4, 4), aliases=("b.weight",))
    active = np.arange(16) > 2
    masks = Masks("m", parameters={"a.weight": known}, weights={"a.weight": active})
    master = torch.ones(4, 4)
    MaskEnforcer(model, masks, fp32_master={"b.weight": master})
    assert torch.equal(master.flatten() == 1, torch.from_numpy(active))
    with pytest.raises(MasksDoNotFit, match=r"master is given for c\.weight"):
        MaskEnforcer(model, masks, fp32_master={"c.weight": master})
