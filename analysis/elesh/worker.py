"""One analysis worker: opens the checkpoint, answers requests through claims, says in each answer what went wrong."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any

from numpy.typing import NDArray

from elesh import basic, structured
from elesh.importance import Importance, ImportanceTrouble
from elesh.reading import AHEAD, Extent, read_ahead
from elesh.scoring import Scoring
from elesh.weights import Weights
from leyline import answers, exits, layout
from leyline.bits import StoredFile
from leyline.claims import Task, order, share
from leyline.crypt import KeyRing
from leyline.envelope import Trust, Untrusted
from leyline.masks import Masks
from leyline.messages import MaskRef, Requests, StructuralAnalysisRequest, StructuralAnalysisResponse
from leyline.model import Malformed
from leyline.partial import Parts
from leyline.ready import read_ready
from leyline.reasons import Reason
from leyline.store import CHUNK, Changed, Damaged, NotFound, ObjectStore
from leyline.work import Meter, peak_rss

Arrays = Mapping[str, NDArray[Any]]

INVALID = (Malformed, Damaged, Changed, NotFound, Untrusted)
"""What the checkpoint itself is to blame for. Other store errors say nothing about it and end the worker."""


@dataclass
class Analysis:
    """Everything that is opened once for all requests of a round; what cannot be opened is told in each answer."""

    store: ObjectStore
    requests: Requests
    trust: Trust | None = None
    ring: KeyRing | None = None
    following: Mapping[str, StructuralAnalysisRequest] = field(default_factory=dict)
    """By request: the one that this worker will most likely answer after it."""
    _masks: dict[str, Masks] = field(default_factory=dict)
    _masks_held: int = 0
    """Chunks that reading these masks holds."""
    _told: int = 0
    """Bytes that the answers so far have told to be read."""

    @cached_property
    def meter(self) -> Meter:
        return Meter(self.store)

    @cached_property
    def scoring(self) -> Scoring:
        return Scoring(threads=self.requests.limits.threads, ahead=0)

    @cached_property
    def weights(self) -> Weights:
        names = {request.checkpoint for request in self.requests.requests}
        if len(names) != 1:
            raise Malformed(f"the requests speak of {len(names)} checkpoints ({', '.join(sorted(names))}), not of one")
        metadata = read_ready(self.store, names.pop(), trust=self.trust)
        return Weights.open(self.meter.store, metadata, chunks=self.requests.limits.memory_bytes // (4 * CHUNK))

    @cached_property
    def parts(self) -> Parts:
        return Parts(self.weights.topology)

    @cached_property
    def importance(self) -> Importance:
        return Importance.open(self.meter.store, self.weights.metadata, self.weights.topology, self.ring)

    def inherited(self, ref: MaskRef | None) -> Masks | None:
        """Masks of the base pair, checked against their digest and the model."""
        if ref is None:
            return None
        if ref.digest not in self._masks:
            file = StoredFile.read(self.store, ref.path)
            if file.sha256 != ref.digest:
                raise Damaged(f"{ref.path} is not the mask file that the request names; restore it or roll back")
            masks = Masks.read(file, name=ref.path)
            if masks.model_id != self.weights.topology.model_id:
                raise Malformed(f"{ref.path} holds masks of model {masks.model_id}")
            self._masks[ref.digest] = masks
            self._masks_held = file.held
        return self._masks[ref.digest]

    def as_they_lie(self) -> list[StructuralAnalysisRequest]:
        """The requests in the order of the bytes that they read, the same for every worker; as they stand where
        weights are missing, which the answers then tell."""
        requests = list(self.requests.requests)
        with suppress(*INVALID, LookupError):
            place = self.weights.place
            requests.sort(key=lambda request: min(map(place, request.slices), default=()))
        return requests

    def compute(self, request: StructuralAnalysisRequest, scale: float) -> Arrays:
        """The arrays of one answer; `scale` of the buffers that the memory limit allows may be used."""
        weights, inherited = self.weights, self.inherited(request.inherited)
        ahead = read_ahead(self.requests.limits.memory_bytes, scale, weights.held + self._masks_held)
        self.scoring.read_ahead(ahead, self._expected(request))
        if request.method != "structured":
            fisher = self._fisher() if basic.uses_fisher(request.importance) else None
            return basic.answer(request, weights, self.scoring, fisher, inherited)
        fisher = self._fisher() if "fisher" in request.importance else None
        arrays = structured.slice_sums(weights, self.parts, request.slices, self.scoring, fisher)
        if request.groups and self._gates_wanted(request.importance):
            arrays |= structured.gate_scores(
                weights.topology, request.groups, request.importance, self.importance, inherited
            )
        return arrays

    def _expected(self, request: StructuralAnalysisRequest) -> list[Extent]:
        """Where the weights lie with which the next request begins: enough to read ahead."""
        following = self.following.get(request.id)
        with suppress(*INVALID, LookupError):  # what is wrong there is no fault of this request
            slices = self.weights.as_they_lie(basic.read_by(following)) if following else []
            return [segment.extent for slice_ in slices[:AHEAD] for segment in self.weights.segments(slice_)]
        return []

    def _gates_wanted(self, scorers: Sequence[str]) -> bool:
        """Where magnitude decides, the others only stand beside it: statistics that nobody published are no loss."""
        beside = scorers[0] == "magnitude" and self.weights.metadata.importance is None
        return structured.needs_statistics(scorers) and not beside

    def _fisher(self) -> Importance | None:
        """The statistics where they know every weight; magnitude needs none, so none are missed here."""
        if self.weights.metadata.importance is None:
            return None
        return self.importance if self.importance.knows_weights() else None

    def answer(
        self, request: StructuralAnalysisRequest, scale: float = 1.0
    ) -> tuple[StructuralAnalysisResponse, Arrays]:
        """The answer, whatever happened; memory that is short and a store in trouble are no answers."""
        begun = time.monotonic()
        arrays: Arrays = {}
        status, reason, message = "answered", "", ""
        try:
            arrays = self.compute(request, scale)
        except ImportanceTrouble as error:
            status, reason, message = "importance", error.reason.value, str(error)
        except Untrusted as error:
            status, reason, message = "invalid", Reason.UNTRUSTED.value, str(error)
        except INVALID as error:
            status, reason, message = "invalid", Reason.INVALID_INPUT.value, _about(request.checkpoint, str(error))
        except (ArithmeticError, LookupError, TypeError, ValueError, AssertionError) as error:
            status, reason = "failed", Reason.WORKERS_FAILED.value
            message = f"request {request.id} could not be scored: {type(error).__name__}: {error}"
        told, self._told = self._told, self.meter.bytes_read  # with what was read ahead of this answer
        return (
            StructuralAnalysisResponse.model_validate(
                {
                    "idempotency_key": request.idempotency_key,
                    "request": request.id,
                    "status": status,
                    "reason": reason,
                    "message": message,
                    "seconds": round(time.monotonic() - begun, 6),
                    "bytes_read": self._told - told,
                    "parameters": sum(slice_.stop - slice_.start for slice_ in request.slices),
                    "peak_rss": peak_rss(),
                }
            ),
            arrays,
        )


def run(
    store: ObjectStore,
    *,
    cycle: str,
    round_: int,
    worker: int,
    of: int,
    launch: int,
    trust: Trust | None = None,
    ring: KeyRing | None = None,
    log: Callable[[str], None],
) -> int:
    """Answer what is to be answered; the exit code (leyline.exits). Raises Malformed for bad requests, StoreError."""
    mark = layout.started(cycle, "analyse", launch)
    store.put_if_absent(mark, b"")
    name = layout.requests(cycle, round_)
    try:
        requests = Requests.parse(store.get(name), name=name)
    except NotFound as error:
        raise Malformed(f"{name} does not exist, so there is nothing to answer; check --cycle and --round") from error
    by_id = {request.id: request for request in requests.requests}
    if not by_id:
        return exits.DONE
    analysis = Analysis(store, requests, trust, ring)
    tasks = [Task(id=request.id) for request in analysis.as_they_lie()]
    analysis.following = {task.id: by_id[after.id] for task, after in pairwise(order(tasks, worker=worker, of=of)[0])}
    invalid = False

    def compute(task: Task, attempt: int, scale: float) -> bytes:
        nonlocal invalid
        message, arrays = analysis.answer(by_id[task.id], scale)
        invalid = invalid or message.status == "invalid"
        found = message.message or f"{message.parameters:,} parameters in {message.seconds:.2f} s"
        log(f"worker {worker}, request {task.id}, attempt {attempt}: {message.status}: {found}")
        return answers.pack(message.model_copy(update={"worker": worker, "attempt": attempt}), arrays)

    try:
        found = share(
            store=store,
            cycle=cycle,
            tasks=tasks,
            worker=worker,
            of=of,
            limits=requests.limits,
            compute=compute,
            mark=mark,
        )
    finally:
        analysis.scoring.close()
    if found.given_up:
        log(f"gave up: request {found.given_up[0]} has {requests.limits.attempts} dead attempts and no answer")
        return exits.GAVE_UP
    return exits.BAD_INPUT if invalid else exits.DONE


def _about(checkpoint: str, said: str) -> str:
    return said if checkpoint in said else f"checkpoint {checkpoint}: {said}"
