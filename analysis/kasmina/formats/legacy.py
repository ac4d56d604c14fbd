"""What torch.save wrote before 1.6: five pickles one after the other, then each storage behind its length."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, BinaryIO

from kasmina.formats.extents import Record, TensorRef
from kasmina.formats.pickles import MAX_PICKLE, read_pickle
from kasmina.formats.torch_zip import ALLOWED, View, box_of, tensors_of, weights_of
from leyline.model import Malformed

_MAGIC = 0x1950A86A20F9469CFC6C


def read_legacy(file: BinaryIO, *, name: str) -> dict[str, TensorRef]:
    """The weights by the names they have there, as boxes of the object `name`. Malformed says what is not right."""
    size = file.seek(0, 2)
    file.seek(0)
    head = file.read(MAX_PICKLE)
    magic, at = read_pickle(head, ALLOWED, name=name)
    if magic != _MAGIC:
        raise Malformed(f"{name} is a pickle, but torch.save did not write it; convert it by a program that you trust")
    _, at = read_pickle(head, ALLOWED, name=name, start=at)
    machine, at = read_pickle(head, ALLOWED, name=name, start=at)
    if not isinstance(machine, dict) or machine.get("little_endian") is not True:
        raise Malformed(f"{name} was written on a big-endian machine; load and save it on a little-endian one")
    tree, at = read_pickle(head, ALLOWED, name=name, start=at)
    keys, at = read_pickle(head, ALLOWED, name=name, start=at)
    views = dict(tensors_of(tree, name=name))
    records = _storages(keys, views.values(), at, size, name)
    refs = {}
    for path, view in views.items():
        box = box_of(view, records, name, "", name)
        refs[path] = TensorRef(dtype=view.dtype, shape=box.shape, boxes=(box,))
    return weights_of(refs, name=name)


def _storages(keys: Any, views: Iterable[View], at: int, size: int, name: str) -> dict[str, Record]:
    """Where each storage lies; `at` is the byte behind the last pickle."""
    lengths = {view.storage: view.storage_bytes for view in views}
    records: dict[str, Record] = {}
    for key in keys if isinstance(keys, list) else ():
        if not isinstance(key, str):  # whatever else it is may be too deep to be printed
            raise Malformed(f"{name}: a storage is called by something that is no text; save it again")
        if key in records or key not in lengths:
            raise Malformed(f"{name}: storage {key[:32]!r} belongs to no tensor or comes twice; save it again")
        # 8 bytes with its number of elements come first, which the pickle has told already
        records[key] = Record(at + 8, at + 8 + lengths[key], ())
        at = records[key].stop
    if at != size:
        raise Malformed(f"{name} is {size:,} bytes long, its storages end at {at:,}; it is truncated or holds more")
    return records
