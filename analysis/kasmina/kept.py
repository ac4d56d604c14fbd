"""The tracker's state as one file, kept with a checkpoint: arrays, and a header that says whose they are."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from numpy.typing import NDArray

from leyline import tensors
from leyline.model import Malformed, canonical_json

Arrays = dict[str, NDArray[Any]]


def pack(header: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> bytes:
    """A safetensors file; equal states give equal bytes."""
    return tensors.pack(arrays, {"tracker": canonical_json(dict(header)).decode()})


def unpack(
    data: bytes, expected: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], *, name: str
) -> tuple[dict[str, Any], Arrays]:
    """Header and arrays. Malformed names the first thing that is not as `expected`, or not of its shape."""
    arrays, metadata = tensors.unpack(data, name=name)
    if "tracker" not in metadata:
        raise Malformed(f"{name} has no tracker header; it is no tracker state")
    header = json.loads(metadata["tracker"])
    for key, value in expected.items():
        if header.get(key) != value:
            raise Malformed(
                f"{name} has {key} {header.get(key)!r}, this tracker {value!r}; start a new tracker, or make it as "
                "the one that wrote the state"
            )
    for key, shape in shapes.items():
        if key not in arrays or arrays[key].shape != shape:
            raise Malformed(f"{name} lacks {key} of shape {list(shape)}; use an older checkpoint's state")
    return header, arrays
