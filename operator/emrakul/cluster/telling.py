"""Writes what became of a cycle: its status first, then its events and figures."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field, replace

from emrakul.api.cycle import CycleStatus
from emrakul.api.resource import API_VERSION
from emrakul.cluster import announce, figures
from emrakul.cluster.kube import CYCLES, EVENTS, Body, KubeError
from emrakul.cluster.services import CYCLE, Services
from emrakul.cluster.status import unable
from emrakul.cluster.subject import Subject, is_admitted, status_of
from emrakul.cluster.supervisor import Key


@dataclass
class Teller:
    """One for all cycles: it also knows which of them are live."""

    services: Services
    live: set[Key] = field(default_factory=set)

    async def conclude(self, subject: Subject, status: CycleStatus) -> Subject:
        """Write the status if it is another one; events and figures follow only once it stands."""
        before = status_of(subject.body)
        self.count_live(subject.key, live=is_admitted(status) and status.outcome is None)
        if status == before:
            return replace(subject, status=status)
        body = await self.write(subject.key, subject.body, status)
        if body is None:  # deleted meanwhile; the next event says so
            return replace(subject, status=status)
        for event in announce.events(body, before, status):
            with suppress(KubeError):  # a full namespace or a posted one: the status has told it
                await self.services.kube.create(EVENTS, subject.key.namespace, event)
        figures.count(self.services.metrics, before, status)
        return replace(subject, body=body, status=status)

    def count_live(self, key: Key, *, live: bool) -> None:
        (self.live.add if live else self.live.discard)(key)
        self.services.metrics.live_cycles = len(self.live)

    async def unable(self, subject: Subject, state: str, message: str) -> None:
        """Tell why it does not go on for now."""
        run = subject.cycle.spec.run
        status = unable(subject.status, state, message, run=run, generation=subject.generation)
        await self.conclude(subject, status)

    async def write(self, key: Key, body: Body, status: CycleStatus) -> Body | None:
        meta = {"name": key.name, "namespace": key.namespace, "uid": body["metadata"]["uid"]}
        applied = {"apiVersion": API_VERSION, "kind": CYCLE, "metadata": meta, "status": status.dump()}
        return await self.services.kube.apply_status(CYCLES, key.namespace, applied)
