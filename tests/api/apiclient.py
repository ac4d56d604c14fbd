"""A plain client of the API server for tests: what a person or another controller would do, without a library."""

from __future__ import annotations

import http.client
import json
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from select import select
from typing import Any
from urllib.parse import urlsplit

import yaml

from cluster.apiserver import ApiServer

Body = dict[str, Any]

CYCLES = "apis/emrakul.dev/v1alpha1/{}pruningcycles"
POLICIES = "apis/emrakul.dev/v1alpha1/{}pruningpolicies"
JOBS = "apis/batch/v1/{}jobs"
EVENTS = "api/v1/{}events"
NAMESPACES = "api/v1/namespaces"
PODS = "api/v1/{}pods"
SECRETS = "api/v1/{}secrets"


class Refused(Exception):
    """An answer of 4xx or 5xx."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(f"{code} {message}")
        self.code = code


class Api:
    """One user's requests. Each thread has a connection of its own, which it keeps."""

    def __init__(self, server: ApiServer) -> None:
        self._place = urlsplit(server.url).netloc
        pair = server.authority.client("test", groups=("system:masters",))
        self._context = ssl.create_default_context(cafile=str(server.authority.root.certificate))
        self._context.load_cert_chain(pair.certificate, pair.key)
        self._threads = threading.local()
        self._connections: list[http.client.HTTPSConnection] = []

    def ask(
        self, method: str, path: str, body: Body | None = None, *, content: str = "application/json", again: int = 20
    ) -> Any:
        """The answer; where the server says to come again later, at most `again` times a second later."""
        connection = getattr(self._threads, "connection", None)
        if connection is None:
            connection = self._threads.connection = self._connect()
            self._connections.append(connection)
        data = None if body is None else json.dumps(body)
        if connection.sock is not None and select([connection.sock], [], [], 0)[0]:
            connection.close()  # the server said good-bye meanwhile: it was restarted
        try:
            connection.request(method, f"/{path}", data, {"Content-Type": content} if data else {})
            answer = connection.getresponse()
            text = answer.read()
        except http.client.HTTPException as error:
            connection.close()
            raise ConnectionError(str(error)) from error
        except OSError:
            connection.close()
            raise
        if answer.status in (429, 503) and again:  # "storage is (re)initializing": it has just been restarted
            time.sleep(1)
            return self.ask(method, path, body, content=content, again=again - 1)
        if answer.status >= 400:
            raise Refused(answer.status, json.loads(text or b"{}").get("message", ""))
        return json.loads(text)

    def watch(self, kind: str, namespace: str) -> Iterator[Body]:
        """Events from the beginning, until the server ends it."""
        with closing(self._connect(seconds=None)) as connection, suppress(OSError, http.client.HTTPException):
            connection.request("GET", f"/{_in(kind, namespace)}?watch=1")
            answer = connection.getresponse()
            while line := answer.readline():
                yield json.loads(line)

    def close(self) -> None:
        for connection in self._connections:
            connection.close()

    def _connect(self, seconds: float | None = 30) -> http.client.HTTPSConnection:
        return http.client.HTTPSConnection(self._place, timeout=seconds, context=self._context)

    def get(self, kind: str, namespace: str, name: str) -> Body | None:
        try:
            return self.ask("GET", f"{_in(kind, namespace)}/{name}")
        except Refused as refused:
            if refused.code == 404:
                return None
            raise

    def list(self, kind: str, namespace: str | None = None) -> list[Body]:
        return self.ask("GET", _in(kind, namespace))["items"]

    def create(self, kind: str, namespace: str, body: Body) -> Body:
        return self.ask("POST", _in(kind, namespace), body)

    def patch(self, kind: str, namespace: str, name: str, change: Body, *, status: bool = False) -> Body:
        path = f"{_in(kind, namespace)}/{name}{'/status' if status else ''}"
        return self.ask("PATCH", path, change, content="application/merge-patch+json")

    def delete(self, kind: str, namespace: str, name: str) -> None:
        self.ask("DELETE", f"{_in(kind, namespace)}/{name}", {"propagationPolicy": "Background"})

    def serves(self, kind: str) -> bool:
        """Whether objects of this kind can be listed."""
        try:
            self.list(kind)
        except Refused:
            return False
        return True

    def apply_crds(self) -> None:
        """Both CRDs; a moment later they are served."""
        for path in sorted(Path("crds").glob("*.yaml")):
            body = yaml.safe_load(path.read_text())
            place = "apis/apiextensions.k8s.io/v1/customresourcedefinitions"
            try:
                self.ask("POST", place, body)
            except Refused as refused:
                if refused.code != 409:
                    raise


def _in(kind: str, namespace: str | None) -> str:
    return kind.format(f"namespaces/{namespace}/" if namespace else "")
