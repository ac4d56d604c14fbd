"""Faults between boto3 and a real S3 server, put in at botocore's own seam before a request is sent."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterator
from typing import Any

from botocore.awsrequest import AWSPreparedRequest, AWSResponse
from botocore.exceptions import ConnectionClosedError

from leyline.s3 import S3Store


class Faults:
    """What goes wrong with the next requests of one store's client. Counts every request it sees."""

    def __init__(self, store: S3Store) -> None:
        self._client = store._client
        self._plans: dict[str, list[Any]] = {}
        self.seen: Counter[str] = Counter()
        self._client.meta.events.register("before-send.s3", self._before_send, unique_id="faults")

    def remove(self) -> None:
        self._client.meta.events.unregister("before-send.s3", unique_id="faults")

    def lose_response(self, operation: str, *, times: int = 1) -> None:
        """The server does the work, and the connection ends before its answer."""
        self._plans.setdefault(operation, []).extend([None] * times)

    def answer(self, operation: str, status: int, code: str, *, times: int = 1) -> None:
        """The server is not asked; this is the answer."""
        self._plans.setdefault(operation, []).extend([(status, code)] * times)

    def _before_send(self, request: AWSPreparedRequest, event_name: str, **_: Any) -> AWSResponse | None:
        operation = event_name.rpartition(".")[2]
        self.seen[operation] += 1
        plan = self._plans.get(operation)
        if not plan:
            return None
        fault = plan.pop(0)
        if fault is None:
            self._client._endpoint.http_session.send(request)  # type: ignore[attr-defined]
            raise ConnectionClosedError(endpoint_url=request.url)
        status, code = fault
        body = f"<Error><Code>{code}</Code><Message>on purpose</Message></Error>".encode()
        return AWSResponse(request.url, status, {"content-length": str(len(body))}, _Raw(body))


class _Raw(io.BytesIO):
    def stream(self, **_: Any) -> Iterator[bytes]:
        yield self.read()
