"""One validation from front to back: what is cheap and needs no torch first, and the first refusal ends it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from leyline import layout
from leyline.answers import with_result
from leyline.bits import StoredFile
from leyline.candidate import get_named, named_by_the_cycle
from leyline.digest import sha256_hex, verified_range
from leyline.envelope import Trust
from leyline.masks import Masks
from leyline.messages import (
    Candidate,
    Check,
    CheckpointMetadata,
    Decision,
    GateResult,
    MaskRef,
    PruningValidationRequest,
    Verdict,
)
from leyline.model import Malformed
from leyline.ready import read_ready
from leyline.reasons import Reason
from leyline.store import Damaged, NotFound, ObjectStore
from leyline.topology import Topology
from leyline.work import Meter, Work
from urabrask import constraints, decided
from urabrask.gate import sentence
from urabrask.structure import NotTheBase, check_bytes


class Declined(Exception):
    """A check refused the candidate; carries the reason's code."""

    def __init__(self, reason: Reason, name: str, message: str) -> None:
        super().__init__(message)
        self.reason, self.name = reason, name


@dataclass(frozen=True)
class Answers(Mapping[str, bytes]):
    """The analysis answers that a basic decision names, by folder, each read when it is asked for."""

    store: ObjectStore
    results: Mapping[str, str]
    """Folder -> digest of the arrays."""

    def __getitem__(self, folder: str) -> bytes:
        return with_result(self.store, folder, self.results[folder])[1]

    def __iter__(self) -> Iterator[str]:
        return iter(self.results)

    def __len__(self) -> int:
        return len(self.results)


@dataclass(frozen=True, kw_only=True)
class Subject:
    """Everything that is judged, read once and each digest checked."""

    request: PruningValidationRequest
    candidate: Candidate
    base: CheckpointMetadata
    topology: Topology
    inherited: Masks | None
    masks: Masks
    decision: Decision
    answers: Answers
    trusted: bool


@dataclass
class Report:
    """What was looked at so far, and how long each part took (outside the verdict)."""

    checks: list[Check] = field(default_factory=list)
    gates: list[GateResult] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    bytes: Work | None = None
    """What the byte checks took, once they have passed."""

    def passed(self, name: str, message: str) -> None:
        self.checks.append(Check(name=name, passed=True, message=message))

    def timed(self, name: str, since: float) -> None:
        self.seconds[name] = round(self.seconds.get(name, 0.0) + time.monotonic() - since, 3)


Measure = Callable[[ObjectStore, Subject, Trust | None, Report], None]
"""The part that needs torch (urabrask.measure); passed in, so that the rest runs without it."""


def read_subject(store: ObjectStore, *, cycle: str, base: int, trust: Trust | None) -> Subject:
    """Read what the request names. Malformed, Damaged or Untrusted in a sentence if it does not belong together."""
    key = layout.validation_request(cycle, base)
    request = PruningValidationRequest.parse(get_named(store, key), name=key)
    if (request.cycle, request.base) != (cycle, base):
        raise Malformed(f"{key} speaks of cycle {request.cycle} on base {request.base}; it was copied there")
    key = layout.manifest(cycle, base)
    candidate = Candidate.parse(_known(store, key, request.candidate), name=key)
    if (candidate.cycle, candidate.base, candidate.checkpoint) != (cycle, base, request.checkpoint):
        raise Malformed(
            f"{key} is of cycle {candidate.cycle} on base {candidate.base} and checkpoint {candidate.checkpoint}, the "
            f"request asks for {cycle}, {base} and {request.checkpoint}; start a new cycle"
        )
    key = layout.decision(cycle)
    decision = Decision.parse(_known(store, key, candidate.decision), name=key)
    metadata = read_ready(store, request.checkpoint, trust)
    return Subject(
        request=request,
        candidate=candidate,
        base=metadata,
        topology=read_topology(store, metadata),
        inherited=read_masks(store, request.inherited) if request.inherited else None,
        masks=read_masks(store, candidate.masks),
        decision=decision,
        answers=Answers(store, {weight.answer: weight.result for weight in decision.weights}),
        trusted=trust is not None,
    )


def read_topology(store: ObjectStore, metadata: CheckpointMetadata) -> Topology:
    """The checkpoint's topology, its digest checked."""
    data = read_object(store, metadata, metadata.topology)
    return Topology.parse(data, name=layout.checkpoint(metadata.name, metadata.topology))


def read_object(store: ObjectStore, metadata: CheckpointMetadata, path: str) -> bytes:
    """A whole object of a checkpoint; Malformed if READY.json does not list it, Damaged if it is another one."""
    try:
        digest = metadata.object(path).digest
        return verified_range(store, layout.checkpoint(metadata.name, path), digest, 0, digest.size)
    except KeyError as error:
        raise Malformed(f"{error.args[0]}; publish it again") from error
    except NotFound as error:
        raise Malformed(f"{error}; publish checkpoint {metadata.name} again") from error


def read_masks(store: ObjectStore, ref: MaskRef) -> Masks:
    """A mask side-car by its digest; it is read again for the bits of single weights."""
    with named_by_the_cycle():
        file = StoredFile.read(store, ref.path)
    if file.sha256 != ref.digest:
        raise Damaged(f"{ref.path} has SHA-256 {file.sha256[:12]}, expected was {ref.digest[:12]}; start a new cycle")
    return Masks.read(file, name=ref.path)


def validate(store: ObjectStore, subject: Subject, trust: Trust | None, measure: Measure) -> tuple[Verdict, Report]:
    """The verdict. Its content depends on what is stored and on nothing else."""
    report = Report()
    try:
        since = time.monotonic()
        check_masks(subject, report)
        check_constraints(subject, report)
        check_structure(store, subject, report)
        report.timed("structure", since)
        measure(store, subject, trust, report)
    except Declined as refused:
        report.checks.append(Check(name=refused.name, passed=False, message=str(refused)))
        return _verdict(subject, report, refused.reason, str(refused)), report
    return _verdict(subject, report, None, "; ".join(sentence(gate) for gate in report.gates)), report


def check_masks(subject: Subject, report: Report) -> None:
    """The masks fit the model, contain the inherited ones, and equal inherited and decision together."""
    masks, topology = subject.masks, subject.topology
    if fault := next(decided.misfits(masks, topology), ""):
        raise Declined(Reason.STRUCTURE, "masks fit", fault)
    if subject.inherited is not None and subject.inherited.exceeds(masks):
        raise Declined(Reason.STRUCTURE, "masks inherited", "the masks give back what the base had pruned already")
    wanted = decided.expected(subject.decision, subject.inherited, topology, subject.answers)
    if fault := next(decided.differences(masks, wanted), ""):
        raise Declined(Reason.STRUCTURE, "masks decided", fault)
    report.passed("masks", f"the masks are the inherited ones and the decision's: {masks.summary()} pruned in all")


def check_constraints(subject: Subject, report: Report) -> None:
    """The hard constraints, from the masks alone."""
    broken = list(constraints.broken(subject.masks, subject.topology, subject.request))
    if broken:
        more = f" (and {len(broken) - 1} more)" if len(broken) > 1 else ""
        raise Declined(Reason.CONSTRAINT, "constraints", broken[0] + more)
    report.passed("constraints", "every group, layer and parameter keeps what the constraints ask for")


def check_structure(store: ObjectStore, subject: Subject, report: Report) -> None:
    """Only the mask changed."""
    meter = Meter(store)
    try:
        found = check_bytes(meter.store, subject.base, subject.candidate, subject.masks, subject.topology)
    except NotTheBase as error:
        raise Declined(Reason.STRUCTURE, "bytes", str(error)) from error
    report.bytes = meter.done(parameters=subject.base.num_params)
    report.passed("bytes", found)


_UNDECIDED = frozenset({Reason.INCONCLUSIVE, Reason.NO_EVALUATION})


def _verdict(subject: Subject, report: Report, reason: Reason | None, message: str) -> Verdict:
    return Verdict(
        cycle=subject.request.cycle,
        base=subject.request.base,
        checkpoint=subject.request.checkpoint,
        candidate=subject.request.candidate,
        masks=subject.candidate.masks.digest,
        outcome="PASS" if reason is None else "INCONCLUSIVE" if reason in _UNDECIDED else "FAIL",
        reason="" if reason is None else reason.value,
        message=message,
        checks=tuple(report.checks),
        gates=tuple(report.gates),
        trusted=subject.trusted,
    )


def _known(store: ObjectStore, key: str, digest: str) -> bytes:
    data = get_named(store, key)
    if (found := sha256_hex(data)) != digest:
        raise Damaged(f"{key} has SHA-256 {found[:12]}, expected was {digest[:12]}; start a new cycle")
    return data
