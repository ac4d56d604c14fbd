"""A callback for the Trainer of Hugging Face transformers.

Trainer(..., callbacks=[KasminaCallback("s3://bucket/run", model_id="bert", tracker=tracker)])
"""

from __future__ import annotations

import logging
import math
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from kasmina.events import TrainerEvents
from kasmina.tracker import ImportanceTracker
from leyline.store import ObjectStore
from leyline.topology import Topology

log = logging.getLogger("kasmina")


class KasminaCallback(TrainerCallback):
    """Publishes at each save of the Trainer, reports what it logs, and keeps the run's masks on the weights.

    The Trainer's own checkpoints stay what they are without it. To resume, give `train(resume_from_checkpoint=...)` the
    checkpoint of the run's tip. `publish`: what each publish gets besides, such as `evaluation=(inputs, classes)`.
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
        self.events = TrainerEvents(run, model_id=model_id, topology=topology, tracker=tracker, **publish)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        optimizer = given["optimizer"]
        self.events.begin(
            given["model"],
            # accelerate wraps it, and the hooks of a step belong on what steps
            (getattr(optimizer, "optimizer", optimizer),),
            step=state.global_step,
            processes=args.world_size,
            accumulated=args.gradient_accumulation_steps,
            scaler=getattr(optimizer, "scaler", None),
        )
        if args.save_strategy == "no":
            log.warning(
                "nothing will be published: the Trainer's save_strategy is 'no', and this publishes when it saves; set "
                "it to 'steps' or 'epoch'"
            )

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.events.step_begins()

    def on_substep_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.events.backward_done()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.events.backward_done()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._before_save(control)

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._before_save(control)

    def _before_save(self, control: TrainerControl) -> None:
        """New masks go onto the weights before the Trainer saves them, so that both checkpoints hold the same."""
        if control.should_save:
            self.events.sync()

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        logs = given.get("logs") or {}
        if "loss" in logs:
            self.events.report(
                step=state.global_step, epoch=_epoch(state), loss=logs["loss"], grad_norm=logs.get("grad_norm")
            )

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.events.saved(step=state.global_step, epoch=_epoch(state))
        if self.events.fenced:
            control.should_training_stop = True

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.events.end()


def _epoch(state: TrainerState) -> int:
    """Epochs count from 1: the Trainer's 0.4 and its 1.0 are both the first."""
    return max(1, math.ceil(state.epoch or 0))
