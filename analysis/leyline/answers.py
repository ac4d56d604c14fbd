"""Answers of the analysis workers: how one is written, when it is valid, and which of several counts.

An answer is one safetensors object, `responses/<request>/<worker>-<attempt>`: the arrays, and the
StructuralAnalysisResponse as JSON in its metadata. Equal input gives equal arrays bit by bit, whoever computes them,
so answers are compared by the digest of their arrays.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from leyline import layout, tensors
from leyline.messages import StructuralAnalysisRequest, StructuralAnalysisResponse
from leyline.model import Malformed
from leyline.store import Damaged, Head, ObjectStore

Arrays = Mapping[str, NDArray[Any]]

_MESSAGE = "message"
_HEADER = 16 * 1024
"""Bytes of the first read of an answer's header: most fit."""
_BEST = ("answered", "invalid", "importance", "failed")
"""Which status is kept where one answer is enough and workers ended differently: what was computed goes first."""


@dataclass(frozen=True)
class Answer:
    """One valid answer, and the path in the run where it lies."""

    path: str
    message: StructuralAnalysisResponse
    arrays: Arrays

    @property
    def vote(self) -> tuple[str, str]:
        """What must be equal for two answers to agree."""
        return self.message.status, self.message.result


@dataclass(frozen=True)
class Majority:
    """What a set of answers says."""

    answer: Answer | None
    """The answer to use, or None while too few workers agree."""
    dissenters: tuple[int, ...] = ()
    """Workers whose answer is another one; they count as failed."""


def path(cycle: str, request: str, worker: int, attempt: int) -> str:
    """Where a worker puts its answer."""
    return f"{layout.responses(cycle, request)}{worker}-{attempt}"


def result_digest(arrays: Arrays) -> str:
    """SHA-256 over names in order, dtypes, shapes and little-endian bytes."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = np.asarray(arrays[name])
        little = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
        digest.update(f"{name}\0{little.dtype.str[1:]}\0{','.join(map(str, array.shape))}\0".encode())
        digest.update(little.tobytes())
    return digest.hexdigest()


def pack(message: StructuralAnalysisResponse, arrays: Arrays) -> bytes:
    """The object to write; `result` becomes the digest of the arrays."""
    sealed = message.model_copy(update={"result": result_digest(arrays)})
    return tensors.pack(arrays, {_MESSAGE: sealed.canonical().decode()})


def unpack(data: bytes, request: StructuralAnalysisRequest, *, path: str) -> Answer:
    """Read the answer to `request`; Malformed if it answers another one, or its arrays are not what it says."""
    arrays, metadata = tensors.unpack(data, name=path)
    if set(metadata) != {_MESSAGE}:
        raise Malformed(f"{path} has the metadata {sorted(metadata)}; an answer has exactly {_MESSAGE!r}")
    message = StructuralAnalysisResponse.parse(metadata[_MESSAGE].encode(), name=path)
    if (message.idempotency_key, message.request) != (request.idempotency_key, request.id):
        raise Malformed(
            f"{path} answers request {message.request} of key {message.idempotency_key[:12]}, not {request.id} of key "
            f"{request.idempotency_key[:12]}; it comes from other settings or another checkpoint"
        )
    if path.rpartition("/")[2] != f"{message.worker}-{message.attempt}":
        raise Malformed(f"{path} says it is by worker {message.worker}, attempt {message.attempt}")
    if message.result != (found := result_digest(arrays)):
        raise Malformed(f"{path} holds arrays of SHA-256 {found[:12]}, its message says {message.result[:12]}")
    return Answer(path, message, arrays)


def read(
    store: ObjectStore, cycle: str, request: StructuralAnalysisRequest
) -> tuple[tuple[Answer, ...], tuple[str, ...]]:
    """All valid answers to a request in order of their paths, and a sentence for each object that is none."""
    found, refused = [], []
    for head in store.list(layout.responses(cycle, request.id)):
        try:
            found.append(unpack(store.get(head.key), request, path=head.key))
        except Malformed as error:
            refused.append(str(error))
    return tuple(found), tuple(refused)


def message(store: ObjectStore, head: Head) -> StructuralAnalysisResponse:
    """What an answer says of itself, without reading its arrays. Malformed if it is none."""
    said = tensors.read_header(store, head.key, head, first=_HEADER)[1].get(_MESSAGE)
    if said is None:
        raise Malformed(f"{head.key} has no {_MESSAGE} in its metadata; it is no answer")
    return StructuralAnalysisResponse.parse(said.encode(), name=head.key)


def with_result(store: ObjectStore, folder: str, result: str) -> tuple[str, bytes]:
    """Path and bytes of an answer in `folder` whose arrays have this digest: whoever's, they are the same arrays.

    Damaged if there is none.
    """
    others = []
    for head in store.list(folder):
        data = store.get(head.key)
        try:
            found = result_digest(tensors.unpack(data, name=head.key)[0])
        except Malformed as error:
            others.append(str(error))
            continue
        if found == result:
            return head.key, data
        others.append(f"{head.key} has result {found[:12]}")
    said = "; ".join(others) or "nothing is there"
    raise Damaged(
        f"no answer in {folder} has result {result[:12]}, which the decision used ({said}); start a new cycle"
    )


def majority(answers: Iterable[Answer], replicas: int) -> Majority:
    """The answer that counts.

    With one replica a single answer is enough. With more, more than half of the workers asked (and of those that
    answered) must agree; a worker has one vote, and one that contradicts itself has none and dissents.
    """
    ordered = sorted(answers, key=lambda answer: (_BEST.index(answer.message.status), answer.path))
    if replicas == 1:
        chosen = ordered[0] if ordered else None
        return Majority(chosen, _dissenters(ordered, chosen))
    votes: dict[int, set[tuple[str, str]]] = {}
    for answer in ordered:
        votes.setdefault(answer.message.worker, set()).add(answer.vote)
    for answer in ordered:
        agree = sum(vote == {answer.vote} for vote in votes.values())
        if agree * 2 > max(replicas, len(votes)):
            return Majority(answer, _dissenters(ordered, answer))
    return Majority(None)


def _dissenters(answers: Sequence[Answer], chosen: Answer | None) -> tuple[int, ...]:
    if chosen is None:
        return ()
    return tuple(sorted({answer.message.worker for answer in answers if answer.vote != chosen.vote}))
