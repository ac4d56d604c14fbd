"""The dead-unit proof fails for every member that a mask leaves out, except where leaving it out changes nothing."""

import re

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from builders import masks_of
from kasmina.evaluation import export_program
from leyline.ids import parameter_uuid
from leyline.masks import Masks
from leyline.topology import Group, Kind, Member, Parameter, Topology
from urabrask import proof
from urabrask.interpret import Interpreter, load_program
from urabrask.joins import joining_fault
from urabrask.proof import Proof

torch.set_num_threads(1)


class Conv(nn.Module):
    """An inner channel group (conv1) and a residual one (stem), in blocks with BatchNorm; two branches."""

    def __init__(self, activation: type[nn.Module] = nn.ReLU) -> None:
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.conv1, self.norm1 = nn.Conv2d(6, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.norm2 = nn.Conv2d(8, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.conv3 = nn.Conv2d(6, 6, 3, padding=1)
        self.fc = nn.Linear(6, 5)
        self.activation = activation()

    def forward(self, x: Tensor) -> Tensor:
        x = self.activation(self.stem_norm(self.stem(x)))
        x = x + self.norm2(self.conv2(self.activation(self.norm1(self.conv1(x)))))
        x = x + self.conv3(x)
        return self.fc(x.mean((2, 3)))


class Attention(nn.Module):
    """Four heads of width 4 and a gated MLP of 12 channels, before a LayerNorm over the stream."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(16, 16) for _ in range(4))
        self.gate, self.up, self.down = nn.Linear(16, 12), nn.Linear(16, 12), nn.Linear(12, 16)
        self.norm = nn.LayerNorm(16)
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        def heads(y: Tensor) -> Tensor:
            return y.view(y.shape[0], 3, 4, 4).transpose(1, 2)

        seen = F.scaled_dot_product_attention(heads(self.q(x)), heads(self.k(x)), heads(self.v(x)))
        x = x + self.o(seen.transpose(1, 2).reshape(x.shape[0], 3, 16))
        x = x + self.down(F.silu(self.gate(x)) * self.up(x))
        return self.fc(self.norm(x).mean(1))


Parts = dict[str, tuple[str, int, int]]
"""Parameter, with "/in" where it is a consumer as well -> (role, axis, block)."""

INNER: Parts = {
    "conv1.weight": ("producer", 0, 1),
    "conv1.bias": ("producer", 0, 1),
    "norm1.weight": ("norm", 0, 1),
    "norm1.bias": ("norm", 0, 1),
    "conv2.weight": ("consumer", 1, 1),
}
RESIDUAL: Parts = {
    "stem.weight": ("producer", 0, 1),
    "stem.bias": ("producer", 0, 1),
    "stem_norm.weight": ("norm", 0, 1),
    "stem_norm.bias": ("norm", 0, 1),
    "conv2.weight": ("producer", 0, 1),
    "conv2.bias": ("producer", 0, 1),
    "norm2.weight": ("norm", 0, 1),
    "norm2.bias": ("norm", 0, 1),
    "conv3.weight": ("producer", 0, 1),
    "conv3.bias": ("producer", 0, 1),
    "conv3.weight/in": ("consumer", 1, 1),
    "conv1.weight": ("consumer", 1, 1),
    "fc.weight": ("consumer", 1, 1),
}
HEADS: Parts = {
    **{f"{name}.{part}": ("producer", 0, 4) for name in "qkv" for part in ("weight", "bias")},
    "o.weight": ("consumer", 1, 4),
}
MLP: Parts = {
    **{f"{name}.{part}": ("producer", 0, 1) for name in ("gate", "up") for part in ("weight", "bias")},
    "down.weight": ("consumer", 1, 1),
}
LAYER: Parts = {
    "conv2.weight": ("producer", 0, 6),
    "conv2.bias": ("producer", 0, 6),
    "norm2.weight": ("norm", 0, 6),
    "norm2.bias": ("norm", 0, 6),
}
UPSTREAM = ("conv1.weight", "conv1.bias", "norm1.weight", "norm1.bias")
GROUPS: dict[str, tuple[type[nn.Module], Kind, int, Parts]] = {
    "inner": (Conv, Kind.CHANNEL, 8, INNER),
    "residual": (Conv, Kind.CHANNEL, 6, RESIDUAL),
    "heads": (Attention, Kind.HEAD, 4, HEADS),
    "mlp": (Attention, Kind.CHANNEL, 12, MLP),
    "layer": (Conv, Kind.LAYER, 1, LAYER),
}


@pytest.fixture(autouse=True, params=[7, proof._WINDOW], ids=["windows of 7", "one window"])
def _windows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is refused may not depend on how much of a tensor is looked at at once."""
    monkeypatch.setattr(proof, "_WINDOW", request.param)


PROGRAMS: dict[tuple[type, torch.dtype, type], bytes] = {}

HARMLESS = {
    # Behind a norm whose weight and bias are zero, nothing of the convolution is left.
    ("inner", "conv1.weight"),
    ("inner", "conv1.bias"),
    ("residual", "stem.weight"),
    ("residual", "stem.bias"),
    ("residual", "conv2.weight"),
    ("residual", "conv2.bias"),
    ("layer", "conv2.weight"),
    ("layer", "conv2.bias"),
    # Whatever a head attends to, its values are zero; and a gate on zero, or zero through a gate, is zero.
    *(("heads", f"{name}.{part}") for name in "qk" for part in ("weight", "bias")),
    *(("mlp", f"{name}.{part}") for name in ("gate",) for part in ("weight", "bias")),
    # silu(0) is 0, so with the gate at zero it does not matter what it multiplies.
    *(("mlp", f"up.{part}") for part in ("weight", "bias")),
}


def trained(kind: type[nn.Module]) -> nn.Module:
    """A model none of whose parameters and statistics is 0 or 1: as after some training."""
    torch.manual_seed(0)
    model = kind()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
        for name, buffer in model.named_buffers():
            if buffer.is_floating_point():
                buffer.add_(torch.rand_like(buffer) if name.endswith("var") else torch.randn_like(buffer))
    return model.eval()


def samples(kind: type[nn.Module], dtype: torch.dtype = torch.float32) -> Tensor:
    torch.manual_seed(1)
    shape = (8, 1, 6, 6) if kind is Conv else (8, 3, 16)
    return torch.randn(shape).to(dtype)


def program_of(model: nn.Module, x: Tensor) -> Interpreter:
    """The model's program: the same for all weights, so it is exported once."""
    key = (type(model), x.dtype, type(getattr(model, "activation", None)))
    if key not in PROGRAMS:
        PROGRAMS[key] = export_program(model, (x,))
    return load_program(PROGRAMS[key], name="program")


def topology(model: nn.Module, name: str, *, left_out: str = "", **changes: object) -> Topology:
    """One group of the model, perhaps without a member."""
    _, kind, units, parts = GROUPS[name]
    members = tuple(
        Member(parameter=p.removesuffix("/in"), role=role, axis=axis, block=block)
        for p, (role, axis, block) in parts.items()
        if p != left_out
    )
    upstream = UPSTREAM if kind is Kind.LAYER else ()
    group = Group(id=name, kind=kind, units=units, members=members, gates=(name,), upstream=upstream)
    parameters = {
        p: Parameter(uuid=parameter_uuid(p, value.shape, "toy"), shape=tuple(value.shape))
        for p, value in model.named_parameters()
    }
    return Topology(model_id="toy", parameters=parameters, groups=(group.model_copy(update=changes),))


def prove(model: nn.Module, x: Tensor, found: Topology) -> tuple[str, Interpreter, dict[str, Tensor]]:
    """Mask what the topology says (and no more), then the proof's fault."""
    (group,) = found.groups
    # Enough units that a norm's constant passes the ReLU in one of them.
    masks: Masks = masks_of(found, {group.id: [0] if group.units == 1 else [0, 1, 3]})
    program = program_of(model, x)
    tensors = {name: value.detach().clone() for name, value in model.state_dict().items()}
    for name in tensors:
        if (dead := masks.dead(name)) is not None:
            tensors[name][torch.from_numpy(dead.full())] = 0
    before = {name: value.clone() for name, value in tensors.items()}
    fault = joining_fault(group, program, tensors, (x,)) if group.kind is Kind.LAYER else ""
    fault = fault or Proof(program, tensors, (x,), masks, "seed").fault()
    restored = (torch.equal(value.nan_to_num(), before[name].nan_to_num()) for name, value in tensors.items())
    assert all(restored), "the proof restores what it fills"
    return fault, program, tensors


@pytest.mark.parametrize("name", GROUPS)
def test_a_mask_over_the_whole_group_is_proven(name: str) -> None:
    kind = GROUPS[name][0]
    model = trained(kind)
    assert prove(model, samples(kind), topology(model, name))[0] == ""


@pytest.mark.parametrize(("name", "member"), [(name, p) for name, (*_, parts) in GROUPS.items() for p in parts])
def test_a_member_that_the_mask_leaves_out_is_found(name: str, member: str) -> None:
    kind, group_kind, _, parts = GROUPS[name]
    model = trained(kind)
    fault, _, _ = prove(model, samples(kind), topology(model, name, left_out=member))
    if (name, member) in HARMLESS:
        assert fault == ""
        return
    if group_kind is Kind.LAYER:
        assert "still adds values up to" in fault
    elif parts[member][0] == "consumer":
        assert re.match(rf"fill A: unit \d of group {name} is felt", fault)
    else:
        assert re.match(rf"fill B: unit \d of group {name} is felt", fault)


def test_the_gate_and_what_it_multiplies_are_harmless_only_one_at_a_time() -> None:
    model = trained(Attention)
    (group,) = topology(model, "mlp").groups
    kept = tuple(member for member in group.members if not member.parameter.startswith(("gate", "up")))
    found = topology(model, "mlp", members=kept)
    assert prove(model, samples(Attention), found)[0].startswith("fill B")


def test_a_layer_whose_closing_weight_lives_is_felt_upstream() -> None:
    model = trained(Conv)
    (group,) = topology(model, "layer").groups
    bias = tuple(member for member in group.members if member.parameter == "conv2.bias")
    found = topology(model, "layer", members=bias)
    assert "layer layer" in prove(model, samples(Conv), found)[0]


def test_fill_a_alone_finds_a_layer_that_ends_elsewhere() -> None:
    """Without looking at the shortcut, as for a user's function: the values upstream pass."""
    model = trained(Conv)
    found = topology(model, "layer", members=(Member(parameter="norm1.bias", role="producer", axis=0, block=8),))
    masks = masks_of(found, {"layer": [0]})
    tensors = {name: value.detach().clone() for name, value in model.state_dict().items()}
    tensors["norm1.bias"].zero_()
    program = program_of(model, samples(Conv))
    fault = Proof(program, tensors, (samples(Conv),), masks, "seed").fault()
    assert fault.startswith("fill A: layer layer is felt")


def test_a_masked_layer_norm_is_not_removal() -> None:
    """A LayerNorm over the masked axis: its mean moves with the width, but no fill shows that; topology declines it.

    What the proof does show: the stream's consumers include the norm itself, which no column mask can silence.
    """
    model = trained(Attention)
    members = (
        Member(parameter="o.weight", role="producer", axis=0),
        Member(parameter="o.bias", role="producer", axis=0),
        Member(parameter="down.weight", role="producer", axis=0),
        Member(parameter="down.bias", role="producer", axis=0),
        Member(parameter="norm.weight", role="norm", axis=0),
        Member(parameter="norm.bias", role="norm", axis=0),
        Member(parameter="fc.weight", role="consumer", axis=1),
        *(Member(parameter=f"{name}.weight", role="consumer", axis=1) for name in ("gate", "up")),
    )
    stream = topology(model, "mlp", id="stream", units=16, members=members)
    assert prove(model, samples(Attention), stream)[0].startswith("fill A")


def test_an_activation_that_is_not_zero_at_zero_fails_fill_b_unless_declared() -> None:
    torch.manual_seed(0)
    model = trained(lambda: Conv(nn.Sigmoid))  # type: ignore[arg-type]
    x = samples(Conv)
    assert prove(model, x, topology(model, "inner"))[0].startswith("fill B")
    assert prove(model, x, topology(model, "inner", zero_at_zero=False))[0] == ""
    undeclared = topology(model, "inner", left_out="conv2.weight", zero_at_zero=False)
    assert prove(model, x, undeclared)[0].startswith("fill A")


@pytest.mark.parametrize("name", ["inner", "heads", "mlp"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_proven_and_refused_alike(name: str, dtype: torch.dtype) -> None:
    kind, _, _, parts = GROUPS[name]
    model, x = trained(kind).to(dtype), samples(kind, dtype)
    assert prove(model, x, topology(model, name))[0] == ""
    consumer = next(p for p, (role, *_) in parts.items() if role == "consumer")
    assert prove(model, x, topology(model, name, left_out=consumer))[0].startswith("fill A")


def test_large_weights_do_not_overflow() -> None:
    model, x = trained(Conv), samples(Conv)
    with torch.no_grad():
        model.conv1.weight.mul_(1e12)
    assert prove(model, x, topology(model, "inner"))[0] == ""


def test_answers_that_are_not_finite_prove_nothing() -> None:
    model, x = trained(Conv), samples(Conv)
    with torch.no_grad():
        model.fc.bias[0] = float("nan")
    assert prove(model, x, topology(model, "inner"))[0] == "the candidate's own answers hold NaN or Inf"


def test_a_unit_that_turns_to_nan_when_filled_is_felt() -> None:
    model, x = trained(Conv).half(), samples(Conv, torch.float16)
    with torch.no_grad():
        model.norm1.weight[2] = 6e4  # alive, and so large that values of this size overflow in float16
        model.conv1.weight[2] = 0
        model.conv1.bias[2] = 0
        model.norm1.running_mean[2] = 0
        model.norm1.running_var[1] = 1e-3
    assert prove(model, x, topology(model, "inner"))[0].startswith("fill A")


def test_a_culprit_among_several_groups_is_named() -> None:
    model, x = trained(Conv), samples(Conv)
    inner = topology(model, "inner")
    residual = topology(model, "residual", left_out="fc.weight")
    both = inner.model_copy(update={"groups": (*inner.groups, *residual.groups)})
    masks = masks_of(both, {"inner": [2, 5], "residual": [0, 4]})
    tensors = {name: value.detach().clone() for name, value in model.state_dict().items()}
    for name in tensors:
        if (dead := masks.dead(name)) is not None:
            tensors[name][torch.from_numpy(dead.full())] = 0
    program = program_of(model, x)
    assert Proof(program, tensors, (x,), masks, "seed").fault().startswith("fill A: unit 0 of group residual")
