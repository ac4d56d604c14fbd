"""The model that is pruned: linear layers of one width, with ReLU between them. Its weights cost no time to make."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from leyline.ids import parameter_uuid
from leyline.topology import Group, Kind, Member, Parameter, Topology

MODEL_ID = "chain"
SAMPLES = 256
WEAK = 0.05
"""Share of each layer's rows that hardly matter: what a cycle takes, and what the gate lets go."""


class Chain(nn.Module):
    """`layers` linear layers; input and logits are [N, width]."""

    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        made = []
        for _ in range(layers):
            layer = nn.utils.skip_init(nn.Linear, width, width, bias=False)
            made.append(layer)
        self.layers = nn.ModuleList(made)
        random = torch.Generator().manual_seed(0)
        rows = torch.randn(width, width, generator=random).mul_((2 / width) ** 0.5)
        weak = torch.randperm(width, generator=random)[: max(1, int(WEAK * width))]
        rows[weak] *= torch.logspace(-4, -2, len(weak)).unsqueeze(1)
        with torch.no_grad():
            for number, layer in enumerate(self.layers):  # the same values, each layer's in another order
                shift = 7 * number % width
                layer.weight[:, : width - shift] = rows[:, shift:]
                layer.weight[:, width - shift :] = rows[:, :shift]

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = torch.relu(layer(x))
        logits: Tensor = self.layers[-1](x)
        return logits


def topology(layers: int, width: int) -> Topology:
    """What `trace_topology` finds in a Chain, written down: a trace keeps a second copy of the weights."""
    names = [f"layers.{number}.weight" for number in range(layers)]
    shape = (width, width)
    groups = tuple(
        Group(
            id=f"layers.{number}",
            kind=Kind.CHANNEL,
            units=width,
            members=(
                Member(parameter=names[number], role="producer", axis=0),
                Member(parameter=names[number + 1], role="consumer", axis=1),
            ),
            gates=(f"layers.{number}",),
        )
        for number in range(layers - 1)
    )
    parameters = {name: Parameter(uuid=parameter_uuid(name, shape, MODEL_ID), shape=shape) for name in names}
    return Topology(model_id=MODEL_ID, parameters=parameters, groups=groups)


def samples(width: int, count: int = SAMPLES) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(1))
