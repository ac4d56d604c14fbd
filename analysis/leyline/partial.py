"""Group scores that need the weights: partial sums per unit come from many answers, and are added up here.

Which sums belong to a slice follows from topology alone, so the worker that makes them and the control plane that
adds them up agree on every name and shape. Added in the order of the slices, they are equal bit by bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from leyline.messages import Slice
from leyline.model import Malformed
from leyline.topology import Group, Topology

Vector = NDArray[np.float64]
Sums = Mapping[tuple[str, int], Vector]
"""(group id, member index) -> [units] sum of squares over the member's weights of each unit."""


class Part(NamedTuple):
    """The units [first, first + units) of one member of a group, as far as one slice touches them."""

    group: Group
    member: int
    first: int
    units: int

    def name(self, kind: str, slice_: Slice) -> str:
        """Of the tensor in an answer; `kind` is `norm` (sum of squares) or `fisher` (sum of w^2 F / 2)."""
        return f"{kind}/{slice_.key}/{self.group.id}/{self.member}/{self.first}"


class Parts:
    """Which members touch which parameter; made once for a topology."""

    def __init__(self, topology: Topology) -> None:
        self._topology = topology
        self._touching: dict[str, list[tuple[Group, int]]] = {}
        for group in topology.groups:
            for index, member in enumerate(group.members):
                self._touching.setdefault(member.parameter, []).append((group, index))

    def of(self, slice_: Slice) -> tuple[Part, ...]:
        """The parts in a slice of whole rows of axis 0, in topology order."""
        found = (self._part(slice_, group, index) for group, index in self._touching.get(slice_.parameter, ()))
        return tuple(part for part in found if part.units)

    def _part(self, slice_: Slice, group: Group, index: int) -> Part:
        shape = self._topology.parameters[slice_.parameter].shape
        first_row, last_row = rows(slice_, shape)
        member = group.members[index]
        if member.groups > 1:
            per = shape[0] // member.groups
            first, last = first_row // per, -(-last_row // per)
            return Part(group, index, first * shape[1], (last - first) * shape[1])
        if member.axis > 0:
            return Part(group, index, 0, group.units)
        first = max(first_row - member.start, 0) // member.block
        last = min(-(-max(last_row - member.start, 0) // member.block), group.units)
        return Part(group, index, first, max(last - first, 0))


def rows(slice_: Slice, shape: tuple[int, ...]) -> tuple[int, int]:
    """[first, last) of axis 0 that the slice covers; Malformed unless it is whole rows of the parameter."""
    row = int(np.prod(shape[1:], dtype=np.int64))
    count = shape[0] if shape else 1
    if not 0 <= slice_.start < slice_.stop <= count * row or slice_.start % row or slice_.stop % row:
        raise Malformed(
            f"elements {slice_.start} to {slice_.stop} of {slice_.parameter} are no whole rows of shape {list(shape)}"
        )
    return slice_.start // row, slice_.stop // row


def add_up(topology: Topology, answers: Iterable[tuple[Slice, Mapping[str, NDArray[Any]]]], kind: str = "norm") -> Sums:
    """Sums over all slices; Malformed if an answer lacks a part of its slice, or a member is not covered."""
    parts = Parts(topology)
    sums: dict[tuple[str, int], Vector] = {
        (group.id, index): np.zeros(group.units)  # of an empty parameter there are no slices
        for group in topology.groups
        for index, member in enumerate(group.members)
        if not topology.parameters[member.parameter].size
    }
    covered: dict[str, int] = {}
    for slice_, arrays in sorted(answers, key=lambda item: (item[0].parameter, item[0].start)):
        if slice_.start != covered.get(slice_.parameter, 0):
            raise Malformed(f"the slices of {slice_.parameter} leave a hole or overlap at element {slice_.start}")
        covered[slice_.parameter] = slice_.stop
        for part in parts.of(slice_):
            values = arrays.get(name := part.name(kind, slice_))
            if values is None or values.shape != (part.units,):
                raise Malformed(f"the answer for {slice_.key} has no tensor {name} of {part.units} sums")
            total = sums.setdefault((part.group.id, part.member), np.zeros(part.group.units))
            total[part.first : part.first + part.units] += values
    for name, stop in covered.items():
        if stop != (size := topology.parameters[name].size):
            raise Malformed(f"the slices of {name} end at element {stop} of {size}")
    return sums


def magnitude(group: Group, sums: Sums) -> Vector:
    """l2 norm [units] over the unit's part of the norm's parameters, or of the producers where there is no norm.

    M_2(u) = (sum over w in S_u of w^2)^(1/2) (Li et al. 2017 with p = 2; S_u without the consumers'
    columns, which would count the unit twice, and without rows before a norm, whose size the norm undoes).
    """
    return np.sqrt(_total(group, sums, _scored_role(group)))


def fisher(group: Group, sums: Sums) -> Vector:
    """I_F(u) = sum over w in S_u of w^2 F_w / 2 [units], in units of the loss, F_w = E_n (dL_n/dw)^2 (LeCun et al.
    1990, with the empirical diagonal Fisher of Theis et al. 2018). `sums` are those of kind `fisher`."""
    return _total(group, sums, _scored_role(group))


def wanda(group: Group, sums: Sums, inputs: Vector) -> Vector:
    """S(u) = ||W_:,u||_2 * ||X_u||_2 [units]: the consumers' columns times their input (Sun et al. 2024, for a whole
    channel). `inputs` [units] = root of the sum over tokens of x_u^2, an answer's `gate/<group>/input`."""
    return np.asarray(np.sqrt(_total(group, sums, "consumer")) * inputs, dtype=np.float64)


def _scored_role(group: Group) -> str:
    return "norm" if any(member.role == "norm" for member in group.members) else "producer"


def _total(group: Group, sums: Sums, role: str) -> Vector:
    chosen = [index for index, member in enumerate(group.members) if member.role == role]
    if missing := [group.members[i].parameter for i in chosen if (group.id, i) not in sums]:
        raise Malformed(f"group {group.id} cannot be scored: no sums of {', '.join(missing)}")
    if not chosen:
        raise Malformed(f"group {group.id} has no {role} to score")
    total = np.zeros(group.units)
    for index in chosen:
        total += sums[group.id, index]
    return total
