"""What the tracker measures is what it says: compared with gates put into the model and differentiated one by one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kasmina.topology import trace_topology
from kasmina.tracker import ImportanceTracker
from leyline.ids import parameter_uuid
from leyline.topology import Group, Kind, Member, Parameter, Topology

torch.set_num_threads(1)

Arrays = dict[str, Any]


def topology_of(model: nn.Module, *groups: Group) -> Topology:
    parameters = {
        name: Parameter(uuid=parameter_uuid(name, p.shape, "m"), shape=tuple(p.shape))
        for name, p in model.named_parameters()
    }
    return Topology(model_id="m", parameters=parameters, groups=groups)


def measured(model: nn.Module, topology: Topology, loss: Any, batches: Sequence[Any], samples: int = 10**6) -> Arrays:
    tracker = ImportanceTracker(model, topology)
    tracker.refresh(loss, batches, samples=samples)
    return tracker.stats(checkpoint="c", run_id="r", source="refreshed")[1]


def both(arrays: Arrays, group: str, name: str) -> Tensor:
    return torch.from_numpy(arrays[f"{group}/odd/{name}"] + arrays[f"{group}/even/{name}"])


def gate_gradients(
    model: nn.Module, sites: Sequence[tuple[str, Callable[[Tensor, Tensor], Tensor], bool]], units: int, losses: Any
) -> Tensor:
    """[N, units]: dL_n/d xi at xi = 1, with xi multiplied in at every site (module, how, whether at its input)."""
    found = []
    for loss in losses:
        xi = torch.ones(units, requires_grad=True)
        handles = []
        for name, how, at_input in sites:
            module = model.get_submodule(name)
            if at_input:
                handles.append(module.register_forward_pre_hook(lambda _, a, h=how, xi=xi: (h(a[0], xi), *a[1:])))
            else:
                handles.append(module.register_forward_hook(lambda _, __, o, h=how, xi=xi: h(o, xi)))
        (gradient,) = torch.autograd.grad(loss(model), xi)
        found.append(gradient)
        for handle in handles:
            handle.remove()
    return torch.stack(found)


class Residual(nn.Module):
    """Coupled by a shortcut; ReLU and the addition work in place, over the norms' outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv0 = nn.Conv2d(1, 6, 3, padding=1, bias=False)
        self.bn0 = nn.BatchNorm2d(6)
        self.conv1 = nn.Conv2d(6, 5, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(5)
        self.conv2 = nn.Conv2d(5, 6, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(6)
        self.fc = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn0(self.conv0(x)), inplace=True)
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = self.bn2(self.conv2(y))
        y += x
        return self.fc(F.relu(y, inplace=True).mean((2, 3)))


def residual() -> tuple[Residual, Topology, Tensor, Tensor]:
    torch.manual_seed(0)
    model = Residual()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return (
        model,
        trace_topology(model, torch.randn(2, 1, 8, 8), model_id="m"),
        torch.randn(12, 1, 8, 8),
        torch.arange(12) % 3,
    )


def cross_entropy(model: nn.Module, batch: Any) -> Tensor:
    x, y = batch
    return F.cross_entropy(model(x), y)


def channels(x: Tensor, xi: Tensor) -> Tensor:
    return x * xi[:, None, None]


@pytest.mark.parametrize("group", ["conv1", "conv0"])
def test_channels_are_measured_at_their_gates_per_sample(group: str) -> None:
    """conv0's units live at two gates, bn0 and bn2: q is the sum of both."""
    model, topology, x, y = residual()
    arrays = measured(model, topology, cross_entropy, [(x[:5], y[:5]), (x[5:9], y[5:9]), (x[9:], y[9:])])
    model.eval()
    gates = topology.group(group).gates
    assert len(gates) == {"conv1": 1, "conv0": 2}[group]
    losses = [lambda m, n=n: cross_entropy(m, (x[n : n + 1], y[n : n + 1])) for n in range(12)]
    exact = torch.zeros(12, topology.group(group).units)
    for gate in gates:  # one gate after the other: the value of a gate is its own, not the product of both
        exact += gate_gradients(model, [(gate, channels, False)], exact.shape[1], losses)
    assert exact.abs().max() > 1e-3
    torch.testing.assert_close(both(arrays, group, "abs").float(), exact.abs().sum(0), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(both(arrays, group, "sq").float(), exact.square().sum(0), rtol=1e-4, atol=1e-6)
    assert both(arrays, group, "n").tolist() == [12, 12]
    assert arrays[f"{group}/odd/n"].tolist() == [8, 8]  # the first and third mini-batch


def test_contribution_norms_and_consumers_inputs() -> None:
    model, topology, x, y = residual()
    seen = {}
    for name in ("bn1", "conv2"):
        keep = lambda m, a, o, n=name: seen.update({n: (a[0].clone(), o.clone())})  # noqa: E731
        model.get_submodule(name).register_forward_hook(keep)
    arrays = measured(model, topology, cross_entropy, [(x, y)])
    torch.testing.assert_close(both(arrays, "conv1", "act").float(), seen["bn1"][1].square().sum((0, 2, 3)))
    torch.testing.assert_close(torch.from_numpy(arrays["conv1/in"]).float(), seen["conv2"][0].square().sum((0, 2, 3)))


def test_only_as_many_samples_as_asked_for() -> None:
    model, topology, x, y = residual()
    tracker = ImportanceTracker(model, topology)
    assert tracker.refresh(cross_entropy, [(x[:5], y[:5]), (x[5:], y[5:])], samples=7) == 7
    stats, arrays = tracker.stats(checkpoint="c", run_id="r", source="refreshed")
    assert stats.samples == 7
    assert both(arrays, "conv1", "n").tolist() == [7, 7]


class Attention(nn.Module):
    """Four query heads of size 3 over two key heads (grouped queries), and a residual."""

    def __init__(self, layout: str = "NTC") -> None:
        super().__init__()
        self.layout = layout
        self.q = nn.Linear(12, 12)
        self.k = nn.Linear(12, 6)
        self.v = nn.Linear(12, 6)
        self.o = nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        q = self.q(x).view(n, t, 4, 3).transpose(1, 2)
        k = self.k(x).view(n, t, 2, 3).transpose(1, 2).repeat_interleave(2, 1)
        v = self.v(x).view(n, t, 2, 3).transpose(1, 2).repeat_interleave(2, 1)
        a = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, 12)
        if self.layout == "TNC":
            return x + self.o(a.transpose(0, 1)).transpose(0, 1)
        if self.layout == "folded":
            return x + self.o(a.reshape(n * t, 12)).reshape(n, t, 12)
        return x + self.o(a)


class Block(nn.Module):
    def __init__(self, layout: str = "NTC") -> None:
        super().__init__()
        self.attention = Attention(layout)
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attention(x).tanh().mean(1))


def heads_of(model: Block) -> Topology:
    members = [
        Member(parameter=f"attention.{name}.{part}", role="producer", axis=0, block=size)
        for name, size in (("q", 6), ("k", 3), ("v", 3))
        for part in ("weight", "bias")
    ]
    members.append(Member(parameter="attention.o.weight", role="consumer", axis=1, block=6))
    heads = Group(id="heads", kind=Kind.HEAD, units=2, members=tuple(members), gates=("attention.o",), heads_per_unit=2)
    layer = Group(
        id="layer",
        kind=Kind.LAYER,
        units=1,
        members=(Member(parameter="attention.o.weight", role="producer", axis=0, block=12),),
        gates=("attention",),
    )
    return topology_of(model, heads, layer)


@pytest.mark.parametrize("layout", ["NTC", "TNC", "folded"])
def test_heads_are_measured_at_the_projections_input(layout: str) -> None:
    torch.manual_seed(1)
    model = Block(layout)
    x, y = torch.randn(6, 5, 12), torch.arange(6) % 3
    arrays = measured(model, heads_of(model), cross_entropy, [(x[:4], y[:4]), (x[4:], y[4:])])
    losses = [lambda m, n=n: cross_entropy(m, (x[n : n + 1], y[n : n + 1])) for n in range(6)]
    scale = lambda a, xi: a * xi.repeat_interleave(6)  # noqa: E731
    exact = gate_gradients(model, [("attention.o", scale, True)], 2, losses)
    torch.testing.assert_close(both(arrays, "heads", "abs").float(), exact.abs().sum(0), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(both(arrays, "heads", "sq").float(), exact.square().sum(0), rtol=1e-4, atol=1e-6)


def test_head_redundancy_is_the_gram_of_their_contributions() -> None:
    torch.manual_seed(1)
    model = Block()
    x, y = torch.randn(6, 5, 12), torch.arange(6) % 3
    seen: list[Tensor] = []
    model.attention.o.register_forward_pre_hook(lambda _, a: seen.append(a[0].detach()))
    arrays = measured(model, heads_of(model), cross_entropy, [(x, y)])
    weight = model.attention.o.weight.detach()
    outputs = [seen[0][..., s : s + 6] @ weight[:, s : s + 6].T for s in (0, 6)]
    gram = torch.tensor([[float((a * b).sum()) for b in outputs] for a in outputs])
    torch.testing.assert_close(torch.from_numpy(arrays["heads/gram"]).float(), gram, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(both(arrays, "heads", "act").float(), gram.diagonal(), rtol=1e-4, atol=1e-4)


def test_block_influence_counts_cosines_by_token() -> None:
    torch.manual_seed(1)
    model = Block()
    x, y = torch.randn(6, 5, 12), torch.arange(6) % 3
    tracker = ImportanceTracker(model, heads_of(model))
    tracker.forward_only(lambda m, b: m(b[0]), [(x[:4], y[:4]), (x[4:], y[4:])], samples=6)
    stats, arrays = tracker.stats(checkpoint="c", run_id="r", source="forward")
    exact = F.cosine_similarity(x, model.attention(x), dim=-1).sum()
    assert arrays["layer/cos"].tolist() == pytest.approx([exact.item(), 30], rel=1e-5)
    assert stats.source == "forward"
    assert stats.samples == 6
    assert "heads/odd/act" in arrays
    assert "heads/odd/abs" not in arrays  # nothing was differentiated


def test_images_have_their_cosines_over_channels() -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1))
    layer = Group(
        id="layer",
        kind=Kind.LAYER,
        units=1,
        members=(Member(parameter="0.weight", role="producer", axis=0, block=4),),
        gates=("0",),
    )
    x = torch.randn(3, 4, 5, 5)
    tracker = ImportanceTracker(model, topology_of(model, layer))
    tracker.forward_only(lambda m, b: m(b), [x], samples=3)
    arrays = tracker.stats(checkpoint="c", run_id="r", source="forward")[1]
    exact = F.cosine_similarity(x, model(x), dim=1).sum()
    assert arrays["layer/cos"].tolist() == pytest.approx([exact.item(), 75], rel=1e-5)


class Fused(nn.Module):
    """SwiGLU with gate and up in one projection: units have two rows of it."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 10)
        self.down = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.up(x).chunk(2, -1)
        return self.down(F.silu(gate) * up).mean(1)


def test_spans_of_a_fused_projection_add_up() -> None:
    torch.manual_seed(2)
    model = Fused()
    members = [
        Member(parameter=f"up.{p}", role="producer", axis=0, start=s) for s in (0, 5) for p in ("weight", "bias")
    ]
    members.append(Member(parameter="down.weight", role="consumer", axis=1))
    topology = topology_of(model, Group(id="up", kind=Kind.CHANNEL, units=5, members=tuple(members), gates=("up",)))
    x, y = torch.randn(6, 7, 4), torch.arange(6) % 3
    arrays = measured(model, topology, cross_entropy, [(x, y)])
    losses = [lambda m, n=n: cross_entropy(m, (x[n : n + 1], y[n : n + 1])) for n in range(6)]
    exact = gate_gradients(model, [("up", lambda o, xi: o * torch.cat([xi, xi]), False)], 5, losses)
    torch.testing.assert_close(both(arrays, "up", "abs").float(), exact.abs().sum(0), rtol=1e-4, atol=1e-6)


def test_flattened_inputs_of_a_linear_consumer_belong_to_their_channels() -> None:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))
    topology = trace_topology(model, torch.randn(2, 1, 4, 4), model_id="m")
    x, y = torch.randn(6, 1, 4, 4), torch.arange(6) % 3
    arrays = measured(model, topology, cross_entropy, [(x, y)])
    exact = model[1](model[0](x)).square().sum((0, 2, 3)).detach()
    torch.testing.assert_close(torch.from_numpy(arrays["0/in"]).float(), exact)


class Encoder(nn.Module):
    """nn.MultiheadAttention never calls its output projection as a module: nothing to hook there."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 4, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((x + self.attention(x, x, x, need_weights=False)[0]).tanh().mean(1))


def test_where_no_gate_runs_the_mini_batch_is_measured() -> None:
    torch.manual_seed(4)
    model = Encoder()
    topology = trace_topology(model, torch.randn(2, 5, 8), model_id="m")
    group = topology.group("attention")
    tracker = ImportanceTracker(model, topology, sample_every=1)
    x, y = torch.randn(16, 5, 8), torch.arange(16) % 3
    for _ in range(3):  # the gate stays silent
        with tracker.step(16):
            cross_entropy(model, (x, y)).backward()
    assert tracker.stats(checkpoint="c", run_id="r")[0].groups == ()
    for _ in range(2):
        with tracker.step(16, scale=1 / 8):
            (cross_entropy(model, (x, y)) / 8).backward()
    stats, arrays = tracker.stats(checkpoint="c", run_id="r")
    assert stats.reduction == "mini-batch"
    assert stats.mini_batch == ("attention",)
    assert stats.samples == 2

    xi = torch.ones(4, requires_grad=True)
    weight = model.attention.out_proj.weight * xi.repeat_interleave(2)
    named = {"attention.out_proj.weight": weight}
    loss = F.cross_entropy(torch.func.functional_call(model, named, (x,)), y)
    (gradient,) = torch.autograd.grad(loss, xi)
    assert gradient.abs().max() > 1e-5
    expected = 16 * gradient.square()
    got = both(arrays, group.id, "sq").float() / both(arrays, group.id, "n")[0]
    torch.testing.assert_close(got.float(), expected, rtol=1e-4, atol=1e-9)


def test_a_refresh_alone_finds_out_that_no_gate_runs() -> None:
    torch.manual_seed(4)
    model = Encoder()
    topology = trace_topology(model, torch.randn(2, 5, 8), model_id="m")
    tracker = ImportanceTracker(model, topology)
    x, y = torch.randn(16, 5, 8), torch.arange(16) % 3
    tracker.refresh(cross_entropy, [(x, y)] * 5, samples=80)
    stats, arrays = tracker.stats(checkpoint="c", run_id="r", source="refreshed")
    assert stats.mini_batch == ("attention",)
    assert stats.samples == 2  # five mini-batches, three of them patience
    assert both(arrays, "attention", "sq").min() > 0


@pytest.mark.parametrize("frozen", [["bn1.weight", "bn1.bias"], ["conv0.weight"], ["fc.weight", "fc.bias"]])
def test_frozen_parameters_do_not_hide_a_gate(frozen: list[str]) -> None:
    model, topology, x, y = residual()
    whole = measured(model, topology, cross_entropy, [(x, y)])
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    part = measured(model, topology, cross_entropy, [(x, y)])
    torch.testing.assert_close(both(part, "conv1", "abs"), both(whole, "conv1", "abs"))
    torch.testing.assert_close(both(part, "conv0", "abs"), both(whole, "conv0", "abs"))


def test_a_topology_of_another_model_is_refused() -> None:
    _, topology, _, _ = residual()
    with pytest.raises(ValueError, match=r"topology names .* this model has no such parameter; trace it again"):
        ImportanceTracker(Block(), topology)
    model = Residual()
    model.extra = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"extra\.weight, which its topology does not know"):
        ImportanceTracker(model, topology)
    gone = topology.model_copy(
        update={"groups": (topology.groups[0].model_copy(update={"gates": ("nowhere",)}), *topology.groups[1:])}
    )
    with pytest.raises(ValueError, match="gate at nowhere, which this model does not have"):
        ImportanceTracker(Residual(), gone)
