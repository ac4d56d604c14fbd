"""Where every tensor of a checkpoint lies: safetensors, single or sharded with an index. Headers only, no data.

A header is read by range and not by chunk, so it is not yet proven by a digest. Who reads the data under the same pin
and checks its chunks proves the header too; nothing is written to a run before that.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from posixpath import dirname, join
from typing import Any

from leyline.digest import verified_range
from leyline.ids import canonical_name
from leyline.messages import CheckpointMetadata, StoredObject
from leyline.model import Malformed
from leyline.store import Changed, Head, NotFound, ObjectStore
from leyline.tensors import ITEMSIZE, MAX_HEADER, Entry, header_length, parse_header
from leyline.topology import Topology

INDEX = ".index.json"
SAFETENSORS = ".safetensors"

_FIRST = 256 * 1024
"""Bytes of the first read: most headers fit."""


@dataclass(frozen=True, kw_only=True)
class TensorRef:
    """Where one tensor lies: bytes [offset, offset + nbytes) of `object`, in C order, little-endian."""

    dtype: str
    """In the format's words: F32, BF16, ..."""
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    """In elements."""
    object: str
    """Path in the checkpoint's folder, as in READY.json."""
    offset: int
    nbytes: int
    pin: str
    """The object's content when its header was read; read the data under the same."""

    @property
    def size(self) -> int:
        """Number of elements."""
        return self.nbytes // ITEMSIZE[self.dtype]


def read_index(store: ObjectStore, prefix: str, metadata: CheckpointMetadata) -> dict[str, TensorRef]:
    """Every tensor of the weights by canonical name, in the order of objects and offsets.

    `prefix` is the folder, "checkpoints/<name>/", or a candidate's with `metadata.objects` taken from its manifest.
    All objects that the metadata lists must stand there in their sizes. Malformed names the object and the rule.
    """
    heads = check_objects(store, prefix, metadata)
    index = [path for path in metadata.weights if path.endswith(INDEX)]
    shards = [path for path in metadata.weights if path not in index]
    sharded = metadata.format == "safetensors-sharded"
    if len(index) != sharded or (not sharded and len(shards) != 1):
        raise Malformed(
            f"checkpoint {metadata.name} of format {metadata.format} lists {len(index)} index and {len(shards)} weight "
            "objects; expected is one object, or one index with its shards. Publish it again"
        )
    headers = {path: read_header(store, prefix, path, heads[path]) for path in shards}
    if sharded:
        _check_index(_weight_map(store, prefix, metadata.object(index[0])), headers, index[0])
    return _by_canonical_name(headers, heads)


def read_slots(store: ObjectStore, prefix: str, metadata: CheckpointMetadata) -> dict[str, TensorRef]:
    """Every tensor of the optimizer object by `<canonical parameter name>/<slot>`; none if there is no such object."""
    if metadata.optimizer is None:
        return {}
    head = _head(store, prefix, metadata.object(metadata.optimizer), metadata.name)
    header = read_header(store, prefix, metadata.optimizer, head)
    return _by_canonical_name({metadata.optimizer: header}, {metadata.optimizer: head})


def read_header(store: ObjectStore, prefix: str, path: str, head: Head) -> dict[str, Entry]:
    """The tensors of one safetensors object by the names they have there."""
    key = prefix + path
    header = store.get_range(key, 0, min(_FIRST, head.size), pin=head.pin)
    length = header_length(header, head.size, name=key)
    if length > len(header):
        header += store.get_range(key, len(header), length, pin=head.pin)
    return parse_header(header, head.size, name=key)[0]


def check_objects(store: ObjectStore, prefix: str, metadata: CheckpointMetadata) -> dict[str, Head]:
    """The head of every object that the metadata lists, after its size was compared."""
    return {stored.path: _head(store, prefix, stored, metadata.name) for stored in metadata.objects}


def bind(index: Mapping[str, TensorRef], topology: Topology) -> dict[str, tuple[TensorRef, ...]]:
    """The tensors of each parameter: one, or more where tied names are stored as copies (the parameter's own first).

    Malformed if a parameter is stored under none of its names, or in another shape.
    """
    bound = {}
    for name, parameter in topology.parameters.items():
        found = tuple(index[known] for known in (name, *parameter.aliases) if known in index)
        if not found:
            raise Malformed(f"the weights hold no {name}, which the topology names; publish both from one model")
        for ref in found:
            if ref.shape != parameter.shape:
                raise Malformed(
                    f"{ref.object}: {name} has shape {list(ref.shape)}, the topology says {list(parameter.shape)}; "
                    "publish both from one model"
                )
        bound[name] = found
    return bound


def _head(store: ObjectStore, prefix: str, stored: StoredObject, checkpoint: str) -> Head:
    try:
        head = store.head(prefix + stored.path)
    except NotFound as error:
        raise Malformed(
            f"checkpoint {checkpoint}: {stored.path} does not exist, READY.json lists it; publish it again"
        ) from error
    if head.size != stored.digest.size:
        raise Changed(
            f"checkpoint {checkpoint}: {stored.path} is {head.size:,} bytes, READY.json says "
            f"{stored.digest.size:,}; publish it again"
        )
    return head


def _by_canonical_name(headers: Mapping[str, Mapping[str, Entry]], heads: Mapping[str, Head]) -> dict[str, TensorRef]:
    found: dict[str, TensorRef] = {}
    for path, header in headers.items():
        for name, entry in sorted(header.items(), key=lambda item: item[1].start):
            known = canonical_name(name)
            if known in found:
                raise Malformed(
                    f"{path}: tensor {name} is {known} once more, which {found[known].object} holds already"
                )
            found[known] = TensorRef(
                dtype=entry.dtype,
                shape=entry.shape,
                strides=_strides(entry.shape),
                object=path,
                offset=entry.start,
                nbytes=entry.stop - entry.start,
                pin=heads[path].pin,
            )
    return found


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides, step = [], 1
    for side in reversed(shape):
        strides.append(step)
        step *= side
    return tuple(reversed(strides))


def read_shards(store: ObjectStore, path: str) -> tuple[str, ...]:
    """The paths of the shards that an index names, of which no digest is known yet."""
    _check_index_size(path, store.head(path).size)
    return tuple(sorted(set(_weights_by_shard(store.get(path), path).values())))


def _weight_map(store: ObjectStore, prefix: str, stored: StoredObject) -> dict[str, str]:
    """Tensor name -> shard's path in the checkpoint's folder."""
    path, size = stored.path, stored.digest.size
    _check_index_size(path, size)
    return _weights_by_shard(verified_range(store, prefix + path, stored.digest, 0, size), path)


def _check_index_size(path: str, size: int) -> None:
    if size > MAX_HEADER:
        raise Malformed(f"{path} is {size:,} bytes long; more than {MAX_HEADER:,} is refused")


def _weights_by_shard(data: bytes, path: str) -> dict[str, str]:
    try:
        document = json.loads(data, object_pairs_hook=_unique)
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise Malformed(f"{path} is not JSON with unique keys ({error}); publish it again") from error
    weights: Any = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(weights, dict) or not all(isinstance(shard, str) for shard in weights.values()):
        raise Malformed(f"{path} has no weight_map from tensor names to shards; publish it again")
    return {name: join(dirname(path), shard) for name, shard in weights.items()}


def _check_index(weight_map: Mapping[str, str], headers: Mapping[str, Iterable[str]], path: str) -> None:
    """The index and the shards must say the same, so that no tensor is overlooked or read from the wrong shard."""
    held = {name: shard for shard, header in headers.items() for name in header}
    if twice := [name for shard, header in headers.items() for name in header if held[name] != shard]:
        raise Malformed(f"{path}: two shards hold tensor {twice[0]}; publish it again")
    for name, shard in weight_map.items():
        if shard not in headers:
            raise Malformed(f"{path} puts {name} into {shard}, which READY.json does not list; publish it again")
        if held.get(name) != shard:
            raise Malformed(f"{path} puts {name} into {shard}, which does not hold it; publish it again")
    if extra := [name for name in held if name not in weight_map]:
        raise Malformed(f"{held[extra[0]]} holds tensor {extra[0]}, which {path} does not list; publish it again")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key occurs twice")
    return found
