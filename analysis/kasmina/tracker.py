"""Importance while training: sampled steps, per-sample statistics at the gates, and no trace left in the training."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from kasmina import kept
from kasmina.cost import Cost, CudaMark, PairedCost, WallMark
from kasmina.fisher import Weights, WeightSums
from kasmina.hooks import first_tensor, parameters_of
from kasmina.isolation import IsolationCheck
from kasmina.probe import Probe
from kasmina.sums import Batch, Sums
from leyline.messages import ImportanceStats, IsolationReport
from leyline.topology import Topology

Source = Literal["tracked", "refreshed", "forward"]

_FIRST_STRIDE = 11
"""Until the cost is measured: per-sample gates cost 4 to 6 % of a step (pruning.md section 6)."""
_LOOKED = 16
"""Samples of a sampled step whose forward statistics (contribution norms, inputs, cosines) are taken."""
_PATIENCE = 3
"""Sampled steps that a gate may stay silent before its group is measured by mini-batch instead."""


class ImportanceTracker:
    """Importance statistics of a model's units, from some of its training steps.

    A training loop tells where a step's forward and backward lie::

        tracker = ImportanceTracker(model, topology)
        for x, y in batches:
            optimizer.zero_grad()
            with tracker.step(len(x)):
                loss_fn(model(x), y).backward()
            optimizer.step()

    or by `begin` and `end` around the same two lines. With several domains each loss says whose it is:
    `tracker.backward(loss, domain="host")` instead of `loss.backward()`. With gradient accumulation each micro-batch is
    a step.

    On a sampled step the gates' outputs a and gradients dL/da of up to `samples_per_step` samples give
    q_n = B * sum over positions of a * dL/da; sums of |q| and q**2 enter averages with `decay` per sampled step.
    A group whose gates never run as modules (nn.MultiheadAttention's output projection, a compiled model) is measured
    by mini-batch instead. On all other steps nothing is hooked. Training is not changed: no gradient, no random number,
    no buffer.

    `sample_every`: a number samples every so many steps; "auto" measures what a sampled step costs and keeps the
    tracker's share of training time under `max_cost`. Then which steps are sampled depends on the clock: give a number
    where runs must be equal. `weights`: also diagonal Fisher of single weights, as `WeightSums` says.
    """

    def __init__(
        self,
        model: nn.Module,
        topology: Topology,
        *,
        decay: float = 0.97,
        sample_every: Literal["auto"] | int = "auto",
        samples_per_step: int = 32,
        max_cost: float = 0.01,
        isolation: bool = True,
        weights: Weights = "none",
    ) -> None:
        if not 0 < decay < 1:
            raise ValueError(f"decay is {decay}; it must lie between 0 and 1")
        if sample_every != "auto" and sample_every < 1:
            raise ValueError(f"sample_every is {sample_every}; it must be auto or at least 1")
        if samples_per_step < 1 or not 0 < max_cost < 1:
            raise ValueError("samples_per_step must be at least 1, and max_cost between 0 and 1")
        self.model = model
        self.topology = topology
        self._parameters = parameters_of(model, topology)
        device = next(iter(self._parameters.values())).device
        self._device = device
        self._samples_per_step, self._max_cost, self._every = samples_per_step, max_cost, sample_every
        self._decay = decay
        sums = Sums(topology, device, decay)
        self._sums: dict[Source, Sums] = {"tracked": sums}
        self._probe = Probe(model, topology, self._parameters, sums.slices)
        self._silent = dict.fromkeys(self._probe.gated, 0)
        self._mini_batch: set[int] = set()
        self._weights_kind: Weights = weights
        self._weights: dict[Source, WeightSums] = {}
        if weights != "none":
            self._weights["tracked"] = WeightSums(topology, weights, decay)
        self._cost = PairedCost(CudaMark if device.type == "cuda" else WallMark)
        self._isolation: IsolationCheck | None = None
        if isolation:
            domains = {name: topology.parameters[name].domain for name in self._parameters}
            self._isolation = IsolationCheck(self._parameters, domains)
        self._batch: Batch | None = None
        self._handles: list[RemovableHandle] = []
        self._watched = False
        self._until_sample = _FIRST_STRIDE if sample_every == "auto" else sample_every
        self._step = 0
        self._first = self._last = 0

    # --- the training loop --------------------------------------------------------------------------------------------

    @contextmanager
    def step(self, batch_size: int, *, scale: float = 1.0) -> Iterator[None]:
        """Around one step's forward and backward; see `begin`. A step that raises adds nothing."""
        self.begin(batch_size, scale=scale)
        try:
            yield
        except BaseException:
            self._abandon()
            raise
        self.end()

    def begin(self, batch_size: int, *, scale: float | Callable[[], float] = 1.0) -> None:
        """Before the forward of a mini-batch of `batch_size` samples, whose loss is a mean over them.

        `scale`: what that mean is multiplied by before backward: GradScaler's scale, 1 / k with k accumulation steps,
        `batch_size` for a summed loss. A function is asked on sampled steps only: GradScaler's waits for the device.
        """
        if self._batch is not None:
            raise RuntimeError("begin() was called inside a step; call end() after each backward")
        if batch_size < 1 or not (callable(scale) or scale > 0):
            raise ValueError(f"batch_size {batch_size} must be at least 1, and scale {scale} above 0")
        self._step += 1
        self._until_sample -= 1
        sampled = self._until_sample <= 0
        self._cost.step(sampled)
        if sampled:
            self._until_sample = self.stride
            taken = min(batch_size, self._samples_per_step)
            looked = min(taken, _LOOKED)
            batch = Batch(
                batch_size,
                taken,
                self._sums["tracked"].units,
                self._device,
                looked,
                scale() if callable(scale) else scale,
            )
            self._hook(batch, gradients=True, weights="tracked" in self._weights)

    def backward(self, loss: Tensor, *, domain: str, **options: Any) -> None:
        """`loss.backward(**options)` of one domain's loss, watched on sampled steps for leaks into other domains."""
        if self._isolation is None or self._batch is None:
            loss.backward(**options)  # type: ignore[no-untyped-call]
            return
        with self._isolation.watch(domain):
            loss.backward(**options)  # type: ignore[no-untyped-call]
        self._watched = True

    def end(self) -> None:
        """After the backward. Takes the sampled mini-batch into the averages, and leaves no hook behind."""
        if (batch := self._batch) is None:
            return
        watched = self._watched
        self._abandon()
        self._notice_silence(batch, self._sums["tracked"])
        self._sums["tracked"].add(batch, frozenset(self._mini_batch))
        if "tracked" in self._weights:
            self._weights["tracked"].add(batch.gradients)
        if self._isolation is not None and watched:
            self._isolation.checked_steps += 1
        self._first = self._first or self._step
        self._last = self._step

    def close(self) -> None:
        """Leave a step that was begun, if any."""
        self._abandon()

    def __enter__(self) -> ImportanceTracker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- at a checkpoint ----------------------------------------------------------------------------------------------

    def refresh(self, loss_fn: Callable[[nn.Module, Any], Tensor], data: Iterable[Any], *, samples: int = 1000) -> int:
        """Measure at the weights as they are, in eval mode, on the first `samples` samples of `data`; returns how many.

        `data` gives mini-batches; `loss_fn(model, batch)` their mean loss. The first tensor in a batch has the samples
        on axis 0. Every module's mode is put back, gradients are not touched. The result is the source "refreshed".
        """
        weights = WeightSums(self.topology, self._weights_kind, 1.0) if self._weights_kind != "none" else None

        def measure(batch: Any, taken: Batch) -> None:
            with torch.enable_grad():
                loss = loss_fn(self.model, batch)
                # Not backward(): that would run what others hooked to the accumulation of gradients.
                wanted = self._probe.upstream(self._mini_batch, weights=weights is not None)
                found = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
            if weights is not None:
                given = zip(wanted, found, strict=True)
                weights.add({n: g.detach().float().square() * taken.size for n, g in given if g is not None})

        done = self._pass("refreshed", measure, data, samples, gradients=True)
        if weights is not None:
            self._weights["refreshed"] = weights
        return done

    def forward_only(self, forward: Callable[[nn.Module, Any], object], data: Iterable[Any], *, samples: int) -> int:
        """As `refresh`, without gradients: contribution norms, consumers' inputs, cosines; the source "forward"."""

        def measure(batch: Any, _: Batch) -> None:
            with torch.no_grad():
                forward(self.model, batch)

        return self._pass("forward", measure, data, samples, gradients=False)

    def stats(
        self,
        *,
        checkpoint: str,
        run_id: str,
        lineage: tuple[str, ...] = (),
        step: int | None = None,
        source: Source = "tracked",
    ) -> tuple[ImportanceStats, dict[str, NDArray[Any]]]:
        """The message and its tensors. `step`: the training's own count (default: the steps this tracker saw)."""
        if source not in self._sums:
            call = "refresh()" if source == "refreshed" else "forward_only()"
            raise LookupError(f"there are no {source} statistics; call {call} first")
        sums = self._sums[source]
        arrays, groups = sums.arrays(gradients=source != "forward")
        found: dict[str, NDArray[Any]] = dict(arrays)
        sketch = None
        if source in self._weights:
            found |= self._weights[source].arrays()
            sketch = self._weights[source].said()
        cost, at = self.cost(), self._step if step is None else step
        effective = sums.effective_samples()
        counted = [effective[i] for i in self._probe.gated - self._mini_batch if effective[i]]
        counted = counted or [effective[i] for i in self._mini_batch if effective[i]]
        tracked = source == "tracked" and self._first > 0
        stats = ImportanceStats(
            idempotency_key=f"{run_id}/{checkpoint}/importance",
            run_id=run_id,
            checkpoint=checkpoint,
            lineage=lineage[:8],
            step=at,
            source=source,
            samples=round(min(counted, default=0.0)),
            sampled_steps=sums.steps,
            first_step=max(0, at - self._step + self._first) if tracked else at,
            last_step=max(0, at - self._step + self._last) if tracked and self._last else at,
            decay=sums.decay,
            reduction="mini-batch" if self._mini_batch and self._mini_batch == self._probe.gated else "per-sample",
            mini_batch=tuple(g.id for i, g in enumerate(self.topology.groups) if i in self._mini_batch),
            groups=groups,
            isolation=self._isolation.report() if self._isolation is not None else IsolationReport(),
            tracker_cost=None if cost is None else cost.share,
            sketch=sketch,
        )
        return stats, found

    def cost(self) -> Cost | None:
        """What the tracker took of the training's time so far, as measured; None before it could be compared."""
        return self._cost.cost()

    def check_isolation(self) -> None:
        """Raise IsolationLeak or IsolationUnchecked; publish calls it before it writes anything."""
        if self._isolation is not None:
            self._isolation.raise_if_leaking(self._sums["tracked"].steps)

    # --- kept with a checkpoint ---------------------------------------------------------------------------------------

    def state(self) -> bytes:
        """The tracked averages and counts, to go on from after a restart or a rollback; a safetensors file."""
        sums = self._sums["tracked"]
        arrays: dict[str, NDArray[Any]] = sums.state()
        if "tracked" in self._weights:
            arrays |= self._weights["tracked"].state()
        leak = None if self._isolation is None else self._isolation.leak
        header = {
            **self._made_as(),
            "sampled_steps": sums.steps,
            "step": self._step,
            "first": self._first,
            "last": self._last,
            "mini_batch": sorted(self._mini_batch),
            "checked_steps": 0 if self._isolation is None else self._isolation.checked_steps,
            "leak": None if leak is None else list(leak),
        }
        return kept.pack(header, arrays)

    def load_state(self, data: bytes, *, name: str = "the tracker's state") -> None:
        """Go on from `state()`. Malformed, with nothing changed, if it is damaged or of another topology or setting."""
        sums = self._sums["tracked"]
        shapes = {"totals": tuple(sums.totals.shape), "counts": tuple(sums.counts.shape)}
        header, arrays = kept.unpack(data, self._made_as(), shapes, name=name)
        self._abandon()
        if "tracked" in self._weights:
            self._weights["tracked"].load_state(arrays, {n: p.device for n, p in self._parameters.items()})
        sums.load_state(arrays, header["sampled_steps"])
        self._step, self._first, self._last = header["step"], header["first"], header["last"]
        self._mini_batch = set(header["mini_batch"])
        self._silent = dict.fromkeys(self._probe.gated - self._mini_batch, 0)
        others: tuple[Source, Source] = ("refreshed", "forward")
        for source in others:
            self._sums.pop(source, None)
            self._weights.pop(source, None)
        if self._isolation is not None:
            leak = header["leak"] or (None, None)
            report = IsolationReport(checked_steps=header["checked_steps"], leak=leak[0])
            self._isolation.restore(report, leak[1])
        self._until_sample = self.stride

    def _made_as(self) -> dict[str, Any]:
        """What a state must have been written with to be read here."""
        return {
            "version": 1,
            "topology": self.topology.sha256(),
            "decay": repr(self._decay),
            "weights": self._weights_kind,
        }

    # --- how it measures ----------------------------------------------------------------------------------------------

    @property
    def stride(self) -> int:
        """Every how many steps one is sampled, as things stand."""
        if self._every != "auto":
            return self._every
        return self._cost.stride(self._max_cost, default=_FIRST_STRIDE)

    def _pass(
        self,
        source: Source,
        measure: Callable[[Any, Batch], None],
        data: Iterable[Any],
        samples: int,
        *,
        gradients: bool,
    ) -> int:
        """Run `measure` over `data` in eval mode into fresh sums of `source`; returns the number of samples taken."""
        if self._batch is not None:
            raise RuntimeError("a step was begun; call end() before statistics are refreshed")
        if samples < 1:
            raise ValueError(f"samples is {samples}; it must be at least 1")
        sums, done = Sums(self.topology, self._device, 1.0), 0
        modes = [(module, module.training) for module in self.model.modules()]
        self.model.eval()
        try:
            for batch in data:
                leading = first_tensor(batch)
                if leading is None or not leading.ndim or not len(leading):
                    raise ValueError(
                        "a mini-batch has no tensor with samples on axis 0; give tensors, tuples or mappings"
                    )
                size = len(leading)
                count = min(size, samples - done)
                taken = Batch(size, count, sums.units, self._device, count)
                self._hook(taken, gradients=gradients, weights=False)
                try:
                    measure(batch, taken)
                finally:
                    self._abandon()
                if gradients:
                    self._notice_silence(taken, sums)
                sums.add(taken, frozenset(self._mini_batch) if gradients else frozenset())
                done += taken.taken
                if done >= samples:
                    break
        finally:
            for module, mode in modes:
                module.training = mode
        if not done:
            raise ValueError("there was no mini-batch to measure; give data that can be read again")
        self._sums[source] = sums
        return done

    def _hook(self, batch: Batch, *, gradients: bool, weights: bool) -> None:
        self._batch = batch
        mini_batch = frozenset(self._mini_batch)
        self._handles = self._probe.hook(batch, gradients=gradients, mini_batch=mini_batch, weights=weights)

    def _abandon(self) -> None:
        """No hook stays, and gradients that arrive later are not counted."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self._batch is not None:
            self._batch.open = False
            self._batch = None
        self._watched = False

    def _notice_silence(self, batch: Batch, sums: Sums) -> None:
        """A gate that never runs as a module leaves its group to be measured by mini-batch."""
        for index in list(self._silent):
            if index in batch.fired:
                del self._silent[index]
            else:
                self._silent[index] += 1
                if self._silent[index] >= _PATIENCE:
                    del self._silent[index]
                    self._mini_batch.add(index)
                    sums.forget(index)
