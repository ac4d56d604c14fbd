"""Builders of small topologies and of what the control plane reads of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from emrakul.settings import Settings
from emrakul.strategy.aggregate import GroupScores
from emrakul.strategy.requests import Subject
from leyline.digest import digest_bytes
from leyline.ids import parameter_uuid
from leyline.masks import Masks
from leyline.messages import CheckpointMetadata, ImportanceStats, StoredObject
from leyline.topology import HOST, Group, Kind, Member, Parameter, Topology

MODEL = "model"


def parameter(name: str, *shape: int, domain: str = HOST, aliases: tuple[str, ...] = ()) -> Parameter:
    return Parameter(uuid=parameter_uuid(name, shape, MODEL), shape=shape, domain=domain, aliases=aliases)


def chain(widths: Sequence[int], *, domain: str = HOST, prefix: str = "", rows: int = 4) -> Topology:
    """Linear layers one after the other with a norm each: one channel group a width."""
    parameters: dict[str, Parameter] = {}
    groups = []
    for index, width in enumerate(widths):
        here, after = f"{prefix}fc{index}", f"{prefix}fc{index + 1}"
        below = widths[index - 1] if index else rows
        above = widths[index + 1] if index + 1 < len(widths) else rows
        parameters[f"{here}.weight"] = parameter(f"{here}.weight", width, below, domain=domain)
        parameters[f"{here}.norm"] = parameter(f"{here}.norm", width, domain=domain)
        parameters[f"{after}.weight"] = parameter(f"{after}.weight", above, width, domain=domain)
        members = (
            Member(parameter=f"{here}.weight", role="producer", axis=0),
            Member(parameter=f"{here}.norm", role="norm", axis=0),
            Member(parameter=f"{after}.weight", role="consumer", axis=1),
        )
        groups.append(
            Group(id=here, kind=Kind.CHANNEL, domain=domain, units=width, members=members, gates=(f"{here}.norm",))
        )
    return Topology(model_id=MODEL, parameters=parameters, groups=tuple(groups))


def attention(layers: int, heads: int, *, width: int = 2, heads_per_unit: int = 1) -> Topology:
    """Attention layers of `heads` units of `width`, value rows and output columns."""
    parameters, groups = {}, []
    for index in range(layers):
        value, out = f"layer{index}.value", f"layer{index}.out"
        parameters[value] = parameter(value, heads * width, 4)
        parameters[out] = parameter(out, 4, heads * width)
        members = (
            Member(parameter=value, role="producer", axis=0, block=width),
            Member(parameter=out, role="consumer", axis=1, block=width),
        )
        groups.append(
            Group(
                id=f"layer{index}",
                kind=Kind.HEAD,
                units=heads,
                members=members,
                gates=(out,),
                heads_per_unit=heads_per_unit,
            )
        )
    return Topology(model_id=MODEL, parameters=parameters, groups=tuple(groups))


def branches(count: int) -> Topology:
    """Residual branches, each a layer group of one unit."""
    parameters, groups = {}, []
    for index in range(count):
        closing = f"block{index}.closing"
        parameters[closing] = parameter(closing, 4, 4)
        member = Member(parameter=closing, role="producer", axis=0, block=4)
        groups.append(Group(id=f"block{index}", kind=Kind.LAYER, units=1, members=(member,), gates=(f"block{index}",)))
    return Topology(model_id=MODEL, parameters=parameters, groups=tuple(groups))


def join(*parts: Topology) -> Topology:
    parameters: dict[str, Parameter] = {}
    for part in parts:
        parameters |= part.parameters
    return Topology(
        model_id=MODEL, parameters=parameters, groups=tuple(group for part in parts for group in part.groups)
    )


def statistics(**changes: object) -> ImportanceStats:
    """2,000 tracked samples of the checkpoint 4000-1-00000000."""
    known: Mapping[str, object] = {
        "idempotency_key": "statistics",
        "run_id": "run",
        "checkpoint": "4000-1-00000000",
        "step": 4000,
        "source": "tracked",
        "samples": 2000,
        "sampled_steps": 400,
        "last_step": 4000,
    }
    return ImportanceStats.model_validate({**known, **changes})


def checkpoint(*, weights: bytes = b"weights", stats: ImportanceStats | None = None) -> CheckpointMetadata:
    """READY.json of checkpoint 4000-1-00000000."""
    content = {"model.safetensors": weights, "topology.json": b"topology", "importance.safetensors": b"importance"}
    return CheckpointMetadata(
        idempotency_key="4000-1-00000000",
        run_id="run",
        model_id=MODEL,
        name="4000-1-00000000",
        step=4000,
        epoch=40,
        term=1,
        format="safetensors",
        weights=("model.safetensors",),
        topology="topology.json",
        importance="importance.safetensors",
        objects=tuple(StoredObject(path=path, digest=digest_bytes(data)) for path, data in content.items()),
        num_params=1000,
        num_bytes=4000,
        statistics=stats or statistics(),
    )


def subject(topology: Topology, settings: Settings | None = None, *, weights: bytes = b"weights") -> Subject:
    return Subject(
        cycle="c3-0123456789",
        checkpoint=checkpoint(weights=weights),
        topology=topology,
        inherited=None,
        settings=settings or Settings(),
    )


def scored(
    topology: Topology,
    score: Sequence[Sequence[float]],
    *,
    pruned: Mapping[str, Sequence[int]] | None = None,
    upper: Sequence[Sequence[float]] | None = None,
) -> tuple[GroupScores, ...]:
    """Scores of every group, as if they had been aggregated."""
    made = []
    for index, group in enumerate(topology.groups):
        gone = list((pruned or {}).get(group.id, ()))
        live = np.ones(group.units, dtype=np.bool_)
        live[gone] = False
        values = np.array(score[index], dtype=np.float64)
        bound = values if upper is None else np.array(upper[index], dtype=np.float64)
        made.append(GroupScores(group=group, scorer="taylor", score=values, upper=bound, live=live, pruned=len(gone)))
    return tuple(made)


def masks(topology: Topology, pruned: Mapping[str, Sequence[int]]) -> Masks:
    """Masks of these units."""
    units = {}
    for id_, gone in pruned.items():
        active = np.ones(topology.group(id_).units, dtype=np.bool_)
        active[list(gone)] = False
        units[id_] = active
    groups = {id_: topology.group(id_) for id_ in pruned}
    return Masks(model_id=topology.model_id, groups=groups, units=units, parameters=topology.parameters)
