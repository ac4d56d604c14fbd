"""Loading: bit for bit, around what is damaged, and never around what is only out of reach."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from torch import nn
from torch.optim.swa_utils import AveragedModel

import builders
from drafts import admitted, masks_of, pruned, published, rolled_back
from kasmina import (
    ModelDoesNotFit,
    NoLoadableCheckpoint,
    PairDamaged,
    PublishRefused,
    TrainingRun,
    load_tip,
    trace_topology,
)
from kasmina.formats import stream
from kasmina.pair import read_masks
from leyline import layout
from leyline.crypt import DATA_KEY, DataKey, KeyRing, WrongKey
from leyline.digest import ObjectDigest, sha256_hex
from leyline.envelope import SigningKey, Trust, Untrusted
from leyline.local import LocalStore
from leyline.log import Log, verify
from leyline.store import NotFound, ObjectStore, Refused, StoreError, Unreachable
from trainers import MODEL, Tiny, Trainer, X, Y, equal, everything, prune, start, topology
from wrapped import Failing, Killed, Mortal, Wrapped

WEIGHTS = "model.safetensors"


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "run")


def two_checkpoints(store: LocalStore) -> tuple[Trainer, list[str]]:
    """Records 2 and 3, at steps 2 and 4; the trainer stands at step 4."""
    trainer = start(store)
    names = []
    for step in (2, 4):
        trainer.train(2)
        names.append(trainer.publish(step).record.id)
    return trainer, names


def damage(store: LocalStore, key: str) -> None:
    """One byte in the middle of the object is another one."""
    data = bytearray(store.get(key))
    data[len(data) // 2] ^= 1
    store.delete(key)
    store.put_if_absent(key, data)


def length(store: LocalStore) -> int:
    return Log(store).tail().record.n


def dead_elements(trainer: Trainer, store: LocalStore) -> dict[str, torch.Tensor]:
    """Every pruned element of weights and slots."""
    ref = Log(store).tail().state.tip_pair.masks  # type: ignore[union-attr]
    assert ref is not None
    masks = read_masks(store, ref)
    found = {}
    for key, tensor in everything(trainer).items():
        dead = masks.dead(key.partition("/")[0])
        if dead is not None and tuple(tensor.shape) == dead.shape:
            found[key] = tensor[torch.from_numpy(dead.full())]
    return found


# --- what comes back ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_restart_goes_on_bit_for_bit(store: LocalStore, dtype: torch.dtype) -> None:
    first = start(store, dtype=dtype)
    first.train(3)
    first.publish(3)
    second = start(store, seed=9, dtype=dtype)
    assert second.run.resumed is not None
    assert (second.run.resumed.step, second.run.resumed.epoch) == (3, 0)
    assert equal(everything(first), everything(second))
    assert first.tracker.state() == second.tracker.state()
    first.train(2)
    second.train(2)
    assert equal(everything(first), everything(second))


def test_a_new_run_has_nothing_to_resume(store: LocalStore) -> None:
    trainer = start(store)
    assert trainer.run.resumed is None
    with pytest.raises(NotFound, match="publish one first"):
        load_tip(store)


def test_fp32_moments_masters_and_averages_of_bf16_weights_come_back(store: LocalStore) -> None:
    def build(seed: int) -> tuple[nn.Module, torch.optim.Optimizer, dict[str, torch.Tensor], nn.Module, TrainingRun]:
        torch.manual_seed(seed)
        model = Tiny().to(torch.bfloat16)
        master = {name: p.detach().float().requires_grad_() for name, p in model.named_parameters()}
        optimizer = torch.optim.AdamW(master.values(), lr=0.01)
        average = AveragedModel(model)
        run = TrainingRun.start(
            store,
            model=model,
            model_id=MODEL,
            optimizer=optimizer,
            topology=topology(),
            ema=[average],
            fp32_master=master,
        )
        return model, optimizer, master, average, run

    model, optimizer, master, average, run = build(0)
    for tensor in master.values():
        tensor.grad = torch.randn_like(tensor)
    optimizer.step()
    average.update_parameters(model)  # type: ignore[attr-defined]
    run.publish(step=1, epoch=0)
    model2, optimizer2, master2, average2, _ = build(1)
    assert equal(model.state_dict(), model2.state_dict())
    assert equal(average.state_dict(), average2.state_dict())
    for name, tensor in master.items():
        assert torch.equal(tensor, master2[name])
        assert equal(optimizer.state[tensor], optimizer2.state[master2[name]])


def test_numbers_in_optimizer_slots_stay_numbers(store: LocalStore) -> None:
    class Counting(torch.optim.SGD):
        def step(self, closure: None = None) -> None:  # type: ignore[override]
            super().step()
            for group in self.param_groups:
                for parameter in group["params"]:
                    state = self.state[parameter]
                    state["step"], state["rate"] = state.get("step", 0) + 1, 0.25

    def build() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = Tiny()
        optimizer = Counting(model.parameters(), lr=0.1)
        held = TrainingRun.start(store, model=model, model_id=MODEL, optimizer=optimizer, topology=topology())
        if held.resumed is None:
            model(X).sum().backward()
            optimizer.step()
            held.publish(step=1, epoch=0)
        return model, optimizer

    build()
    model, optimizer = build()
    state = optimizer.state[next(model.parameters())]
    assert (state["step"], type(state["step"]), state["rate"]) == (1, int, 0.25)


def test_another_model_is_refused_before_anything_is_changed(store: LocalStore) -> None:
    trainer, _ = two_checkpoints(store)
    torch.manual_seed(3)
    model = Tiny()
    model.head = nn.Linear(4, 4)
    model.twin = model.head.bias
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = trace_topology(model, X[:2], model_id=MODEL)
    with pytest.raises(ModelDoesNotFit, match=r"(head\.\w+|twin) has shape"):
        TrainingRun.start(store, model=model, model_id=MODEL, topology=found)
    assert equal(model.state_dict(), before)
    assert length(store) == 3, "the run was not opened"
    trainer.publish(4)  # so whoever trains it was not fenced


def test_a_candidate_of_another_model_is_refused_before_the_run_is_opened(store: LocalStore) -> None:
    two_checkpoints(store)
    prune(store, {0: [3]})
    before = length(store)
    with pytest.raises(ModelDoesNotFit, match=r"first\.\w+, which this model does not have"):
        TrainingRun.start(store, model=nn.Linear(2, 2), model_id=MODEL, topology=topology())
    assert length(store) == before


def test_looking_whether_the_tip_fits_reads_no_weights(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    two_checkpoints(store)
    read: list[str] = []

    def counted(store: ObjectStore, key: str, digest: ObjectDigest, **options: Any) -> Iterator[bytes]:
        read.append(key.rpartition("/")[2])
        return stream(store, key, digest, **options)

    monkeypatch.setattr("kasmina.pair.stream", counted)
    start(store)
    assert read == [WEIGHTS, "optimizer.safetensors"], "each once"


@pytest.mark.parametrize(("what", "half"), [(layout.READY, False), (WEIGHTS, False), ("tracker.safetensors", True)])
def test_a_load_that_changed_nothing_is_told_from_one_that_ended_in_the_middle(
    store: LocalStore, what: str, half: bool
) -> None:
    _, names = two_checkpoints(store)
    away = Failing(store, Unreachable("away"), prefix=layout.checkpoint(names[1], what), times=0)
    trainer = start(away)
    trainer.train(1)
    before = everything(trainer)
    away.times = 1
    with pytest.raises(Unreachable):
        trainer.run.load()
    assert (trainer.run.half_loaded, equal(everything(trainer), before)) == (half, not half)
    trainer.run.load()
    assert not trainer.run.half_loaded


# --- masks ----------------------------------------------------------------------------------------------------------


def test_sync_brings_masks_onto_weights_and_moments(store: LocalStore) -> None:
    trainer, _ = two_checkpoints(store)
    assert trainer.run.sync().masks is None
    end = prune(store, {0: [1, 4], 1: [2]})
    assert all(bool(tensor.any()) for key, tensor in dead_elements(trainer, store).items() if key == "first.weight")
    assert trainer.run.sync().masks == end.record.masks
    dead = dead_elements(trainer, store)
    assert {
        "first.weight",
        "norm.bias",
        "second.weight",
        "first.weight/exp_avg",
        "second.weight/exp_avg_sq",
    } <= dead.keys()
    assert not any(bool(tensor.any()) for tensor in dead.values())
    assert trainer.run.sync().masks is None


def test_sync_without_news_is_one_get(store: LocalStore) -> None:
    two_checkpoints(store)
    counted = Wrapped(store)
    trainer = start(counted)
    counted.seen.clear()
    assert trainer.run.sync().record == 4
    assert counted.seen == {"get": 1}


def test_all_ranks_take_the_masks_of_the_same_record(store: LocalStore) -> None:
    two_checkpoints(store)
    other = start(store, rank=1)
    at = length(store)
    prune(store, {0: [1]})
    assert other.run.sync(at=at).masks is None
    assert other.run.sync(at=length(store)).masks is not None


def test_masked_weights_and_slots_stay_zero_for_a_hundred_steps(store: LocalStore) -> None:
    two_checkpoints(store)
    prune(store, {0: [1, 4], 1: [0]})
    trainer = start(store)
    trainer.train(100)
    dead = dead_elements(trainer, store)
    assert len(dead) > 10
    assert not any(bool(tensor.any()) for tensor in dead.values())
    accuracy = (trainer.model(X).argmax(1) == Y).float().mean()
    assert accuracy > 0.5
    assert trainer.publish(104).state.tip_pair.provisional is False  # type: ignore[union-attr]


def test_a_candidate_loads_the_same_from_its_objects_or_from_base_and_masks(store: LocalStore) -> None:
    two_checkpoints(store)
    prune(store, {0: [3]})
    from_candidate = everything(start(store))
    folder = Log(store).tail().state.tip_pair.candidate  # type: ignore[union-attr]
    assert folder is not None
    damage(store, folder + WEIGHTS)
    before = length(store)
    assert equal(everything(start(store)), from_candidate)
    assert length(store) == before + 1  # an open, no rollback
    store.delete(folder + "MANIFEST.json")
    assert equal(everything(start(store)), from_candidate)


def test_a_provisional_tip_loads_with_its_masks_applied(store: LocalStore) -> None:
    trainer, _ = two_checkpoints(store)
    prune(store, {0: [2]})
    assert trainer.publish(6).state.tip_pair.provisional  # type: ignore[union-attr]
    second = start(store)
    assert second.run.resumed is not None
    assert second.run.resumed.step == 6
    assert not any(bool(tensor.any()) for tensor in dead_elements(second, store).values())
    weights = load_tip(store)
    assert torch.equal(weights["first.weight"], second.model.state_dict()["first.weight"])


# --- damage ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", [WEIGHTS, "optimizer.safetensors", "tracker.safetensors", layout.READY])
@pytest.mark.parametrize("gone", [True, False])
def test_a_damaged_tip_is_rolled_back_by_itself(store: LocalStore, what: str, gone: bool) -> None:
    _, names = two_checkpoints(store)
    key = layout.checkpoint(names[1], what)
    store.delete(key) if gone else damage(store, key)
    trainer = start(store)
    assert trainer.run.resumed is not None
    assert (trainer.run.resumed.step, trainer.run.resumed.record) == (2, 2)
    assert what in trainer.run.resumed.rolled_back
    state = Log(store).tail().state
    assert (state.tip, [pair.record for pair in state.pairs if pair.condemned]) == (2, [3])
    assert trainer.publish(4).state.tip == length(store)
    list(verify(Log(store)))


def test_a_damaged_header_is_damage_and_not_another_model(store: LocalStore) -> None:
    _, names = two_checkpoints(store)
    key = layout.checkpoint(names[1], WEIGHTS)
    data = store.get(key)
    store.delete(key)
    store.put_if_absent(key, data[:9] + b"!" + data[10:])
    assert start(store).run.resumed.step == 2  # type: ignore[union-attr]


def test_what_is_missing_once_is_read_again(store: LocalStore) -> None:
    first, names = two_checkpoints(store)
    key = layout.checkpoint(names[1], WEIGHTS)
    once = Failing(store, NotFound("not yet"), prefix=key, times=1)
    second = start(once)
    assert once.times == 0
    assert second.run.resumed.rolled_back == ""  # type: ignore[union-attr]
    assert equal(everything(first), everything(second))


def test_objects_that_loading_does_not_need_may_be_gone(store: LocalStore) -> None:
    first, names = two_checkpoints(store)
    store.delete(layout.checkpoint(names[1], "importance.safetensors"))
    assert equal(everything(start(store)), everything(first))


def test_masks_that_do_not_fit_roll_back(store: LocalStore) -> None:
    two_checkpoints(store)
    foreign = builders.toy_topology().model_copy(update={"model_id": MODEL})
    data = builders.masks_of(foreign, {"conv1": [1]}).to_bytes()
    ref = masks_of(3, digest=sha256_hex(data))
    store.put_if_absent(ref.path, data)
    log = Log(store)
    log.append(admitted(3), base=3)
    log.append(pruned(3, masks=ref), base=3)
    trainer = start(store)
    assert trainer.run.resumed is not None
    assert trainer.run.resumed.record == 3
    assert "which this model does not have" in trainer.run.resumed.rolled_back


def test_the_nearest_good_ancestor_and_then_the_baseline(store: LocalStore) -> None:
    trainer, names = two_checkpoints(store)
    trainer.train(1)
    names.append(trainer.publish(5).record.id)
    for name in names[1:]:
        store.delete(layout.checkpoint(name, WEIGHTS))
    assert start(store).run.resumed.step == 2  # type: ignore[union-attr]
    store.delete(layout.checkpoint(names[0], WEIGHTS))
    before = length(store)
    with pytest.raises(NoLoadableCheckpoint, match="emrakul rollback"):
        start(store)
    assert length(store) == before + 1  # the open


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("at", range(1, 5))
def test_killed_while_it_rolls_back_the_next_start_finishes(store: LocalStore, at: int, before: bool) -> None:
    _, names = two_checkpoints(store)
    store.delete(layout.checkpoint(names[1], WEIGHTS))
    with pytest.raises(Killed):  # state and record of the open, then of the rollback
        start(Mortal(store, at=at, before=before))
    assert start(store).run.resumed.step == 2  # type: ignore[union-attr]
    kinds = [entry.record.kind.value for entry in verify(Log(store))]
    assert kinds.count("rollback") == 1


def test_only_rank_0_rolls_back_and_nobody_who_only_reads(store: LocalStore) -> None:
    trainer, names = two_checkpoints(store)
    store.delete(layout.checkpoint(names[1], WEIGHTS))
    before = length(store)
    with pytest.raises(PairDamaged, match="first rank"):
        start(store, rank=1)
    with pytest.raises(PairDamaged, match="emrakul rollback"):
        load_tip(store)
    with pytest.raises(PairDamaged):
        trainer.run.load(readonly=True)
    assert length(store) == before
    with pytest.raises(PublishRefused, match="load again"):
        trainer.publish(6)
    assert trainer.run.load().step == 2  # type: ignore[union-attr]
    trainer.publish(6)


# --- out of reach ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [Refused("403"), Unreachable("timeout"), WrongKey("key"), Untrusted("signature")])
@pytest.mark.parametrize("what", ["checkpoints/", "cycles/", "state/"])
def test_what_is_out_of_reach_rolls_nothing_back(store: LocalStore, error: StoreError, what: str) -> None:
    two_checkpoints(store)
    prune(store, {0: [2]})
    before = Log(store).tail().state
    with pytest.raises(type(error)):
        start(Failing(store, error, prefix=what))
    after = Log(store).tail().state
    assert (after.tip, after.tip_moved) == (before.tip, before.tip_moved)


def test_a_wrong_data_key_rolls_nothing_back(store: LocalStore) -> None:
    trainer = start(store, ring=KeyRing(DataKey(b"a" * 32)))
    trainer.train(2)
    trainer.publish(2)
    second = start(store, ring=KeyRing(DataKey(b"b" * 32)))  # loading reads no statistics
    assert second.run.resumed.rolled_back == ""  # type: ignore[union-attr]
    assert Log(store).tail().state.tip == 2


def test_a_data_key_that_is_no_key_stops_the_start(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    two_checkpoints(store)
    before = length(store)
    monkeypatch.setenv(DATA_KEY, "c2hvcnQ=")
    with pytest.raises(WrongKey):
        start(store)
    assert length(store) == before


def test_a_checkpoint_that_nobody_trusted_signed_rolls_nothing_back(store: LocalStore) -> None:
    key = SigningKey(Ed25519PrivateKey.generate())
    trust = Trust({"trainer": (key.private.public_key(),)})
    trainer = start(store, keys=[key], trust=trust)
    name = trainer.publish(1).record.id
    # the record is trusted and names what an untrusted writer put there
    ready = layout.checkpoint("2-1-00000002", layout.READY)
    store.put_if_absent(ready, store.get(layout.checkpoint(name, layout.READY)).replace(b'"sig":"', b'"sig":"AAAA'))
    Log(store, keys=[key], trust=trust).append(published("2-1-00000002", term=1, step=2), base=2)
    with pytest.raises(Untrusted):
        start(store, keys=[key], trust=trust)
    assert Log(store).tail().state.tip == 3


def test_sync_says_what_is_wrong_and_training_goes_on(store: LocalStore) -> None:
    two_checkpoints(store)
    flaky = Failing(store, Unreachable("no answer"), prefix="log/", times=0)
    trainer = start(flaky)
    end = prune(store, {0: [2]})
    flaky.times = 1
    assert trainer.run.sync().error == "no answer"
    trainer.train(1)
    assert trainer.run.sync().masks == end.record.masks


def test_a_mask_file_that_was_exchanged_is_not_taken(store: LocalStore) -> None:
    trainer, _ = two_checkpoints(store)
    end = prune(store, {0: [2]})
    assert end.record.masks is not None
    damage(store, end.record.masks.path)
    before = everything(trainer)
    assert "SHA-256" in trainer.run.sync().error
    assert equal(everything(trainer), before)


# --- rollback in place ----------------------------------------------------------------------------------------------


def test_a_rollback_is_carried_out_in_place(store: LocalStore) -> None:
    trainer = start(store)
    trainer.train(2)
    trainer.publish(2)
    at_two, statistics = everything(trainer), trainer.tracker.state()
    trainer.train(2)
    trainer.publish(4)
    prune(store, {0: [1]})
    trainer.run.sync()
    trainer.train(1)
    Log(store).append(rolled_back(2), base=0)
    assert trainer.run.sync().restart
    assert trainer.run.load().step == 2  # type: ignore[union-attr]
    assert equal(everything(trainer), at_two)  # what was masked has its values back, moments too
    assert trainer.tracker.state() == statistics
    trainer.train(1)
    assert bool(trainer.model.state_dict()["first.weight"][1].any())
    entry = trainer.publish(3)
    assert entry.record.masks is None
    assert entry.state.tip_pair.parent == 2  # type: ignore[union-attr]


def test_a_rollback_that_somebody_else_appended_first_is_followed(store: LocalStore) -> None:
    trainer, _ = two_checkpoints(store)
    trainer.train(1)
    third = trainer.publish(
        5,
    ).record.id
    store.delete(layout.checkpoint(third, WEIGHTS))

    class Rival(Wrapped):
        def put_if_absent(self, key: str, data: bytes | bytearray) -> bool:
            if key == layout.record(6):
                Log(store).append(rolled_back(2), base=0)
            return super().put_if_absent(key, data)

    resumed = start(Rival(store)).run.resumed
    assert resumed is not None
    assert (resumed.record, resumed.rolled_back) == (2, "")
    assert Log(store).tail().state.rolled_back == 6


def test_a_bad_report_makes_a_masked_checkpoint_no_place_to_go_back_to(store: LocalStore) -> None:
    two_checkpoints(store)
    prune(store, {0: [2]})
    trainer = start(store)
    trainer.run.report(step=5, epoch=0, loss=1.0, state="unstable")
    trainer.publish(5)
    trainer.run.report(step=6, epoch=0, loss=1.0, correct=1, n=1)
    last = trainer.publish(6).record.id
    store.delete(layout.checkpoint(last, WEIGHTS))
    assert start(store).run.resumed.record == 5  # type: ignore[union-attr]  the prune, not the checkpoint after it
