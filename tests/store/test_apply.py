"""The apply worker against a real S3 server: the same bytes as on the local store, whoever writes them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np

import builders
from leyline import layout
from leyline.local import LocalStore
from leyline.messages import WorkLimits
from leyline.s3 import S3Store
from leyline.store import CHUNK, ObjectStore

PRUNED = {"conv1": (1, 6), "attn": (2,)}
CYCLE = "c1-0123456789"


def publish(store: ObjectStore) -> None:
    """A checkpoint of four shards, one of them longer than a part."""
    topology = builders.toy_topology()
    weights = builders.toy_weights(topology)
    weights["buffer"] = builders.tensor(np.random.default_rng(0).random(CHUNK // 4 + 100), "F32")
    run = builders.make_run(store, weights=weights, shards=4, slots=builders.toy_slots(topology))
    builders.decide(run, PRUNED, limits=WorkLimits(beat_seconds=1))


def start(store: ObjectStore, *, worker: int, of: int) -> subprocess.Popen[bytes]:
    cycle = f"{store.uri}/cycles/{CYCLE}"
    place = ["--cycle", cycle, "--base", "1", "--worker", str(worker), "--of", str(of), "--launch", "0"]
    return subprocess.Popen([sys.executable, "-m", "kasmina.apply", *place])


def candidate(store: ObjectStore) -> dict[str, bytes]:
    return {head.key: store.get(head.key) for head in store.list(layout.candidate(CYCLE, 1))}


def test_the_candidate_on_s3_is_the_one_on_the_local_store(s3: S3Store, tmp_path: Path) -> None:
    local = LocalStore(tmp_path / "run")
    for store, of in ((local, 1), (s3, 3)):
        publish(store)
        workers = [start(store, worker=i, of=of) for i in range(of)]
        assert [worker.wait(timeout=60) for worker in workers] == [0] * of
    assert candidate(local) == candidate(s3)
    assert len(candidate(s3)) == 8
