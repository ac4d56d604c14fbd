"""The same weights in every format that is read, written by torch; and what each format's own loader makes of it."""

from __future__ import annotations

import io
import itertools
import json
import pickle
import warnings
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load as load_safetensors
from torch import Tensor
from torch.distributed.checkpoint import filesystem, metadata

import builders
from kasmina.tensor_files import TORCH
from leyline.messages import Format

Objects = dict[str, bytes]
Stored = tuple[Format, Objects]


def torch_tensors(weights: Mapping[str, builders.Tensor]) -> dict[str, Tensor]:
    return {name: one_tensor(one) for name, one in weights.items()}


def one_tensor(one: builders.Tensor) -> Tensor:
    if not one.raw:
        return torch.empty(one.shape, dtype=TORCH[one.dtype])
    return torch.frombuffer(bytearray(one.raw), dtype=TORCH[one.dtype]).reshape(one.shape)


def raw(tensor: Tensor) -> bytes:
    """Its elements in C order."""
    flat = torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach()).reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def saved(what: object, **how: object) -> bytes:
    file = io.BytesIO()
    torch.save(what, file, **how)
    return file.getvalue()


def as_views(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same values, but no matrix in one piece: transposed, columns of something wider, rows behind each other."""
    found = {}
    for number, (name, one) in enumerate(tensors.items()):
        if one.dim() < 2 or not one.numel():
            found[name] = one
        elif number % 3 == 0:
            found[name] = one.transpose(0, -1).contiguous().transpose(0, -1)
        elif number % 3 == 1:
            found[name] = within_wider(one)
        else:
            stacked = torch.cat([torch.zeros_like(one), one])
            found[name] = stacked[one.shape[0] :]
    return found


def within_wider(one: Tensor) -> Tensor:
    """The same values as columns of something wider."""
    wide = torch.zeros(*one.shape[:-1], one.shape[-1] + 3, dtype=one.dtype)
    wide[..., 2:-1] = one
    return wide[..., 2:-1]


def safetensors_(weights: Mapping[str, builders.Tensor]) -> Stored:
    return "safetensors", {"model.safetensors": builders.safetensors(weights)}


def safetensors_sharded(weights: Mapping[str, builders.Tensor]) -> Stored:
    return "safetensors-sharded", builders.sharded(weights, 3)


def torch_zip(weights: Mapping[str, builders.Tensor]) -> Stored:
    return "torch-zip", {"pytorch_model.bin": saved(torch_tensors(weights))}


def lightning(weights: Mapping[str, builders.Tensor]) -> Stored:
    return "torch-zip", {"last.ckpt": saved(in_lightnings_words(as_views(torch_tensors(weights))))}


def in_lightnings_words(state: Mapping[str, Tensor]) -> dict[str, object]:
    slots = {0: {"step": torch.tensor(3.0), "exp_avg": torch.ones(4)}}
    return {
        "epoch": 3,
        "pytorch-lightning_version": "2.6.0",
        "state_dict": dict(state),
        "optimizer_states": [{"state": slots, "param_groups": [{"lr": 0.1, "params": [0]}]}],
        "lr_schedulers": [],
    }


def repacked(weights: Mapping[str, builders.Tensor]) -> Stored:
    """By another writer of zip archives, which puts the checksum before the data."""
    form, objects = torch_zip(weights)
    file = io.BytesIO()
    old = zipfile.ZipFile(io.BytesIO(objects["pytorch_model.bin"]))
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as new:
        for entry in old.infolist():
            new.writestr(zipfile.ZipInfo(entry.filename), old.read(entry))
    return form, {"model.pt": file.getvalue()}


def torch_sharded(weights: Mapping[str, builders.Tensor]) -> Stored:
    names = list(weights)
    parts = {f"pytorch_model-{n + 1:05d}-of-00002.bin": names[n::2] for n in range(2)}
    objects = {path: saved(torch_tensors({name: weights[name] for name in part})) for path, part in parts.items()}
    weight_map = {name: path for path, part in parts.items() for name in part}
    index = json.dumps({"metadata": {}, "weight_map": weight_map}).encode()
    return "torch-zip-sharded", {**objects, "pytorch_model.bin.index.json": index}


def distributed(weights: Mapping[str, builders.Tensor], folder: Path) -> Stored:
    """By torch itself, in one process."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({"model": as_views(torch_tensors(weights)), "step": 7}, checkpoint_id=str(folder))
    return "dcp", {path.name: path.read_bytes() for path in folder.iterdir()}


def distributed_files(weights: Mapping[str, builders.Tensor], folder: Path) -> Stored:
    """An object for each tensor, and moments in objects of their own."""
    tensors = torch_tensors(weights)
    moments = {"state": {name: {"exp_avg": torch.ones(one.shape)} for name, one in tensors.items()}}
    writer = filesystem.FileSystemWriter(folder, single_file_per_rank=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({"model": tensors, "optimizer": moments}, storage_writer=writer)
    return "dcp", {path.name: path.read_bytes() for path in folder.iterdir()}


def distributed_grid(weights: Mapping[str, builders.Tensor], rows: int = 2, columns: int = 2) -> Stored:
    """As ranks write it that share each matrix as a grid: torch's own classes, and no process group."""
    ranks, parts = rows * columns, (rows, columns)
    files = {f"__{rank}_0.distcp": bytearray(rank) for rank in range(ranks)}
    described, places = {}, {}
    for name, one in torch_tensors(weights).items():
        cuts = []
        for axis, side in enumerate(one.shape):
            pieces = parts[axis] if axis < 2 and side >= parts[axis] else 1
            cuts.append([side * number // pieces for number in range(pieces + 1)])
        chunks = []
        cells = itertools.product(*(list(itertools.pairwise(axis)) for axis in cuts))
        for rank, cell in enumerate(cells):
            piece = saved(one[tuple(slice(*part) for part in cell)].clone())
            path = f"__{rank % ranks}_0.distcp"
            origin = torch.Size([part[0] for part in cell])
            chunks.append(metadata.ChunkStorageMetadata(origin, torch.Size([part[1] - part[0] for part in cell])))
            index = metadata.MetadataIndex(name, origin, rank)
            places[index] = filesystem._StorageInfo(path, len(files[path]), len(piece))
            files[path] += piece
        properties = metadata.TensorProperties.create_from_tensor(one)
        described[name] = metadata.TensorStorageMetadata(properties, one.shape, chunks)
    document = metadata.Metadata(described, {name: (name,) for name in described}, places, version="1.0.0")
    return "dcp", {".metadata": pickle.dumps(document), **{path: bytes(data) for path, data in files.items()}}


FORMATS: dict[str, Callable[..., Stored]] = {
    "safetensors": safetensors_,
    "safetensors-sharded": safetensors_sharded,
    "torch-zip": torch_zip,
    "lightning": lightning,
    "repacked": repacked,
    "torch-zip-sharded": torch_sharded,
    "dcp": distributed,
    "dcp-grid": distributed_grid,
    "dcp-files": distributed_files,
}


def stored(form: str, weights: Mapping[str, builders.Tensor], folder: Path) -> Stored:
    """The weights in this format; `folder` is scratch."""
    writer = FORMATS[form]
    return writer(weights, folder) if writer in (distributed, distributed_files) else writer(weights)


def loaded(form: Format, objects: Mapping[str, bytes], like: Mapping[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """What the format's own loader makes of the objects; the names and shapes of `like` are asked for."""
    if form == "dcp":
        folder.mkdir(parents=True)
        for path, data in objects.items():
            (folder / path).write_bytes(data)
        nested = dcp.FileSystemReader(str(folder)).read_metadata().planner_data
        found = {name: torch.zeros_like(one, memory_format=torch.contiguous_format) for name, one in like.items()}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            wanted = {"model": found} if any(len(path) > 1 for path in nested.values()) else found
            dcp.load(wanted, checkpoint_id=str(folder))
        return found
    tensors: dict[str, Tensor] = {}
    for path, data in objects.items():
        if path.endswith(".safetensors"):
            tensors |= load_safetensors(data)
        elif not path.endswith(".json"):
            assert zipfile.ZipFile(io.BytesIO(data)).testzip() is None
            read = torch.load(io.BytesIO(data), weights_only=True)
            tensors |= read.get("state_dict", read)
    return tensors
