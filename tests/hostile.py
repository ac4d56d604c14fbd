"""Checkpoints and runs as nobody should publish them: real ones, changed, and named by a record like any other."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
from numpy.typing import NDArray

import builders
from commands import MANIFEST
from emrakul.cli import main
from leyline import layout, tensors
from leyline.crypt import KeyRing, encrypt
from leyline.digest import digest_bytes, sha256_hex
from leyline.log import Entry, Log
from leyline.messages import CheckpointMetadata, StoredObject
from leyline.ready import read_ready, seal_ready
from leyline.records import Draft, Publish
from leyline.store import ObjectStore

WEIGHTS = "model.safetensors"
IMPORTANCE = "importance.safetensors"
TOPOLOGY = "topology.json"

Objects = dict[str, bytes]


def ready(store: ObjectStore, name: str | None = None) -> CheckpointMetadata:
    """READY.json of a checkpoint, by default the tip's."""
    return read_ready(store, name or tip(store), None)


def tip(store: ObjectStore) -> str:
    """The tip's checkpoint."""
    found = Log(store).tail().state.tip_pair
    assert found is not None
    return found.checkpoint


def objects(store: ObjectStore, name: str | None = None) -> Objects:
    """What a checkpoint consists of, by path."""
    found = ready(store, name)
    return {one.path: store.get(layout.checkpoint(found.name, one.path)) for one in found.objects}


def key(store: ObjectStore, path: str) -> str:
    """Where an object of the tip's checkpoint lies."""
    return layout.checkpoint(tip(store), path)


def publish(
    store: ObjectStore,
    changed: Mapping[str, bytes] | None = None,
    *,
    of: str | None = None,
    missing: Collection[str] = (),
    statistics: Mapping[str, Any] | None = None,
    without_statistics: bool = False,
    ring: KeyRing | None = None,
    tampered: bool = False,
    shards: int = 1,
) -> Entry:
    """A checkpoint (by default the tip's) once more, as the next one, with other objects and a READY.json to them.

    `missing` is listed and not written; `statistics` are fields of ImportanceStats; `ring` encrypts them,
    and `tampered` changes what it wrote, with a digest that agrees: only the encryption can tell.
    """
    state = Log(store).tail().state
    last, before, held = state.tip_pair, ready(store, of), objects(store, of)
    assert last is not None and before.statistics is not None
    step = last.step + 10
    name = f"{step}-{state.term}-{step:08x}"
    here = {"checkpoint": name, "lineage": (before.name, *before.statistics.lineage), "step": step}
    stats = before.statistics.model_copy(update={**here, **(statistics or {})})
    if without_statistics:
        del held[IMPORTANCE]
    else:
        arrays, _ = tensors.unpack(held[IMPORTANCE], name=IMPORTANCE)
        held[IMPORTANCE] = _sealed(tensors.pack(arrays, {"importance": stats.canonical().decode()}), name, ring)
        if tampered:
            held[IMPORTANCE] = flipped(held[IMPORTANCE])
    layout_of_weights: dict[str, Any] = {}
    if shards > 1:
        parts = builders.sharded(_tensors(held.pop(WEIGHTS)), shards)
        layout_of_weights = {"format": "safetensors-sharded", "weights": tuple(parts)}
        held |= parts
    held |= changed or {}
    said = before.model_copy(
        update={
            "idempotency_key": name,
            "name": name,
            "step": step,
            "importance": None if without_statistics else IMPORTANCE,
            "statistics": None if without_statistics else stats,
            **layout_of_weights,
            "objects": tuple(StoredObject(path=path, digest=digest_bytes(data)) for path, data in held.items()),
        }
    )
    for path, data in {**held, layout.READY: seal_ready(said, ())}.items():
        if path not in missing:
            store.put_if_absent(layout.checkpoint(name, path), data)
    draft = Draft(
        id=name,
        checkpoint=name,
        masks=last.masks,
        baked=last.baked,
        evidence={layout.checkpoint(name, layout.READY): sha256_hex(seal_ready(said, ()))},
        body=Publish(step=step, epoch=said.epoch, term=state.term),
    )
    return Log(store).append(draft, base=state.n)


def _sealed(data: bytes, name: str, ring: KeyRing | None) -> bytes:
    if ring is None:
        return data
    path = layout.checkpoint(name, IMPORTANCE)
    return b"".join(encrypt([data], digest=digest_bytes(data), key=path, checkpoint=name, ring=ring))


def replace(store: ObjectStore, key: str, change: Callable[[bytes], bytes]) -> None:
    """What a disk or an intruder does: other bytes where nothing is ever overwritten."""
    data = store.get(key)
    store.delete(key)
    store.put_if_absent(key, change(data))


def flipped(data: bytes, at: int = -100) -> bytes:
    changed = bytearray(data)
    changed[at] ^= 0xFF
    return bytes(changed)


def reshaped(data: bytes, name: str, shape: list[int]) -> bytes:
    """A safetensors file whose header gives a tensor another shape."""
    return _rewritten(data, lambda header: header[name].update(shape=shape))


def lying(data: bytes) -> bytes:
    """A safetensors file whose header puts the last tensor behind the end of the file."""

    def beyond(header: dict[str, Any]) -> None:
        last = max((n for n in header if n != "__metadata__"), key=lambda n: header[n]["data_offsets"][1])
        begin, end = header[last]["data_offsets"]
        header[last].update(shape=[(end - begin) // 4 + 1000], data_offsets=[begin, end + 4000])

    return _rewritten(data, beyond)


def with_value(data: bytes, name: str, raw: bytes) -> bytes:
    """A safetensors file in which the first bytes of a tensor are these."""
    length, header = _header(data)
    at = 8 + length + header[name]["data_offsets"][0]
    return data[:at] + raw + data[at + len(raw) :]


def with_tensor(data: bytes, name: str, values: NDArray[np.float32]) -> bytes:
    """A safetensors file with one more tensor."""
    end = len(data) - 8 - _header(data)[0]
    entry = {"dtype": "F32", "shape": list(values.shape), "data_offsets": [end, end + values.nbytes]}
    return _rewritten(data, lambda header: header.update({name: entry})) + values.tobytes()


def _tensors(data: bytes) -> dict[str, builders.Tensor]:
    length, header = _header(data)
    header.pop("__metadata__", None)
    found = {}
    for name, entry in header.items():
        begin, end = (8 + length + offset for offset in entry["data_offsets"])
        found[name] = builders.Tensor(entry["dtype"], tuple(entry["shape"]), data[begin:end])
    return found


def _header(data: bytes) -> tuple[int, dict[str, Any]]:
    (length,) = struct.unpack("<Q", data[:8])
    return length, json.loads(data[8 : 8 + length])


def _rewritten(data: bytes, change: Callable[[dict[str, Any]], None]) -> bytes:
    length, header = _header(data)
    change(header)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


class Shell:
    """`emrakul run` and others in this process, workers in processes of their own; every answer is looked at."""

    def __init__(self, folder: Path, capture: pytest.CaptureFixture[str]) -> None:
        self._folder, self._capture = folder, capture
        self.sentence = ""
        """What the last command said went wrong."""

    def __call__(self, *arguments: str, code: int) -> dict[str, Any]:
        found = main([*arguments, "--output", "json"])
        out, error = self._capture.readouterr()
        said = [line for line in error.splitlines() if line.startswith("emrakul: ")]
        self.sentence = said[-1].removeprefix("emrakul: ") if said else ""
        assert found == code, (found, out, error)
        assert len(said) == (code != 0), error
        assert "Traceback" not in error
        return json.loads(out) if out else {}

    def run(
        self, store: ObjectStore, *arguments: str, code: int, more: str = "", structured: bool = True
    ) -> dict[str, Any]:
        """One cycle on the tip, on one worker; `more` are lines of settings, indented by four."""
        text = MANIFEST.format(run=store.uri, structured=str(structured).lower(), more=more)
        return self("run", self.manifest(text), "--workers", "1", *arguments, code=code)

    def manifest(self, text: str) -> str:
        """A file with this text."""
        path = self._folder / "cycle.yaml"
        path.write_text(text)
        return str(path)

    def ended(self, store: ObjectStore, reason: str, *arguments: str, code: int, **how: Any) -> str:
        """The sentence of a cycle that ended for this reason, its tip and masks as they were."""
        before = Log(store).tail().state
        found = self.run(store, *arguments, code=code, **how)
        after = Log(store).tail()
        assert f"{found['outcome']}/{found['reason']}" == reason, found["message"]
        assert after.record.message == found["message"]
        assert (after.state.tip, after.state.live) == (before.tip, None)
        assert self.sentence == f"{reason}: {found['message']}"
        return str(found["message"])


def folder(store: ObjectStore) -> Path:
    return Path(urlsplit(store.uri).path)


def keys(store: ObjectStore) -> set[str]:
    return {head.key for head in store.list("")}


WORK = re.compile(r"log/.*|state/.*|reports/results-.*|cycles/[^/]+/(requests-0\.json|(started|attempts|responses)/.*)")
"""What a cycle writes before it has decided anything, and at its end."""


def only_work(before: set[str], store: ObjectStore) -> bool:
    """Nothing was written since but records and what workers say to each other: no decision, no candidate, no masks."""
    return all(WORK.fullmatch(name) for name in keys(store) - before)
