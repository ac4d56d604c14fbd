"""The safetensors format, read strictly: header rules here, data wherever the caller keeps it.

Layout: u64 little-endian N | N bytes of JSON | data. A header is refused if it is too long, has duplicate keys,
unknown dtypes, shapes whose product does not match, or offsets that overlap, leave holes or do not end at the end of
the object: parsers elsewhere failed on exactly these.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from math import prod
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from leyline.model import Malformed
from leyline.store import Head, ObjectStore

MAX_HEADER = 16 * 1024 * 1024
"""Bytes; an 88 MiB header costs 715 MiB of memory to parse, and ten million parameters' names fit in less."""

ITEMSIZE = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8, "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1, "C64": 8,
}  # fmt: skip
"""Bytes of an element, for dtypes whose elements are bytes of their own, and whose zero is the zero byte."""
BITS = {
    **{name: 8 * size for name, size in ITEMSIZE.items()},
    "F8_E8M0": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip
"""Bits of an element, for every dtype that safetensors 0.8 knows. Less than 8: packed along the last axis."""
_SIDES = 64
"""Axes of a tensor; torch allows as many."""
_NUMPY = {
    "BOOL": "?", "U8": "<u1", "I8": "<i1", "U16": "<u2", "I16": "<i2", "F16": "<f2", "U32": "<u4", "I32": "<i4",
    "F32": "<f4", "U64": "<u8", "I64": "<i8", "F64": "<f8",
}  # fmt: skip
_NAME = {np.dtype(code): name for name, code in _NUMPY.items()}


class Entry(NamedTuple):
    """One tensor: dtype in the format's own words, shape, and [start, stop) in the object."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def header_length(first: bytes, size: int, *, name: str) -> int:
    """Length of the whole header (the 8 bytes included) from the object's first 8 bytes and its size."""
    if len(first) < 8:
        raise Malformed(f"{name} is {size} bytes long; a safetensors file has at least 8. Publish it again")
    (length,) = struct.unpack("<Q", first[:8])
    if length > MAX_HEADER:
        raise Malformed(
            f"{name} is no safetensors file{_kind(first)}: its first 8 bytes speak of a header of {length:,} "
            f"bytes; more than {MAX_HEADER:,} is refused"
        )
    if 8 + length > size:
        raise Malformed(f"{name}: the header ends at byte {8 + length}, the object at {size}; it is truncated")
    return int(8 + length)


def _kind(first: bytes) -> str:
    """What people rename."""
    if first.startswith(b"PK"):
        return " (it begins like a zip archive, as torch.save writes them)"
    return " (it begins like a pickle)" if first[0] == 0x80 else ""


def parse_header(header: bytes, size: int, *, name: str) -> tuple[dict[str, Entry], dict[str, str]]:
    """Tensors by name and the metadata, from the header's bytes (with the leading 8) and the object's size."""
    end = header_length(header, size, name=name)
    try:
        document = json.loads(header[8:end].decode("utf-8"), object_pairs_hook=_no_duplicates)
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise Malformed(f"{name}: the header is not JSON with unique keys ({error})") from error
    if not isinstance(document, dict):
        raise Malformed(f"{name}: the header is a JSON {type(document).__name__}, not an object")
    metadata = document.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise Malformed(f"{name}: __metadata__ must map text to text")
    if not is_unicode(*document, *metadata, *metadata.values()):
        raise Malformed(f"{name}: the header holds text that is no Unicode (half a surrogate pair); rename the tensors")
    entries = {key: _entry(key, value, end, name) for key, value in document.items()}
    position = end
    for key, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start != position:
            fault = "overlaps the one before" if entry.start < position else "leaves a hole before it"
            raise Malformed(f"{name}: tensor {key} at byte {entry.start} {fault} (expected {position})")
        position = entry.stop
    if position != size:
        raise Malformed(f"{name} is {size} bytes long, its header speaks of {position}; publish it again")
    return entries, metadata


def read_header(store: ObjectStore, key: str, head: Head, *, first: int) -> tuple[dict[str, Entry], dict[str, str]]:
    """parse_header of an object in a store. `first`: bytes of the first read; a longer header costs a second one."""
    header = store.get_range(key, 0, min(first, head.size), pin=head.pin)
    length = header_length(header, head.size, name=key)
    if length > len(header):
        header += store.get_range(key, len(header), length, pin=head.pin)
    return parse_header(header, head.size, name=key)


def _entry(key: str, value: Any, base: int, name: str) -> Entry:
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise Malformed(f"{name}: tensor {key} must have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        said = f"dtype {dtype[:40]!r}" if isinstance(dtype, str) else "a dtype that is no text"
        raise Malformed(
            f"{name}: tensor {key} has {said}; known are {', '.join(BITS)}. Convert it, or keep it in a file of its own"
        )
    if not _naturals(shape) or not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        said = f"shape {_shown(shape)} and offsets {_shown(offsets)}"
        raise Malformed(f"{name}: tensor {key} has {said}; they must be naturals, of at most {_SIDES} axes")
    row = BITS[dtype] * (shape[-1] if shape else 1)
    if row % 8:
        raise Malformed(
            f"{name}: tensor {key} of shape {shape} and {dtype} has rows of {row} bits, which fill no bytes; pad its "
            "last axis"
        )
    nbytes = prod(shape[:-1]) * (row // 8)
    if nbytes != offsets[1] - offsets[0]:
        raise Malformed(
            f"{name}: tensor {key} of shape {shape} and {dtype} needs {nbytes} bytes, its offsets span "
            f"{offsets[1] - offsets[0]}"
        )
    return Entry(dtype, tuple(shape), base + offsets[0], base + offsets[1])


def _naturals(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) <= _SIDES
        and all(type(item) is int and 0 <= item < 2**62 for item in value)
    )


def _shown(value: Any) -> str:
    """What is no list of numbers may be too deep to be printed."""
    flat = isinstance(value, list) and all(isinstance(item, int | str) for item in value[:_SIDES])
    return f"{value[:_SIDES]!r:.200}" if flat else f"of {type(value).__name__}"


def is_unicode(*texts: str) -> bool:
    """Whether nothing of these is half a surrogate pair: JSON may say such, and no digest, name or message takes it."""
    try:
        "".join(texts).encode()
    except UnicodeEncodeError:
        return False
    return True


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key occurs twice")
    return found


def pack(arrays: Mapping[str, NDArray[Any]], metadata: Mapping[str, str]) -> bytes:
    """A whole file in memory; for small ones (responses). Tensors in name order, so equal in, equal out."""
    found = {name: np.asarray(arrays[name]) for name in sorted(arrays)}
    blobs = [np.ascontiguousarray(array).reshape(-1).view(np.uint8).data for array in found.values()]
    return b"".join([header_of({name: (array.dtype, array.shape) for name, array in found.items()}, metadata), *blobs])


def header_of(arrays: Mapping[str, tuple[np.dtype[Any], tuple[int, ...]]], metadata: Mapping[str, str]) -> bytes:
    """The whole header of a file whose data are these (dtype, shape), in name order and without gaps."""
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    position = 0
    for name, (dtype, shape) in sorted(arrays.items()):
        stop = position + dtype.itemsize * prod(shape)
        header[name] = {
            "dtype": _NAME[dtype.newbyteorder("<")],
            "shape": list(shape),
            "data_offsets": [position, stop],
        }
        position = stop
    return framed(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())


def framed(text: bytes) -> bytes:
    """The JSON as a whole header: behind its length, and padded so that the data is aligned."""
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def unpack(data: bytes, *, name: str) -> tuple[dict[str, NDArray[Any]], dict[str, str]]:
    """The arrays (read-only views of `data`) and metadata of a whole file; numpy's own dtypes only."""
    entries, metadata = parse_header(data, len(data), name=name)
    arrays = {}
    for key, entry in entries.items():
        if entry.dtype not in _NUMPY:
            raise Malformed(f"{name}: tensor {key} has dtype {entry.dtype}, which numpy lacks")
        raw = np.frombuffer(data, dtype=_NUMPY[entry.dtype], offset=entry.start, count=_count(entry))
        arrays[key] = raw.reshape(entry.shape)
    return arrays, metadata


def _count(entry: Entry) -> int:
    return (entry.stop - entry.start) // ITEMSIZE[entry.dtype]
