"""Which format a folder of objects is in, for checkpoints that say nothing of themselves."""

from __future__ import annotations

from posixpath import basename
from typing import NamedTuple

from kasmina.formats.blocks import Bytes
from kasmina.formats.dcp import METADATA, objects_of
from kasmina.formats.extents import TensorRef
from kasmina.formats.index import INDEX, SAFETENSORS, read_tensors, refuse_large, refuse_legacy, weight_map
from leyline.messages import Format
from leyline.model import Malformed
from leyline.store import Head, ObjectStore

TORCH = (".pt", ".pth", ".ckpt", ".bin")
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
"""What transformers calls them; other files of such a folder hold optimizers and arguments."""


class Recognised(NamedTuple):
    """What a folder holds."""

    format: Format
    objects: tuple[str, ...]
    """Paths in the folder, what CheckpointMetadata lists as `weights`: the index or `.metadata` first."""


def recognise(store: ObjectStore, prefix: str) -> Recognised:
    """The format and weight objects of the folder `prefix` ("" or ending in "/"). Malformed says what is unclear."""
    found = {head.key.removeprefix(prefix): head for head in store.list(prefix)}
    if METADATA in found:
        named = objects_of(_small(store, found[METADATA]), METADATA)
        return Recognised("dcp", (METADATA, *_present(named, found, METADATA)))
    if index := _only([path for path in found if path.endswith(INDEX)], prefix):
        sharded = _sharded(store, index, found[index])
        _present(list(sharded.objects), found, index)
        return sharded
    form: Format
    for form, endings in (("safetensors", (SAFETENSORS,)), ("torch-zip", TORCH)):
        paths = [path for path in found if path.endswith(endings)]
        usual = [path for path in paths if basename(path) in _WEIGHTS]
        usual = [path for path in usual if "/" not in path] or usual  # folders beneath hold what was saved on the way
        if path := _only(usual or paths, prefix):
            if form == "torch-zip":  # the length of a safetensors header may begin with any byte
                refuse_legacy(Bytes(store, found[path].key, found[path]))
            return Recognised(form, (path,))
    raise Malformed(
        f"{prefix or store.uri} holds no checkpoint: no {METADATA}, *{INDEX}, *{SAFETENSORS} or *{', *'.join(TORCH)}; "
        "name the folder in which the weights are"
    )


def recognise_object(store: ObjectStore, path: str) -> Recognised:
    """The same where a person names one object, a file or an index, of a folder that may hold others."""
    head = store.head(path)
    if path.endswith(INDEX):
        return _sharded(store, path, head)
    if path.endswith(SAFETENSORS):
        return Recognised("safetensors", (path,))
    refuse_legacy(Bytes(store, path, head))
    return Recognised("torch-zip", (path,))


def read_recognised(store: ObjectStore, prefix: str, found: Recognised) -> dict[str, TensorRef]:
    """Every tensor by canonical name; for what has no READY.json yet, so that no digest is checked."""
    heads = {path: store.head(prefix + path) for path in found.objects}
    return read_tensors(store, prefix, found.format, heads, lambda path: store.get(prefix + path))


def _sharded(store: ObjectStore, index: str, head: Head) -> Recognised:
    shards = sorted(set(weight_map(_small(store, head), index).values()))
    form: Format = "safetensors-sharded" if shards and shards[0].endswith(SAFETENSORS) else "torch-zip-sharded"
    return Recognised(form, (index, *shards))


def _only(paths: list[str], prefix: str) -> str | None:
    if len(paths) > 1:
        raise Malformed(
            f"{prefix or 'the folder'} holds {len(paths)} checkpoints ({', '.join(sorted(paths)[:3])}, ...); name the "
            "one file, or a folder that holds one"
        )
    return paths[0] if paths else None


def _small(store: ObjectStore, head: Head) -> bytes:
    refuse_large(head.key, head)
    return store.get_range(head.key, 0, head.size, pin=head.pin)


def _present(named: list[str], found: dict[str, Head], index: str) -> list[str]:
    if missing := [path for path in named if path not in found]:
        raise Malformed(f"{index} names {missing[0]!r}, which does not stand beside it; copy the whole checkpoint")
    return named
