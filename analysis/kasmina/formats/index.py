"""Where every tensor of a checkpoint lies, in any format. Headers only, no data.

A header is read by range and not by chunk, so it is not yet proven by a digest. Who reads the data under the same pin
and checks its chunks proves the header too; nothing is written to a run before that.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from posixpath import dirname, join
from typing import Any

from kasmina.formats.blocks import Bytes
from kasmina.formats.dcp import METADATA, read_dcp
from kasmina.formats.elements import zero_is_zero_byte
from kasmina.formats.extents import Box, TensorRef, c_strides
from kasmina.formats.torch_zip import read_torch
from leyline import tensors
from leyline.digest import verified_range
from leyline.ids import canonical_name
from leyline.messages import CheckpointMetadata, Format, StoredObject
from leyline.model import Malformed
from leyline.store import Changed, Head, NotFound, ObjectStore, StoreError, checked_key
from leyline.tensors import BITS, MAX_HEADER, Entry, is_unicode
from leyline.topology import Topology

INDEX = ".index.json"
SAFETENSORS = ".safetensors"

_FIRST = 256 * 1024
"""Bytes of the first read: most headers fit."""


def read_index(store: ObjectStore, prefix: str, metadata: CheckpointMetadata) -> dict[str, TensorRef]:
    """Every tensor of the weights by canonical name, in the order of objects and offsets.

    `prefix` is the folder, "checkpoints/<name>/", or a candidate's with `metadata.objects` taken from its manifest.
    All objects that the metadata lists must stand there in their sizes. Malformed names the object and the rule.
    """
    heads = check_objects(store, prefix, metadata)

    def small(path: str) -> bytes:
        digest = metadata.object(path).digest
        return verified_range(store, prefix + path, digest, 0, digest.size)

    named = {path: heads[path] for path in metadata.weights}
    return read_tensors(store, prefix, metadata.format, named, small)


def read_tensors(
    store: ObjectStore, prefix: str, form: Format, heads: Mapping[str, Head], small: Callable[[str], bytes]
) -> dict[str, TensorRef]:
    """Every tensor of the weights by canonical name. `heads`: the objects by path; `small` reads a whole small one."""
    index = [path for path in heads if path.endswith(METADATA if form == "dcp" else INDEX)]
    shards = [path for path in heads if path not in index]
    indexed = form not in ("safetensors", "torch-zip")
    if len(index) != indexed or (not indexed and len(shards) != 1):
        raise Malformed(
            f"{prefix} of format {form} lists {len(index)} index and {len(shards)} weight objects; expected is one "
            f"object, or one index with its shards ({METADATA} is a distributed checkpoint's). Publish it again"
        )
    for path in index:
        refuse_large(path, heads[path])
    if form == "dcp":
        sources = {path: (Bytes(store, prefix + path, heads[path]), heads[path].pin) for path in shards}
        return _by_canonical_name({"": read_dcp(small(index[0]), index[0], sources)})
    headers = {path: _read_object(store, prefix, path, heads[path]) for path in shards}
    if indexed:
        _check_index(weight_map(small(index[0]), index[0]), headers, index[0])
    return _by_canonical_name(headers)


def _read_object(store: ObjectStore, prefix: str, path: str, head: Head) -> dict[str, TensorRef]:
    if path.endswith(SAFETENSORS):
        header = read_header(store, prefix, path, head)
        return {name: _in_one_piece(entry, path, head.pin) for name, entry in header.items()}
    source = Bytes(store, prefix + path, head)
    refuse_legacy(source)
    return read_torch(source, 0, head.size, path, head.pin, name=prefix + path)


def refuse_large(path: str, head: Head) -> None:
    """Malformed for an index that is too large to be one."""
    if head.size > MAX_HEADER:
        raise Malformed(f"{path} is {head.size:,} bytes long; more than {MAX_HEADER:,} is refused")


def refuse_legacy(source: Bytes) -> None:
    """Malformed for what torch.save wrote before 1.6: pickles one after the other, and no place of any tensor."""
    if source.read(0, min(1, source.size)) == b"\x80":
        raise Malformed(
            f"{source.key} is a pickle as torch.save wrote them before 1.6, which is not read in place; convert it "
            "once: emrakul convert SOURCE TARGET"
        )


def read_slots(store: ObjectStore, prefix: str, metadata: CheckpointMetadata) -> dict[str, TensorRef]:
    """Every tensor of the optimizer object by `<canonical parameter name>/<slot>`; none if there is no such object."""
    if metadata.optimizer is None:
        return {}
    head = _head(store, prefix, metadata.object(metadata.optimizer), metadata.name)
    header = read_header(store, prefix, metadata.optimizer, head)
    refs = {name: _in_one_piece(entry, metadata.optimizer, head.pin) for name, entry in header.items()}
    return _by_canonical_name({metadata.optimizer: refs})


def read_header(store: ObjectStore, prefix: str, path: str, head: Head) -> dict[str, Entry]:
    """The tensors of one safetensors object by the names they have there."""
    return tensors.read_header(store, prefix + path, head, first=_FIRST)[0]


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
            if not zero_is_zero_byte(ref.dtype):
                raise Malformed(
                    f"{ref.object}: {name} has dtype {ref.dtype}, whose zero is not the zero byte or whose elements "
                    "share bytes, so that nothing of it can be masked; save it in another dtype"
                )
            if ref.shared:
                raise Malformed(
                    f"{ref.object}: {name} shares some of its bytes with {ref.shared}, so that masking it would change "
                    "that as well; save a clone of it"
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


def _by_canonical_name(headers: Mapping[str, Mapping[str, TensorRef]]) -> dict[str, TensorRef]:
    found: dict[str, TensorRef] = {}
    for refs in headers.values():
        for name, ref in sorted(refs.items(), key=lambda item: (item[1].object, item[1].boxes[0].offset)):
            known = canonical_name(name)
            if known in found:
                raise Malformed(
                    f"{ref.object}: tensor {name} is {known} once more, which {found[known].object} holds already"
                )
            found[known] = ref
    return found


def _in_one_piece(entry: Entry, path: str, pin: str) -> TensorRef:
    """A packed tensor has the shape of its bytes, as torch has it: two F4 are one float4_e2m1fn_x2."""
    bits, shape = BITS[entry.dtype], entry.shape
    if bits < 8:
        shape = (*shape[:-1], shape[-1] * bits // 8)
    box = Box(
        object=path,
        pin=pin,
        offset=entry.start,
        itemsize=max(1, bits // 8),
        origin=(0,) * len(shape),
        shape=shape,
        strides=c_strides(shape),
    )
    return TensorRef(dtype=entry.dtype, shape=shape, boxes=(box,))


def weight_map(data: bytes, path: str) -> dict[str, str]:
    """Tensor name -> shard's path in the checkpoint's folder."""
    try:
        document = json.loads(data, object_pairs_hook=_unique)
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise Malformed(f"{path} is not JSON with unique keys ({error}); publish it again") from error
    weights: Any = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(weights, dict) or not all(isinstance(shard, str) for shard in weights.values()):
        raise Malformed(f"{path} has no weight_map from tensor names to shards; publish it again")
    if not is_unicode(*weights):
        raise Malformed(f"{path} names a tensor in text that is no Unicode (half a surrogate pair); rename it")
    for shard in set(weights.values()):
        try:
            checked_key(shard)
        except StoreError as error:
            raise Malformed(
                f"{path} names {shard[:80]!r}, which does not stand beside it; name each shard as the file is called "
                "there, such as model-00001-of-00002.safetensors"
            ) from error
    return {name: join(dirname(path), shard) for name, shard in weights.items()}


def _check_index(weight_map: Mapping[str, str], headers: Mapping[str, Iterable[str]], path: str) -> None:
    """The index and the shards must say the same, so that no tensor is overlooked or read from the wrong shard."""
    held = {name: shard for shard, header in headers.items() for name in header}
    if twice := [name for shard, header in headers.items() for name in header if held[name] != shard]:
        raise Malformed(f"{path}: two shards hold tensor {twice[0]}; publish it again")
    for name, shard in weight_map.items():
        if shard not in headers:
            raise Malformed(
                f"{path} puts {name} into {shard}, which is no shard of this checkpoint; save all of it again"
            )
        if held.get(name) != shard:
            raise Malformed(f"{path} puts {name} into {shard}, which does not hold it; publish it again")
    if extra := [name for name in held if name not in weight_map]:
        raise Malformed(f"{held[extra[0]]} holds tensor {extra[0]}, which {path} does not list; publish it again")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key occurs twice")
    return found
