"""What every trainer's callback does: `kasmina.huggingface` and `kasmina.lightning` only know what events are called.

Training is never stopped for a publish's sake: one that fails, whatever the reason, is a warning, and the next save
tries again. What is wrong with the set-up (another model, an evaluation that it cannot answer, a step that does not
follow, several processes) raises at the first event.
"""

from __future__ import annotations

import inspect
import logging
import time
from collections.abc import Sequence
from typing import Any

from torch import Tensor, is_grad_enabled, nn
from torch.amp import GradScaler
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from kasmina.evaluation import BATCH
from kasmina.hooks import first_tensor
from kasmina.publish import EvaluationExport, PublishRefused
from kasmina.run import TrainingRun
from kasmina.tracker import ImportanceTracker
from leyline.envelope import trust_from_environment
from leyline.ids import canonical_name
from leyline.log import Log, NoRun
from leyline.model import Malformed
from leyline.open import open_store
from leyline.store import ObjectStore, StoreError
from leyline.topology import Topology

log = logging.getLogger("kasmina")

_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 60.0
"""Seconds between two attempts to carry out a rollback; each pause is twice the one before."""


class TrainerEvents:
    """One trainer's hold on a run, told by its events.

    `topology` or `tracker` as `TrainingRun.start` takes them; a tracker is told its steps here. `publish` goes to every
    `TrainingRun.publish` (evaluation, evaluation_model, refresh, data, ...); a name that it does not know is a
    TypeError.
    """

    def __init__(
        self,
        run: str | ObjectStore,
        *,
        model_id: str,
        topology: Topology | None = None,
        tracker: ImportanceTracker | None = None,
        **publish: Any,
    ) -> None:
        if topology is None and tracker is None:
            raise ValueError("give the callback a topology or a tracker; trace_topology(model, inputs) makes one")
        known = sorted(inspect.signature(TrainingRun.publish).parameters.keys() - {"self", "step", "epoch"})
        if unknown := next((name for name in publish if name not in known), None):
            raise TypeError(f"the callback takes no {unknown}; what a publish can be given is {', '.join(known)}")
        self._uri, self._model_id, self._topology, self._tracker = run, model_id, topology, tracker
        self._publish = publish
        self._watching: RemovableHandle | None = None
        self._accumulated = 1
        self._scaler: GradScaler | None = None
        self._in_step = False
        self._restart = False
        self._pause, self._again = _FIRST_PAUSE, 0.0
        self._published = -1
        self.run: TrainingRun | None = None
        """Open between the trainer's first and last event."""
        self.fenced = False
        """Another trainer took the run: this one is to stop."""

    def begin(
        self,
        model: nn.Module,
        optimizers: Sequence[Optimizer],
        *,
        step: int,
        processes: int,
        accumulated: int,
        scaler: GradScaler | None,
    ) -> None:
        """Training begins at `step`: open the run and load its tip, masks and all, into model and optimizers.

        `accumulated`: mini-batches whose gradients make one step. `scaler`: what multiplies the loss, in float16.
        ValueError where the tip is of another step, or the evaluation not one that can be published.
        """
        if processes > 1:
            raise ValueError(
                f"this training has {processes} processes, and the callback drives one; use TrainingRun itself, with "
                "rank= on each and sync(at=...), as docs/trainers.md shows"
            )
        _check_names(model, self._tracker.topology if self._tracker else self._topology)
        store = open_store(self._uri) if isinstance(self._uri, str) else self._uri
        _check_step(store, step)
        _check_evaluation(model, **self._publish)
        self.run = TrainingRun.start(
            store,
            model=model,
            model_id=self._model_id,
            optimizer=optimizers,
            topology=self._topology,
            tracker=self._tracker,
        )
        self._accumulated, self._scaler = accumulated, scaler
        self._published, self._restart, self.fenced = -1, False, False
        self._pause, self._again = _FIRST_PAUSE, 0.0
        if self._tracker is not None:
            hook = self._tracker.model.register_forward_pre_hook(self._forward_begins, with_kwargs=True)
            self._watching = hook

    def backward_done(self) -> None:
        """The gradients of one mini-batch are there."""
        if self._tracker is not None and self._in_step:
            self._in_step = False
            self._tracker.end()

    def step_begins(self) -> None:
        """Between two steps, where weights may be replaced: what a rollback asked for is carried out here.

        While the store is away training goes on unpublished, and a later step tries again. It waits here only where a
        load ended in the middle: weights of two checkpoints are no good to train on, nor for the trainer to save.
        """
        while self.run is not None and self._restart and (self.run.half_loaded or time.monotonic() >= self._again):
            try:
                loaded = self.run.load()
            except PublishRefused:
                if self.run.half_loaded:
                    raise
                self._restart = False
                self._stop()
            except StoreError as error:
                pause, self._pause = self._pause, min(2 * self._pause, _LONGEST_PAUSE)
                log.warning(
                    "the run was rolled back, and the checkpoint to go on from cannot be loaded: %s; training %s, and "
                    "this is tried again in %d s",
                    error,
                    "waits with its weights half loaded" if self.run.half_loaded else "goes on unpublished",
                    pause,
                )
                self._again = time.monotonic() + pause
                if self.run.half_loaded:
                    time.sleep(pause)
            else:
                self._restart, self._pause = False, _FIRST_PAUSE
                name = loaded and loaded.checkpoint
                log.warning("the run was rolled back; training goes on from checkpoint %s", name)

    def report(self, *, step: int, epoch: int, loss: float, grad_norm: float | None) -> None:
        """How training is doing."""
        if self.run is None:
            return
        said = self.run.report(step=step, epoch=epoch, loss=loss, grad_norm=grad_norm)
        if said.error:
            log.warning("%s", said.error)

    def sync(self) -> None:
        """Take what the log says: new masks at once, a rollback before the next step."""
        if self.run is None or self._restart:
            return
        news = self.run.sync()
        self._restart = news.restart
        if news.error:
            log.warning("%s", news.error)
        if news.fenced:
            self._stop()

    def saved(self, *, step: int, epoch: int) -> None:
        """The trainer saves a checkpoint of its own at `step`: publish the same state, and look for news."""
        if self.run is None or self.fenced or self._restart or step == self._published:
            return
        try:
            self.run.publish(step=step, epoch=epoch, **self._publish)
            self._published = step
        except (StoreError, PublishRefused) as error:
            log.warning("step %d was not published: %s", step, error)
        except Exception as error:  # of the model's own code, or of the data: nothing here is worth a training
            log.warning(
                "step %d was not published: %s: %s. Training goes on, and the next save tries again; if that says the "
                "same, mend the model or what the callback is given, and resume",
                step,
                type(error).__name__,
                error,
                exc_info=not isinstance(error, Malformed),
            )
        self.sync()

    def end(self) -> None:
        """Training is over. Masks are enforced no longer; they are on the weights."""
        if self._watching is not None:
            self._watching.remove()
        if self._tracker is not None:
            self._tracker.close()
        if self.run is not None:
            self.run.close()
            if self._restart:
                log.warning("training ended before a rollback was carried out; its weights are not the run's tip")
        self.run = self._watching = None

    def _stop(self) -> None:
        self.fenced = True
        log.error("another trainer opened the run; nothing of this training is published any more, and it stops")

    def _forward_begins(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """No trainer says how many samples a mini-batch has before it computes with them; its tensors do."""
        if self._tracker is None or self._in_step or not module.training or not is_grad_enabled():
            return
        batch: Tensor | None = first_tensor((args, kwargs))
        if batch is not None and batch.ndim and len(batch):
            self._tracker.begin(len(batch), scale=self._scale)
            self._in_step = True

    def _scale(self) -> float:
        return (self._scaler.get_scale() if self._scaler else 1.0) / self._accumulated


def _check_names(model: nn.Module, topology: Topology | None) -> None:
    known = {canonical_name(name) for name, _ in model.named_parameters(remove_duplicate=False)}
    if topology is not None and (missing := topology.parameters.keys() - known):
        raise ValueError(
            f"the topology names {min(missing)}, which the {type(model).__name__} that is trained does not have; trace "
            "that very module, or for Lightning give the callback the one that was traced, model=..."
        )


def _check_evaluation(
    model: nn.Module,
    *,
    evaluation: Any = None,
    evaluation_function: str | None = None,
    evaluation_model: nn.Module | None = None,
    evaluation_batch: int = BATCH,
    **_: Any,
) -> None:
    """What would be a warning at the first save, hours from here, is a ValueError now."""
    if evaluation is None:
        return
    exports = EvaluationExport()
    try:
        exports.of(model, evaluation, evaluation_function, answering=evaluation_model, batch=evaluation_batch)
    except Malformed as error:
        raise ValueError(
            f"this evaluation cannot be published: {error}; mend it, or give an evaluation_function of your own where "
            "the model cannot be traced"
        ) from error


def _check_step(store: ObjectStore, step: int) -> None:
    """Data, schedules and random state are the trainer's to resume, so its step and the tip's must be one."""
    try:
        tip = Log(store, trust=trust_from_environment()).tail().state.tip_pair
    except NoRun:
        return
    if tip is not None and tip.step != step:
        raise ValueError(
            f"the tip of {store.uri} is checkpoint {tip.checkpoint} of step {tip.step:,}, and this training begins at "
            f"step {step:,}; resume it from its own checkpoint of step {tip.step:,}, or give it a run of its own"
        )
