"""Groups that patterns declare: attention heads, transformer MLPs, residual branches. Never guessed: else declined."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, Literal

from torch import nn

from kasmina.patterns import MLPS, HeadPattern, LayerPattern, MlpPattern
from leyline.topology import Declined, Group, Kind, Member

_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "nhead")
_KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads")


class _Refused(Exception):
    """This structure is declined; the message is the reason."""


class Declaration:
    """Reads declared groups off a model's names, shapes and configuration."""

    def __init__(self, model: nn.Module, tied: Collection[str]) -> None:
        self.model = model
        self.tied = tied
        self.modules = dict(model.named_modules())
        self.shapes = {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}
        self.groups: list[Group] = []
        self.declined: list[Declined] = []
        self.taken: set[tuple[str, int]] = set()
        """Parameters and axes that a declared group owns, or that were declined with it."""

    def heads(self, patterns: Sequence[HeadPattern], *, attention_modules: bool) -> None:
        """Head groups of every match, and of every nn.MultiheadAttention if asked for."""
        for pattern in patterns:
            inputs = [name for name in (pattern.fused, pattern.query, pattern.key, pattern.value) if name]
            for prefix in self._prefixes(pattern.out, inputs):
                members = [
                    *((f"{prefix}{name}.weight", int(pattern.transposed)) for name in inputs),
                    (f"{prefix}{pattern.out}.weight", int(not pattern.transposed)),
                ]
                if self.taken.isdisjoint(members):
                    name = prefix + inputs[0]
                    self._keep(name, Kind.HEAD, members, lambda p=pattern, at=prefix: self._head(p, at))
        for name, module in self.modules.items():
            if attention_modules and isinstance(module, nn.MultiheadAttention):
                weights = [n for n in self.shapes if n.startswith(f"{name}.") and n.endswith("proj_weight")]
                members = [*((weight, 0) for weight in weights), (f"{name}.out_proj.weight", 1)]
                self._keep(name, Kind.HEAD, members, lambda n=name, m=module: self._attention(n, m))

    def mlps(self, patterns: Sequence[MlpPattern] = MLPS) -> None:
        """Channel groups of transformer MLPs."""
        for pattern in patterns:
            for prefix in self._prefixes(pattern.down, pattern.up):
                members = [
                    *((f"{prefix}{name}.weight", int(pattern.transposed)) for name in pattern.up),
                    (f"{prefix}{pattern.down}.weight", int(not pattern.transposed)),
                ]
                name = prefix + pattern.up[0]
                self._keep(name, Kind.CHANNEL, members, lambda p=pattern, at=prefix: self._mlp(p, at))

    def layers(self, patterns: Sequence[LayerPattern]) -> None:
        """Layer groups: one unit each, the closing weight and bias of a residual branch."""
        for pattern in patterns:
            for prefix in self._prefixes(pattern.closing, [pattern.norm] if pattern.norm else []):
                branch = [n for n in self.shapes if any(n.startswith(f"{prefix}{part}.") for part in pattern.branch)]
                first = any(n.startswith(f"{prefix}{pattern.branch[0]}.") for n in branch)
                block = (prefix + pattern.block).rstrip(".")
                if first and block and not any(prefix + name in self.modules for name in pattern.absent):
                    name = f"layer:{prefix}{pattern.closing}"
                    self._keep(name, Kind.LAYER, (), lambda p=pattern, at=prefix, b=branch: self._layer(p, at, b))

    def _prefixes(self, anchor: str, others: Sequence[str]) -> Iterator[str]:
        for name in self.modules:
            if name == anchor or name.endswith(f".{anchor}"):
                prefix = name.removesuffix(anchor)
                if all(f"{prefix}{other}.weight" in self.shapes for other in (anchor, *others)):
                    yield prefix

    def _keep(self, name: str, kind: Kind, taken: Collection[tuple[str, int]], read: Any) -> None:
        self.taken.update(taken)
        try:
            group: Group = read()
            if shared := [member.parameter for member in group.members if member.parameter in self.tied]:
                raise _Refused(f"{shared[0]} is tied to another parameter")
        except _Refused as refused:
            self.declined.append(Declined(name=name, kind=kind, reason=str(refused)))
        else:
            self.groups.append(group)

    def _linear(
        self, module: str, side: Literal["rows", "columns"], *, transposed: bool, block: int, start: int = 0
    ) -> list[Member]:
        """A linear layer's rows (with the bias) as producer, or its columns as consumer."""
        weight, bias = f"{module}.weight", f"{module}.bias"
        if side == "columns":
            return [Member(parameter=weight, role="consumer", axis=int(not transposed), start=start, block=block)]
        members = [Member(parameter=weight, role="producer", axis=int(transposed), start=start, block=block)]
        if bias in self.shapes:
            members.append(Member(parameter=bias, role="producer", axis=0, start=start, block=block))
        return members

    def _width(self, module: str, axis: int) -> int:
        shape = self.shapes[f"{module}.weight"]
        if len(shape) != 2:
            raise _Refused(f"{module}.weight has {len(shape)} axes, a linear layer's has 2")
        return shape[axis]

    def _head(self, pattern: HeadPattern, prefix: str) -> Group:
        row, column = int(pattern.transposed), int(not pattern.transposed)
        names = [prefix + (pattern.fused or name) for name in (pattern.query, pattern.key, pattern.value)]
        out = prefix + pattern.out
        heads, kv_heads = self._counts(pattern, [*names, out])
        width = self._width(out, column)
        if not pattern.fused:
            sizes = [self._width(name, row) for name in names]
        elif pattern.interleaved:
            return self._interleaved(pattern, names[0], out, heads, kv_heads)
        else:
            total = self._width(names[0], row)
            sizes = [width, (total - width) // 2, (total - width) // 2]
            if sum(sizes) != total or sizes[1] < 1:
                raise _Refused(f"{names[0]} has {total} outputs, which are not q, k and v for {width} inputs of {out}")
        if kv_heads is None and sizes[0] != sizes[1]:
            raise _Refused(
                f"{names[1]} has {sizes[1]} outputs for {sizes[0]} of queries; the number of key heads is unknown"
            )
        kv_heads = kv_heads or heads
        _divide(heads, kv_heads, [(sizes[0], heads), (sizes[1], kv_heads), (sizes[2], kv_heads), (width, heads)])
        starts = [0, sizes[0], sizes[0] + sizes[1]] if pattern.fused else [0, 0, 0]
        members = [
            member
            for name, start, size in zip(names, starts, sizes, strict=True)
            for member in self._linear(name, "rows", transposed=pattern.transposed, start=start, block=size // kv_heads)
        ]
        members += self._linear(out, "columns", transposed=pattern.transposed, block=width // kv_heads)
        return _heads(names[0], members, out, kv_heads, heads // kv_heads)

    def _interleaved(self, pattern: HeadPattern, fused: str, out: str, heads: int, kv_heads: int | None) -> Group:
        total, width = self._width(fused, int(pattern.transposed)), self._width(out, int(not pattern.transposed))
        if kv_heads not in (None, heads) or total != 3 * width:
            raise _Refused(f"{fused} is interleaved, but not as one q, k and v of equal size for each head")
        _divide(heads, heads, [(width, heads)])
        members = self._linear(fused, "rows", transposed=pattern.transposed, block=total // heads)
        members += self._linear(out, "columns", transposed=pattern.transposed, block=width // heads)
        return _heads(fused, members, out, heads, 1)

    def _counts(self, pattern: HeadPattern, names: Sequence[str]) -> tuple[int, int | None]:
        """Query and key heads: the pattern's, else of the nearest module around the projections that tells them."""
        heads, kv_heads = pattern.heads, pattern.kv_heads
        owners = list(dict.fromkeys(parent for name in names for parent in _parents(name)))
        for owner in sorted(owners, key=lambda name: -len(name)):
            for source in (self.modules[owner], getattr(self.modules[owner], "config", None)):
                heads = heads if heads is not None else _number(source, _HEADS)
                kv_heads = kv_heads if kv_heads is not None else _number(source, _KV_HEADS)
        if heads is None:
            raise _Refused(
                f"the number of heads is in no attribute ({', '.join(_HEADS)}) of the modules around {names[0]} nor of "
                "their config; give it as HeadPattern(heads=...)"
            )
        return heads, kv_heads

    def _attention(self, name: str, module: nn.MultiheadAttention) -> Group:
        width, heads = module.embed_dim, module.num_heads
        if module.bias_k is not None:
            raise _Refused(f"{name} appends a key and value of its own (add_bias_kv)")
        _divide(heads, heads, [(width, heads)])
        block = width // heads
        members = []
        for at, letter in enumerate("qkv"):
            fused = module.in_proj_weight is not None
            weight = f"{name}.in_proj_weight" if fused else f"{name}.{letter}_proj_weight"
            start = at * width
            members.append(Member(parameter=weight, role="producer", axis=0, start=start if fused else 0, block=block))
            if module.in_proj_bias is not None:
                bias = f"{name}.in_proj_bias"
                members.append(Member(parameter=bias, role="producer", axis=0, start=start, block=block))
        out = f"{name}.out_proj"
        members += self._linear(out, "columns", transposed=False, block=block)
        return _heads(name, members, out, heads, 1)

    def _mlp(self, pattern: MlpPattern, prefix: str) -> Group:
        row, column = int(pattern.transposed), int(not pattern.transposed)
        down = prefix + pattern.down
        units = self._width(down, column)
        parts = 2 if pattern.fused else 1
        members: list[Member] = []
        for up in pattern.up:
            if self._width(prefix + up, row) != parts * units:
                raise _Refused(f"{prefix}{up} does not have {parts * units} outputs for the {units} inputs of {down}")
            for part in range(parts):
                members += self._linear(prefix + up, "rows", transposed=pattern.transposed, start=part * units, block=1)
        if units < 2:
            raise _Refused("it has a single unit")
        members += self._linear(down, "columns", transposed=pattern.transposed, block=1)
        name = prefix + pattern.up[0]
        return Group(id=name, kind=Kind.CHANNEL, units=units, members=tuple(members), gates=(name,))

    def _layer(self, pattern: LayerPattern, prefix: str, branch: Sequence[str]) -> Group:
        for part in pattern.projection:
            if any(name.startswith(f"{prefix}{part}.") for name in self.shapes):
                raise _Refused(f"its shortcut {prefix}{part} is a projection, so the block's width or size changes")
        closing, axis = prefix + pattern.closing, int(pattern.transposed)
        weight = f"{closing}.weight"
        members = [Member(parameter=weight, role="producer", axis=axis, block=self.shapes[weight][axis])]
        names: list[tuple[str, Literal["producer", "norm"]]] = [(f"{closing}.bias", "producer")]
        if pattern.norm:
            names += [(f"{prefix}{pattern.norm}.weight", "norm"), (f"{prefix}{pattern.norm}.bias", "norm")]
        for name, role in names:
            if name in self.shapes:
                members.append(Member(parameter=name, role=role, axis=0, block=self.shapes[name][0]))
        own = {member.parameter for member in members}
        return Group(
            id=f"layer:{closing}",
            kind=Kind.LAYER,
            units=1,
            members=tuple(members),
            gates=((prefix + pattern.block).rstrip("."),),
            upstream=tuple(name for name in branch if name not in own),
        )


def _heads(name: str, members: Sequence[Member], out: str, units: int, per_unit: int) -> Group:
    return Group(id=name, kind=Kind.HEAD, units=units, members=tuple(members), gates=(out,), heads_per_unit=per_unit)


def _divide(heads: int, kv_heads: int, sizes: Sequence[tuple[int, int]]) -> None:
    if kv_heads == 1:
        what = "it has a single head" if heads == 1 else "all its query heads share one key and value head (MQA)"
        raise _Refused(f"{what}, so there is no unit to remove")
    for size, count in ((heads, kv_heads), *sizes):
        if size % count:
            raise _Refused(f"{size} does not divide into {count} heads")


def _parents(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:length]) for length in range(len(parts) - 1, -1, -1)]


def _number(source: object, names: Sequence[str]) -> int | None:
    values = source if isinstance(source, Mapping) else {}
    for name in names:
        value = values.get(name, getattr(source, name, None))
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return None
