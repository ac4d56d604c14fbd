"""A folder that torch.distributed.checkpoint wrote: `.metadata`, and objects that hold one torch.save archive a piece.

`.metadata` says which rectangle of which tensor is where; the archive there says where its elements lie.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import pairwise
from posixpath import dirname, join
from typing import Any, NamedTuple

from kasmina.formats.blocks import Bytes
from kasmina.formats.extents import Box, TensorRef
from kasmina.formats.pickles import MEMBER, Call, Global, read_pickle
from kasmina.formats.torch_zip import DTYPES, read_box, weights_of
from leyline.model import Malformed

METADATA = ".metadata"

_MODULE = "torch.distributed.checkpoint.metadata"
ALLOWED = frozenset(
    {
        *(f"{_MODULE}.{name}" for name in (
            "Metadata", "TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata", "BytesStorageMetadata",
            "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING",
        )),
        "torch.distributed.checkpoint.filesystem._StorageInfo", "torch.serialization._get_layout", "torch.Size",
        "collections.OrderedDict", "pathlib.PosixPath", "pathlib._local.PosixPath",
        *(f"torch.{name}" for name in DTYPES),
        MEMBER,
    }
)  # fmt: skip
_HEAD = 4096
"""Bytes at either end of a piece that usually hold all but its data."""
_BATCH = 256
_LONGEST_PATH = 1024
"""Characters of an object's path, and of a key."""
_LONGEST_KEYS = 64
"""Keys that lead to one tensor."""


class Piece(NamedTuple):
    """A rectangle of a tensor: an archive at bytes [start, stop) of an object."""

    tensor: str
    origin: tuple[int, ...]
    shape: tuple[int, ...]
    object: str
    start: int
    stop: int


class _Tensor(NamedTuple):
    dtype: str
    shape: tuple[int, ...]
    pieces: list[Piece]


def objects_of(metadata: bytes, path: str) -> list[str]:
    """The objects that `.metadata` at `path` names, as paths in the checkpoint's folder.

    Those without a weight too, such as a rank's that holds moments alone: the format's own loader asks for all.
    """
    document = _document(metadata, path)
    _tensors(document, path)  # what cannot be read is refused before anything is looked for
    infos = (_state(info, "_StorageInfo", path) for info in document["storage_data"].values())
    return sorted({_object(info, path) for info in infos})


def read_dcp(metadata: bytes, path: str, sources: Mapping[str, tuple[Bytes, str]]) -> dict[str, TensorRef]:
    """The weights by the names they have there. `sources`: the listed objects and their pins, by path."""
    document = _document(metadata, path)
    tensors = _tensors(document, path)
    _check_whole(document, path, sources)
    by_object: dict[str, list[Piece]] = {}
    for name, one in tensors.items():
        for piece in one.pieces:
            if piece.object not in sources:
                raise Malformed(
                    f"{path} puts {piece.tensor} into {piece.object!r}, which is no object of this checkpoint; save "
                    "all of it again"
                )
            by_object.setdefault(piece.object, []).append(piece._replace(tensor=name))
    boxes: dict[str, list[Box]] = {name: [] for name in tensors}
    for object_, pieces in by_object.items():
        source, pin = sources[object_]
        for piece, box in _boxes(source, sorted(pieces, key=lambda piece: piece.start), tensors, pin):
            boxes[piece.tensor].append(box)
    refs = {}
    for name, one in tensors.items():
        ordered = tuple(sorted(boxes[name], key=lambda box: box.origin))
        irregular = name if not all(box.regular for box in ordered) else ""
        refs[name] = TensorRef(dtype=one.dtype, shape=one.shape, boxes=ordered, shared=irregular)
    return refs


def _check_whole(document: Mapping[str, Any], path: str, sources: Mapping[str, tuple[Bytes, str]]) -> None:
    """Of moments and plain values too, which are read by nobody here: the format's own loader wants them all."""
    for info in (_state(info, "_StorageInfo", path) for info in document["storage_data"].values()):
        object_, start, stop = _place(info, path, "something")
        if object_ in sources and stop > (size := sources[object_][0].size):
            raise Malformed(
                f"{sources[object_][0].key} ends at byte {size:,}, and {path} has a piece there at bytes {start:,} to "
                f"{stop:,}; it is truncated, copy it again"
            )


def _boxes(source: Bytes, pieces: list[Piece], tensors: Mapping[str, _Tensor], pin: str) -> Iterable[tuple[Piece, Box]]:
    for one, two in pairwise(pieces):
        if two.start < one.stop:
            raise Malformed(f"{source.key}: the pieces of {one.tensor} and {two.tensor} overlap; save it again")
    for number, piece in enumerate(pieces):
        if number % _BATCH == 0:
            batch = pieces[number : number + _BATCH]
            source.fetch(
                span for each in batch for span in ((each.start, each.start + _HEAD), (each.stop - _HEAD, each.stop))
            )
        name = f"{source.key}, the piece of {piece.tensor} at byte {piece.start:,}"
        dtype, box = read_box(source, piece.start, piece.stop, piece.object, pin, piece.origin, name=name)
        if box.shape != piece.shape or dtype != tensors[piece.tensor].dtype:
            raise Malformed(
                f"{name} is {dtype} {list(box.shape)}, {METADATA} says {tensors[piece.tensor].dtype} "
                f"{list(piece.shape)}; save it again"
            )
        yield piece, box


def _document(data: bytes, path: str) -> dict[str, Any]:
    tree, _ = read_pickle(data, ALLOWED, name=path)
    return _state(tree, "Metadata", path)


def _tensors(document: Mapping[str, Any], path: str) -> dict[str, _Tensor]:
    """The weights that `.metadata` describes, by name."""
    described, stored = document.get("state_dict_metadata"), document.get("storage_data")
    if not isinstance(described, dict) or not isinstance(stored, dict):
        raise _broken(path, "no tensors or no places of them")
    places = {}
    for index, info in stored.items():
        key = _state(index, "MetadataIndex", path)
        if not isinstance(name := key.get("fqn"), str):
            raise _broken(path, "a place of something without a name")
        places[name, _sides(key.get("offset"), path)] = _state(info, "_StorageInfo", path)
    found = {}
    for name, one in described.items():
        if not isinstance(name, str) or not isinstance(one, Call):
            raise _broken(path, f"an entry {name[:40]!r}" if isinstance(name, str) else "an entry without a name")
        if one.function.name != "BytesStorageMetadata":
            found[name] = _tensor(name, _state(one, "TensorStorageMetadata", path), places, path)
    plan = document.get("planner_data")
    at = {name: plan.get(name, name) if isinstance(plan, dict) else name for name in found}
    keys = {_key(where, name, path): one for (name, where), one in zip(at.items(), found.values(), strict=True)}
    return weights_of(keys, name=path)


def _key(where: Any, name: str, path: str) -> tuple[str, ...]:
    """The keys that lead to a tensor, as the planner of the checkpoint wrote them down for its name."""
    if not isinstance(where, tuple) or not where:
        return (name,)
    keys = [str(part) if isinstance(part, int) else part for part in where[: _LONGEST_KEYS + 1]]
    if len(keys) > _LONGEST_KEYS or not all(isinstance(key, str) and len(key) <= _LONGEST_PATH for key in keys):
        raise _broken(path, f"keys of {name[:40]!r} that are none")
    return tuple(keys)


def _tensor(name: str, state: dict[str, Any], places: Mapping[Any, dict[str, Any]], path: str) -> _Tensor:
    properties, chunks = state.get("properties"), state.get("chunks")
    if not isinstance(properties, Call) or not isinstance(properties.state, tuple) or not isinstance(chunks, list):
        raise _broken(path, f"{name} without a dtype or pieces")
    dtype = properties.state[0] if properties.state else None
    if not isinstance(dtype, Global) or dtype.name not in DTYPES:
        raise _broken(path, f"{name} of dtype {dtype.name if isinstance(dtype, Global) else 'unknown'}")
    shape = _sides(state.get("size"), path) or ()
    if len(chunks) > len(places):  # one piece can be named as often as one likes
        raise _broken(path, f"more pieces of {name} than it has places")
    pieces = []
    for chunk in chunks:
        rectangle = _state(chunk, "ChunkStorageMetadata", path)
        origin, sides = _sides(rectangle.get("offsets"), path) or (), _sides(rectangle.get("sizes"), path) or ()
        info = places.get((name, origin))
        if info is None:
            raise _broken(path, f"no place for the piece of {name} at {list(origin)}")
        object_, start, stop = _place(info, path, f"the piece of {name} at {list(origin)}")
        if info.get("transform_descriptors"):
            raise Malformed(f"{path}: {name} is stored transformed (compressed); save it without extensions")
        pieces.append(Piece(name, origin, sides, object_, start, stop))
    _must_tile(shape, pieces, path, name)
    return _Tensor(DTYPES[dtype.name][0], shape, pieces)


def _place(info: Mapping[str, Any], path: str, what: str) -> tuple[str, int, int]:
    """The object, and the bytes [start, stop) of it."""
    start, length = info.get("offset"), info.get("length")
    if type(start) is not int or type(length) is not int or min(start, length) < 0:
        raise _broken(path, f"no place for {what}")
    return _object(info, path), start, start + length


def _object(info: Mapping[str, Any], path: str) -> str:
    if not isinstance(where := info.get("relative_path"), str) or len(where) > _LONGEST_PATH:
        raise _broken(path, "a piece that lies nowhere")
    return join(dirname(path), where)


def _must_tile(shape: tuple[int, ...], pieces: list[Piece], path: str, name: str) -> None:
    """The pieces are the cells of a grid over the tensor, as every sharding over a mesh of devices makes them."""
    count = 1
    whole = all(len(piece.origin) == len(piece.shape) == len(shape) for piece in pieces)
    for axis, side in enumerate(shape if whole else ()):
        cuts = sorted({(piece.origin[axis], piece.origin[axis] + piece.shape[axis]) for piece in pieces})
        ends = [0, *(stop for _, stop in cuts)]
        whole = whole and ends[:-1] == [start for start, _ in cuts] and ends[-1] == side
        count *= len(cuts)
    if not whole or not pieces or len(pieces) != count or len({piece.origin for piece in pieces}) != count:
        raise Malformed(f"{path}: the pieces of {name} do not tile its shape {list(shape)}; save it again")


def _state(value: Any, kind: str, path: str) -> dict[str, Any]:
    """The attributes that unpickling would have given to an instance of this class."""
    if not isinstance(value, Call) or value.function.name != kind or not isinstance(value.state, dict):
        raise _broken(path, f"a value where {kind} belongs")
    return value.state


def _sides(value: Any, path: str) -> tuple[int, ...] | None:
    if value is None:
        return None
    sides = value.args[0] if isinstance(value, Call) and len(value.args) == 1 else value
    if type(sides) is not tuple or len(sides) > 64 or not all(type(n) is int and 0 <= n < 2**62 for n in sides):
        raise _broken(path, "a shape that is none")
    return sides


def _broken(path: str, what: str) -> Malformed:
    return Malformed(f"{path} is no metadata of torch.distributed.checkpoint: it has {what}; save the checkpoint again")
