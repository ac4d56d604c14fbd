"""Four gigabytes through workers that the kernel allows 256 MB each, and what a worker without bounds would meet there.

`make large` runs this; a billion weights take about a minute for each format.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import struct
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

import builders
import stored
from builders import MODEL_ID, Run
from emrakul.core.snapshot import Phase, Snapshot
from emrakul.settings import Settings
from emrakul.work import work
from kasmina.formats import read_index
from leyline import exits, layout
from leyline.digest import Digester, ObjectDigest
from leyline.ids import parameter_uuid
from leyline.local import LocalStore
from leyline.messages import Format
from leyline.open import open_store
from leyline.store import CHUNK, Data, ObjectStore
from leyline.topology import Group, Kind, Member, Parameter, Topology
from limits import memory_limit
from servers import seaweedfs
from whole import BY_MAGNITUDE, SINGLE_WEIGHTS, Limited, committed, cycle, gone, manifest_of, masks_of_cycle, publish

LIMIT = 256_000_000
HELD = "analysis_memory_limit: 256MB\n"


def model(layers: int, rows: int, columns: int) -> Topology:
    """Square layers whose rows are one group of channels."""
    names, shape = [f"layer{number:02d}.weight" for number in range(layers)], (rows, columns)
    members = tuple(Member(parameter=name, role="producer", axis=0) for name in names)
    group = Group(id="rows", kind=Kind.CHANNEL, units=rows, members=members, gates=("x",))
    parameters = {name: Parameter(uuid=parameter_uuid(name, shape, MODEL_ID), shape=shape) for name in names}
    return Topology(model_id=MODEL_ID, parameters=parameters, groups=(group,))


@dataclass(frozen=True)
class Made:
    """An object that is made while it is read, and can be again: its header, then rows of its tensors."""

    header: bytes
    row: Callable[[int, int], bytes]
    """(tensor, row) -> bytes."""
    tensors: Sequence[int]
    rows: int

    def __iter__(self) -> Iterator[Data]:
        pending = bytearray(self.header)
        for tensor in self.tensors:
            for row in range(self.rows):
                pending += self.row(tensor, row)
                while len(pending) >= CHUNK:
                    yield bytes(pending[:CHUNK])
                    del pending[:CHUNK]
        if pending:
            yield bytes(pending)


def digest_of(chunks: Iterable[Data]) -> ObjectDigest:
    digester = Digester()
    for chunk in chunks:
        digester.update(chunk)
    return digester.finish()


def row_of(columns: int) -> Callable[[int, int], bytes]:
    """Rows that all differ, and grow with their number, so that the first ones are the least: real float32 bytes."""
    noise = np.random.default_rng(0).random(columns + 4096, dtype=np.float32) + 1

    def row(tensor: int, number: int) -> bytes:
        at = (tensor * 131 + number * 7) % 4096
        return (noise[at : at + columns] * np.float32(1e-3 * (number + 1))).tobytes()

    return row


Objects = Mapping[str, Iterable[Data]]
"""A checkpoint's objects by path, each in chunks that can be read twice."""


def safetensors(topology: Topology, tensors: Sequence[int]) -> Made:
    names = list(topology.parameters)
    rows, columns = topology.parameters[names[0]].shape
    size, header = 4 * rows * columns, {}
    for position, tensor in enumerate(tensors):
        place = [position * size, (position + 1) * size]
        header[names[tensor]] = {"dtype": "F32", "shape": [rows, columns], "data_offsets": place}
    text = json.dumps(header).encode()
    return Made(struct.pack("<Q", len(text)) + text, row_of(columns), tensors, rows)


def single(topology: Topology, _scratch: Path) -> Objects:
    return {"model.safetensors": safetensors(topology, range(len(topology.parameters)))}


def sharded(topology: Topology, _scratch: Path) -> Objects:
    """Two shards and their index."""
    names, half = list(topology.parameters), len(topology.parameters) // 2
    shards = {
        "model-00001-of-00002.safetensors": range(half),
        "model-00002-of-00002.safetensors": range(half, len(names)),
    }
    where = {names[tensor]: path for path, tensors in shards.items() for tensor in tensors}
    index = Made(json.dumps({"weight_map": where}).encode(), lambda _tensor, _row: b"", (), 0)
    return {**{path: safetensors(topology, t) for path, t in shards.items()}, "model.safetensors.index.json": index}


def torch_weights(topology: Topology) -> dict[str, Tensor]:
    rows, columns = next(iter(topology.parameters.values())).shape
    row, found = row_of(columns), {}
    for number, name in enumerate(topology.parameters):
        found[name] = torch.empty(rows, columns)
        for at in range(rows):
            found[name][at] = torch.frombuffer(bytearray(row(number, at)), dtype=torch.float32)
    return found


def torch_zip(topology: Topology, scratch: Path) -> Objects:
    scratch.mkdir(parents=True)
    torch.save(torch_weights(topology), scratch / "model.pt")
    return {"pytorch_model.bin": File(scratch / "model.pt")}


def torch_sharded(topology: Topology, scratch: Path) -> Objects:
    return in_chunks(stored.torch_sharded(tensors_of(topology)))


def lightning(topology: Topology, scratch: Path) -> Objects:
    """No matrix lies in one piece."""
    views = {name: stored.within_wider(one) for name, one in torch_weights(topology).items()}
    return in_chunks(("torch-zip", {"last.ckpt": stored.saved(stored.in_lightnings_words(views))}))


def distributed_grid(topology: Topology, scratch: Path) -> Objects:
    return in_chunks(stored.distributed_grid(tensors_of(topology)))


def tensors_of(topology: Topology) -> dict[str, builders.Tensor]:
    weights = torch_weights(topology)
    return {name: builders.Tensor("F32", tuple(one.shape), stored.raw(one)) for name, one in weights.items()}


def in_chunks(what: stored.Stored) -> Objects:
    return {path: [data[at : at + CHUNK] for at in range(0, len(data), CHUNK)] for path, data in what[1].items()}


def distributed(topology: Topology, scratch: Path) -> Objects:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is one process only
        dcp.save(torch_weights(topology), checkpoint_id=str(scratch))
    return {path.name: File(path) for path in sorted(scratch.iterdir())}


@dataclass(frozen=True)
class File:
    """A file in chunks."""

    path: Path

    def __iter__(self) -> Iterator[Data]:
        with self.path.open("rb") as file:
            while chunk := file.read(CHUNK):
                yield chunk


Writer = Callable[[Topology, Path], Objects]
FORMATS: dict[str, tuple[Format, Writer]] = {
    "safetensors": ("safetensors", single),
    "safetensors-sharded": ("safetensors-sharded", sharded),
    "torch-zip": ("torch-zip", torch_zip),
    "dcp": ("dcp", distributed),
    "torch-zip-sharded": ("torch-zip-sharded", torch_sharded),
    "lightning": ("torch-zip", lightning),
    "dcp-grid": ("dcp", distributed_grid),
}
"""Each way that weights lie: its name in READY.json, and who writes it. Another one is another line here."""
ONE_OF_EACH = ("safetensors", "safetensors-sharded", "torch-zip", "dcp")
IN_PIECES = ("torch-zip-sharded", "lightning", "dcp-grid")
TEXTS = {"structured": BY_MAGNITUDE, "basic": SINGLE_WEIGHTS}


def published(store: ObjectStore, folder: Path, topology: Topology, way: str) -> Run:
    """A run whose one checkpoint lies that way; `folder` is for what is needed meanwhile."""
    format_, writer = FORMATS[way]
    objects = writer(topology, folder / "scratch")
    written = {path: (chunks, digest_of(chunks)) for path, chunks in objects.items()}
    run = publish(store, topology=topology, written=written, stored=(format_, {}))
    shutil.rmtree(folder / "scratch", ignore_errors=True)
    return run


def pruned_under_the_limit(run: Run, text: str) -> Snapshot:
    """A cycle whose workers are held to LIMIT, each of them, and did what they should."""
    made: list[Limited] = []

    def runtime(uri: str) -> Limited:
        made.append(Limited(uri, LIMIT))
        return made[0]

    ended = cycle(run.store, Settings.from_yaml(text + HELD), workers=1, runtime=runtime)
    assert {code for _, code, _ in made[0].ended} == {exits.DONE}, made[0].ended
    base = committed(ended)
    done = work(run.store, ended.cycle, base)
    assert set(done) == set(Phase)
    for phase, one in done.items():
        rate = one.bytes_read / one.seconds / 1e6
        print(f"{phase}: {one.bytes_read / 1e9:.2f} GB at {rate:.0f} MB/s, peak {one.peak_rss / 1e6:.0f} MB")
        assert one.peak_rss <= LIMIT
    return ended


def some_rows(rows: int) -> list[int]:
    some = {*range(0, rows, 97), *range(40), *range(rows // 8, rows // 8 + 40), rows - 1}
    return sorted(one for one in some if one < rows)


def written(run: Run, ended: Snapshot) -> Iterator[tuple[str, int, bytes, bytes]]:
    """(tensor, row, its bytes in the base, and in the candidate) for some rows of each tensor."""
    folder = layout.candidate(ended.cycle, committed(ended))
    for name, ref in read_index(run.store, run.prefix, run.metadata).items():
        rows, width = ref.shape[0], 4 * ref.shape[1]
        for row in some_rows(rows):
            at = ref.boxes[0].offset + row * width
            old, new = (run.store.get_range(place + ref.object, at, at + width) for place in (run.prefix, folder))
            yield name, row, old, new


def differs(run: Run, ended: Snapshot) -> dict[str, set[int]]:
    """Of some rows of each tensor, those that are not the base's in the candidate; all of them must be zero."""
    found: dict[str, set[int]] = {}
    for name, row, old, new in written(run, ended):
        if old != new:
            assert not any(new), (name, row)
            found.setdefault(name, set()).add(row)
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Emptied at once: pytest keeps its folders for three runs."""
    yield tmp_path
    shutil.rmtree(tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("way", [*ONE_OF_EACH, "safetensors on S3"])
def test_four_gigabytes_in_256_mb_a_worker(folder: Path, way: str) -> None:
    with store_for(folder, way) as store:
        four_gigabytes_in_256_mb_a_worker(store, folder, way.split()[0])


@contextmanager
def store_for(folder: Path, way: str) -> Iterator[ObjectStore]:
    if not way.endswith("on S3"):
        yield LocalStore(folder / "run")
        return
    with seaweedfs(folder / "seaweed") as server, patch.dict(os.environ, server.environment):
        yield open_store(f"s3://{server.bucket}/large")


def four_gigabytes_in_256_mb_a_worker(store: ObjectStore, folder: Path, way: str) -> None:
    topology = model(16, 8192, 8192)  # each tensor is 268 MB, more than a worker may hold
    run = published(store, folder, topology, way)
    assert run.metadata.num_params > 10**9
    assert run.metadata.num_bytes > 4 * 2**30
    ended = pruned_under_the_limit(run, BY_MAGNITUDE)
    assert ended.decision is not None
    (group,) = ended.decision.groups
    assert group.pruned == tuple(range(int(0.15 * 8192))), "the least rows"
    assert differs(run, ended) == {
        name: {row for row in {*range(0, 8192, 97), *range(40), *range(1024, 1064)} if row < int(0.15 * 8192)}
        for name in topology.parameters
    }


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_single_weights_of_four_gigabytes_in_256_mb_a_worker(folder: Path) -> None:
    """Their masks alone are 134 MB."""
    run = published(LocalStore(folder / "run"), folder, model(16, 8192, 8192), "safetensors")
    ended = pruned_under_the_limit(run, SINGLE_WEIGHTS)
    assert manifest_of(run.store, ended).weights_zeroed == int(0.15 * 16 * 8192 * 8192)
    least, kept = 0, 2**32
    for name, row, old, new in written(run, ended):
        was, is_ = np.frombuffer(old, "<u4"), np.frombuffer(new, "<u4")  # floats above zero are ordered as their bits
        gone = is_ == 0
        assert np.array_equal(was[~gone], is_[~gone]), (name, row)
        least, kept = max(least, was[gone].max(initial=0)), min(kept, was[~gone].min(initial=2**32 - 1))
    assert 0 < least <= kept < 2**32 - 1
    again = pruned_under_the_limit(run, SINGLE_WEIGHTS)  # it inherits masks as large as those that it makes
    assert again.ask.base > ended.ask.base
    assert manifest_of(run.store, again).weights_zeroed == 16 * int(0.2 * 8192 * 8192), "max_layer_removal binds"


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("way", "shape", "text"),
    [
        *itertools.product([*IN_PIECES, "safetensors on S3"], [(10_000, 15_000)], TEXTS),
        *itertools.product(["torch-zip", "dcp"], [(10_000, 15_000)], ["basic"]),
        *itertools.product(["dcp"], [(3, 50_000_000)], TEXTS),
    ],
    ids=str,
)
def test_a_tensor_of_600_mb_in_256_mb_a_worker(folder: Path, way: str, shape: tuple[int, int], text: str) -> None:
    with store_for(folder, way) as store:
        a_tensor_of_600_mb(store, folder, way.split()[0], shape, TEXTS[text])


def a_tensor_of_600_mb(store: ObjectStore, folder: Path, way: str, shape: tuple[int, int], text: str) -> None:
    topology = model(1, *shape)
    run = published(store, folder, topology, way)
    third = text.replace("0.15", "0.34") + "  safety_constraints: {min_channel_retention: 0.5}\n"
    ended = pruned_under_the_limit(run, third)
    dead = gone(masks_of_cycle(run.store, ended), topology)["layer00.weight"].reshape(shape)
    third_of = int(0.34 * shape[0])
    if text is BY_MAGNITUDE:
        assert dead.all(1).tolist() == [row < third_of for row in range(shape[0])]
    else:
        assert dead.sum() == int(0.34 * shape[0] * shape[1])
        assert dead[0].all() and not dead[-1].any(), "rows grow with their number"
    candidate = layout.candidate(ended.cycle, committed(ended))
    objects = {path: bytes(store.get(candidate + path)) for path in run.metadata.weights}
    base = torch_weights(topology)
    found = stored.loaded(FORMATS[way][0], objects, base, folder / "loaded")
    assert torch.equal(found["layer00.weight"], base["layer00.weight"].masked_fill(torch.from_numpy(dead), 0.0))


UNBOUNDED = {
    "a worker that holds a tensor": "data = bytearray(268_000_000)",
    "a worker that holds it as it comes": "data = [bytes(16 << 20) + bytes([n]) for n in range(17)]",
}


@pytest.mark.parametrize("code", UNBOUNDED.values(), ids=UNBOUNDED.keys())
def test_who_holds_a_tensor_is_ended(code: str) -> None:
    """The limit is one: else the tests above would show nothing."""
    with memory_limit(LIMIT) as limit:
        small = subprocess.run((sys.executable, "-c", "data = bytearray(100_000_000)"), preexec_fn=limit)
    assert small.returncode == 0
    with memory_limit(LIMIT) as limit:
        held = subprocess.run((sys.executable, "-c", code), preexec_fn=limit, capture_output=True, text=True)
    assert held.returncode == -9 or "MemoryError" in held.stderr


def test_a_worker_that_needs_more_than_its_limit_says_so(tmp_path: Path) -> None:
    """The very worker, under a limit that it cannot keep."""
    run = published(LocalStore(tmp_path / "run"), tmp_path, model(1, 4000, 5000), "safetensors")
    made: list[Limited] = []

    def runtime(uri: str) -> Limited:
        made.append(Limited(uri, 60_000_000))
        return made[0]

    ended = cycle(run.store, Settings.from_yaml(BY_MAGNITUDE + HELD), workers=1, runtime=runtime)
    assert ended.end is not None and ended.end.reason != "Pruned"
    assert exits.DONE not in {code for _, code, _ in made[0].ended}
