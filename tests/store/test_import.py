"""A checkpoint that kasmina never saw, on a folder and on a real S3 server: read where it lies, by everybody."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import builders
from commands import emrakul_run
from emrakul.finding import Finding
from emrakul.gc import Policy, collect
from emrakul.observe import Observer
from emrakul.rollback import Request, roll_back
from emrakul.verify import verify_run
from kasmina import PairDamaged, load_tip
from kasmina.foreign import adopt
from leyline import layout
from leyline.local import LocalStore
from leyline.log import Log
from leyline.messages import Candidate
from leyline.ready import read_ready
from leyline.reasons import Reason
from leyline.records import Kind, Publish
from leyline.s3 import S3Store
from leyline.store import NotLent, ObjectStore
from leyline.tensors import unpack
from servers import S3Server

WEIGHTS = builders.toy_weights(builders.toy_topology())
NOW = Policy(keep=0, age=timedelta(), grace=timedelta())


@pytest.fixture
def place(store: ObjectStore) -> ObjectStore:
    """A folder beside the run, with a sharded checkpoint as transformers writes it."""
    found = store.lender(f"{store.uri}-elsewhere/checkpoint-4000")
    for path, data in builders.sharded(WEIGHTS, 3).items():
        found.put_if_absent(path, data)
    return found


def objects(store: ObjectStore) -> dict[str, tuple[bytes, str]]:
    """What lies there, and as which object: a copy of the same bytes would be another."""
    return {head.key: (store.get(head.key), head.pin) for head in store.list("")}


def test_the_run_refers_to_the_objects_and_everybody_reads_them_there(store: ObjectStore, place: ObjectStore) -> None:
    before = objects(place)
    done = adopt(store, place.uri)
    assert (done.new, done.imported_from) == (True, place.uri)
    name = done.checkpoint
    assert name.startswith("4000-1-")
    assert {head.key for head in store.list("checkpoints/")} == {
        layout.checkpoint(name, "topology.json"),
        layout.checkpoint(name, layout.READY),
    }
    record = Log(store).tail().record
    assert isinstance(record.body, Publish) and record.body.imported_from == place.uri
    loaded = load_tip(store)
    for tensor_name, tensor in WEIGHTS.items():
        assert loaded[tensor_name].contiguous().reshape(-1).numpy().tobytes() == tensor.raw
    found = verify_run(store, Log(store), trust=None)
    assert not found.faults and found.bytes > sum(len(data) for data, _ in before.values())
    assert objects(place) == before


def test_the_same_import_again_is_the_same_record(store: ObjectStore, place: ObjectStore) -> None:
    first, newest = adopt(store, place.uri), Log(store).tail().record.n
    again = adopt(store, f"{place.uri}/")
    assert (again.record, again.checkpoint, again.new) == (first.record, first.checkpoint, False)
    second = adopt(store, place.uri, step=5000)
    assert second.record == newest + 1
    # a rollback raises the term, which is part of a checkpoint's name
    finding = Finding(Reason.ASKED, "back to the first")
    back = Request(id="back", strategy="named", to=first.record, finding=finding)
    roll_back(store, Log(store), back, trust=None)
    assert adopt(store, place.uri, step=5000).record == second.record
    assert adopt(store, place.uri, step=6000).checkpoint.startswith("6000-2-")
    assert [record.kind for record in Log(store).since(0)].count(Kind.OPEN) == 1


def test_a_cycle_of_it_is_basic_and_says_what_is_missing(
    store: ObjectStore, place: ObjectStore, tmp_path: Path
) -> None:
    before = objects(place)
    command = (sys.executable, "-m", "emrakul", "import", place.uri, store.uri, "--output", "json")
    done = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert done["checkpoint"] == Log(store).tail().record.checkpoint
    ended = emrakul_run(tmp_path, store.uri).end()
    assert (ended["exit"], ended["outcome"], ended["reason"]) == (0, "ValidatedOnly", "NoEvaluation"), ended["said"]
    assert "TrainingRun.start on this run" in ended["message"]
    (budget,) = ended["budgets"]
    assert budget["kind"] == "weight" and budget["achieved"] > 0
    masked = candidate(store, ended["cycle"])
    zeroed = 0
    for name, tensor in WEIGHTS.items():
        zero = masked[name].reshape(-1) == 0
        same = masked[name].reshape(-1) == np.frombuffer(tensor.raw, masked[name].dtype)
        assert (zero | same).all()
        zeroed += int((zero & ~same).sum())
        if len(tensor.shape) < 2 or name.startswith("embed"):
            assert same.all()
    assert zeroed == budget["achieved"]
    assert objects(place) == before


def candidate(store: ObjectStore, cycle: str) -> Mapping[str, Any]:
    """The candidate's tensors, as anybody reads safetensors."""
    folder = layout.candidate(cycle, 2)
    manifest = Candidate.parse(store.get(f"{folder}MANIFEST.json"), name="manifest")
    found: dict[str, Any] = {}
    for stored in manifest.objects:
        if stored.path.endswith(".safetensors"):
            found |= unpack(store.get(folder + stored.path), name=stored.path)[0]
    return found


def test_gc_never_deletes_what_was_imported(store: ObjectStore, place: ObjectStore) -> None:
    before = objects(place)
    old = adopt(store, place.uri).checkpoint
    for step in range(1, 9):  # the first is the baseline, the newest are within the rollback depth
        adopt(store, place.uri, step=step)
    done = collect(store, Log(store), NOW)
    assert done.retired and done.deleted == 2 * len(done.retired)
    assert objects(place) == before
    assert {name.split("/")[1] for name in objects(store) if name.startswith("checkpoints/")} >= {old}
    assert not verify_run(store, Log(store), trust=None).faults


def test_an_exchanged_object_is_found_by_its_digest(store: ObjectStore, place: ObjectStore) -> None:
    adopt(store, place.uri)
    path = "model-00002-of-00003.safetensors"
    data = place.get(path)
    place.delete(path)
    place.put_if_absent(path, data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(PairDamaged, match="not what its SHA-256 says"):
        load_tip(store)
    assert [key.rpartition("/")[2] for key in verify_run(store, Log(store), trust=None).faults] == [path]
    place.delete(path)
    with pytest.raises(PairDamaged, match="does not exist"):
        load_tip(store)


def test_a_run_reads_only_from_its_own_kind_of_store(s3: S3Store, local: LocalStore) -> None:
    with pytest.raises(Exception, match="another kind of store than the run file://"):
        adopt(local, s3.uri)
    with pytest.raises(Exception, match="another kind of store than the run s3://"):
        adopt(s3, local.uri)


def test_a_tenant_reads_only_below_its_prefixes(seaweed: S3Server, s3: S3Store) -> None:
    """The operator's store says no, whatever READY.json names, and the cycle ends before any worker starts."""
    place = s3.lender(f"{s3.uri}-elsewhere/checkpoint-1")
    place.put_if_absent("model.safetensors", builders.safetensors(WEIGHTS))
    name = adopt(s3, place.uri).checkpoint
    bucket, _, prefix = s3.uri.removeprefix("s3://").partition("/")
    held = S3Store(bucket, prefix, may_borrow=lambda uri: uri.startswith(f"{s3.uri}/"))
    with pytest.raises(NotLent, match="which no prefix of allowedRunPrefixes has"):
        read_ready(held, name, None)
    unusable = Observer(held, Log(held), "c", trust=None).checkpoint(name).unusable
    assert unusable is not None and unusable.reason is Reason.RUN_NOT_ALLOWED
    assert "add the prefix to allowedRunPrefixes" in unusable.sentence
