"""Reading, writing and writing back one object on SeaweedFS and on the local store, against the plainest way."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import numpy as np
from cycles import served
from lines import Line, Sample, alternating
from raw import hashed, raw_of
from sizes import Size

from kasmina.formats import read_recognised, recognise
from kasmina.formats.stream import stream
from kasmina.rewrite import copy_masked, zeroes_of
from leyline.digest import digest_bytes
from leyline.ids import parameter_uuid
from leyline.masks import Masks
from leyline.messages import StoredObject
from leyline.open import open_store
from leyline.store import CHUNK
from leyline.tensors import pack
from leyline.topology import Group, Kind, Member, Parameter

UNIT = "MB/s"
WIDTH = 1024
SHARE = 0.03
"""Of the columns, and of the rows, that the masks prune: every chunk is touched."""


def lines(size: Size, folder: Path) -> Iterator[Line]:
    here = folder / "transfer"
    with served(here) as server:
        yield from on_store(size, f"s3://{server.bucket}/transfer", here, "SeaweedFS")
    try:
        yield from on_store(size, str(here), here, "local store")
    finally:
        shutil.rmtree(here, ignore_errors=True)


def on_store(size: Size, uri: str, folder: Path, kind: str) -> Iterator[Line]:
    group = f"one object of {size.transfer_bytes / 1e6:,.0f} MB, {kind}"
    store, plain = open_store(uri), raw_of(uri, folder)
    rows = size.transfer_bytes // (4 * WIDTH)
    values = np.random.default_rng(0).standard_normal((rows, WIDTH), dtype=np.float32)
    data = pack({"w": values}, {})
    digest = digest_bytes(data)
    del values
    chunks = [data[at : at + CHUNK] for at in range(0, len(data), CHUNK)]
    numbers = count()
    written: list[str] = []
    key = "checkpoints/source/model.safetensors"
    store.put_stream(key, chunks, size=len(data))
    refs = read_recognised(store, "checkpoints/source/", recognise(store, "checkpoints/source/"))
    zeroes = zeroes_of(refs, pruned(rows), slots=False)

    def line(what: str, reference: str, samples: list[Sample], goal: float | None = None) -> Line:
        against, figure = (sample.per(len(data) / 1e6) for sample in samples)
        return Line(
            group=group, what=what, unit=UNIT, figure=figure, reference=f"{reference}: {plain.name}", against=against,
            target=f"at least {goal:.0%}" if goal else "",
            reached=figure.median >= goal * against.median if goal else None,
        )  # fmt: skip

    def read() -> None:
        for _ in stream(store, key, digest, ahead=2):
            pass

    def new(folder: str) -> str:
        """A key that is not written yet; what was written under the one before is thrown away."""
        while written:
            store.delete(written.pop())
        written.append(f"{folder}/{next(numbers)}/model.safetensors")
        return written[0]

    def write() -> None:
        store.put_stream(new("ours"), chunks, size=len(data))

    def write_plain() -> None:
        plain.write(new("plain"), len(data))

    def write_back() -> None:
        copy_masked(
            store, source="checkpoints/source/", target=new("ours").removesuffix("model.safetensors"),
            stored=StoredObject(path="model.safetensors", digest=digest), zeroes=zeroes, ahead=2,
        )  # fmt: skip

    def write_back_plain() -> None:
        plain.read(key, len(data))
        write_plain()

    def write_back_hashed() -> None:
        write_back_plain()
        hashed(2 * len(data))

    def read_plain() -> None:
        plain.read(key, len(data))

    read()
    yield line("read, warm", "get", alternating(size.repeats, read_plain, read))
    yield line("read, cold", "get", alternating(size.repeats, read_plain, read, before=plain.evict))
    yield line("write", "put", alternating(min(3, size.repeats), write_plain, write))
    samples = alternating(min(3, size.repeats), write_back_plain, write_back)
    yield line("write back, masked and hashed", "get, then put", samples, goal=0.85 if kind == "SeaweedFS" else None)
    samples = alternating(min(3, size.repeats), write_back_hashed, write_back)
    yield line("write back, hashing counted", "get, SHA-256, put, SHA-256", samples)


def pruned(rows: int) -> Masks:
    """A producer's rows of one group and a consumer's columns of another."""
    gone = np.random.default_rng(0)
    parameter = Parameter(uuid=parameter_uuid("w", (rows, WIDTH), "bench"), shape=(rows, WIDTH))
    groups = {
        id_: Group(
            id=id_, kind=Kind.CHANNEL, units=units, gates=("w",), members=(Member(parameter="w", role=role, axis=axis),)
        )
        for id_, units, role, axis in (("rows", rows, "producer", 0), ("columns", WIDTH, "consumer", 1))
    }
    units = {id_: gone.random(group.units) >= SHARE for id_, group in groups.items()}
    return Masks(model_id="bench", groups=groups, units=units, parameters={"w": parameter})
