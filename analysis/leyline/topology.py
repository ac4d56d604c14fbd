"""What may be pruned: groups of parameters that go together, as units, and what was declined and why."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from leyline.model import Value

HOST = "host"
"""The domain of every parameter that belongs to no seed module."""


Domain = Annotated[str, Field(min_length=1, max_length=200)]
"""`host`, or the canonical name of one seed module."""


class Kind(StrEnum):
    """What a unit is. `weight` is basic pruning: single weights, no group."""

    CHANNEL = "channel"
    HEAD = "head"
    LAYER = "layer"
    WEIGHT = "weight"


class Member(Value):
    """One parameter's part in a group: unit u owns indices [start + u*block, start + (u+1)*block) of `axis`.

    With `groups` > 1 (consumer of a grouped convolution, weight [out, in/groups, ...]) unit u is instead the column
    u % (in/groups) of axis 1 within the rows of convolution group u // (in/groups); start, block, axis are 0, 1, 1.
    """

    parameter: str
    role: Literal["producer", "norm", "consumer"]
    axis: int = Field(ge=0)
    start: int = Field(default=0, ge=0)
    block: int = Field(default=1, ge=1)
    groups: int = Field(default=1, ge=1)


class Group(Value):
    """Parameters that must be pruned together, as `units` units.

    A unit is pruned when every member is zero at it. A layer group has one unit: the closing weight and bias of its
    branch (and the branch's own norm there), no consumers; `upstream` then names the branch's other parameters.
    """

    id: str
    kind: Kind
    domain: Domain = HOST
    units: int = Field(ge=1)
    members: tuple[Member, ...] = Field(min_length=1)
    gates: tuple[str, ...] = Field(min_length=1)
    """The modules at whose outputs the unit is scored, q summed over them: the producers' norms, or the producers where
    there is none; heads: the output projection (its input is hooked); layers: the residual block."""
    heads_per_unit: int = Field(default=1, ge=1)
    """Query heads in a unit of kind head: more than one under grouped-query attention."""
    upstream: tuple[str, ...] = ()
    zero_at_zero: bool = True
    """False where an activation with f(0) != 0 follows: declined unless the user declared it."""


class Declined(Value):
    """Structure that is left alone, with the reason a person reads in the report."""

    name: str
    kind: Kind
    reason: str


class Parameter(Value):
    """One parameter of the model (ties: the first name; `aliases` has the others)."""

    uuid: str
    shape: tuple[int, ...]
    domain: Domain = HOST
    aliases: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        """Number of weights."""
        size = 1
        for side in self.shape:
            size *= side
        return size


class Topology(Value):
    """What kasmina found in a model. Stored with the checkpoint; requests and masks are cut from it alone."""

    schema_version: Literal[1] = 1
    model_id: str
    parameters: dict[str, Parameter]
    """By canonical name."""
    groups: tuple[Group, ...] = ()
    declined: tuple[Declined, ...] = ()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        seen: set[str] = set()
        for group in self.groups:
            if group.id in seen:
                raise ValueError(f"group {group.id} occurs twice")
            seen.add(group.id)
            for member in group.members:
                parameter = self.parameters.get(member.parameter)
                if parameter is None:
                    raise ValueError(f"group {group.id} names {member.parameter}, which is no parameter")
                if parameter.domain != group.domain:
                    raise ValueError(
                        f"group {group.id} of domain {group.domain} names {member.parameter} of domain "
                        f"{parameter.domain}; no group may cross two domains"
                    )
                if not member_fits(member, group.units, parameter.shape):
                    raise ValueError(
                        f"group {group.id}: {group.units} units of {member.block} do not fit {member.parameter} "
                        f"of shape {list(parameter.shape)} on axis {member.axis} from {member.start}"
                    )
        return self

    def group(self, id_: str) -> Group:
        for group in self.groups:
            if group.id == id_:
                return group
        raise KeyError(f"no group {id_}; groups: {', '.join(g.id for g in self.groups[:8])}")

    @property
    def domains(self) -> tuple[str, ...]:
        """Every domain that has a parameter, host first."""
        found = {p.domain for p in self.parameters.values()}
        return tuple(sorted(found, key=lambda d: (d != HOST, d)))


def coverage(topology: Topology) -> float:
    """Share of all weights that lie in parameters which structured pruning can reach, between 0 and 1.

    A parameter counts whole, and once, if it is a member of any group or goes with a layer (`upstream`).
    """
    known = {member.parameter for group in topology.groups for member in group.members}
    known.update(name for group in topology.groups for name in group.upstream)
    total = sum(parameter.size for parameter in topology.parameters.values())
    reached = sum(parameter.size for name, parameter in topology.parameters.items() if name in known)
    return reached / total if total else 0.0


def member_fits(member: Member, units: int, shape: tuple[int, ...]) -> bool:
    """Whether the member's indices lie inside a parameter of this shape."""
    if member.groups > 1:
        return len(shape) >= 2 and shape[0] % member.groups == 0 and shape[1] * member.groups == units
    return member.axis < len(shape) and member.start + units * member.block <= shape[member.axis]
