"""Torch tensors as safetensors objects, streamed: beside the tensors only one chunk is held, and one tensor on its way.

Written as safetensors' own save_model does: names of tied tensors once, the other names in the metadata.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from leyline.digest import Digester, ObjectDigest
from leyline.model import Malformed
from leyline.store import CHUNK, in_chunks
from leyline.tensors import framed

DTYPES = {
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.int16: "I16", torch.uint16: "U16",
    torch.int32: "I32", torch.uint32: "U32", torch.int64: "I64", torch.uint64: "U64", torch.float16: "F16",
    torch.bfloat16: "BF16", torch.float32: "F32", torch.float64: "F64", torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2", torch.float8_e4m3fnuz: "F8_E4M3FNUZ", torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
    torch.float8_e8m0fnu: "F8_E8M0", torch.float4_e2m1fn_x2: "F4", torch.complex64: "C64",
}  # fmt: skip
"""What safetensors can hold."""
TORCH = {**{name: dtype for dtype, name in DTYPES.items()}, "C128": torch.complex128}
"""What can be loaded."""


class Content(Protocol):
    """What one object will hold. Iterated anew it gives the same bytes, in pieces of CHUNK."""

    @property
    def size(self) -> int: ...

    def __iter__(self) -> Iterator[bytes | bytearray]: ...


@dataclass(frozen=True)
class Blob:
    """Bytes that are in memory anyway."""

    data: bytes

    @property
    def size(self) -> int:
        return len(self.data)

    def __iter__(self) -> Iterator[bytes]:
        return (self.data[at : at + CHUNK] for at in range(0, len(self.data), CHUNK))


@dataclass(frozen=True)
class TensorFile:
    """A safetensors object of these tensors, wherever they live. They must not change while it is written."""

    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def size(self) -> int:
        return len(self._header()) + sum(_nbytes(tensor) for tensor in self.tensors.values())

    def __iter__(self) -> Iterator[bytearray]:
        return in_chunks(self._pieces())

    def _pieces(self) -> Iterator[memoryview]:
        yield memoryview(self._header())
        for name in self._order():
            # of a conjugate or negated view, the bytes are those of the tensor that it is a view of
            flat = self.tensors[name].detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
            step = CHUNK // flat.element_size()
            for at in range(0, flat.numel(), step):
                yield flat[at : at + step].cpu().view(torch.uint8).numpy().data

    def _order(self) -> list[str]:
        """Wide elements first, so that every tensor is aligned, as safetensors itself does; then by name."""
        return sorted(self.tensors, key=lambda name: (-self.tensors[name].element_size(), name))

    def _header(self) -> bytes:
        header: dict[str, Any] = {"__metadata__": dict(sorted(self.metadata.items()))} if self.metadata else {}
        position = 0
        for name in self._order():
            tensor = self.tensors[name]
            if tensor.dtype not in DTYPES or tensor.layout != torch.strided:
                raise Malformed(
                    f"tensor {name} is {tensor.dtype} ({tensor.layout}), which safetensors cannot hold; convert it "
                    "before publishing"
                )
            end = position + _nbytes(tensor)
            shape = list(tensor.shape)
            if tensor.dtype == torch.float4_e2m1fn_x2:  # torch counts bytes, the format numbers
                shape[-1] *= 2
            header[name] = {"dtype": DTYPES[tensor.dtype], "shape": shape, "data_offsets": [position, end]}
            position = end
        return framed(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())


def digest_of(content: Content) -> ObjectDigest:
    """One pass over the bytes."""
    digester = Digester()
    for chunk in content:
        digester.update(chunk)
    return digester.finish()


def weight_files(tensors: Mapping[str, Tensor], tied: Mapping[str, str], shard_bytes: int) -> dict[str, Content]:
    """The objects that hold a model's weights: one, or shards with an index, in the names that transformers gives.

    `tied`: other name -> name under which the tensor is written.
    """
    metadata = {"format": "pt", **tied}
    shards: list[dict[str, Tensor]] = [{}]
    filled = 0
    for name in sorted(tensors):
        nbytes = _nbytes(tensors[name])
        if shards[-1] and filled + nbytes > shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = tensors[name]
        filled += nbytes
    if len(shards) == 1:
        return {"model.safetensors": TensorFile(tensors, metadata)}
    files: dict[str, Content] = {}
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        path = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        files[path] = TensorFile(shard, metadata)
        weight_map |= dict.fromkeys(shard, path)
    index = {"metadata": {"total_size": sum(map(_nbytes, tensors.values()))}, "weight_map": weight_map}
    files["model.safetensors.index.json"] = Blob(json.dumps(index, sort_keys=True).encode())
    return files


def read_tensor(raw: bytearray, dtype: str, shape: tuple[int, ...]) -> Tensor:
    """A CPU tensor over `raw`, without a copy. Malformed for a dtype that torch lacks."""
    if dtype not in TORCH:
        raise Malformed(
            f"a tensor of shape {list(shape)} has dtype {dtype}, which torch lacks, so that it cannot be loaded; "
            "convert it, or keep it in a file of its own"
        )
    if not raw:
        return torch.empty(shape, dtype=TORCH[dtype])
    return torch.frombuffer(raw, dtype=TORCH[dtype]).reshape(shape)


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
