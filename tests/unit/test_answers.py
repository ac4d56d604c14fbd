"""Answers: written, refused, counted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from leyline import answers, tensors
from leyline.answers import Answer, majority
from leyline.local import LocalStore
from leyline.messages import StructuralAnalysisRequest, StructuralAnalysisResponse
from leyline.model import Malformed

REQUEST = StructuralAnalysisRequest(
    idempotency_key="k" * 64, id="0-3", cycle="c1-x", method="structured", checkpoint="4-1-00000000"
)
TRUTH = {"gate/a/taylor": np.array([1.0, 2.0]), "norm/w@0/a/0/0": np.array([3.0])}
LIE = {**TRUTH, "gate/a/taylor": np.array([2.0, 1.0])}


def response(worker: int, attempt: int = 1, **changes: object) -> StructuralAnalysisResponse:
    known = {"idempotency_key": REQUEST.idempotency_key, "request": REQUEST.id, "worker": worker, "attempt": attempt}
    return StructuralAnalysisResponse.model_validate(known | changes)


def answer(worker: int, arrays: answers.Arrays, attempt: int = 1, **changes: object) -> Answer:
    path = answers.path(REQUEST.cycle, REQUEST.id, worker, attempt)
    return answers.unpack(answers.pack(response(worker, attempt, **changes), arrays), REQUEST, path=path)


def test_an_answer_comes_back_as_it_was() -> None:
    read = answer(2, TRUTH, seconds=1.5)
    assert read.message.seconds == 1.5
    assert all(np.array_equal(read.arrays[name], TRUTH[name]) for name in TRUTH)
    assert read.message.result == answers.result_digest(dict(reversed(TRUTH.items())))


@pytest.mark.parametrize(
    "other",
    [
        {"a": np.array([1.0, 2.0])},
        {"b": np.array([1.0, 2.0], dtype=np.float32)},
        {"b": np.array([[1.0, 2.0]])},
        {"b": np.array([1.0, -2.0])},
    ],
)
def test_name_dtype_shape_and_bytes_are_in_the_digest(other: answers.Arrays) -> None:
    assert answers.result_digest(other) != answers.result_digest({"b": np.array([1.0, 2.0])})


def test_arrays_that_are_not_what_the_message_says_are_refused() -> None:
    honest = response(0).model_copy(update={"result": answers.result_digest(TRUTH)})
    data = tensors.pack(LIE, {"message": honest.canonical().decode()})
    with pytest.raises(Malformed, match="holds arrays of SHA-256"):
        answers.unpack(data, REQUEST, path=answers.path("c1-x", "0-3", 0, 1))


def test_an_answer_to_another_request_or_under_another_name_is_refused() -> None:
    data = answers.pack(response(0), TRUTH)
    with pytest.raises(Malformed, match="other settings"):
        answers.unpack(data, REQUEST.model_copy(update={"idempotency_key": "x"}), path="r/0-1")
    with pytest.raises(Malformed, match="by worker 0, attempt 1"):
        answers.unpack(data, REQUEST, path="r/5-1")


def test_what_is_no_answer_is_told_and_left_out(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    store.put_if_absent(answers.path("c1-x", "0-3", 0, 1), b"not a safetensors file")
    store.put_if_absent(answers.path("c1-x", "0-3", 1, 1), answers.pack(response(1), TRUTH))
    found, refused = answers.read(store, "c1-x", REQUEST)
    assert [a.message.worker for a in found] == [1]
    assert len(refused) == 1
    assert "0-1" in refused[0]


def test_one_answer_is_enough_and_what_was_computed_goes_first() -> None:
    assert majority([], 1).answer is None
    failed = answer(0, {}, status="failed", message="could not")
    good = answer(4, TRUTH)
    found = majority([failed, good], 1)
    assert found.answer is good
    assert found.dissenters == (0,)


def test_a_lie_is_outvoted_and_named() -> None:
    truth = [answer(0, TRUTH), answer(2, TRUTH)]
    lie = answer(1, LIE)
    assert majority([truth[0], lie], 3).answer is None
    found = majority([truth[0], lie, truth[1]], 3)
    assert found.answer is truth[0]
    assert found.dissenters == (1,)


def test_one_worker_cannot_make_a_majority_alone() -> None:
    assert majority([answer(1, LIE), answer(1, LIE, attempt=2), answer(0, TRUTH)], 3).answer is None


def test_a_worker_that_contradicts_itself_has_no_vote() -> None:
    both = [answer(1, LIE), answer(1, TRUTH, attempt=2)]
    assert majority([*both, answer(0, TRUTH)], 3).answer is None
    found = majority([*both, answer(0, TRUTH), answer(2, TRUTH)], 3)
    assert found.answer is not None
    assert found.dissenters == (1,)


def test_two_of_four_are_no_majority() -> None:
    split = [answer(0, TRUTH), answer(1, LIE), answer(2, TRUTH), answer(3, LIE)]
    assert majority(split, 3).answer is None
