"""Publishing: what is written, in which order it counts, and what refuses it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from safetensors.torch import load_file, load_model
from torch import nn

from drafts import rolled_back
from elesh.importance import Importance
from kasmina import ImportanceTracker, IsolationLeak, PublishRefused, TrainingRun, trace_topology
from kasmina.formats import bind, read_index, read_slots
from kasmina.tensor_files import TensorFile, digest_of
from leyline import layout, tensors
from leyline.crypt import DataKey, KeyRing, WrongKey
from leyline.digest import digest_bytes, sha256_hex
from leyline.envelope import SigningKey, Trust, Untrusted
from leyline.local import LocalStore
from leyline.log import Log, verify
from leyline.messages import ImportanceStats
from leyline.model import Malformed
from leyline.ready import read_ready
from leyline.store import CHUNK, Unreachable
from trainers import MODEL, Tiny, Trainer, X, Y, equal, everything, prune, start, topology
from wrapped import Failing, Killed, Mortal, Wrapped


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "run")


def published(store: LocalStore, **options: object) -> tuple[Trainer, str]:
    """A trainer that has trained three steps and published; the checkpoint's name."""
    trainer = start(store)
    trainer.train(3)
    return trainer, trainer.publish(3, **options).record.id


def keys(store: LocalStore, prefix: str = "") -> set[str]:
    return {head.key for head in store.list(prefix)}


def test_a_checkpoint_holds_what_ready_says(store: LocalStore) -> None:
    trainer, name = published(store, evaluation=(X, Y))
    metadata = read_ready(store, name, trust=None)
    for stored in metadata.objects:
        assert digest_bytes(store.get(layout.checkpoint(name, stored.path))) == stored.digest
    listed = {layout.checkpoint(name, stored.path) for stored in metadata.objects}
    assert keys(store, "checkpoints/") == listed | {layout.checkpoint(name, layout.READY)}
    assert (metadata.step, metadata.epoch, metadata.term, metadata.baked) == (3, 0, 1, None)
    assert metadata.num_params == sum(parameter.numel() for parameter in trainer.model.parameters())
    record = Log(store).tail().record
    ready = layout.checkpoint(name, layout.READY)
    assert record.evidence == {ready: sha256_hex(store.get(ready))}


def test_the_other_roles_can_read_it(store: LocalStore) -> None:
    _, name = published(store, evaluation=(X, Y))
    metadata = read_ready(store, name, trust=None)
    index = read_index(store, layout.checkpoint(name), metadata)
    assert bind(index, topology()).keys() == topology().parameters.keys()
    slots = read_slots(store, layout.checkpoint(name), metadata)
    assert {"first.weight/exp_avg", "first.weight/exp_avg_sq", "first.weight/step"} <= slots.keys()
    importance = Importance.open(store, metadata, topology(), None)
    assert importance.stats.checkpoint == name
    assert importance.stats.sampled_steps == 3
    group = topology().groups[0]
    assert importance.group(group, np.ones(group.units, dtype=np.bool_)) is not None


def test_safetensors_itself_reads_the_weights_with_ties_written_once(store: LocalStore) -> None:
    trainer, name = published(store)
    path = Path(store.uri[7:]) / layout.checkpoint(name, "model.safetensors")
    assert not {"head.bias", "twin"} <= load_file(path).keys()
    model = Tiny()
    load_model(model, path)
    assert equal(model.state_dict(), trainer.model.state_dict())


def test_large_weights_become_shards_with_an_index(store: LocalStore) -> None:
    trainer = start(store, shard_bytes=600)
    name = trainer.publish(0).record.id
    metadata = read_ready(store, name, trust=None)
    assert metadata.format == "safetensors-sharded"
    assert len(metadata.weights) > 2
    index = read_index(store, layout.checkpoint(name), metadata)
    assert bind(index, topology()).keys() == topology().parameters.keys()
    assert equal(everything(start(store, seed=5)), everything(trainer))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool])
def test_tensors_are_streamed_in_chunks_whatever_their_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    big = torch.arange(CHUNK // 2 + 5).to(dtype)
    file = TensorFile({"b": big, "turned": big[:6].reshape(2, 3).t(), "scalar": big[3], "none": big[:0]})
    pieces = list(file)
    assert {len(piece) for piece in pieces[:-1]} <= {CHUNK}
    data = b"".join(pieces)
    assert len(data) == file.size
    assert digest_of(file) == digest_bytes(data)
    (tmp_path / "file").write_bytes(data)
    found = load_file(tmp_path / "file")
    assert all(torch.equal(found[name], tensor) for name, tensor in file.tensors.items())


def test_a_tensor_that_safetensors_cannot_hold_is_named() -> None:
    with pytest.raises(Malformed, match=r"tensor wave is torch\.complex128"):
        list(TensorFile({"wave": torch.zeros(2, dtype=torch.complex128)}))


def test_the_same_state_is_the_same_checkpoint(store: LocalStore) -> None:
    trainer, name = published(store)
    before = keys(store)
    assert trainer.publish(3).record.id == name
    assert keys(store) == before
    trainer.train(1)
    assert trainer.publish(3).record.id != name


def publish_two(store: Wrapped) -> Trainer:
    trainer = start(store)
    trainer.train(2)
    trainer.publish(2)
    return trainer


@pytest.mark.parametrize("before", [True, False])
def test_killed_at_any_write_the_next_start_finishes(tmp_path: Path, before: bool) -> None:
    counted = Wrapped(LocalStore(tmp_path / "counted"))
    trainer = publish_two(counted)
    for k in range(1, counted.seen["put"] + 1):
        store = LocalStore(tmp_path / f"run-{k}")
        mortal = Mortal(store, at=k, before=before)
        with pytest.raises(Killed):
            publish_two(mortal)
        second = start(store)
        if second.run.resumed is None:
            second.train(2)
            second.publish(2)
        assert equal(everything(second), everything(trainer))
        state = Log(store).tail().state
        assert [pair.step for pair in state.pairs] == [2]
        list(verify(Log(store)))


def test_a_lost_answer_and_a_second_try_are_one_record(store: LocalStore) -> None:
    start(store)
    lossy = Failing(store, Unreachable("the answer was lost"), prefix="log/0/3", writes=True, times=1)
    trainer = start(lossy)  # record 2
    with pytest.raises(Unreachable):
        trainer.publish(1)
    assert not trainer.run.sync().error
    assert trainer.publish(1).record.n == 3
    assert Log(store).tail().record.n == 3


def test_a_rollback_between_sync_and_publish_refuses_the_publish(store: LocalStore) -> None:
    trainer, _ = published(store)
    trainer.train(1)
    trainer.publish(4)
    assert not trainer.run.sync().restart
    Log(store).append(rolled_back(2), base=0)
    trainer.train(1)
    with pytest.raises(PublishRefused, match="rolled back"):
        trainer.publish(5)
    assert Log(store).tail().state.tip == 2
    assert trainer.run.sync().restart
    loaded = trainer.run.load()
    assert loaded is not None
    assert loaded.step == 3
    assert trainer.publish(5).state.tip_pair.parent == 2  # type: ignore[union-attr]


def test_an_older_trainer_is_fenced(store: LocalStore) -> None:
    old, _ = published(store)
    new = start(store)
    with pytest.raises(PublishRefused, match="opened by another trainer"):
        old.publish(4)
    assert old.run.sync().fenced
    with pytest.raises(PublishRefused, match="another trainer"):
        old.run.load()
    new.publish(4)


def test_masks_that_come_while_publishing_make_the_checkpoint_provisional(store: LocalStore) -> None:
    class Late(Wrapped):
        def put_if_absent(self, key: str, data: bytes | bytearray) -> bool:
            if key.endswith(layout.READY) and "checkpoints/4-" in key:
                prune(store, {0: [1]})
            return super().put_if_absent(key, data)

    published(store)
    trainer = start(Late(store))
    trainer.train(1)
    pair = trainer.publish(4).state.tip_pair
    assert pair is not None
    assert pair.provisional
    assert pair.masks is not None
    assert pair.baked is None
    assert trainer.run.sync().masks == pair.masks
    trainer.train(1)
    pair = trainer.publish(5).state.tip_pair
    assert pair is not None
    assert not pair.provisional
    assert pair.baked == pair.masks


class TwoDomains(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.host = nn.Conv2d(1, 4, 3)
        self.out = nn.Linear(4, 3)
        self.seed = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.host(x)).mean((2, 3))
        return torch.cat([self.out(y), self.seed(y)], 1)


def test_a_leak_refuses_the_publish_and_names_the_parameter(store: LocalStore) -> None:
    model = TwoDomains()
    tracker = ImportanceTracker(model, trace_topology(model, X[:2], model_id=MODEL, seeds=["seed"]), sample_every=1)
    run = TrainingRun.start(store, model=model, model_id=MODEL, tracker=tracker)
    with tracker.step(len(X)):
        loss = model(X)[:, 3:].square().mean()  # the seed's loss, and nobody detached the host
        tracker.backward(loss, domain="seed")
    before = keys(store)
    with pytest.raises(IsolationLeak, match=r"host\.(weight|bias)"):
        run.publish(step=1, epoch=0)
    assert keys(store) == before


def test_statistics_are_encrypted_where_a_data_key_is_given(store: LocalStore) -> None:
    ring = KeyRing(DataKey(b"k" * 32))
    trainer = start(store, ring=ring)
    trainer.train(3)
    name = trainer.publish(3).record.id
    metadata = read_ready(store, name, trust=None)
    assert b"odd/abs" not in store.get(layout.checkpoint(name, "importance.safetensors"))
    assert Importance.open(store, metadata, topology(), ring).stats == metadata.statistics
    with pytest.raises(WrongKey):
        Importance.open(store, metadata, topology(), KeyRing(DataKey(b"x" * 32)))
    assert trainer.publish(3).record.id == name


def test_ready_and_record_are_signed_by_the_trainer(store: LocalStore) -> None:
    key, other = SigningKey(Ed25519PrivateKey.generate()), SigningKey(Ed25519PrivateKey.generate())
    trust = Trust({"trainer": (key.private.public_key(),)})
    name = start(store, keys=[key], trust=trust).publish(1).record.id
    assert read_ready(store, name, trust=trust).name == name
    with pytest.raises(Untrusted):
        read_ready(store, name, trust=Trust({"trainer": (other.private.public_key(),)}))
    with pytest.raises(Untrusted):
        start(store, keys=[other], trust=trust)


def test_lineage_and_refreshed_statistics_are_told(store: LocalStore) -> None:
    trainer, first = published(store)
    trainer.train(2)

    def loss(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    name = trainer.publish(5, refresh=20, data=(loss, [(X, Y)])).record.id
    data = store.get(layout.checkpoint(name, "importance.safetensors"))
    stats = ImportanceStats.parse(tensors.unpack(data, name=name)[1]["importance"].encode(), name=name)
    assert (stats.source, stats.samples, stats.lineage, stats.step) == ("refreshed", 20, (first,), 5)
    with pytest.raises(ValueError, match="refresh needs"):
        trainer.publish(6, refresh=20)


def test_a_report_travels_with_the_next_publish_and_judges_itself(store: LocalStore) -> None:
    trainer = start(store)
    said = [
        trainer.run.report(step=step, epoch=0, loss=loss) for step, loss in enumerate([1.0, 1.1, 1.5, float("nan")])
    ]
    assert [report.packet.state for report in said] == ["unknown", "stable", "unstable", "unstable"]
    assert not any(report.error for report in said)
    trainer.run.report(step=9, epoch=0, loss=0.5, correct=9, n=10)
    entry = trainer.publish(9)
    assert json.loads(store.get(layout.report(1, 9)))["correct"] == 9
    assert entry.record.body.report.state == "stable"  # type: ignore[union-attr]
    assert entry.state.tip_pair.accuracy == 0.9  # type: ignore[union-attr]
    assert Log(store).tail().record == entry.record


def test_a_report_that_cannot_be_stored_says_so_and_nothing_else(store: LocalStore) -> None:
    start(store)
    trainer = start(Failing(store, Unreachable("no answer"), prefix="reports/", writes=True))
    assert trainer.run.report(step=1, epoch=0, loss=1.0).error == "no answer"


def test_other_ranks_publish_nothing(store: LocalStore) -> None:
    published(store)
    before = keys(store)
    second = start(store, rank=1)
    with pytest.raises(ValueError, match="rank 1 publishes nothing"):
        second.publish(4)
    assert keys(store) == before


def test_waiting_ends_with_the_cycle_or_with_the_time(store: LocalStore) -> None:
    trainer, _ = published(store)
    assert trainer.run.wait(timeout=0.01) is None
    prune(store, {0: [2]})
    end = trainer.run.wait(timeout=5)
    assert end is not None
    assert end.body.kind == "prune"
    assert trainer.run.sync().masks == end.masks
