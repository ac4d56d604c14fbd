"""kopf, and nothing else: it logs in and watches; every event only wakes a key.

No daemon, timer or on.create/update/delete handler, so that no object ever carries a finalizer or an annotation of
ours, and nothing hangs when the operator is gone.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import kopf

from emrakul.api import labels
from emrakul.api.resource import GROUP, VERSION
from emrakul.cluster.freshness import Freshness
from emrakul.cluster.services import CYCLE, POLICY
from emrakul.cluster.supervisor import Key

Wake = Callable[[Key], None]

PLURALS = {"pruningcycles": CYCLE, "pruningpolicies": POLICY}


def registry(wake: Wake, freshness: Freshness, namespaces: Collection[str]) -> kopf.OperatorRegistry:
    """What is watched: cycles, policies, and the Jobs that are ours."""
    found = kopf.OperatorRegistry()

    async def heard(event: Mapping[str, Any], resource: kopf.Resource, **_: Any) -> None:
        body = event["object"]
        meta = body["metadata"]
        watched = watch_name(resource.plural, meta["namespace"] if namespaces else None)
        if event["type"] == "DELETED":
            freshness.deleted(watched, meta["uid"])
        else:
            freshness.delivered(watched, meta["uid"], meta["resourceVersion"])
        for key in keys(resource.plural, body):
            wake(key)

    for plural in PLURALS:
        kopf.on.event(GROUP, VERSION, plural, registry=found)(heard)
    kopf.on.event("batch", "v1", "jobs", labels={labels.MANAGED_BY: labels.EMRAKUL}, registry=found)(heard)

    @kopf.on.login(registry=found)
    async def login(**given: Any) -> kopf.ConnectionInfo | None:
        return kopf.login_with_service_account(**given) or kopf.login_with_kubeconfig(**given)

    return found


def watch_name(plural: str, namespace: str | None) -> str:
    """One watch: of a namespace, or of the whole cluster."""
    return f"{plural} in {namespace}" if namespace else plural


def settings() -> kopf.OperatorSettings:
    """How kopf watches: no peering, no scanning, no words of its own on any object."""
    found = kopf.OperatorSettings()
    found.peering.standalone = True
    found.scanning.disabled = True
    found.posting.enabled = False
    # behind load balancers a stream may end without a word; bookmarks come each minute
    found.watching.server_timeout = 300
    found.watching.client_timeout = 310
    found.watching.reconnect_backoff = 1.0
    found.watching.chunk_size = 100
    found.watching.label_selectors["batch", "v1", "jobs"] = f"{labels.MANAGED_BY}={labels.EMRAKUL}"
    return found


def keys(plural: str, body: Mapping[str, Any]) -> tuple[Key, ...]:
    """What an object's event may have changed: itself, or for a Job its owner."""
    meta = body["metadata"]
    if plural in PLURALS:
        return (Key(PLURALS[plural], meta["namespace"], meta["name"]),)
    owners = meta.get("ownerReferences") or []
    return tuple(
        Key(owner["kind"], meta["namespace"], owner["name"])
        for owner in owners
        if owner.get("kind") in (CYCLE, POLICY) and str(owner.get("apiVersion", "")).startswith(f"{GROUP}/")
    )
