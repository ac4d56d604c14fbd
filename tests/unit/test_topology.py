"""What a topology must say of each way in which parameters hang together, checked by running the model."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.nn import functional as F

from kasmina.patterns import HEADS, HeadPattern, LayerPattern
from kasmina.topology import trace_topology
from leyline.ids import parameter_uuid
from leyline.masks import Masks
from leyline.topology import Group, Kind, Member, Parameter, Topology, coverage
from zoo import (
    Attention,
    Chain,
    Concat,
    Depthwise,
    Encoder,
    Grouped,
    ResNet,
    Shuffle,
    SmallCNN,
    Split,
    SqueezeExcite,
    transformer,
)

IMAGE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
DIGIT = torch.randn(2, 1, 28, 28, generator=torch.Generator().manual_seed(2))
VECTOR = torch.randn(4, 6, generator=torch.Generator().manual_seed(3))
TOKENS = {"input_ids": torch.arange(14).reshape(2, 7)}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def trace(model: nn.Module, inputs: Any, **options: Any) -> Topology:
    return trace_topology(model, inputs, model_id="zoo", **options)


def lively(model: nn.Module) -> nn.Module:
    """In eval mode, with biases, norms and running statistics that are neither 0 nor 1."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.rand_like(parameter) + 0.1)  # upwards: a ReLU must let it through
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.sub_(torch.rand_like(buffer) + 0.1)
    return model.eval()


def answer(model: nn.Module, inputs: Any) -> Tensor:
    with torch.no_grad():
        out = model(**inputs) if isinstance(inputs, dict) else model(inputs)
    return out if isinstance(out, Tensor) else out.logits


def dead(topology: Topology, group: Group, members: Sequence[Member], units: Sequence[int]) -> dict[str, Tensor]:
    """Parameter -> where leyline's masks zero it, were the group made of these members only."""
    if not members:
        return {}
    active = np.ones(group.units, dtype=np.bool_)
    active[list(units)] = False
    part = group.model_copy(update={"members": tuple(members)})
    masks = Masks("zoo", {group.id: part}, {group.id: active}, topology.parameters)
    return {m.parameter: torch.from_numpy(masks.dead(m.parameter).full()) for m in members}  # type: ignore[union-attr]


def faults(model: nn.Module, inputs: Any, topology: Topology, group: Group, without: Member | None = None) -> str:
    """The fills that the output feels: A random producers and norms, B random consumers; the others are zero."""
    members = [m for m in group.members if m != without]
    units = range(max(group.units - 1, 1))
    makers = dead(topology, group, [m for m in members if m.role != "consumer"], units)
    users = dead(topology, group, [m for m in members if m.role == "consumer"], units)
    parameters = dict(model.named_parameters())
    before = {name: parameters[name].detach().clone() for name in {*makers, *users, *group.upstream}}

    def write(places: dict[str, Tensor], random: bool) -> None:
        with torch.no_grad():
            for name, where in places.items():
                noise = torch.randn_like(before[name]) * before[name].std()
                parameters[name].copy_(torch.where(where, noise if random else torch.zeros(()), parameters[name]))

    def felt() -> bool:
        return not torch.equal(answer(model, inputs), masked)

    write(makers, False)
    write(users, False)
    masked = answer(model, inputs)
    found = ""
    if group.kind is Kind.LAYER:
        write({name: torch.ones_like(before[name], dtype=torch.bool) for name in group.upstream}, True)
        found = "A" if felt() else ""
    else:
        write(makers, True)
        write(users, False)
        found += "A" if felt() else ""
        write(users, True)
        write(makers, False)
        found += "B" if felt() else ""
    with torch.no_grad():
        for name, old in before.items():
            parameters[name].copy_(old)
    return found


def proven(model: nn.Module, inputs: Any, topology: Topology, id_: str) -> set[tuple[str, int]]:
    """Assert that masking is removing; return the members (parameter, start) whose absence goes unnoticed."""
    lively(model)
    group = topology.group(id_)
    assert faults(model, inputs, topology, group) == ""
    return {(m.parameter, m.start) for m in group.members if not faults(model, inputs, topology, group, without=m)}


def reason(topology: Topology, name: str, kind: Kind = Kind.CHANNEL) -> str:
    found = [d.reason for d in topology.declined if d.name == name and d.kind is kind]
    assert len(found) == 1, topology.declined
    return found[0]


def spans(group: Group) -> set[tuple[Any, ...]]:
    return {(m.parameter, m.role, m.axis, m.start, m.block, m.groups) for m in group.members}


# Convolutions and linear layers


def test_residual_network_has_336_channels_and_four_branches() -> None:
    model = ResNet()
    topology = trace(model, DIGIT)
    channels = [g for g in topology.groups if g.kind is Kind.CHANNEL]
    inner = [g for g in channels if g.id.endswith("conv1") and g.id != "conv1"]
    assert sum(p.numel() for p in model.parameters()) == 174_970
    assert (sum(g.units for g in inner), sum(g.units for g in channels)) == (224, 336)
    assert topology.group("layer2.0.conv2").gates == ("layer2.0.bn2", "layer2.0.shortcut.1", "layer2.1.bn2")
    assert topology.group("layer1.0.conv1").gates == ("layer1.0.bn1",)
    assert [g.id for g in topology.groups if g.kind is Kind.LAYER] == [
        f"layer:{block}.conv2" for block in ("layer1.0", "layer1.1", "layer2.1", "layer3.1")
    ]
    assert all("running" not in m.parameter for g in topology.groups for m in g.members)


def test_residual_groups_hold_every_producer_norm_and_consumer() -> None:
    model = ResNet()
    topology = trace(model, DIGIT)
    for id_ in ("conv1", "layer2.0.conv2", "layer3.0.conv2"):  # a norm at zero hides the rows before it, nothing else
        rows = {(m.parameter, 0) for m in topology.group(id_).members if m.role == "producer"}
        assert proven(model, DIGIT, topology, id_) == rows
    assert proven(model, DIGIT, topology, "layer2.1.conv1") == {("layer2.1.conv1.weight", 0)}


def test_masks_equal_the_network_without_the_channels() -> None:
    model = lively(ResNet())
    topology = trace(model, DIGIT)
    for id_ in ("conv1", "layer2.0.conv2", "layer3.1.conv1"):
        group = topology.group(id_)
        units = [1, group.units - 2]
        small = copy.deepcopy(model)
        graph = tp.DependencyGraph().build_dependency(small, DIGIT, verbose=False)
        graph.get_pruning_group(small.get_submodule(id_), tp.prune_conv_out_channels, units).prune()
        masked = copy.deepcopy(model)
        with torch.no_grad():
            for name, where in dead(topology, group, group.members, units).items():
                masked.get_parameter(name)[where] = 0
        assert torch.allclose(answer(masked, DIGIT), answer(small.eval(), DIGIT), atol=1e-4)


def test_flatten_makes_a_channel_a_block_of_columns() -> None:
    model = SmallCNN()
    topology = trace(model, DIGIT)
    assert ("fc.weight", "consumer", 1, 0, 49, 1) in spans(topology.group("second"))
    assert proven(model, DIGIT, topology, "second") == set()
    assert proven(model, DIGIT, topology, "first") == {("first.weight", 0), ("first.bias", 0)}
    assert topology.group("first").gates == ("norm",)
    assert topology.group("second").gates == ("second",)


def test_depthwise_convolution_has_the_same_index_on_axis_0_and_no_column() -> None:
    model = Depthwise()
    topology = trace(model, IMAGE)
    group = topology.group("expand")
    assert {place for place in spans(group) if place[0].startswith("depthwise")} == {
        ("depthwise.weight", "producer", 0, 0, 1, 1),
        ("depthwise.bias", "producer", 0, 0, 1, 1),
    }
    assert group.gates == ("norm2",)  # norm1 feeds the same units once more
    noticed = {m.parameter for m in group.members} - {name for name, _ in proven(model, IMAGE, topology, "expand")}
    assert noticed == {"norm2.weight", "norm2.bias", "project.weight"}


def test_grouped_convolution_maps_a_unit_to_group_and_column() -> None:
    model = Grouped()
    topology = trace(model, IMAGE)
    assert ("grouped.weight", "consumer", 1, 0, 1, 4) in spans(topology.group("first"))
    assert proven(model, IMAGE, topology, "first") == set()
    assert "groups of the grouped convolution grouped would differ" in reason(topology, "grouped")


def test_concat_shifts_the_columns() -> None:
    model = Concat()
    topology = trace(model, IMAGE)
    assert {("norm2.bias", "norm", 0, 6, 1, 1), ("fc.weight", "consumer", 1, 6, 1, 1)} <= spans(topology.group("conv1"))
    assert ("fc.weight", "consumer", 1, 10, 1, 1) in spans(topology.group("conv2"))
    for id_ in ("stem", "conv1", "conv2"):
        assert proven(model, IMAGE, topology, id_) == set()


def test_split_makes_two_groups_of_one_layer() -> None:
    model = Split()
    topology = trace(model, IMAGE)
    left, right = topology.group("stem[0:6]"), topology.group("stem[6:10]")
    assert (left.units, right.units) == (6, 4)
    assert ("right.weight", "consumer", 1, 0, 1, 1) in spans(right)
    assert ("stem.weight", "producer", 0, 6, 1, 1) in spans(right)
    for group in (left, right):
        assert proven(model, IMAGE, topology, group.id) == set()


def test_squeeze_and_excite_goes_with_the_channels_it_scales() -> None:
    model = SqueezeExcite()
    topology = trace(model, IMAGE)
    group = topology.group("conv")
    assert {("down.weight", "consumer", 1, 0, 1, 1), ("up.bias", "producer", 0, 0, 1, 1)} <= spans(group)
    assert group.gates == ("norm",)
    hidden = {("conv.weight", 0), ("conv.bias", 0), ("up.weight", 0), ("up.bias", 0)}  # sigmoid(0) scales a zero
    assert proven(model, IMAGE, topology, "conv") == hidden
    assert proven(model, IMAGE, topology, "down") == set()


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.GELU(), nn.SiLU(), nn.Tanh(), nn.PReLU(8)])
def test_linear_layers_with_an_activation_that_keeps_zero(activation: nn.Module) -> None:
    model = Chain(activation)
    topology = trace(model, VECTOR)
    assert topology.group("0").zero_at_zero
    assert proven(model, VECTOR, topology, "0") == set()


def test_linear_layers_over_a_sequence() -> None:
    assert [g.id for g in trace(Chain(nn.ReLU()), torch.randn(2, 5, 6)).groups] == ["0"]


def test_a_gated_product_is_measured_once_at_its_linear_factor() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.up, self.down = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(F.silu(self.gate(x)) * self.up(x))

    topology = trace(Gated(), VECTOR)
    assert {m.parameter for m in topology.group("gate").members} >= {"gate.weight", "up.bias", "down.weight"}
    assert topology.group("gate").gates == ("up",)


def test_each_part_of_a_split_is_judged_by_its_own_way() -> None:
    model = Split()
    model.left = nn.Sequential(nn.ReLU(), model.left)
    model.right = nn.Sequential(nn.Softmax(1), model.right)
    topology = trace(model, IMAGE)
    assert [g.id for g in topology.groups] == ["stem[0:6]"]
    assert "Softmax may mix units" in reason(topology, "stem[6:10]")


def test_sigmoid_is_declined_unless_declared() -> None:
    topology = trace(Chain(nn.Sigmoid()), VECTOR)
    assert topology.groups == ()
    assert "f(0) != 0" in reason(topology, "0")
    assert "declared_nonzero" in reason(topology, "0")
    declared = trace(Chain(nn.Sigmoid()), VECTOR, declared_nonzero=["0"])
    assert not declared.group("0").zero_at_zero


def _product(a: Tensor, b: Tensor) -> Tensor:
    return a * b


def _weight_norm() -> nn.Module:
    model = Chain(nn.ReLU())
    nn.utils.parametrizations.weight_norm(model[0])
    return model


class _Own(nn.Module):
    """The layers `a` and `c` with a function of one's own between."""

    def __init__(self, between: Any, **parts: Any) -> None:
        super().__init__()
        self.a, self.c = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1)
        for name, part in parts.items():
            setattr(self, name, part)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.between(self, self.a(x))).mean((2, 3))


@pytest.mark.parametrize(
    ("model", "inputs", "name", "words"),
    [
        (Chain(nn.LayerNorm(8)), VECTOR, "0", "LayerNorm over the masked axis"),
        (Chain(nn.RMSNorm(8)), VECTOR, "0", "normalises over the masked axis"),
        (Chain(nn.Softmax(-1)), VECTOR, "0", "Softmax may mix units"),
        (Chain(nn.ReLU(), width=1), VECTOR, "0", "single unit"),
        (Chain(nn.ReLU()), VECTOR, "2", "model's output"),
        (Shuffle(), IMAGE, "first", "something else consumes it"),
        (_Own(lambda _, x: F.group_norm(x, 2)), IMAGE, "a", "may mix units"),
        (_Own(lambda s, x: s.n(x), n=nn.GroupNorm(2, 8)), IMAGE, "a", "GroupNorm mixes"),
        (_Own(lambda s, x: s.n(x), n=nn.BatchNorm2d(8, affine=False)), IMAGE, "a", "no weight and bias"),
        (_Own(lambda _, x: x * x.mean(1, keepdim=True)), IMAGE, "a", "taken over the units"),
        (_Own(lambda _, x: F.layer_norm(x, x.shape[1:])), IMAGE, "a", "may mix units"),
        (_Own(lambda s, x: x + s.p, p=nn.Parameter(torch.ones(8, 1, 1))), IMAGE, "a", "bare parameter p"),
        (_Own(lambda s, x: s.b(s.b(x)), b=nn.Conv2d(8, 8, 1)), IMAGE, "a", "b is used 2 times"),
        (_Own(lambda _, x: x + 1), IMAGE, "a", "f(0) != 0"),
        (_Own(lambda _, x: x + x.flip(1)), IMAGE, "a", "may mix units"),
        (_Own(lambda _, x: _product(*x.chunk(2, 1)), c=nn.Conv2d(4, 2, 1)), IMAGE, "a[0:4]", "coupled to other units"),
        (_Own(lambda _, x: torch.cat([x, x], 1), c=nn.Conv2d(16, 2, 1)), IMAGE, "a", "several separate places in c"),
        (_weight_norm(), VECTOR, "0", "computed from other parameters"),
    ],
)
def test_what_is_not_understood_is_declined(model: nn.Module, inputs: Any, name: str, words: str) -> None:
    topology = trace(model, inputs)
    assert words in reason(topology, name)
    assert all(name not in (g.id, g.id.partition("[")[0]) for g in topology.groups)


def test_a_model_that_cannot_be_traced_is_declined_whole() -> None:
    class Cut(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.relu(self.a(x))).detach()

    topology = trace(Cut(), VECTOR)
    assert topology.groups == ()
    assert len(topology.parameters) == 4


# Attention


def test_bert_heads_take_rows_of_q_k_v_and_columns_of_the_output() -> None:
    model = transformer("bert")
    topology = trace(model, TOKENS)
    id_ = "bert.encoder.layer.0.attention.self.query"
    group = topology.group(id_)
    assert (group.units, group.heads_per_unit) == (4, 1)
    assert group.gates == ("bert.encoder.layer.0.attention.output.dense",)
    missed = {name for name, _ in proven(model, TOKENS, topology, id_)}  # a head without values is dead already
    assert {name.split(".")[6] for name in missed} == {"query", "key"}
    assert "LayerNorm over the masked axis" in reason(topology, "bert.encoder.layer.0.attention.output.dense")
    assert proven(model, TOKENS, topology, "bert.encoder.layer.0.intermediate.dense") == set()


def test_gpt2_weights_are_transposed_and_fused() -> None:
    model = transformer("gpt2")
    topology = trace(model, TOKENS)
    at = "transformer.h.0."
    assert spans(topology.group(f"{at}attn.c_attn")) == {
        *((f"{at}attn.c_attn.weight", "producer", 1, start, 6, 1) for start in (0, 24, 48)),
        *((f"{at}attn.c_attn.bias", "producer", 0, start, 6, 1) for start in (0, 24, 48)),
        (f"{at}attn.c_proj.weight", "consumer", 0, 0, 6, 1),
    }
    assert {start for _, start in proven(model, TOKENS, topology, f"{at}attn.c_attn")} == {0, 24}
    assert proven(model, TOKENS, topology, f"{at}mlp.c_fc") == set()
    assert topology.parameters["transformer.wte.weight"].aliases == ("lm_head.weight",)
    assert all(m.parameter != "transformer.wte.weight" for g in topology.groups for m in g.members)


def test_a_unit_under_grouped_query_attention_is_a_whole_key_value_group() -> None:
    model = transformer("llama")
    topology = trace(model, TOKENS)
    at = "model.layers.0.self_attn."
    group = topology.group(f"{at}q_proj")
    assert (group.units, group.heads_per_unit) == (2, 2)
    assert {(name, block) for name, _, _, _, block, _ in spans(group)} == {
        (f"{at}q_proj.weight", 12), (f"{at}k_proj.weight", 6), (f"{at}v_proj.weight", 6), (f"{at}o_proj.weight", 12),
    }  # fmt: skip
    assert proven(model, TOKENS, topology, group.id) == {(f"{at}q_proj.weight", 0), (f"{at}k_proj.weight", 0)}
    assert "coupled to an embedding" in reason(topology, f"{at}o_proj")


def test_swiglu_takes_gate_rows_up_rows_and_down_columns() -> None:
    model = transformer("llama")
    topology = trace(model, TOKENS)
    at = "model.layers.1.mlp."
    group = topology.group(f"{at}up_proj")
    assert {(m.parameter, m.axis) for m in group.members} == {
        (f"{at}up_proj.weight", 0), (f"{at}gate_proj.weight", 0), (f"{at}down_proj.weight", 1),
    }  # fmt: skip
    assert group.gates == (f"{at}up_proj",)
    either = {(f"{at}up_proj.weight", 0), (f"{at}gate_proj.weight", 0)}  # one of the two is enough for a zero product
    assert proven(model, TOKENS, topology, group.id) == either


def test_one_key_value_head_is_declined() -> None:
    topology = trace(transformer("llama", num_key_value_heads=1), TOKENS)
    assert "MQA" in reason(topology, "model.layers.0.self_attn.q_proj", Kind.HEAD)
    assert all(g.kind is not Kind.HEAD for g in topology.groups)


def test_norms_that_heads_share_are_no_members() -> None:
    model = transformer("qwen3")
    topology = trace(model, TOKENS)
    group = topology.group("model.layers.0.self_attn.q_proj")
    assert not [m for m in group.members if "norm" in m.parameter]
    assert faults(lively(model), TOKENS, topology, group) == ""


def test_interleaved_projection_is_one_block_of_three_heads_dims() -> None:
    model = transformer("gpt_neox")
    topology = trace(model, TOKENS)
    at = "gpt_neox.layers.0.attention."
    assert (f"{at}query_key_value.weight", "producer", 0, 0, 18, 1) in spans(topology.group(f"{at}query_key_value"))
    assert proven(model, TOKENS, topology, f"{at}query_key_value") == set()


def test_the_wrong_layout_is_found_out() -> None:
    sliced = HeadPattern("attention.dense", fused="attention.query_key_value")
    topology = trace(transformer("gpt_neox"), TOKENS, heads=[sliced])
    assert "still" in reason(topology, "gpt_neox.layers.0.attention.query_key_value", Kind.HEAD)


@pytest.mark.parametrize("separate", [False, True])
def test_multihead_attention_in_three_slices_or_three_weights(separate: bool) -> None:
    model = Attention(separate)
    topology = trace(model, torch.randn(2, 4, 5))
    places = spans(topology.group("attention"))
    fused = {("attention.in_proj_weight", "producer", 0, start, 4, 1) for start in (0, 12, 24)}
    apart = {(f"attention.{letter}_proj_weight", "producer", 0, 0, 4, 1) for letter in "qkv"}
    assert (apart if separate else fused) <= places
    assert ("attention.in_proj_bias", "producer", 0, 24, 4, 1) in places
    assert faults(lively(model), torch.randn(2, 4, 5), topology, topology.group("attention")) == ""
    value = next(m for m in topology.group("attention").members if m.parameter.endswith("bias") and m.start == 24)
    assert faults(model, torch.randn(2, 4, 5), topology, topology.group("attention"), without=value) == "B"


class _Plain(nn.Module):
    """Attention that does not tell its number of heads."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(12, 12) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (3, 4)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        return self.o_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def test_the_number_of_heads_is_never_guessed() -> None:
    x = torch.randn(2, 5, 12)
    topology = trace(_Plain(), x)
    assert "HeadPattern(heads=...)" in reason(topology, "q_proj", Kind.HEAD)
    told = HeadPattern("o_proj", "q_proj", "k_proj", "v_proj", heads=3)
    assert trace(_Plain(), x, heads=(told,)).group("q_proj").units == 3
    wrong = HeadPattern("o_proj", "q_proj", "k_proj", "v_proj", heads=6)
    assert "still" in reason(trace(_Plain(), x, heads=(wrong, *HEADS)), "q_proj", Kind.HEAD)
    assert "does not divide" in reason(
        trace(_Plain(), x, heads=[HeadPattern("o_proj", "q_proj", "k_proj", "v_proj", heads=5)]), "q_proj", Kind.HEAD
    )


# Layers


def test_a_residual_branch_is_its_closing_weight_and_norm() -> None:
    model = ResNet()
    topology = trace(model, DIGIT)
    group = topology.group("layer:layer1.1.conv2")
    assert [m.parameter.removeprefix("layer1.1.") for m in group.members] == ["conv2.weight", "bn2.weight", "bn2.bias"]
    assert (group.units, group.gates) == (1, ("layer1.1",))
    assert group.upstream == ("layer1.1.conv1.weight", "layer1.1.bn1.weight", "layer1.1.bn1.bias")
    assert faults(lively(model), DIGIT, topology, group) == ""
    with torch.no_grad():  # masking is removing: the block is then its shortcut alone
        for name, where in dead(topology, group, group.members, [0]).items():
            model.get_parameter(name)[where] = 0
        x = torch.rand(2, 16, 4, 4)
        assert torch.equal(model.layer1[1](x), x)


def test_a_shortcut_that_projects_or_is_missing_is_declined() -> None:
    assert "is a projection" in reason(trace(ResNet(), DIGIT), "layer:layer2.0.conv2", Kind.LAYER)

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.bn1 = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
            self.conv2, self.bn2 = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)

        def forward(self, x: Tensor) -> Tensor:
            return self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))

    model = nn.Sequential(nn.Conv2d(3, 8, 1), Plain(), nn.Flatten(), nn.Linear(512, 3))
    assert "no shortcut" in reason(trace(model, IMAGE), "layer:1.conv2", Kind.LAYER)


def test_norms_after_the_addition_are_no_members_of_a_layer() -> None:
    model = transformer("bert")
    topology = trace(model, TOKENS)
    for end, gate in (("attention.output.dense", ".attention"), ("output.dense", "")):
        group = topology.group(f"layer:bert.encoder.layer.1.{end}")
        assert {m.parameter.rpartition(".")[0] for m in group.members} == {f"bert.encoder.layer.1.{end}"}
        assert group.gates == (f"bert.encoder.layer.1{gate}",)
        assert faults(lively(model), TOKENS, topology, group) == ""


@pytest.mark.parametrize("name", ["gpt2", "llama", "gpt_neox"])
def test_both_branches_of_a_decoder_layer(name: str) -> None:
    model = transformer(name)
    topology = trace(model, TOKENS)
    layers = [g for g in topology.groups if g.kind is Kind.LAYER]
    assert len(layers) == 4
    lively(model)
    for group in layers:
        assert faults(model, TOKENS, topology, group) == ""
        closing = group.members[0]
        shape = topology.parameters[closing.parameter].shape
        assert (closing.axis, closing.block) == ((1, shape[1]) if name == "gpt2" else (0, shape[0]))


def test_an_encoder_layer_of_torch() -> None:
    model, x = Encoder(), torch.randn(2, 4, 12)
    topology = trace(model, x)
    assert [(g.id, g.kind.value) for g in topology.groups] == [
        ("layer.self_attn", "head"),
        ("layer:layer.self_attn.out_proj", "layer"),
        ("layer.linear1", "channel"),
        ("layer:layer.linear2", "layer"),
    ]
    for group in topology.groups:
        assert faults(lively(model), x, topology, group) == ""


def test_a_branch_that_ends_elsewhere_is_found_out() -> None:
    model = ResNet()
    wrong = LayerPattern("conv1", ("conv2", "bn2"), norm="bn1", projection=("shortcut",))
    topology = trace(model, DIGIT, layers=[wrong])
    assert "the branch does not end there" in reason(topology, "layer:layer1.0.conv1", Kind.LAYER)
    assert all(g.kind is not Kind.LAYER for g in trace(model, DIGIT, layers="none").groups)


# Names, domains, and the model itself


def test_parameters_have_their_names_ties_and_uuids_once() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    topology = trace(model, torch.randn(2, 4))
    assert list(topology.parameters) == ["0.weight", "0.bias", "2.bias"]
    tied = topology.parameters["0.weight"]
    assert (tied.aliases, tied.shape) == (("2.weight",), (4, 4))
    assert tied.uuid == parameter_uuid("0.weight", (4, 4), "zoo")
    assert "tied to another parameter" in reason(topology, "0")


def test_seeds_are_domains_that_no_group_crosses() -> None:
    class Grafted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.c = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1)
            self.seed = nn.Sequential(nn.Conv2d(8, 6, 1), nn.ReLU(), nn.Conv2d(6, 8, 1))

        def forward(self, x: Tensor) -> Tensor:
            h = F.relu(self.a(x))
            return self.c(h + self.seed(h)).mean((2, 3))

    topology = trace(Grafted(), IMAGE, seeds=["seed"])
    assert topology.domains == ("host", "seed")
    assert [(g.id, g.domain) for g in topology.groups] == [("seed.0", "seed")]
    assert "crosses the domains host and seed" in reason(topology, "a")
    assert trace(Grafted(), IMAGE, seeds={"seed": "graft-1"}).group("seed.0").domain == "graft-1"
    with pytest.raises(TypeError, match="one string"):
        trace(Grafted(), IMAGE, seeds="seed")


def test_tracing_leaves_the_model_as_it_was() -> None:
    model = ResNet().train()
    model.fc.weight.requires_grad_(False)
    model(DIGIT).sum().backward()
    seen: list[int] = []
    model.bn1.register_forward_hook(lambda *_: seen.append(1))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    random = torch.get_rng_state()
    with torch.no_grad():
        trace(model, DIGIT)
    assert seen == []
    assert all(module.training for module in model.modules())
    assert not model.fc.weight.requires_grad
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(model.get_parameter(name).grad, grad) for name, grad in grads.items())
    assert torch.equal(torch.get_rng_state(), random)
    assert [len(m._forward_hooks) for m in model.modules() if m._forward_hooks] == [1]


def test_wrappers_change_nothing_and_the_result_repeats() -> None:
    class Wrapper(nn.Module):  # as torch.compile and DDP keep the model
        def __init__(self, name: str, inner: nn.Module) -> None:
            super().__init__()
            setattr(self, name, inner)
            self.name = name

        def forward(self, x: Tensor) -> Tensor:
            return getattr(self, self.name)(x)

    model = SmallCNN()
    plain = trace(model, DIGIT)
    assert trace(model, DIGIT).canonical() == plain.canonical()
    assert trace(Wrapper("module", model), DIGIT).canonical() == plain.canonical()
    assert trace(Wrapper("module", Wrapper("_orig_mod", model)), DIGIT).canonical() == plain.canonical()
    inner = SmallCNN()
    inner.first = Wrapper("_checkpoint_wrapped_module", inner.first)
    assert trace(inner, DIGIT).canonical() == plain.canonical()
    assert Topology.parse(plain.canonical(), name="topology").group("first").units == 6


def test_half_precision_is_traced_too() -> None:
    topology = trace(SmallCNN().bfloat16(), DIGIT.bfloat16())
    assert [g.id for g in topology.groups] == ["first", "second"]


def test_an_output_that_is_not_finite_declines_everything() -> None:
    model = SmallCNN()
    with torch.no_grad():
        model.fc.bias[0] = float("nan")
    topology = trace(model, DIGIT)
    assert topology.groups == ()
    assert "not finite" in reason(topology, "first")


def test_coverage_is_the_share_of_all_weights_that_groups_reach() -> None:
    found = trace(ResNet(), IMAGE[:, :1])
    known = {member.parameter for group in found.groups for member in group.members}
    assert 0.9 < coverage(found) < 1.0
    assert coverage(found) == sum(found.parameters[name].size for name in known) / 174_970
    assert coverage(found.model_copy(update={"groups": ()})) == 0.0


def test_coverage_counts_a_parameter_once_and_what_goes_with_a_layer() -> None:
    sizes = {"a": 6, "b": 3, "c": 1}
    member = Member(parameter="a", role="producer", axis=0)
    one = Group(id="one", kind=Kind.CHANNEL, units=1, members=(member,), gates=("a",))
    layer = Group(id="layer", kind=Kind.LAYER, units=1, members=(member,), gates=("a",), upstream=("b",))
    parameters = {name: Parameter(uuid=name, shape=(size,)) for name, size in sizes.items()}
    two = one.model_copy(update={"id": "two"})
    assert coverage(Topology(model_id="zoo", parameters=parameters, groups=(one, two))) == 0.6
    assert coverage(Topology(model_id="zoo", parameters=parameters, groups=(one, layer))) == 0.9
