"""The Jobs of one owner, as a thread sees them: every call goes to the event loop that has the client."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar

from emrakul.api import labels
from emrakul.cluster.kube import EVENTS, JOBS, PODS, AlreadyExists, Body, Kube, KubeError
from emrakul.cluster.services import Services
from emrakul.cluster.subject import Subject

T = TypeVar("T")

CALL_SECONDS = 120.0


class Taken(KubeError):
    """A Job of this name belongs to somebody else."""


@dataclass(frozen=True, kw_only=True)
class Children:
    """Found by the owner's UID: a Job of another object that had the same name is not ours."""

    kube: Kube
    loop: asyncio.AbstractEventLoop
    namespace: str
    owner: str
    """The label with the owner's UID: labels.CYCLE_UID or labels.POLICY_UID."""
    uid: str

    async def found(self) -> tuple[Body, ...]:
        """All that are not being deleted."""
        found = await self.kube.list(JOBS, self.namespace, labels=f"{self.owner}={self.uid}")
        marks = {labels.PHASE, labels.STEP, labels.LAUNCH}
        return tuple(
            job
            for job in found.items
            if self._ours(job)
            and "deletionTimestamp" not in job["metadata"]
            and marks <= job["metadata"]["labels"].keys()
        )

    async def remove(self, job: Body) -> None:
        meta = job["metadata"]
        await self.kube.delete(JOBS, self.namespace, meta["name"], uid=meta["uid"])

    def list(self) -> tuple[Body, ...]:
        return self._wait(self.found())

    def pods(self, job: Body) -> tuple[Body, ...]:
        name = job["metadata"]["name"]
        return self._wait(self.kube.list(PODS, self.namespace, labels=f"batch.kubernetes.io/job-name={name}")).items

    def events(self, uid: str) -> tuple[Body, ...]:
        return self._wait(self.kube.list(EVENTS, self.namespace, fields=f"involvedObject.uid={uid}")).items

    def create(self, job: Body) -> None:
        try:
            self._wait(self.kube.create(JOBS, self.namespace, job))
        except AlreadyExists as error:
            # made before a restart, or the answer was lost; one of an earlier owner is still being collected
            there = self._wait(self.kube.get(JOBS, self.namespace, job["metadata"]["name"]))
            if there is None or not self._ours(there) or "deletionTimestamp" in there["metadata"]:
                name = f"{self.namespace}/{job['metadata']['name']}"
                raise Taken(f"Job {name} of another owner is there; it waits until that is gone") from error

    def delete(self, job: Body) -> None:
        self._wait(self.remove(job))

    def _ours(self, job: Body) -> bool:
        return any(owner.get("uid") == self.uid for owner in job["metadata"].get("ownerReferences") or [])

    def _wait(self, call: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(call, self.loop).result(CALL_SECONDS)


def children_of(services: Services, subject: Subject) -> Children:
    """The Jobs of one cycle."""
    return Children(
        kube=services.kube,
        loop=services.loop,
        namespace=subject.key.namespace,
        owner=labels.CYCLE_UID,
        uid=subject.uid,
    )
