"""The one object that a trainer holds: it opens a run, publishes into it, and takes what the log says.

    run = TrainingRun.start("s3://bucket/run", model=model, model_id="resnet", optimizer=optimizer, tracker=tracker)
    for epoch in range(run.resumed.epoch if run.resumed else 0, epochs):
        train(...)
        run.report(step=step, epoch=epoch, loss=loss, correct=correct, n=n)
        run.publish(step=step, epoch=epoch, evaluation=(images, labels))
        if run.sync().restart:
            run.load()

What training does without is never in its way: `sync` and `report` do not raise for the store's sake, they say what
was wrong. `publish` and `load` raise, because their caller must know; a failed publish leaves the training as it was.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Self

from torch import Tensor, nn
from torch.optim import Optimizer

from kasmina.enforce import MaskEnforcer, MasksDoNotFit
from kasmina.evaluation import BATCH
from kasmina.formats import TensorRef
from kasmina.held import HeldTime, holds
from kasmina.into import IntoTensors, IntoTraining
from kasmina.load import Loaded, load_newest
from kasmina.pair import PairDamaged, load_pair, read_masks
from kasmina.publish import (
    SHARD_BYTES,
    EvaluationExport,
    PublishRefused,
    append_publish,
    lineage_of,
    write_checkpoint,
)
from kasmina.report import LossHistory, State
from kasmina.sync import Position, SyncResult, news
from kasmina.tracker import ImportanceTracker, Source
from kasmina.training_state import Training
from leyline import layout
from leyline.crypt import KeyRing
from leyline.envelope import SigningKey, Trust, signing_keys_from_environment, trust_from_environment
from leyline.fold import PairState, RunState
from leyline.log import Entry, Log
from leyline.masks import Masks
from leyline.messages import SystemStatePacket
from leyline.model import Malformed
from leyline.open import open_store, probe
from leyline.records import Admit, Draft, Genesis, Open, Outcome, Prune, Publish, Record
from leyline.store import NotFound, ObjectStore, StoreError
from leyline.topology import Topology

_POLL_SECONDS = 0.5
_REFRESH_INTERVAL = 1600
"""Steps between checkpoints from which fresh statistics are the default where data is given."""
_REFRESH_SAMPLES = 1000

Data = tuple[Callable[[nn.Module, Any], Tensor], Iterable[Any]]
"""(loss function of model and mini-batch, mini-batches): what `tracker.refresh` takes. Without gradients the function
only has to run the model."""


@dataclass(frozen=True, kw_only=True)
class Reported:
    """A report, and a sentence where it could not be stored."""

    packet: SystemStatePacket
    error: str = ""


class TrainingRun:
    """One trainer's hold on a run. Rank 0 writes; the other ranks of a distributed training only read."""

    def __init__(
        self,
        store: ObjectStore,
        log: Log,
        training: Training,
        enforcer: MaskEnforcer,
        *,
        rank: int,
        position: Position,
        shard_bytes: int,
        keys: Sequence[SigningKey],
        trust: Trust | None,
        ring: KeyRing | None,
    ) -> None:
        """For `start`."""
        self._store, self._log, self._training, self._enforcer = store, log, training, enforcer
        self._rank, self._shard_bytes = rank, shard_bytes
        self._keys, self._trust, self._ring = keys, trust, ring
        self._blank = training.tracker.state() if training.tracker is not None else b""
        self._exports = EvaluationExport()
        self._losses = LossHistory()
        self._held = HeldTime()
        self._report: SystemStatePacket | None = None
        self._times: tuple[str, dict[str, float | None]] = ("", {})
        self._position = position
        self._term = 0
        self._seen = 0
        self._published: Entry | None = None
        self._load_failed = False
        self.half_loaded = False
        """A load ended in the middle, and none has succeeded since: the weights are of two checkpoints."""
        self.resumed: Loaded | None = None
        """What the newest load gave; None in a run without checkpoints."""

    @classmethod
    def start(
        cls,
        run: str | ObjectStore,
        *,
        model: nn.Module,
        model_id: str,
        optimizer: Optimizer | Sequence[Optimizer] = (),
        topology: Topology | None = None,
        tracker: ImportanceTracker | None = None,
        ema: Sequence[nn.Module | Mapping[str, Tensor]] = (),
        fp32_master: Mapping[str, Tensor] | None = None,
        run_id: str | None = None,
        rank: int = 0,
        shard_bytes: int = SHARD_BYTES,
        endpoint: str | None = None,
        region: str | None = None,
        ca_bundle: str | None = None,
        keys: Sequence[SigningKey] | None = None,
        trust: Trust | None = None,
        ring: KeyRing | None = None,
    ) -> Self:
        """Open the run (rank 0 makes it if it is new) and load its tip, if it has one, into what is given.

        `run`: its URI, or an opened store. `topology` or `tracker` must be given. `run_id`: by default the last part
        of the URI. Other ranks start after rank 0 has. Keys, trust and data key come from the environment where they
        are not given. Every start opens the run anew, and no trainer that opened it before may publish from then on.
        """
        if tracker is not None:
            topology = tracker.topology
        if topology is None:
            raise ValueError("start() needs a topology or a tracker; trace_topology(model, example_inputs) makes one")
        if topology.model_id != model_id:
            raise ValueError(f"the topology is of model {topology.model_id}, not {model_id}; trace it for this model")
        store = open_store(run, endpoint=endpoint, region=region, ca_bundle=ca_bundle) if isinstance(run, str) else run
        keys = signing_keys_from_environment() if keys is None else keys
        trust = trust_from_environment() if trust is None else trust
        ring = KeyRing.from_environment() if ring is None else ring
        optimizers = (optimizer,) if isinstance(optimizer, Optimizer) else tuple(optimizer)
        training = Training(
            model=model,
            topology=topology,
            optimizers=optimizers,
            ema=tuple(ema),
            fp32_master=fp32_master or {},
            tracker=tracker,
        )
        enforcer = MaskEnforcer(
            model,
            Masks(model_id=model_id),
            optimizers=optimizers,
            ema=ema,
            fp32_master=fp32_master,
            model_id=model_id,
        )
        log = Log(store, keys=keys, trust=trust)
        opened = None
        if rank == 0:
            probe(store)
            genesis = Genesis(run_id=run_id or store.uri.rpartition("/")[2], model_id=model_id)
            state = log.create(Draft(id="genesis", body=genesis)).state
            if state.tip_pair is not None:  # an open fences whoever trains this run, so not for a model of another
                _check_fits(store, log, state.tip_pair, _Asked(training, enforcer, blank=b""), trust)
            # a new id for each start: two trainers must never take one open for their own
            opened = log.append(Draft(id=f"open-{uuid.uuid4().hex}", body=Open()), base=log.tail().record.n).record.n
        elif (found := log.tail().state.model_id) != model_id:
            raise ValueError(f"{store.uri} is a run of model {found}, not {model_id}; name its own, or use another run")
        self = cls(
            store,
            log,
            training,
            enforcer,
            rank=rank,
            position=Position(opened=opened, rolled_back=-1, masks=None),
            shard_bytes=shard_bytes,
            keys=keys,
            trust=trust,
            ring=ring,
        )
        self.load()
        return self

    # --- out ----------------------------------------------------------------------------------------------------------

    @holds
    def publish(
        self,
        *,
        step: int,
        epoch: int,
        evaluation: tuple[Tensor | Sequence[Tensor], Tensor | None] | None = None,
        evaluation_function: str | None = None,
        evaluation_model: nn.Module | None = None,
        evaluation_batch: int = BATCH,
        refresh: int | None = None,
        data: Data | None = None,
        gradients: bool = True,
        wait: bool = False,
    ) -> Entry:
        """Write a checkpoint and append its record; returns that.

        `evaluation`: (inputs [N, ...] or several, right classes int64 [N] or None), what the validator measures
        accuracy on; with `evaluation_function` ("module:function" of your own image) instead of the exported model.
        `evaluation_model`: the module that answers, where the trained model returns no logits [N, C]; it must hold the
        trained one. `evaluation_batch`: samples it is given at once, in their order.
        `refresh`: measure importance on so many samples of `data` first (0: never; left out: 1,000 where `data` is
        given and the last checkpoint is 1,600 steps or more ago). `gradients=False` refreshes by forward passes alone
        (`tracker.forward_only`), for a model that is not being trained. `wait`: wait for the cycle, as `wait()` does.

        Raises IsolationLeak (nothing is written), PublishRefused (rolled back, or another trainer has the run: sync()
        says which), StoreError. The same state may be published again after any of these.
        """
        if self._rank != 0:
            raise ValueError(f"rank {self._rank} publishes nothing; call publish on rank 0")
        if self._load_failed:
            raise PublishRefused("the last load() failed in the middle, so these weights are no checkpoint; load again")
        if self._training.tracker is not None:
            self._training.tracker.check_isolation()
        state = self._log.tail().state
        source = self._refresh(refresh, data, step, gradients=gradients)
        exported = None
        if evaluation is not None:
            exported = self._exports.of(
                self._training.model,
                evaluation,
                evaluation_function,
                answering=evaluation_model,
                batch=evaluation_batch,
            )
        written = write_checkpoint(
            self._store,
            self._training,
            run_id=state.run_id,
            step=step,
            epoch=epoch,
            term=self._term,
            source=source,
            lineage=lineage_of(state),
            baked=self._position.masks,
            evaluation=exported,
            shard_bytes=self._shard_bytes,
            keys=self._keys,
            ring=self._ring,
        )
        self._published = append_publish(self._log, written, report=self._report, base=self._seen)
        self._report = None
        self._held.published()
        if wait:
            self.wait()
        return self._published

    @holds
    def report(
        self,
        *,
        step: int,
        epoch: int,
        loss: float,
        grad_norm: float | None = None,
        correct: int | None = None,
        n: int | None = None,
        state: State | None = None,
    ) -> Reported:
        """Say how training is doing. `correct` of `n`: its own evaluation, by which a later checkpoint counts as good.

        `state` left out: stable if the loss is finite and at most 1.2 x its running median. How long the training was
        held, and what the tracker costs, is measured here. The next publish carries the newest report, without these
        times: a record says what happened, not how fast. Never raises for the store's sake.
        """
        judged = self._losses.judge(loss, grad_norm)
        packet = SystemStatePacket(
            idempotency_key=f"{self._term}-{step}",
            step=step,
            epoch=epoch,
            loss=loss,
            grad_norm=grad_norm,
            correct=correct,
            n=n,
            state=state or judged,
            record=self._seen,
        )
        self._report = packet
        packet = packet.model_copy(update=self._measured(packet))
        if self._rank != 0:
            return Reported(packet=packet)
        try:
            self._store.put_if_absent(layout.report(self._term, step), packet.canonical())
        except StoreError as error:
            return Reported(packet=packet, error=str(error))
        return Reported(packet=packet)

    def _measured(self, packet: SystemStatePacket) -> dict[str, float | None]:
        """The times of a report. Saying the same step again is the same object, so its first times stay."""
        said, times = self._times
        if said != packet.idempotency_key:
            cost = self._training.tracker.cost() if self._training.tracker is not None else None
            times = {"held_seconds": self._held.seconds, "tracking_share": None if cost is None else cost.share}
            self._times = packet.idempotency_key, times
        return times

    # --- in -----------------------------------------------------------------------------------------------------------

    @holds
    def sync(self, *, at: int | None = None) -> SyncResult:
        """Take what the log says since the last sync; one GET where there is nothing new.

        New masks go onto the weights at once. A rollback is only told: `load()` carries it out. `at`: look no further
        than this record, so that all ranks of a distributed training take the same masks at the same step.
        Never raises for the store's sake: `error` says what was wrong.
        """
        if at is not None and at == self._seen:
            return SyncResult(record=at)
        try:
            state = self._log.tail().state if at is None else self._log.state_at(at)
            found = news(state, self._position)
            if found.masks is not None:
                self._enforcer.update(read_masks(self._store, found.masks))
        except (StoreError, Malformed, MasksDoNotFit) as error:
            return SyncResult(record=self._seen, error=str(error))
        self._seen = state.n
        if found.masks is not None:
            self._position = replace(self._position, masks=found.masks)
        return found

    @holds
    def wait(self, timeout: float = 600.0) -> Record | None:
        """Wait for the end of the cycle on the checkpoint published last: its prune or outcome record, or None.

        None also where the run was rolled back or taken over meanwhile. Call `sync()` next, whatever comes.
        """
        if self._published is None:
            return None
        base = self._published.record.n
        deadline = time.monotonic() + timeout
        seen, cycle = base, ""
        while True:
            try:
                for record in self._log.since(seen):
                    seen = record.n
                    match record.body:
                        case Admit() if record.body.base == base:
                            cycle = record.id
                        case Prune() | Outcome() if record.id == cycle:
                            return record
                    if record.term != self._term:
                        return None
            except StoreError:
                pass  # asked again until the time is over
            if time.monotonic() >= deadline:
                return None
            time.sleep(min(_POLL_SECONDS, timeout))

    @holds
    def load(self, *, readonly: bool = False) -> Loaded | None:
        """Load the tip in place: weights, moments, masters, averaged copies, tracker and masks. None in an empty run.

        Rank 0 rolls a damaged tip back (unless `readonly`); elsewhere that is PairDamaged. NoLoadableCheckpoint where
        nothing loads. Refused, Unreachable, WrongKey and Untrusted roll nothing back. Where this raises, the weights
        may be half loaded (`half_loaded` says it): publish refuses until a load succeeds.
        """
        self._check_ours(self._log.tail().state)
        self._load_failed = True
        into = _InPlace(self._training, self._enforcer, blank=self._blank)
        may_roll_back = self._rank == 0 and not readonly
        try:
            loaded, state = load_newest(self._store, self._log, into, trust=self._trust, may_roll_back=may_roll_back)
        except BaseException:
            self.half_loaded = self.half_loaded or into.begun
            raise
        self.half_loaded = False
        self._check_ours(state)
        self._load_failed = False
        self._term, self._seen, self._published = state.term, state.n, None
        self._report, self._losses = None, LossHistory()
        masks = loaded.masks if loaded else None
        self._position = replace(self._position, rolled_back=state.rolled_back, masks=masks)
        self.resumed = loaded
        return loaded

    def close(self) -> None:
        """Enforce masks no longer: the training is over, and its optimizers may go on to another one."""
        self._enforcer.remove()

    def _check_ours(self, state: RunState) -> None:
        if self._position.opened is not None and state.opened != self._position.opened:
            raise PublishRefused("another trainer opened this run since; stop, or start() anew to take it back")

    def _refresh(self, samples: int | None, data: Data | None, step: int, *, gradients: bool) -> Source:
        """Measure if it is time to; which statistics are to be published."""
        tracker = self._training.tracker
        if samples is None:
            body = self._published.record.body if self._published else None
            before = body.step if isinstance(body, Publish) else self.resumed.step if self.resumed else 0
            samples = _REFRESH_SAMPLES if data is not None and step - before >= _REFRESH_INTERVAL else 0
        if not samples:
            return "tracked"
        if tracker is None or data is None:
            raise ValueError("refresh needs a tracker, and data=(loss function, mini-batches)")
        function, batches = data
        if not gradients:
            tracker.forward_only(function, batches, samples=samples)
            return "forward"
        tracker.refresh(function, batches, samples=samples)
        return "refreshed"


class _InPlace(IntoTraining):
    """Knows whether it has begun to replace what the training holds."""

    begun = False

    def begin(self, weights: Mapping[str, TensorRef], slots: Mapping[str, TensorRef]) -> None:
        super().begin(weights, slots)
        self.begun = True


class _Asked(IntoTraining):
    """Takes nothing: ModelDoesNotFit, or else _Fits."""

    def begin(self, weights: Mapping[str, TensorRef], slots: Mapping[str, TensorRef]) -> None:
        self._check_weights(weights)
        self._check_slots(slots)
        raise _Fits


class _Fits(Exception):
    """Names and shapes are those of the training; no tensor was read to find that."""


def _check_fits(store: ObjectStore, log: Log, tip: PairState, asked: _Asked, trust: Trust | None) -> None:
    """ModelDoesNotFit where the training cannot take the tip. A damaged tip is for `load` to roll back."""
    with suppress(_Fits, PairDamaged):
        load_pair(store, log, tip, asked, trust)


def load_tip(
    run: str | ObjectStore,
    *,
    endpoint: str | None = None,
    region: str | None = None,
    ca_bundle: str | None = None,
    trust: Trust | None = None,
) -> dict[str, Tensor]:
    """The tip's weights by canonical name, masks applied, on the CPU; for whoever is no trainer. Writes nothing."""
    store = open_store(run, endpoint=endpoint, region=region, ca_bundle=ca_bundle) if isinstance(run, str) else run
    trust = trust_from_environment() if trust is None else trust
    into = IntoTensors()
    loaded, _ = load_newest(store, Log(store, trust=trust), into, trust=trust, may_roll_back=False)
    if loaded is None:
        raise NotFound(f"{store.uri} has no checkpoint yet; publish one first")
    return into.tensors
