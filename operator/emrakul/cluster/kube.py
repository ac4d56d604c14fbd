"""The only user of the Kubernetes client. Bodies are plain dicts; what the server refuses becomes one of our errors."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
from kubernetes.aio import client, config

FIELD_MANAGER = "emrakul-operator"
TIMEOUT_SECONDS = 30.0
PAGE = 100
"""Objects of one page of a listing."""

Body = dict[str, Any]


@dataclass(frozen=True)
class Kind:
    """A kind of object, by its place in the API."""

    api: str
    """`api/v1` or `apis/<group>/<version>`."""
    plural: str

    def path(self, namespace: str | None, name: str = "") -> str:
        inside = f"/namespaces/{namespace}" if namespace else ""
        return f"/{self.api}{inside}/{self.plural}{f'/{name}' if name else ''}"


CYCLES = Kind("apis/emrakul.dev/v1alpha1", "pruningcycles")
POLICIES = Kind("apis/emrakul.dev/v1alpha1", "pruningpolicies")
JOBS = Kind("apis/batch/v1", "jobs")
PODS = Kind("api/v1", "pods")
EVENTS = Kind("api/v1", "events")
SECRETS = Kind("api/v1", "secrets")


class KubeError(Exception):
    """What the API server answered, in a sentence."""


class AlreadyExists(KubeError):
    """409: an object of this name is there."""


class Conflict(KubeError):
    """409 for any other reason: a precondition does not hold, or something was changed at the same moment."""


class Rejected(KubeError):
    """400, 422: the object itself is wrong, and trying again gives the same answer."""


class Forbidden(KubeError):
    """401, 403: a quota, a policy or missing rights. For a moment after its start the API server says so to all."""


class Unavailable(KubeError):
    """No answer, 429 or 5xx: trying again may help."""


@dataclass(frozen=True)
class Listing:
    """The objects of one kind, and the version of the whole list."""

    items: tuple[Body, ...]
    version: str


class Kube:
    """The API server, as one account."""

    def __init__(self, api: client.ApiClient, *, asked: Callable[[str, int], None] = lambda _verb, _code: None) -> None:
        """`asked` is told of every request: its verb and the answer's code, 0 for none."""
        authority = api.configuration.ssl_ca_cert
        self.cluster = hashlib.sha256(Path(authority).read_bytes()).hexdigest()[:12] if authority else ""
        """Tells this cluster from others that share a store with it, by its certificate authority."""
        self._api = api
        self._asked = asked

    @classmethod
    async def connect(cls, *, asked: Callable[[str, int], None] = lambda _verb, _code: None) -> Kube:
        """In a pod as its service account, else as KUBECONFIG says."""
        configuration = client.Configuration()
        try:
            config.load_incluster_config(client_configuration=configuration)  # type: ignore[no-untyped-call]
        except config.ConfigException:
            try:
                await config.load_kube_config(client_configuration=configuration)  # type: ignore[no-untyped-call]
            except config.ConfigException as error:
                raise KubeError(f"no cluster is configured ({error}); run in a pod, or set KUBECONFIG") from error
        return cls(client.ApiClient(configuration), asked=asked)

    async def close(self) -> None:
        await self._api.close()  # type: ignore[no-untyped-call]

    async def get(self, kind: Kind, namespace: str, name: str) -> Body | None:
        """The object, or None if there is none."""
        return await self._ask("GET", kind.path(namespace, name), absent=True)

    async def list(
        self, kind: Kind, namespace: str | None, *, labels: str = "", fields: str = "", metadata: bool = False
    ) -> Listing:
        """All objects, of one namespace or of the cluster; `metadata` leaves the rest out."""
        items: list[Body] = []
        query = {"limit": str(PAGE), "labelSelector": labels, "fieldSelector": fields}
        accept = "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1" if metadata else "application/json"
        while True:
            page = await self._ask("GET", kind.path(namespace), query=query, accept=accept, verb="LIST")
            assert page is not None
            items += page.get("items") or []
            if not page["metadata"].get("continue"):
                return Listing(tuple(items), page["metadata"].get("resourceVersion", "0"))
            query["continue"] = page["metadata"]["continue"]

    async def create(self, kind: Kind, namespace: str, body: Body) -> Body:
        """The object as it was made; AlreadyExists if one of its name is there."""
        made = await self._ask("POST", kind.path(namespace), query={"fieldManager": FIELD_MANAGER}, body=body)
        assert made is not None
        return made

    async def apply_status(self, kind: Kind, namespace: str, body: Body) -> Body | None:
        """Set the status that we own by server-side apply; None if the object is gone (it is never made)."""
        path = f"{kind.path(namespace, body['metadata']['name'])}/status"
        query = {"fieldManager": FIELD_MANAGER, "force": "true"}
        apply = "application/apply-patch+yaml"
        return await self._ask("PATCH", path, query=query, body=body, content=apply, verb="APPLY", absent=True)

    async def delete(self, kind: Kind, namespace: str, name: str, *, uid: str) -> None:
        """Delete this very object, its dependents in the background; one that is gone is no error."""
        options = {"propagationPolicy": "Background", "preconditions": {"uid": uid}}
        try:
            await self._ask("DELETE", kind.path(namespace, name), body=options, absent=True)
        except Conflict:  # another object of that name, which is not ours to delete
            return

    async def _ask(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        body: Body | None = None,
        accept: str = "application/json",
        content: str = "application/json",
        verb: str = "",
        absent: bool = False,
    ) -> Body | None:
        code = 0
        try:
            request = await self._api.param_serialize(
                method,
                path,
                query_params=[(key, value) for key, value in (query or {}).items() if value],
                header_params={"Accept": accept, "Content-Type": content},
                body=body,
                auth_settings=["BearerToken"],
            )
            answer = await self._api.call_api(*request, _request_timeout=TIMEOUT_SECONDS)
            code = answer.status
            data = await answer.read()  # type: ignore[no-untyped-call]
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise Unavailable(
                f"{method} {path}: the API server does not answer ({error or type(error).__name__})"
            ) from error
        finally:
            self._asked(verb or method, code)
        if code == 404 and absent:
            return None
        if code >= 400:
            raise _error(method, path, code, data)
        found = json.loads(data)
        assert isinstance(found, dict)
        return found


def _error(method: str, path: str, code: int, data: bytes) -> KubeError:
    reason = None
    try:
        status = json.loads(data)
        said, reason = str(status["message"]), status.get("reason")
    except (ValueError, KeyError, TypeError):
        said = data.decode(errors="replace")[:200]
    sentence = f"{method} {path}: {said} ({code})"
    if code == 409:
        return AlreadyExists(sentence) if reason == "AlreadyExists" else Conflict(sentence)
    if code == 429 or code >= 500:
        return Unavailable(sentence)
    if code in (400, 422):
        return Rejected(sentence)
    if code in (401, 403):
        return Forbidden(sentence)
    return KubeError(sentence)
