"""A checkpoint's tensors for torch, from the very bytes in the store: each object streamed once, each chunk checked."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import numpy as np
import torch
from torch import Tensor

from kasmina.formats import Chunks, TensorRef, gather, read_index, stream
from leyline import layout
from leyline.masks import Masks
from leyline.messages import CheckpointMetadata, StoredObject
from leyline.model import Malformed
from leyline.store import ObjectStore
from leyline.topology import Topology

_DTYPE = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
    "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


def load_weights(
    store: ObjectStore,
    metadata: CheckpointMetadata,
    topology: Topology,
    *,
    names: Collection[str] | None,
    masks: Masks | None = None,
    folder: str | None = None,
    objects: Iterable[StoredObject] = (),
) -> dict[str, Tensor]:
    """Tensors by the names asked for (None: all that are stored); tied names share one tensor.

    `folder` and `objects`: a candidate's, instead of the checkpoint's own. `masks` are put on while loading.
    Malformed if a name is not stored under it or one of its aliases; Damaged if bytes are not what their digest says.
    """
    prefix = folder or layout.checkpoint(metadata.name)
    stored = {each.path: each for each in (*metadata.objects, *objects)}
    index = read_index(store, layout.checkpoint(metadata.name), metadata)
    owner = {alias: name for name, known in topology.parameters.items() for alias in (name, *known.aliases)}
    same = {name: (name, *known.aliases) for name, known in topology.parameters.items()}
    wanted = {}
    for name in index if names is None else names:
        known = next((n for n in (name, *same.get(owner.get(name, name), ())) if n in index), None)
        if known is None:
            raise Malformed(f"checkpoint {metadata.name} holds no tensor {name}, which the evaluation program uses")
        wanted[name] = known
    raw = _read(store, prefix, stored, {known: index[known] for known in wanted.values()})
    for known, data in raw.items():
        dead = masks.dead(owner.get(known, known)) if masks else None
        if dead is not None:
            size = index[known].nbytes // max(index[known].size, 1)
            dead.zero(np.frombuffer(data, dtype=f"<u{size}"), 0)
    made = {known: _tensor(known, index[known], data) for known, data in raw.items()}
    one = {owner.get(known, known): tensor for known, tensor in made.items()}
    return {name: one.get(owner.get(known, known), made[known]) for name, known in wanted.items()}


def _read(
    store: ObjectStore, prefix: str, stored: Mapping[str, StoredObject], refs: Mapping[str, TensorRef]
) -> dict[str, bytearray]:
    """The bytes of each tensor."""
    whole = {name: ref.whole for name, ref in refs.items()}
    raw = {name: bytearray(refs[name].nbytes) for name, box in whole.items() if box}
    for path in sorted({box.object for box in whole.values() if box}):
        inside = sorted((box.offset, name) for name, box in whole.items() if box and box.object == path)
        begin = 0
        for chunk in stream(store, prefix + path, stored[path].digest):
            end = begin + len(chunk)
            for offset, name in inside:
                start, stop = max(begin, offset), min(end, offset + refs[name].nbytes)
                if start < stop:
                    raw[name][start - offset : stop - offset] = memoryview(chunk)[start - begin : stop - begin]
            begin = end
    chunks = Chunks(store, prefix, {path: one.digest for path, one in stored.items()}, {})
    for name in sorted((n for n, box in whole.items() if not box), key=lambda n: refs[n].object):
        raw[name] = bytearray(gather(refs[name], 0, refs[name].size, chunks.read))
    return raw


def _tensor(name: str, ref: TensorRef, data: bytearray) -> Tensor:
    if ref.dtype not in _DTYPE:
        raise Malformed(f"tensor {name} has dtype {ref.dtype}, which torch does not compute with")
    if not ref.nbytes:
        return torch.empty(ref.shape, dtype=_DTYPE[ref.dtype])
    return torch.frombuffer(data, dtype=_DTYPE[ref.dtype]).view(ref.shape)
