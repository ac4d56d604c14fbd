"""What the API server answers becomes one of our errors: who meets it does the right thing by its type."""

from __future__ import annotations

import json

import pytest

from emrakul.cluster.kube import AlreadyExists, Conflict, Forbidden, KubeError, Rejected, Unavailable, _error


def answer(code: int, reason: str) -> KubeError:
    body = {"kind": "Status", "status": "Failure", "message": "it said so", "reason": reason, "code": code}
    return _error("POST", "/apis/batch/v1/namespaces/a/jobs", code, json.dumps(body).encode())


@pytest.mark.parametrize(
    ("code", "reason", "kind"),
    [
        (409, "AlreadyExists", AlreadyExists),
        (409, "Conflict", Conflict),  # a quota that was counted twice at once: the object was not made
        (400, "BadRequest", Rejected),
        (422, "Invalid", Rejected),
        (401, "Unauthorized", Forbidden),
        (403, "Forbidden", Forbidden),
        (429, "TooManyRequests", Unavailable),
        (504, "Timeout", Unavailable),
        (410, "Expired", KubeError),
    ],
)
def test_each_answer_has_its_type_and_its_words(code: int, reason: str, kind: type[KubeError]) -> None:
    error = answer(code, reason)
    assert type(error) is kind
    assert str(error) == f"POST /apis/batch/v1/namespaces/a/jobs: it said so ({code})"


def test_a_proxy_that_speaks_no_json_is_quoted() -> None:
    assert str(_error("GET", "/api", 502, b"<html>bad gateway")) == "GET /api: <html>bad gateway (502)"
