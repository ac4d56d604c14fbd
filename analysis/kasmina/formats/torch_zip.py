"""What torch.save wrote since 1.6: a zip archive with a pickle that says where each tensor lies in which stored file.

Names come from the nested dicts, joined by dots. Where a training's state is kept whole (Lightning's `state_dict`
beside `optimizer_states`), the weights are that dict; the rest is neither read nor changed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

from kasmina.formats.blocks import Bytes
from kasmina.formats.extents import Box, Record, TensorRef, reach
from kasmina.formats.pickles import MAX_PICKLE, Call, Global, Persistent, read_pickle
from kasmina.formats.zips import a_program, read_records
from leyline.model import Malformed

T = TypeVar("T")
Path = tuple[str, ...]

ROOTS = ("state_dict", "model_state_dict", "model")
"""Keys under which trainers keep the weights beside other things."""

_STATE = "state"
"""Where `Optimizer.state_dict()` keeps moments, by parameter; or, flattened, in the middle of a name."""
_OPTIMIZER = re.compile(r"optim(izer)?s?(_states?|_state_dicts?)?")
"""Keys under which trainers keep optimizers."""
_SLOT = re.compile(
    r"(max_)?exp_avg(_sq)?(_row|_col)?|exp_inf|exp_avg_diff|momentum(_buffer)?|(square|grad)_avg|acc_delta|sum|prev|"
    r"step(_size)?|eta|mu|ax|(row|col)_var|variance|state[12]|(qmap|absmax|max)[12]|master_param|fp32_param"
)
"""What optimizers keep for a parameter: torch's own, and bitsandbytes'."""
_MAX_NODES = 200_000
"""Values that are looked at: a pickle can name one value many times, each time inside itself."""
_MAX_DEPTH = 64
_MAX_SIDES = 64
_MAX_NAME = 1024
"""Characters of a tensor's name. Each key of a nested dict is in all the names beneath it."""
_MAX_COMPARED = 200_000
"""Pairs of tensors whose bytes interleave, as the columns of one matrix do."""

DTYPES = {
    "float32": ("F32", 4), "float64": ("F64", 8), "float16": ("F16", 2), "bfloat16": ("BF16", 2),
    "float8_e4m3fn": ("F8_E4M3", 1), "float8_e5m2": ("F8_E5M2", 1), "float8_e8m0fnu": ("F8_E8M0", 1),
    "float8_e4m3fnuz": ("F8_E4M3FNUZ", 1), "float8_e5m2fnuz": ("F8_E5M2FNUZ", 1), "bool": ("BOOL", 1),
    "float4_e2m1fn_x2": ("F4", 1),
    "uint8": ("U8", 1), "int8": ("I8", 1), "uint16": ("U16", 2), "int16": ("I16", 2), "uint32": ("U32", 4),
    "int32": ("I32", 4), "uint64": ("U64", 8), "int64": ("I64", 8), "complex64": ("C64", 8), "complex128": ("C128", 16),
}  # fmt: skip
"""torch's name -> safetensors' name and bytes an element."""
_STORAGES = {
    "FloatStorage": "float32", "DoubleStorage": "float64", "HalfStorage": "float16", "BFloat16Storage": "bfloat16",
    "LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16", "CharStorage": "int8",
    "ByteStorage": "uint8", "BoolStorage": "bool", "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
}  # fmt: skip
ALLOWED = frozenset(
    {
        "collections.OrderedDict", "collections.Counter", "_codecs.encode", "torch.Size", "torch.device",
        "torch.Tensor",
        "torch.nn.parameter.Parameter", "torch.storage.UntypedStorage", "torch.serialization._get_layout",
        *(f"torch._utils._rebuild_{what}" for what in ("tensor", "tensor_v2", "tensor_v3", "parameter",
                                                       "parameter_with_state")),
        "torch._tensor._rebuild_from_type_v2",
        *(f"torch.{name}" for name in (*DTYPES, *_STORAGES)),
    }
)  # fmt: skip


class View(NamedTuple):
    """A tensor as the pickle describes it: strided over one storage."""

    dtype: str
    itemsize: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    storage: str
    offset: int
    """Of its first element in the storage, in elements."""
    storage_bytes: int


def read_torch(source: Bytes, begin: int, end: int, path: str, pin: str, *, name: str) -> dict[str, TensorRef]:
    """The weights in the archive at bytes [begin, end) of the object `path`, by the names they have there."""
    tree, records = read_archive(source, begin, end, name=name)
    found = dict(tensors_of(tree, name=name))
    boxes = {key: box_of(view, records, path, pin, name) for key, view in found.items()}
    shared = _shared(boxes)
    refs = {
        key: TensorRef(dtype=found[key].dtype, shape=box.shape, boxes=(box,), shared=".".join(shared.get(key, ())))
        for key, box in boxes.items()
    }
    return weights_of(refs, name=name)


def read_box(
    source: Bytes, begin: int, end: int, path: str, pin: str, origin: tuple[int, ...], *, name: str
) -> tuple[str, Box]:
    """The dtype and place of the one tensor in the archive, the rectangle at `origin` of another."""
    tree, records = read_archive(source, begin, end, name=name)
    view = _view(tree, name) if isinstance(tree, Call) else None
    if view is None or len(view.shape) != len(origin):
        raise Malformed(f"{name} holds something else than the tensor it is said to hold; save it again")
    return view.dtype, replace(box_of(view, records, path, pin, name), origin=origin)


def read_archive(source: Bytes, begin: int, end: int, *, name: str) -> tuple[Any, dict[str, Record]]:
    """What was saved, with View in place of tensors yet to be made, and the stored files by their storage's key."""
    records = read_records(source, begin, end, name=name)
    pickles = [path for path in records if path.endswith("/data.pkl")]
    if any(path.endswith("/constants.pkl") for path in records):
        raise a_program(name)
    if len(pickles) != 1:
        raise Malformed(f"{name} is nothing that torch.save wrote: it holds {len(pickles)} data.pkl, not one")
    root = pickles[0].removesuffix("data.pkl")
    order = records.get(root + "byteorder")
    if order is not None and source.read(order.start, min(order.stop, order.start + 8)) != b"little":
        raise Malformed(f"{name} was written on a big-endian machine; load and save it on a little-endian one")
    pickle = records[pickles[0]]
    if pickle.stop - pickle.start > MAX_PICKLE:
        raise Malformed(
            f"{name}: data.pkl is {pickle.stop - pickle.start:,} bytes long, more than {MAX_PICKLE:,} is refused; save "
            "tensors and plain values only: torch.save(model.state_dict(), path)"
        )
    tree, _ = read_pickle(source.read(pickle.start, pickle.stop), ALLOWED, name=name)
    data = root + "data/"
    return tree, {path.removeprefix(data): record for path, record in records.items() if path.startswith(data)}


def tensors_of(tree: Any, *, name: str) -> Iterable[tuple[Path, View]]:
    """Every tensor of nested dicts and lists, by the keys that lead to it."""
    waiting: list[tuple[Path, Any]] = [((), tree)]
    for _ in range(_MAX_NODES):
        if not waiting:
            return
        path, value = waiting.pop()
        if len(path) > _MAX_DEPTH:
            raise Malformed(f"{name}: values are nested more than {_MAX_DEPTH} deep; save model.state_dict()")
        if isinstance(value, dict):
            waiting.extend(((*path, str(key)), item) for key, item in reversed(value.items()))
        elif isinstance(value, list) or type(value) is tuple:
            waiting.extend(((*path, str(at)), item) for at, item in reversed(list(enumerate(value))))
        elif isinstance(value, Call) and (view := _view(value, name)):
            yield path, view
    raise Malformed(f"{name} holds more than {_MAX_NODES:,} values; save model.state_dict() alone")


def weights_of(found: Mapping[Path, T], *, name: str) -> dict[str, T]:
    """The weights among what lies at these paths, by name: what is under one of ROOTS, if anything is.

    What an optimizer keeps (`state`, then the parameter, then the moment) is none, under whatever key it lies.
    """
    if long := next((path for path in found if sum(map(len, path)) > _MAX_NAME), None):
        raise Malformed(
            f"{name}: a name that begins with {long[0][:40]!r} is longer than {_MAX_NAME:,} characters; rename that "
            "tensor"
        )
    found = {path: one for path, one in found.items() if not path or not _of_optimizer(path, name)}
    apps = {path[0] for path in found if path}
    if len(apps) == 1 and any(len(path) > 2 and path[1] in ROOTS for path in found):
        found = {path[1:]: one for path, one in found.items()}
    roots = [root for root in ROOTS if any(len(path) > 1 and path[0] == root for path in found)]
    named: dict[str, T] = {}
    for path, one in found.items():
        if roots and path[0] != roots[0]:
            continue
        key = ".".join(path[1:] if roots else path)
        if len(key) > _MAX_NAME:
            raise Malformed(
                f"{name}: the name {key[:40]!r}... is longer than {_MAX_NAME:,} characters; rename that tensor"
            )
        if key in named:
            raise Malformed(f"{name} holds two tensors that are called {key}; rename one of them")
        named[key] = one
    return named


def _of_optimizer(path: Path, name: str) -> bool:
    """Whether an optimizer keeps this tensor. Malformed where it lies as a moment does, and is none that is known."""
    parts = path[-1].split(".")
    if any(map(_OPTIMIZER.fullmatch, path[:-1])) or (len(parts) > 1 and _OPTIMIZER.fullmatch(parts[0])):
        return True
    parts = [*path[:-1], *parts]
    if _STATE in parts[:-2] and _SLOT.fullmatch(parts[-1]):
        return True
    if _STATE not in path[:-2]:
        return False
    if path[-2].isdecimal():  # an optimizer numbers its parameters
        return True
    raise Malformed(
        f"{name}: {'.'.join(path)[:80]} lies where optimizers keep moments, and is none that is known; save the "
        "weights alone: torch.save(model.state_dict(), path)"
    )


def _view(call: Call, name: str) -> View | None:
    """The tensor that this call would have made; None if it would have made something else."""
    what, args = call.function.name, call.args
    for _ in range(4):  # a Parameter wraps a tensor, a subclass wraps either
        if what in ("_rebuild_parameter", "_rebuild_parameter_with_state"):
            inner = args[0] if args else None
            if not isinstance(inner, Call):
                raise _broken(name)
            what, args = inner.function.name, inner.args
        elif what == "_rebuild_from_type_v2":
            if len(args) < 3 or not isinstance(args[0], Global) or type(args[2]) is not tuple:
                raise _broken(name)
            what, args = args[0].name, args[2]
    if what not in ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_tensor_v3"):
        return None
    if len(args) < (7 if what.endswith("v3") else 4):
        raise _broken(name)
    if what != "_rebuild_tensor" and args[7 if what.endswith("v3") else 6 :] not in ((), (None,), ({},)):
        # Tensor.imag of a conjugate, for one: its numbers have the other sign than the bytes
        raise Malformed(
            f"{name}: a tensor says that its bytes are to be negated or conjugated; save "
            "tensor.resolve_conj().resolve_neg()"
        )
    storage, offset, shape, strides = args[0], args[1], _sides(args[2]), _sides(args[3])
    dtype = args[6] if what.endswith("v3") else None
    known = storage.id if isinstance(storage, Persistent) else None
    if type(known) is tuple and len(known) == 6 and known[5] is None:  # what was written before 1.6 says it is no view
        known = known[:5]
    if (
        type(known) is not tuple or len(known) != 5 or known[0] != "storage" or not isinstance(known[1], Global)
        or not isinstance(known[2], str) or not _natural(known[4]) or not _natural(offset)
        or shape is None or strides is None or len(shape) != len(strides) or not isinstance(dtype, Global | None)
    ):  # fmt: skip
        raise _broken(name)
    kind = _STORAGES.get(known[1].name, "uint8")
    word, itemsize = DTYPES.get(dtype.name if dtype else kind, ("", 0))
    if not word:
        raise _broken(name)
    return View(word, itemsize, shape, strides, known[2], offset, known[4] * DTYPES[kind][1])


def _broken(name: str) -> Malformed:
    return Malformed(f"{name}: the pickle describes a tensor in a way that torch.save does not; save it again")


def _natural(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**62


def _sides(value: Any) -> tuple[int, ...] | None:
    if isinstance(value, Call) and str(value.function) == "torch.Size" and len(value.args) == 1:
        value = value.args[0]
    if type(value) is not tuple or len(value) > _MAX_SIDES or not all(_natural(side) for side in value):
        return None
    return value


def box_of(view: View, records: Mapping[str, Record], path: str, pin: str, name: str) -> Box:
    """Where the tensor lies in the object `path`. Malformed if its storage is missing or too short."""
    record = records.get(view.storage)
    if record is None or record.stop - record.start != view.storage_bytes:
        found = "no" if record is None else f"{record.stop - record.start:,}"
        raise Malformed(
            f"{name}: storage {view.storage[:32]!r} has {found} bytes, a tensor says {view.storage_bytes:,}; save "
            "it again"
        )
    offset = 0 if 0 in view.shape else view.offset  # an empty view may begin behind its storage
    end = (offset + reach(view.shape, view.strides)) * view.itemsize
    if end > view.storage_bytes:
        raise Malformed(
            f"{name}: a tensor of shape {list(view.shape)} ends at byte {end:,} of storage {view.storage!r}, which has "
            f"{view.storage_bytes:,}; save it again"
        )
    return Box(
        object=path,
        pin=pin,
        offset=record.start + offset * view.itemsize,
        itemsize=view.itemsize,
        origin=(0,) * len(view.shape),
        shape=view.shape,
        strides=view.strides,
        record=record,
    )


def _shared(boxes: Mapping[Path, Box]) -> dict[Path, Path]:
    """Who overlaps whom without lying exactly there too: writing to one would change part of the other."""
    places: dict[Box, list[Path]] = {}
    for path, box in boxes.items():
        places.setdefault(box, []).append(path)
    found = {path: path for box, paths in places.items() if not box.regular for path in paths}
    live: list[Box] = []
    compared = 0
    for box in sorted((box for box in places if box.size), key=lambda box: box.offset):
        live = [other for other in live if other.stop > box.offset]
        compared += len(live)
        if compared > _MAX_COMPARED:
            raise Malformed(f"{box.object}: too many tensors lie within each other's bytes; save clones of them")
        for other in live:
            if _overlap(other, box):
                found |= dict.fromkeys(places[box], places[other][0]) | dict.fromkeys(places[other], places[box][0])
        live.append(box)
    return found


def _overlap(first: Box, second: Box) -> bool:
    """Whether they share a byte; True as well where they lie on different grids and might."""
    one, other = first.axes, second.axes
    if not first.regular or not second.regular or first.itemsize != second.itemsize:
        return True
    if [stride for _, stride in one] != [stride for _, stride in other]:
        return True
    rest, remainder = divmod(second.offset - first.offset, first.itemsize)
    if remainder:
        return True
    apart, period = False, 0
    for (side, stride), (width, _) in zip(one, other, strict=True):
        at, rest = divmod(rest, stride)
        if period and max(side, at + width) * stride > period:
            return True  # it reaches into the next row
        apart, period = apart or at >= side, stride
    return not apart
