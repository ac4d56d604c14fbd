"""A callback for Lightning's Trainer.

Trainer(..., callbacks=[KasminaCallback("s3://bucket/run", model_id="resnet", tracker=tracker)])
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.optim import Optimizer

from kasmina.events import TrainerEvents
from kasmina.tracker import ImportanceTracker
from leyline.store import ObjectStore
from leyline.topology import Topology

log = logging.getLogger("kasmina")


class KasminaCallback(Callback):
    """Publishes at each save of the Trainer, reports every `log_every_n_steps`, and keeps masks on the weights.

    Lightning's own checkpoints stay what they are without it. To resume, give `fit(ckpt_path=...)` the checkpoint of
    the run's tip. `model`: what the topology is of; by default the tracker's model, else the LightningModule itself.
    `publish`: what each publish gets besides, such as `evaluation=(inputs, classes)`.
    """

    def __init__(
        self,
        run: str | ObjectStore,
        *,
        model_id: str,
        model: nn.Module | None = None,
        topology: Topology | None = None,
        tracker: ImportanceTracker | None = None,
        **publish: Any,
    ) -> None:
        self._model = model if model is not None or tracker is None else tracker.model
        self._norm: float | None = None
        self.events = TrainerEvents(run, model_id=model_id, topology=topology, tracker=tracker, **publish)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for saving in trainer.checkpoint_callbacks:
            if isinstance(saving, ModelCheckpoint) and saving.save_weights_only:
                raise ValueError(
                    "a ModelCheckpoint has save_weights_only=True, and Lightning tells no callback of such saves; "
                    "leave it out, or nothing would be published"
                )
        self.events.begin(
            self._model or pl_module,
            trainer.optimizers,
            step=trainer.global_step,
            processes=trainer.world_size,
            accumulated=trainer.accumulate_grad_batches,
            scaler=getattr(trainer.precision_plugin, "scaler", None),
        )
        if not trainer.checkpoint_callbacks:
            log.warning(
                "nothing will be published: the Trainer has no ModelCheckpoint, and this publishes when one saves; add "
                "one, or leave out enable_checkpointing=False"
            )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.events.step_begins()

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.events.backward_done()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        # a norm is a pass over all gradients, and reading it waits for the device: only where it is reported
        self._norm = None
        if self._reports(trainer.global_step + 1, trainer):
            found = [parameter.grad for parameter in pl_module.parameters() if parameter.grad is not None]
            self._norm = float(torch.nn.utils.get_total_norm(found))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if self._norm is not None and isinstance(loss, torch.Tensor):
            # Lightning has divided it for the accumulation of gradients
            whole = loss.item() * trainer.accumulate_grad_batches
            self.events.report(
                step=trainer.global_step, epoch=trainer.current_epoch + 1, loss=whole, grad_norm=self._norm
            )
            self._norm = None

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """`checkpoint` holds the very tensors of the model, so masks that come now are in the file too."""
        self.events.sync()
        self.events.saved(step=trainer.global_step, epoch=trainer.current_epoch + 1)
        if self.events.fenced:
            trainer.should_stop = True

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.events.end()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.events.end()

    @staticmethod
    def _reports(step: int, trainer: Trainer) -> bool:
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]  # set by a part of it
        return step % max(1, every) == 0
