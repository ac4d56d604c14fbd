"""Masks: one bit a unit (structured) or a weight (basic); 0 is pruned, 1 active. The format, and what it zeroes.

A side-car safetensors file, little bit order: tensors `group/<id>` and `weight/<parameter>` of packed bits (weights
flat, in C order), and in `__metadata__["masks"]` the groups and parameters (UUID, shape) they speak of, so that masks
can be applied without anything else at hand.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import sha256
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from leyline import tensors
from leyline.bits import WINDOW, Bits, BitSource, Packed, Part, Rectangle, pieces, window
from leyline.digest import Digester, digest_bytes
from leyline.model import Malformed, Value, canonical_json
from leyline.store import in_chunks
from leyline.topology import Group, Kind, Member, Parameter


class _Header(Value):
    version: Literal[1] = 1
    model_id: str
    groups: tuple[Group, ...]
    parameters: dict[str, Parameter]


@dataclass(frozen=True)
class Dead:
    """The pruned elements of one parameter: where any (view, bits) is True, with bits broadcast over the view.

    `view` is the parameter's shape, or a reshape of it that splits an axis.
    """

    shape: tuple[int, ...]
    parts: tuple[tuple[tuple[int, ...], Bits], ...]
    single: BitSource | None = None
    """Active bits of single weights, flat and packed; those not set are pruned too."""

    def zero(self, flat: NDArray[Any], offset: int) -> None:
        """Assign 0 to the pruned elements of `flat`, elements [offset, offset+len) of the parameter in C order.

        Assigned, not multiplied: NaN * 0 is NaN and -1 * 0 is -0.
        """
        for view, bits in self.parts:
            _fill(flat, offset, view, bits, flat.dtype.type(0))
        self._fill_single(flat, offset, flat.dtype.type(0))

    def range(self, start: int, stop: int) -> Bits:
        """True where an element of [start, stop), in C order, is pruned."""
        found = np.zeros(stop - start, dtype=np.bool_)
        for view, bits in self.parts:
            _fill(found, start, view, bits, np.True_)
        self._fill_single(found, start, np.True_)
        return found

    def touches(self, start: int, stop: int) -> bool:
        """Whether any element of [start, stop) is pruned."""
        return bool(self.range(start, stop).any()) if stop > start else False

    def full(self) -> Bits:
        """The pruned elements as an array of the parameter's shape."""
        return self.range(0, int(np.prod(self.shape, dtype=np.int64))).reshape(self.shape)

    def within(self, origin: tuple[int, ...], shape: tuple[int, ...], order: tuple[int, ...]) -> Dead:
        """The pruned elements of the rectangle at `origin`, with its axes in this order, as it may lie in a file."""
        if shape == self.shape and order == tuple(range(len(shape))):
            return self
        place = [slice(start, start + side) for start, side in zip(origin, shape, strict=True)]
        turned = tuple(shape[axis] for axis in order)
        parts = []
        for view, bits in self.parts:
            whole = bits if view == self.shape else np.broadcast_to(bits, view).reshape(self.shape)
            cut = whole[tuple(part if side > 1 else slice(None) for part, side in zip(place, whole.shape, strict=True))]
            parts.append((turned, cut.transpose(order)))
        single = None if self.single is None else Rectangle(self.single, self.shape, origin, turned, order)
        return Dead(turned, tuple(parts), single)

    def _fill_single(self, flat: NDArray[Any], offset: int, value: Any) -> None:
        if self.single is None:
            return
        for at in range(0, flat.size, WINDOW):
            piece = flat[at : at + WINDOW]
            np.copyto(piece, value, where=~window(self.single, offset + at, offset + at + piece.size))


def _fill(flat: NDArray[Any], offset: int, view: tuple[int, ...], bits: Bits, value: Any) -> None:
    """Set `flat` (elements from `offset` of an array of shape `view`) to `value` where the broadcast bits are True."""
    if not flat.size or not bits.any():
        return
    if len(view) <= 1:
        span = bits if bits.shape == view else np.broadcast_to(bits, view)
        flat[span[offset : offset + flat.size] if view else span.reshape(1)] = value
        return
    row = int(np.prod(view[1:], dtype=np.int64))
    done = 0
    while done < flat.size:
        index, within = divmod(offset + done, row)
        whole = (flat.size - done) // row if within == 0 else 0
        if whole:
            rows = bits if bits.shape[0] == 1 else bits[index : index + whole]
            part = flat[done : done + whole * row].reshape(whole, *view[1:])
            np.copyto(part, value, where=rows)
            done += whole * row
        else:  # a row that this range cuts: the same question one axis further in
            size = min(row - within, flat.size - done)
            inner = bits[0 if bits.shape[0] == 1 else index]
            _fill(flat[done : done + size], within, view[1:], inner, value)
            done += size


def member_dead(member: Member, shape: tuple[int, ...], pruned: Bits) -> tuple[tuple[int, ...], Bits]:
    """The (view, bits) that a member of a group contributes to its parameter, from the group's pruned units."""
    if member.groups > 1:
        per = shape[1]
        view = (member.groups, shape[0] // member.groups, *shape[1:])
        return view, pruned.reshape(member.groups, 1, per, *(1 for _ in shape[2:]))
    along = np.zeros(shape[member.axis], dtype=np.bool_)
    along[member.start : member.start + len(pruned) * member.block] = np.repeat(pruned, member.block)
    return shape, along.reshape([-1 if axis == member.axis else 1 for axis in range(len(shape))])


@dataclass(frozen=True)
class Masks:
    """All masks of one checkpoint. Immutable: `union` makes a new one."""

    model_id: str
    groups: Mapping[str, Group] = field(default_factory=dict)
    units: Mapping[str, Bits] = field(default_factory=dict)
    """Group id -> active bits [units]; groups with nothing pruned are left out."""
    parameters: Mapping[str, Parameter] = field(default_factory=dict)
    """Every parameter that a group or a weight mask names."""
    weights: Mapping[str, Bits] = field(default_factory=dict)
    """Parameter -> active bits, flat in C order; parameters that lose none are left out. Packed where they are many."""

    def __bool__(self) -> bool:
        return bool(self.units or self.weights)

    def dead(self, parameter: str) -> Dead | None:
        """What is pruned of a parameter (canonical name), or None."""
        single = self._single.packed.get(parameter)
        parts = self._parts.get(parameter, ())
        if single is None and not parts:
            return None
        return Dead(self.parameters[parameter].shape, tuple(parts), single)

    @cached_property
    def _parts(self) -> dict[str, list[tuple[tuple[int, ...], Bits]]]:
        parts: dict[str, list[tuple[tuple[int, ...], Bits]]] = {}
        for id_, active in self.units.items():
            for member in self.groups[id_].members:
                shape = self.parameters[member.parameter].shape
                parts.setdefault(member.parameter, []).append(member_dead(member, shape, ~active))
        return parts

    @cached_property
    def _single(self) -> Packed:
        return Packed.of(self.weights)

    def pruned(self, group: str) -> Bits | None:
        """Pruned units of a group, or None where it has none."""
        return ~self.units[group] if group in self.units else None

    def counts(self) -> dict[str, int]:
        """Pruned units by kind."""
        found: dict[str, int] = {}
        for id_, active in self.units.items():
            kind = self.groups[id_].kind.value
            found[kind] = found.get(kind, 0) + int((~active).sum())
        if self.weights:
            found[Kind.WEIGHT.value] = self._single.pruned()
        return found

    def union(self, other: Masks) -> Masks:
        """Everything that either prunes. Refuses masks of another model."""
        if other.model_id != self.model_id:
            raise Malformed(f"masks of model {other.model_id} cannot join masks of model {self.model_id}")
        return Masks(
            model_id=self.model_id,
            groups={**self.groups, **other.groups},
            units=_both(self.units, other.units),
            parameters={**self.parameters, **other.parameters},
            weights=self._single.both(other._single),
        )

    def exceeds(self, other: Masks) -> bool:
        """Whether this prunes anything that `other` does not."""
        for mine, theirs in ((Packed.of(self.units), Packed.of(other.units)), (self._single, other._single)):
            for name, active in mine.packed.items():
                known = theirs.packed.get(name)
                if known is None or any((~a & b).any() for a, b in zip(pieces(active), pieces(known), strict=True)):
                    return True
        return False

    def to_bytes(self) -> bytes:
        """The side-car file; equal masks give equal bytes."""
        return b"".join(MaskFile(self))

    @classmethod
    def from_bytes(cls, data: bytes, *, name: str) -> Masks:
        """Read a side-car; Malformed names it and what does not fit."""
        return cls.read(np.frombuffer(data, np.uint8), name=name)

    @classmethod
    def read(cls, file: BitSource, *, name: str) -> Masks:
        """from_bytes of a file that is read again for the bits of single weights, when they are asked for."""
        end = tensors.header_length(file[:8].tobytes(), len(file), name=name)
        entries, metadata = tensors.parse_header(file[:end].tobytes(), len(file), name=name)
        if "masks" not in metadata:
            raise Malformed(f"{name} has no masks header; it is no mask file")
        header = _Header.parse(metadata["masks"].encode(), name=name)
        groups = {group.id: group for group in header.groups}
        units: dict[str, Bits] = {}
        weights: dict[str, BitSource] = {}
        for key, entry in entries.items():
            family, _, owner = key.partition("/")
            if family == "group" and owner in groups:
                size = groups[owner].units
            elif family == "weight" and owner in header.parameters:
                size = header.parameters[owner].size
            else:
                raise Malformed(f"{name}: tensor {key} belongs to nothing in its header")
            if entry.dtype != "U8" or entry.shape != ((size + 7) // 8,):
                raise Malformed(f"{name}: tensor {key} should hold {size} packed bits, it has shape {entry.shape}")
            packed = Part(file, entry.start, entry.stop)
            if size % 8 and packed[size // 8 :][0] >> size % 8:
                raise Malformed(f"{name}: tensor {key} sets bits behind its {size}; it was not written by emrakul")
            if family == "group":
                units[owner] = window(packed, 0, size)
            else:
                weights[owner] = packed
        for group in header.groups:
            if missing := [m.parameter for m in group.members if m.parameter not in header.parameters]:
                raise Malformed(f"{name}: group {group.id} names {missing[0]}, which its header does not list")
        sizes = {owner: header.parameters[owner].size for owner in weights}
        return cls(header.model_id, groups, units, header.parameters, Packed(weights, sizes))

    def summary(self) -> str:
        """For people: "3 channels, 1 head"."""
        return ", ".join(f"{n} {kind}{'' if n == 1 else 's'}" for kind, n in self.counts().items()) or "nothing"


class MaskFile:
    """The side-car of these masks, `size` bytes in chunks of CHUNK; can be iterated again."""

    def __init__(self, masks: Masks) -> None:
        header = _Header(
            model_id=masks.model_id,
            groups=tuple(masks.groups[id_] for id_ in sorted(masks.units)),
            parameters={name: masks.parameters[name] for name in sorted({*masks._parts, *masks._single})},
        )
        bits: dict[str, BitSource] = {
            f"group/{id_}": np.packbits(bits, bitorder="little") for id_, bits in masks.units.items()
        }
        bits |= {f"weight/{name}": packed for name, packed in masks._single.packed.items()}
        text = canonical_json(header.model_dump(mode="json")).decode()
        first = tensors.header_of(
            {name: (np.dtype(np.uint8), (len(packed),)) for name, packed in bits.items()}, {"masks": text}
        )
        self._parts = [np.frombuffer(first, np.uint8), *(bits[name] for name in sorted(bits))]
        self.size = sum(map(len, self._parts))
        self.sha256 = ""
        """Of the chunks, once all were given."""
        self.digest = digest_bytes(b"")
        """The same."""

    def __iter__(self) -> Iterator[bytearray]:
        whole, digester = sha256(), Digester()
        for chunk in in_chunks(piece.data for part in self._parts for piece in pieces(part)):
            whole.update(chunk)
            digester.update(chunk)
            yield chunk
        self.sha256, self.digest = whole.hexdigest(), digester.finish()


def _both(a: Mapping[str, Bits], b: Mapping[str, Bits]) -> dict[str, Bits]:
    joined = dict(a)
    for name, active in b.items():
        joined[name] = joined[name] & active if name in joined else active
    return joined
