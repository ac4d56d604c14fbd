"""Which format a folder of objects is in, for checkpoints that say nothing of themselves."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from kasmina.formats.blocks import Bytes
from kasmina.formats.dcp import METADATA, objects_of
from kasmina.formats.extents import TensorRef
from kasmina.formats.index import INDEX, SAFETENSORS, read_tensors, refuse_large, refuse_legacy, weight_map
from leyline.messages import Format
from leyline.model import Malformed
from leyline.store import Head, ObjectStore

TORCH = (".pt", ".pth", ".ckpt", ".bin")
_WEIGHTS = ("model.safetensors", f"model.safetensors{INDEX}", "pytorch_model.bin", f"pytorch_model.bin{INDEX}")
"""What transformers calls them, in the order in which it looks for them."""
_BESIDE = ("optimizer.", "scheduler.", "scaler.", "rng_state", "training_args.")
"""How the names begin of what its trainer saves beside weights of other names, such as an adapter's."""


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
    path = next((usual for usual in _WEIGHTS if usual in found), None) or _only(_candidates(found), found, prefix)
    one = _of_object(store, path, found[path])
    _present(list(one.objects), found, path)
    return one


def recognise_object(store: ObjectStore, path: str) -> Recognised:
    """The same where a person names one object, a file or an index, of a folder that may hold others."""
    return _of_object(store, path, store.head(path))


def _of_object(store: ObjectStore, path: str, head: Head) -> Recognised:
    if path.endswith(INDEX):
        return _sharded(store, path, head)
    if path.endswith(SAFETENSORS):  # the length of its header may begin with any byte
        return Recognised("safetensors", (path,))
    refuse_legacy(Bytes(store, head.key, head))
    return Recognised("torch-zip", (path,))


def read_recognised(store: ObjectStore, prefix: str, found: Recognised) -> dict[str, TensorRef]:
    """Every tensor by canonical name; for what has no READY.json yet, so that no digest is checked."""
    heads = {path: store.head(prefix + path) for path in found.objects}
    return read_tensors(store, prefix, found.format, heads, lambda path: store.get(prefix + path))


def _sharded(store: ObjectStore, index: str, head: Head) -> Recognised:
    shards = sorted(set(weight_map(_small(store, head), index).values()))
    form: Format = "safetensors-sharded" if shards and shards[0].endswith(SAFETENSORS) else "torch-zip-sharded"
    return Recognised(form, (index, *shards))


def _candidates(found: Iterable[str]) -> list[str]:
    """What may be the checkpoint. Folders beneath hold what was saved on the way, or what belongs to others."""
    here = [path for path in found if "/" not in path and not path.startswith(_BESIDE)]
    indexes = [path for path in here if path.endswith(tuple(f"{ending}{INDEX}" for ending in (SAFETENSORS, *TORCH)))]
    return indexes or [path for path in here if path.endswith((SAFETENSORS, *TORCH))]


def _only(paths: list[str], found: Iterable[str], prefix: str) -> str:
    where = prefix or "the folder"
    if len(paths) > 1:
        some = ", ".join(sorted(paths)[:3]) + (", ..." if len(paths) > 3 else "")
        raise Malformed(
            f"{where} holds {len(paths)} checkpoints ({some}); name the one file, or a folder that holds one"
        )
    if not paths:
        weights = [path for path in found if path.endswith((METADATA, SAFETENSORS, *TORCH)) and "/" in path]
        beneath = sorted({path.rpartition("/")[0] for path in weights})
        remedy = "name the folder or the file in which the weights are (links are not followed)"
        raise Malformed(
            f"{where} holds no checkpoint: no {METADATA}, *{INDEX}, *{SAFETENSORS} or *{', *'.join(TORCH)}; "
            + (f"there is one in {beneath[0]}, name that folder" if beneath else remedy)
        )
    return paths[0]


def _small(store: ObjectStore, head: Head) -> bytes:
    refuse_large(head.key, head)
    return store.get_range(head.key, 0, head.size, pin=head.pin)


def _present(named: list[str], found: dict[str, Head], index: str) -> list[str]:
    if missing := [path for path in named if path not in found]:
        raise Malformed(f"{index} names {missing[0]!r}, which does not stand beside it; copy the whole checkpoint")
    return named
