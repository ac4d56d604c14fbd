"""The part of a validation that needs torch: the accuracy gates and the dead-unit proof."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from leyline import layout
from leyline.envelope import Trust
from leyline.messages import Check, CheckpointMetadata, GateResult
from leyline.model import Malformed
from leyline.ready import read_ready
from leyline.reasons import Reason
from leyline.store import NotFound, ObjectStore
from leyline.topology import Kind
from urabrask.evaluate import Answers, EvaluationSet, answer, load_function, load_set, right
from urabrask.gate import gate, sentence
from urabrask.interpret import Forward, Interpreter, load_program
from urabrask.joins import joining_fault
from urabrask.proof import Proof
from urabrask.recovery import Loadable
from urabrask.validate import Declined, Report, Subject, read_object, read_topology
from urabrask.weights import load_weights

_FUNCTION_BATCH = 256


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """How this checkpoint is evaluated."""

    forward: Forward
    data: EvaluationSet
    batch: int
    names: tuple[str, ...] | None
    """The checkpoint's tensors that are needed; None: all."""


def measure(store: ObjectStore, subject: Subject, trust: Trust | None, report: Report) -> None:
    """Gates and proof; Declined with the first reason against the candidate."""
    torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    since = time.monotonic()
    evaluation = load_evaluation(store, subject.base)
    base = base_answers(store, subject, evaluation)
    reference = reference_answers(store, subject, trust, evaluation, base)
    tensors = candidate_tensors(store, subject, evaluation)
    candidate = answer(evaluation.forward, tensors, evaluation.data, batch=evaluation.batch)
    report.timed("evaluation", since)
    since = time.monotonic()
    check_proof(subject, evaluation, tensors, report)
    report.timed("proof", since)
    check_gates(subject, evaluation, base, reference, candidate, report)


def load_evaluation(store: ObjectStore, base: CheckpointMetadata) -> Evaluation:
    """The program or function with its data. Declined with NoEvaluation where the checkpoint has none."""
    ref = base.evaluation
    if ref is None:
        said = f"checkpoint {base.name} has no evaluation set; publish one with it"
        if base.imported_from is not None:
            said = (
                f"checkpoint {base.name} was imported, and with it comes no evaluation set to judge masks by; "
                "TrainingRun.start on this run loads it"
            )
        raise Declined(Reason.NO_EVALUATION, "evaluation", said)
    data = load_set(read_object(store, base, ref.data), name=layout.checkpoint(base.name, ref.data))
    if ref.program is not None:
        name = layout.checkpoint(base.name, ref.program)
        program = load_program(read_object(store, base, ref.program), name=name)
        inputs = {source.input for source in program.program.sources if source.input is not None}
        if inputs - set(range(len(data.inputs))):
            raise Malformed(f"{name} takes input {max(inputs)}, {ref.data} has {len(data.inputs)} inputs")
        return Evaluation(forward=program, data=data, batch=program.program.batch, names=tuple(program.program.tensors))
    if ref.function is not None:
        return Evaluation(forward=load_function(ref.function), data=data, batch=_FUNCTION_BATCH, names=None)
    raise Malformed(f"checkpoint {base.name} names evaluation data but neither a program nor a function")


def base_answers(store: ObjectStore, subject: Subject, evaluation: Evaluation) -> Answers:
    """The base pair: the checkpoint's weights with the inherited masks."""
    tensors = load_weights(store, subject.base, subject.topology, names=evaluation.names, masks=subject.inherited)
    return _finite(answer(evaluation.forward, tensors, evaluation.data, batch=evaluation.batch), subject.base.name)


def reference_answers(
    store: ObjectStore, subject: Subject, trust: Trust | None, evaluation: Evaluation, base: Answers
) -> tuple[str, Answers]:
    """What all masks together are compared with: the same weights unmasked where they are known, else the baseline."""
    request = subject.request
    if request.reference is None and subject.inherited is None:
        return "unmasked", base
    name = request.reference or request.baseline
    if name is None:
        raise Malformed(
            f"cycle {request.cycle}: the base has masks, but the request names neither unmasked weights nor a baseline"
        )
    if name == subject.base.name and subject.inherited is None:
        return "unmasked" if request.reference else "baseline", base
    try:
        metadata = subject.base if name == subject.base.name else read_ready(store, name, trust)
        tensors = load_weights(store, metadata, read_topology(store, metadata), names=evaluation.names)
    except NotFound as error:
        raise Malformed(f"reference checkpoint {name} is gone ({error}); choose another baseline") from error
    found = answer(evaluation.forward, tensors, evaluation.data, batch=evaluation.batch)
    return "unmasked" if request.reference else "baseline", _finite(found, name)


def candidate_tensors(store: ObjectStore, subject: Subject, evaluation: Evaluation) -> dict[str, Tensor]:
    """The candidate's own bytes: what the evaluation uses and every member of a pruned group."""
    pruned = {m.parameter for id_ in subject.masks.units for m in subject.masks.groups[id_].members}
    return load_weights(
        store,
        subject.base,
        subject.topology,
        names=None if evaluation.names is None else {*evaluation.names, *pruned},
        folder=layout.candidate(subject.candidate.cycle, subject.candidate.base),
        objects=subject.candidate.objects,
    )


def check_proof(subject: Subject, evaluation: Evaluation, tensors: Mapping[str, Tensor], report: Report) -> None:
    """Whatever stood in the pruned units, the answers would be the same."""
    groups = [subject.masks.groups[id_] for id_ in sorted(subject.masks.units)]
    layers = [group for group in groups if group.kind is Kind.LAYER]
    program = evaluation.forward if isinstance(evaluation.forward, Interpreter) else None
    inputs = evaluation.data.batch(0, evaluation.batch)
    fault = ""
    if program is not None:
        fault = _unseen(subject, program.program.tensors)
        fault = fault or next(filter(None, (joining_fault(layer, program, tensors, inputs) for layer in layers)), "")
    proof = Proof(evaluation.forward, tensors, inputs, subject.masks, subject.candidate.masks.digest)
    if fault := fault or proof.fault():
        raise Declined(Reason.PROOF_FAILED, "dead units", fault)
    text = f"random values in the pruned units of {len(groups)} groups change no answer of {len(inputs[0])} samples"
    if declared := [group.id for group in groups if not group.zero_at_zero]:
        text += f"; declared to follow an activation with f(0) != 0, so only fill A: {', '.join(declared)}"
    if layers and program is None:
        text += "; what removed layers add to their shortcuts cannot be seen in a function"
    report.passed("dead units", text)


def _unseen(subject: Subject, used: Iterable[str]) -> str:
    """The proof and the gates see only what the program uses."""
    known = set(used)
    for id_ in sorted(subject.masks.units):
        for member in subject.masks.groups[id_].members:
            parameter = subject.topology.parameters[member.parameter]
            if known.isdisjoint((member.parameter, *parameter.aliases)):
                return (
                    f"the evaluation program does not use {member.parameter} of group {id_}, so nothing is known of it"
                )
    return ""


def check_gates(
    subject: Subject,
    evaluation: Evaluation,
    base: Answers,
    reference: tuple[str, Answers],
    candidate: Answers,
    report: Report,
) -> None:
    """Twice: this step against its base, and all masks together against the weights without them."""
    if candidate.not_finite:
        message = f"the candidate answers {candidate.not_finite} of {evaluation.data.n} samples with NaN or Inf"
        raise Declined(Reason.ACCURACY_DROP, "finite answers", message)
    data, request = evaluation.data, subject.request
    against, whole = reference
    steps = (
        ("base", base, request.accuracy_drop, Reason.ACCURACY_DROP),
        (against, whole, request.cumulative_drop, Reason.CUMULATIVE_DROP),
    )
    results = [
        (gate(name, right(known, known, data), right(candidate, known, data), allowed), reason)
        for name, known, allowed, reason in steps
    ]
    report.gates.extend(result for result, _ in results)
    # A drop that is there outweighs one that cannot be excluded.
    for outcome in ("FAIL", "INCONCLUSIVE"):
        for result, reason in results:
            if result.outcome == outcome:
                _refuse(result, reason if outcome == "FAIL" else Reason.INCONCLUSIVE)
    for result, _ in results:
        report.checks.append(Check(name=f"accuracy against {result.against}", passed=True, message=sentence(result)))


def _refuse(result: GateResult, reason: Reason) -> None:
    raise Declined(reason, f"accuracy against {result.against}", sentence(result))


def _finite(answers: Answers, name: str) -> Answers:
    if answers.not_finite:
        raise Malformed(
            f"checkpoint {name} itself answers {answers.not_finite} samples with NaN or Inf; nothing can be compared "
            "with that, publish another"
        )
    return answers


def pair_answers(store: ObjectStore, loadable: Loadable) -> str:
    """Evaluate a rolled-back pair as a trainer would load it; Malformed if it answers with NaN or Inf."""
    metadata, candidate = loadable.metadata, loadable.candidate
    if metadata.evaluation is None:
        load_weights(store, metadata, loadable.topology, names=None, masks=loadable.masks)
        return "it loads, and has no evaluation set to be asked"
    evaluation = load_evaluation(store, metadata)
    tensors = load_weights(
        store,
        metadata,
        loadable.topology,
        names=evaluation.names,
        masks=loadable.masks,
        folder=layout.candidate(candidate.cycle, candidate.base) if candidate else None,
        objects=candidate.objects if candidate else (),
    )
    data = evaluation.data
    found = _finite(answer(evaluation.forward, tensors, data, batch=evaluation.batch), metadata.name)
    if data.target is None:
        return f"it loads and answers all of {data.n} samples"
    return f"it loads and answers {int(right(found, found, data).sum())} of {data.n} samples right"
