"""Hugging Face's Trainer and Lightning's, the real ones: what they publish, and that they save what they saved before.

The snippets of docs/trainers.md are what is run.
"""

from __future__ import annotations

import logging
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import pytest
import torch
import transformers
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from drafts import rolled_back
from kasmina import ImportanceTracker, trace_topology
from kasmina.events import TrainerEvents
from kasmina.huggingface import KasminaCallback
from kasmina.lightning import KasminaCallback as LightningCallback
from leyline import layout
from leyline.local import LocalStore
from leyline.log import Log
from leyline.messages import SystemStatePacket
from leyline.ready import read_ready
from leyline.records import Draft, Kind, Open, Publish
from leyline.store import ObjectStore, Unreachable
from leyline.topology import Topology
from trainers import prune
from wrapped import Failing

X = torch.randn(32, 8, generator=torch.Generator().manual_seed(1))
Y = (X[:, 0] > 0).long()
SAVES = (4, 8)
"""Steps at which both trainers save: 32 samples in mini-batches of 8, two epochs."""

PAGE = (Path(__file__).parents[2] / "docs" / "trainers.md").read_text()
SNIPPETS = dict(re.findall(r"^## (.*?)\n\n```python\n(.*?)```", PAGE, re.DOTALL | re.MULTILINE))

pytestmark = [
    # 32 samples in memory need no workers to load them
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers:UserWarning"),
    # transformers asks for pinned memory whatever the device
    pytest.mark.filterwarnings("ignore:.*pin_memory.*no accelerator is found.*:UserWarning"),
    # a training that is started again finds its own folder
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty:UserWarning"),
    # Lightning 2.6 still uses torch's LeafSpec, which torch has renamed
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning"),
]


class Net(nn.Module):
    """Eight hidden channels between two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


class ForTrainer(Net):
    """The same, as models of transformers take and give it."""

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:  # type: ignore[override]
        logits = super().forward(x)
        return (
            {"logits": logits}
            if labels is None
            else {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}
        )


class Answering(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)["logits"]


class Module(lightning.LightningModule):
    def __init__(self, rate: float) -> None:
        super().__init__()
        self.model, self.rate = Net(), rate

    def training_step(self, batch: list[Tensor]) -> Tensor:
        return nn.functional.cross_entropy(self.model(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.rate)


class Items(Dataset[dict[str, Tensor]]):
    def __len__(self) -> int:
        return len(X)

    def __getitem__(self, at: int) -> dict[str, Tensor]:
        return {"x": X[at], "labels": Y[at]}


class HuggingFace:
    """Its Trainer in a folder."""

    title = "Hugging Face Trainer"

    def __init__(self, folder: Path, uri: str, *, epochs: int = 2, accumulated: int = 1, rate: float = 0.01) -> None:
        transformers.set_seed(3)
        self.folder, self.uri = folder, uri
        self.model = ForTrainer()
        self.module = self.model
        self.arguments = transformers.TrainingArguments(
            str(folder), per_device_train_batch_size=8, num_train_epochs=epochs, save_steps=4, logging_steps=2,
            use_cpu=True, report_to="none", disable_tqdm=True, seed=3, learning_rate=rate,
            gradient_accumulation_steps=accumulated,
        )  # fmt: skip

    def namespace(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "arguments": self.arguments,
            "dataset": Items(),
            "answering": Answering(self.model),
        }

    def alone(self) -> None:
        transformers.Trainer(model=self.model, args=self.arguments, train_dataset=Items()).train()

    def train(self, callback: Any, resume: int | None = None) -> None:
        trainer = transformers.Trainer(
            model=self.model, args=self.arguments, train_dataset=Items(), callbacks=[callback]
        )
        trainer.train(resume_from_checkpoint=None if resume is None else str(self.folder / f"checkpoint-{resume}"))

    def callback(self, run: str | ObjectStore, **options: Any) -> Any:
        return KasminaCallback(run, model_id="mine", **options)


class Lightning:
    """Its Trainer in a folder."""

    title = "Lightning"

    def __init__(self, folder: Path, uri: str, *, epochs: int = 2, accumulated: int = 1, rate: float = 0.01) -> None:
        lightning.seed_everything(3, verbose=False)
        self.folder, self.uri = folder, uri
        self.module = Module(rate)
        self.model = self.module.model
        self.epochs, self.accumulated = epochs, accumulated

    def options(self) -> dict[str, Any]:
        return {
            "max_epochs": self.epochs, "accumulate_grad_batches": self.accumulated, "log_every_n_steps": 2,
            "accelerator": "cpu", "logger": False, "default_root_dir": self.folder,
            "enable_progress_bar": False, "enable_model_summary": False,
        }  # fmt: skip

    def saving(self) -> ModelCheckpoint:
        return ModelCheckpoint(self.folder, filename="{step}", every_n_train_steps=4, save_top_k=-1)

    def batches(self) -> DataLoader[Any]:
        return DataLoader(TensorDataset(X, Y), batch_size=8, shuffle=True)

    def namespace(self) -> dict[str, Any]:
        return {
            "module": self.module, "arguments": self.options(), "callbacks": [self.saving()], "batches": self.batches()
        }  # fmt: skip

    def alone(self) -> None:
        lightning.Trainer(**self.options(), callbacks=[self.saving()]).fit(self.module, self.batches())

    def train(self, callback: Any, resume: int | None = None) -> None:
        path = None if resume is None else self.folder / f"step={resume}.ckpt"
        trainer = lightning.Trainer(**self.options(), callbacks=[self.saving(), callback])
        trainer.fit(self.module, self.batches(), ckpt_path=path)

    def callback(self, run: str | ObjectStore, **options: Any) -> Any:
        return LightningCallback(run, model_id="mine", model=self.model, **options)


Practice = HuggingFace | Lightning


@pytest.fixture(params=[HuggingFace, Lightning], ids=["huggingface", "lightning"])
def kind(request: pytest.FixtureRequest) -> type[Practice]:
    return request.param


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "run")


def topology_of(model: nn.Module) -> Topology:
    return trace_topology(model, X[:2], model_id="mine")


def run_snippet(practice: Practice) -> None:
    names = {"uri": practice.uri, "example": X[:2], "evaluation": (X, Y), **practice.namespace()}
    exec(SNIPPETS[practice.title], names)


def tree(folder: Path) -> Mapping[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def at_saves(
    callback: Any,
    before: Callable[[int], object] = lambda _step: None,
    after: Callable[[int], object] = lambda _step: None,
) -> None:
    """What happens beside the trainer at each of its saves."""
    whole = callback.events.saved

    def saved(*, step: int, epoch: int) -> None:
        before(step)
        whole(step=step, epoch=epoch)
        after(step)

    callback.events.saved = saved


def published(store: ObjectStore) -> list[Publish]:
    return [record.body for record in Log(store).since(0) if isinstance(record.body, Publish)]


def test_the_trainers_own_checkpoints_are_byte_for_byte_the_same(
    kind: type[Practice], folder: Path, store: LocalStore
) -> None:
    kind(folder, store.uri).alone()
    without = tree(folder)
    assert len([name for name in without if "4" in name]) and len([name for name in without if "8" in name])
    shutil.rmtree(folder)
    run_snippet(kind(folder, store.uri))
    assert tree(folder).keys() == without.keys()
    assert [name for name, data in tree(folder).items() if data != without[name]] == []
    # and the run has the same states
    assert [body.step for body in published(store)] == list(SAVES)
    assert [body.epoch for body in published(store)] == [1, 2]
    tip = Log(store).tail().state.tip_pair
    assert tip is not None
    metadata = read_ready(store, tip.checkpoint, None)
    assert metadata.evaluation is not None and metadata.optimizer is not None
    report = published(store)[-1].report
    assert report is not None and report.loss is not None and report.grad_norm is not None and report.step == 8
    kept = [SystemStatePacket.parse(store.get(head.key), name=head.key) for head in store.list(layout.reports(1))]
    assert [packet.step for packet in kept] == [2, 4, 6, 8]


def test_every_sample_is_seen_by_the_tracker(kind: type[Practice], folder: Path, store: LocalStore) -> None:
    practice = kind(folder, store.uri)
    tracker = ImportanceTracker(practice.model, topology_of(practice.model), sample_every=1, decay=0.999999)
    practice.train(practice.callback(store.uri, tracker=tracker))
    stats, _ = tracker.stats(checkpoint="", run_id="r")
    assert stats.sampled_steps == 8
    assert stats.samples == 64


def test_accumulated_gradients_give_the_same_statistics(kind: type[Practice], folder: Path, store: LocalStore) -> None:
    """Where nothing is learnt, the same mini-batches say the same, however many of them make a step."""
    found = []
    for accumulated in (1, 2):
        practice = kind(folder / str(accumulated), f"{store.uri}{accumulated}", accumulated=accumulated, rate=0.0)
        tracker = ImportanceTracker(practice.model, topology_of(practice.model), sample_every=1)
        practice.train(practice.callback(practice.uri, tracker=tracker))
        assert [body.step for body in published(LocalStore(practice.uri))] == ([4, 8] if accumulated == 1 else [4])
        stats, arrays = tracker.stats(checkpoint="", run_id="r")
        assert stats.sampled_steps == 8
        found.append(arrays)
    alone, together = found
    assert alone.keys() == together.keys()
    for key, value in alone.items():
        np.testing.assert_allclose(together[key], value, rtol=1e-4, err_msg=key)


class Scaler:
    """What multiplies the loss in float16; here it is the test that multiplies it."""

    def __init__(self, scale: float) -> None:
        self.scale, self.asked = scale, 0

    def get_scale(self) -> float:
        self.asked += 1
        return self.scale


@pytest.mark.parametrize("accumulated", [1, 4])
def test_a_loss_that_is_scaled_for_float16_gives_the_same_statistics(store: LocalStore, accumulated: int) -> None:
    found = []
    for number, scaler in enumerate((None, Scaler(1024.0))):
        torch.manual_seed(0)
        model = Net().eval()
        tracker = ImportanceTracker(model, topology_of(model), sample_every=2)
        events = TrainerEvents(LocalStore(store.uri + str(number)), model_id="mine", tracker=tracker)
        options = {"step": 0, "processes": 1, "accumulated": accumulated}
        events.begin(model, (torch.optim.SGD(model.parameters()),), scaler=scaler, **options)  # type: ignore[arg-type]
        model.train()
        for x, y in zip(X.split(8), Y.split(8), strict=True):
            loss = nn.functional.cross_entropy(model(x), y) / accumulated
            (loss * (scaler.scale if scaler else 1)).backward()
            events.backward_done()
        found.append(tracker.stats(checkpoint="", run_id="r")[1])
        events.end()
        assert scaler is None or scaler.asked == 2, "only where a step is sampled"
    plain, scaled = found
    assert plain.keys() == scaled.keys()
    for key, value in plain.items():
        np.testing.assert_allclose(scaled[key], value, rtol=1e-4, err_msg=key)


def test_masks_are_taken_at_a_save_and_hold(kind: type[Practice], folder: Path, store: LocalStore) -> None:
    practice = kind(folder, store.uri)
    topology = topology_of(practice.model)
    callback = practice.callback(store.uri, topology=topology)

    def after(step: int) -> None:
        if step == 4:  # a cycle ends between the two saves
            prune(store, {0: [1, 5]}, of=topology)

    at_saves(callback, after=after)
    practice.train(callback)
    assert [body.step for body in published(store)] == [4, 8]
    assert_pruned(practice.model)
    tip = Log(store).tail().state.tip_pair
    assert tip is not None and not tip.provisional and tip.baked == tip.masks
    # a process that is started again resumes the trainer, and with the run's tip come its masks
    again = kind(folder, store.uri)
    seen: list[bool] = []
    callback = again.callback(store.uri, topology=topology)
    events, begin = callback.events, callback.events.begin

    def begun(*args: Any, **options: Any) -> None:
        begin(*args, **options)
        assert_pruned(again.model)
        seen.append(True)

    events.begin = begun  # type: ignore[method-assign]
    again.train(callback, resume=8)
    assert seen == [True]
    assert_pruned(again.model)


def test_masks_hold_while_a_training_that_was_started_again_goes_on(
    kind: type[Practice], folder: Path, store: LocalStore
) -> None:
    first = kind(folder, store.uri, epochs=1)
    topology = topology_of(first.model)
    first.train(first.callback(store.uri, topology=topology))
    prune(store, {0: [1, 5]}, of=topology)
    again = kind(folder, store.uri)
    before = again.model.down.bias.detach().clone()
    again.train(again.callback(store.uri, topology=topology), resume=4)
    assert_pruned(again.model)
    assert not torch.equal(again.model.down.bias, before), "it was trained"
    assert [body.step for body in published(store)] == [4, 8]
    tip = Log(store).tail().state.tip_pair
    assert tip is not None and tip.step == 8 and tip.baked == tip.masks
    # the trainer's own checkpoint holds them too
    kept = {str(name): one for path in folder.rglob("*8*") for name, one in weights_in(path)}
    (up,) = [one for name, one in kept.items() if name.endswith("up.weight")]
    assert [bool((up[unit] == 0).all()) for unit in range(8)] == [unit in (1, 5) for unit in range(8)]


def weights_in(path: Path) -> Iterable[tuple[str, Tensor]]:
    """Of a checkpoint that one of the two trainers wrote."""
    if path.is_dir():
        return load_file(path / "model.safetensors").items()
    return torch.load(path, weights_only=True)["state_dict"].items()


def assert_pruned(model: nn.Module) -> None:
    assert isinstance(model, Net)
    assert [bool((model.up.weight[u] == 0).all() and (model.down.weight[:, u] == 0).all()) for u in range(8)] == [
        u in (1, 5) for u in range(8)
    ]


def test_a_step_that_does_not_follow_the_tip_is_refused(kind: type[Practice], folder: Path, store: LocalStore) -> None:
    first = kind(folder, store.uri)
    first.train(first.callback(store.uri, topology=topology_of(first.model)))
    for resume, begins in ((None, 0), (4, 4)):
        again = kind(folder, store.uri)
        callback = again.callback(store.uri, topology=topology_of(again.model))
        said = f"of step 8, and this training begins at step {begins}; resume it from its own checkpoint of step 8"
        with pytest.raises(ValueError, match=said):
            again.train(callback, resume=resume)
    assert [record.kind for record in Log(store).since(0)].count(Kind.OPEN) == 1, "nobody was fenced"


def test_a_rollback_is_carried_out_before_the_next_step(
    kind: type[Practice], folder: Path, store: LocalStore, caplog: pytest.LogCaptureFixture
) -> None:
    practice = kind(folder, store.uri)
    callback = practice.callback(store.uri, topology=topology_of(practice.model))
    events = callback.events
    step_begins = events.step_begins
    weights: list[Tensor] = []

    def after(step: int) -> None:
        if step == 4:
            weights.append(practice.model.up.weight.detach().clone())
            with torch.no_grad():
                practice.model.up.weight.add_(1)  # what the training does until somebody rolls it back
            Log(store).append(rolled_back(2), base=2)
            events.sync()

    def begins() -> None:
        step_begins()
        if len(weights) == 1:
            weights.append(practice.model.up.weight.detach().clone())

    at_saves(callback, after=after)
    events.step_begins = begins
    with caplog.at_level(logging.WARNING, "kasmina"):
        practice.train(callback)
    assert torch.equal(weights[0], weights[1])
    assert "the run was rolled back; training goes on from checkpoint 4-1-" in caplog.text
    assert [body.step for body in published(store)] == [4, 8]


def test_a_trainer_whose_run_was_taken_stops(
    kind: type[Practice], folder: Path, store: LocalStore, caplog: pytest.LogCaptureFixture
) -> None:
    practice = kind(folder, store.uri)
    callback = practice.callback(store.uri, topology=topology_of(practice.model))
    at_saves(callback, lambda step: Log(store).append(Draft(id=f"open-other-{step}", body=Open()), base=0))
    practice.train(callback)
    assert "step 4 was not published" in caplog.text
    assert "another trainer opened the run" in caplog.text
    assert published(store) == []
    assert not [name for name in tree(folder) if "8" in name], "it stopped at its first save"


def test_a_store_that_does_not_answer_costs_a_warning(
    kind: type[Practice], folder: Path, store: LocalStore, caplog: pytest.LogCaptureFixture
) -> None:
    practice = kind(folder, store.uri)
    away = Away(Path(store.uri.removeprefix("file://")))
    practice.train(practice.callback(away, topology=topology_of(practice.model)))
    assert "step 4 was not published: the store is away" in caplog.text
    assert "nothing will be published" not in caplog.text
    assert [body.step for body in published(store)] == [8]


class Away(LocalStore):
    """Takes no checkpoint of step 4."""

    def put_if_absent(self, key: str, data: Any) -> bool:
        if key.startswith("checkpoints/4-"):
            raise Unreachable("the store is away")
        return super().put_if_absent(key, data)

    def put_stream(self, key: str, chunks: Any, *, size: int, digests: Any = None) -> bool:
        if key.startswith("checkpoints/4-"):
            raise Unreachable("the store is away")
        return super().put_stream(key, chunks, size=size)


def test_a_model_that_cannot_be_published_costs_a_warning(
    kind: type[Practice], folder: Path, store: LocalStore, caplog: pytest.LogCaptureFixture
) -> None:
    practice = kind(folder, store.uri)
    callback = practice.callback(store.uri, topology=topology_of(practice.model))

    def before(step: int) -> None:
        if step == 4:
            practice.model.register_buffer("angles", torch.ones(2, dtype=torch.complex128))

    def after(step: int) -> None:
        if step == 4:
            del practice.model.angles

    at_saves(callback, before, after)
    practice.train(callback)
    assert "step 4 was not published: Malformed: tensor angles is torch.complex128" in caplog.text
    assert "Training goes on, and the next save tries again" in caplog.text
    assert [body.step for body in published(store)] == [8]


def test_data_that_cannot_be_read_costs_a_warning(
    kind: type[Practice], folder: Path, store: LocalStore, caplog: pytest.LogCaptureFixture
) -> None:
    practice = kind(folder, store.uri)

    def lost(model: nn.Module, batch: Any) -> Tensor:
        raise OSError("the data are gone")

    tracker = ImportanceTracker(practice.model, topology_of(practice.model))
    practice.train(practice.callback(store.uri, tracker=tracker, refresh=8, data=(lost, [X[:8]])))
    for step in SAVES:
        assert f"step {step} was not published: OSError: the data are gone" in caplog.text
    assert 'raise OSError("the data are gone")' in caplog.text, "it is the person's code, so they see where"


def test_an_evaluation_that_cannot_be_published_is_refused_before_the_first_step(
    kind: type[Practice], folder: Path, store: LocalStore
) -> None:
    practice = kind(folder, store.uri)
    callback = practice.callback(store.uri, topology=topology_of(practice.model), evaluation=(X, Y[:3]))
    with pytest.raises(ValueError, match=r"cannot be published: the evaluation target must be int64 \[32\].*; mend"):
        practice.train(callback)
    assert not list(store.list("")), "no run was opened"


def test_a_mistyped_option_is_refused_at_once(kind: type[Practice], folder: Path, store: LocalStore) -> None:
    practice = kind(folder, store.uri)
    with pytest.raises(TypeError, match=r"takes no evalution; what a publish can be given is data, evaluation, "):
        practice.callback(store.uri, topology=topology_of(practice.model), evalution=(X, Y))


def test_a_trainer_that_never_saves_is_told_so_once(
    kind: type[Practice], folder: Path, store: LocalStore, caplog: pytest.LogCaptureFixture
) -> None:
    practice = kind(folder, store.uri)
    callback = practice.callback(store.uri, topology=topology_of(practice.model))
    if isinstance(practice, HuggingFace):
        practice.arguments.save_strategy = transformers.trainer_utils.SaveStrategy.NO
        practice.train(callback)
    else:
        trainer = lightning.Trainer(**practice.options(), callbacks=[callback], enable_checkpointing=False)
        trainer.fit(practice.module, practice.batches())
    assert caplog.text.count("nothing will be published") == 1


class Clock:
    """What kasmina.events takes for the time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.slept: list[float] = []
        monkeypatch.setattr("kasmina.events.time", self)

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


def test_a_store_that_is_away_after_a_rollback_is_tried_again_while_training_goes_on(
    kind: type[Practice],
    folder: Path,
    store: LocalStore,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    practice, clock = kind(folder, store.uri), Clock(monkeypatch)
    away = Failing(store, Unreachable("the store is away"), times=0)
    callback = practice.callback(away, topology=topology_of(practice.model))
    events, step_begins = callback.events, callback.events.step_begins
    weights: list[Tensor] = []

    def after(step: int) -> None:
        if step == 4:
            weights.append(practice.model.up.weight.detach().clone())
            Log(store).append(rolled_back(2), base=2)
            events.sync()
            away.times = 2  # of the steps 5 and 6; at step 7 it is too early for a third attempt

    def begins() -> None:
        step_begins()
        if weights:
            clock.now += 1
            weights.append(practice.model.up.weight.detach().clone())

    at_saves(callback, after=after)
    events.step_begins = begins
    practice.train(callback)
    assert [torch.equal(weights[0], found) for found in weights[1:]] == [True, False, False, True]
    said = re.findall(
        r"cannot be loaded: the store is away; training goes on unpublished.* again in (\d+) s", caplog.text
    )
    assert said == ["1", "2"]
    assert "the run was rolled back; training goes on from checkpoint 4-1-" in caplog.text
    assert clock.slept == []
    assert [body.step for body in published(store)] == [4, 8]


def rolled_back_events(store: ObjectStore) -> tuple[Net, TrainerEvents]:
    """A training of one published step whose run was rolled back, and that knows it."""
    model = Net()
    events = TrainerEvents(store, model_id="mine", tracker=ImportanceTracker(model, topology_of(model)))
    options: Any = {"step": 0, "processes": 1, "accumulated": 1, "scaler": None}
    events.begin(model, (torch.optim.SGD(model.parameters(), lr=0.1),), **options)
    events.saved(step=1, epoch=1)
    Log(store).append(rolled_back(2), base=2)
    events.sync()
    return model, events


def test_attempts_to_carry_out_a_rollback_come_ever_more_rarely(
    store: LocalStore, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    away = Failing(store, Unreachable("the store is away"), times=0)
    _, events = rolled_back_events(away)
    away.times = 10**9
    for _ in range(300):  # seconds
        events.step_begins()
        clock.now += 1
    events.saved(step=2, epoch=1)
    events.end()
    assert re.findall(r"again in (\d+) s", caplog.text) == ["1", "2", "4", "8", "16", "32", "60", "60", "60", "60"]
    assert "training ended before a rollback was carried out" in caplog.text
    assert [body.step for body in published(store)] == [1]


def test_a_load_that_ends_in_the_middle_is_waited_for(
    store: LocalStore, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    away = Failing(store, Unreachable("the store is away"), times=0)
    model, events = rolled_back_events(away)
    before = model.up.weight.detach().clone()
    with torch.no_grad():
        model.up.weight.add_(1)
    (body,) = published(store)
    name = next(record.id for record in Log(store).since(0) if record.body == body)
    away._prefix, away.times = layout.checkpoint(name, "tracker.safetensors"), 2  # it is read last
    events.step_begins()
    assert clock.slept == [1, 2]
    assert caplog.text.count("training waits with its weights half loaded") == 2
    assert torch.equal(model.up.weight, before)


def test_a_trainer_whose_run_was_taken_after_a_rollback_stops(
    store: LocalStore, caplog: pytest.LogCaptureFixture
) -> None:
    _, events = rolled_back_events(store)
    Log(store).append(Draft(id="open-other", body=Open()), base=0)
    events.step_begins()
    assert events.fenced
    assert "another trainer opened the run" in caplog.text


def test_weights_only_saves_are_refused(folder: Path, store: LocalStore) -> None:
    practice = Lightning(folder, store.uri)
    saving = ModelCheckpoint(folder, save_weights_only=True)
    callback = LightningCallback(store.uri, model_id="mine", topology=topology_of(practice.model), model=practice.model)
    trainer = lightning.Trainer(**practice.options(), callbacks=[saving, callback])
    with pytest.raises(ValueError, match="save_weights_only=True, and Lightning tells no callback"):
        trainer.fit(practice.module, practice.batches())


def test_a_topology_of_another_module_is_refused(folder: Path, store: LocalStore) -> None:
    practice = Lightning(folder, store.uri)
    callback = LightningCallback(store.uri, model_id="mine", topology=topology_of(practice.model))
    with pytest.raises(ValueError, match=r"names down.bias, which the Module that is trained does not have.*model="):
        practice.train(callback)
    assert not list(store.list("")), "no run was opened"


def test_several_processes_are_refused(store: LocalStore) -> None:
    model = Net()
    events = TrainerEvents(store, model_id="mine", topology=topology_of(model))
    with pytest.raises(ValueError, match=r"has 2 processes.*use TrainingRun itself, with rank="):
        events.begin(model, (), step=0, processes=2, accumulated=1, scaler=None)
    with pytest.raises(ValueError, match="a topology or a tracker"):
        TrainerEvents(store, model_id="mine")


def test_the_plain_loop(tmp_path: Path, store: LocalStore) -> None:
    torch.manual_seed(3)
    model = Net()
    names = {
        "uri": store.uri, "model": model, "example": X[:2], "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "epochs": 2, "batches": list(zip(X.split(8), Y.split(8), strict=True)), "evaluation": (X, Y),
        "loss_function": nn.functional.cross_entropy,
    }  # fmt: skip
    exec(SNIPPETS["A plain loop"], dict(names))
    assert [(body.step, body.epoch) for body in published(store)] == [(4, 1), (8, 2)]
    exec(SNIPPETS["A plain loop"], {**names, "epochs": 3})  # a process that is started again
    assert [(body.step, body.epoch) for body in published(store)] == [(4, 1), (8, 2), (12, 3)]


def test_kasmina_needs_neither_library() -> None:
    hidden = "import sys; sys.modules['transformers'] = sys.modules['lightning'] = None; "
    code = f"{hidden}import kasmina; [getattr(kasmina, name) for name in kasmina.__all__]; import kasmina.events"
    assert subprocess.run([sys.executable, "-c", code], check=False, capture_output=True).returncode == 0
