"""A cycle that has its outcome: its Jobs go, its sink hears of it, and one day the resource goes."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, field
from datetime import UTC, datetime

from emrakul.api.cycle import CycleStatus, RollbackStatus
from emrakul.cluster import retention
from emrakul.cluster.access import Access, NotReady, OpenRun
from emrakul.cluster.children import children_of
from emrakul.cluster.kube import CYCLES
from emrakul.cluster.outbox import offer
from emrakul.cluster.services import Services
from emrakul.cluster.source import Sources
from emrakul.cluster.subject import Subject, seen_of
from emrakul.cluster.supervisor import RESYNC_SECONDS, Key
from emrakul.cluster.telling import Teller
from leyline.reasons import Outcome
from leyline.store import StoreError

log = logging.getLogger("emrakul")

KEPT_UNSENT_SECONDS = 7 * 86400.0
"""How long a resource outlives its time while its sink has not taken the outcome."""


@dataclass
class EndedCycles:
    """All ended cycles of this operator."""

    services: Services
    teller: Teller
    sources: Sources
    _cleaned: dict[Key, str] = field(default_factory=dict)
    """UIDs of cycles whose Jobs are gone."""

    def forget(self, key: Key) -> None:
        """The resource is gone."""
        self._cleaned.pop(key, None)

    async def finish(self, subject: Subject) -> float | None:
        """Jobs go, the outcome goes out, and in the end the resource goes too, if it has a time to live."""
        status = subject.status
        if self._cleaned.get(subject.key) != subject.uid:
            children = children_of(self.services, subject)
            for found in await children.found():
                await children.remove(found)
            self._cleaned[subject.key] = subject.uid
        if status.observed_generation != subject.generation:
            current = status.model_copy(update={"observed_generation": subject.generation})
            subject = await self.teller.conclude(subject, current)
        run, unsent = await self._ended_run(subject), False
        if run is not None:
            async with run.lock:
                undone = await asyncio.to_thread(_undone, run, status)
            if undone is not None:
                subject = await self.teller.conclude(subject, status.model_copy(update={"rollback": undone}))
            own = status.frozen.sink if status.frozen else None
            unsent = status.cycle is not None and await offer(self.services, own, run, status.cycle)
            if subject.status.outcome is Outcome.COMMITTED and subject.status.rollback is None:
                self.services.remember(run, subject.key)
            else:
                self.services.leave(subject.key)
        left = retention.seconds_left(status, subject.cycle.spec.ttl_seconds_after_finished, datetime.now(UTC))
        if left is None or left > 0:
            # what a sink has not taken may be given up for others: then it is offered again
            return min(left or RESYNC_SECONDS, RESYNC_SECONDS) if unsent else left
        if (unsent and left > -KEPT_UNSENT_SECONDS) or await self.sources.would_come_again(subject):
            return RESYNC_SECONDS
        if await self.recorded(subject.key.namespace, status):
            await self.services.kube.delete(CYCLES, subject.key.namespace, subject.key.name, uid=subject.uid)
            return None
        return RESYNC_SECONDS

    async def _ended_run(self, subject: Subject) -> OpenRun | None:
        """The run of an ended cycle, where it still can be reached; nothing that is left to do is worth an error."""
        status = subject.status
        if status.run is None or status.frozen is None or status.record is None:
            return None
        access = Access(namespace=subject.key.namespace, run=status.run, store=status.frozen.store)
        try:
            return await self.services.runs.open(access, seen=seen_of(status))
        except (NotReady, StoreError) as error:
            log.debug("%s: %s", subject.key, error)
            return None

    async def recorded(self, namespace: str, status: CycleStatus) -> bool:
        """Whether the log has, as read back now, the record that the status speaks of; one that has none needs none."""
        if status.record is None or status.run is None or status.frozen is None:
            return status.cycle is None
        access = Access(namespace=namespace, run=status.run, store=status.frozen.store)
        run = await self.services.runs.open(access, seen=seen_of(status))
        async with run.lock:
            record, _ = await asyncio.to_thread(run.log.read, status.record)
        return record.id == status.cycle


def _undone(run: OpenRun, status: CycleStatus) -> RollbackStatus | None:
    """The rollback that condemned what the cycle committed, if it is not told yet."""
    if status.outcome is not Outcome.COMMITTED or status.rollback is not None or status.record is None:
        return None
    state = run.log.tail().state
    pair = state.pair(status.record)
    if pair is None or not pair.condemned:
        return None
    record, _ = run.log.read(state.rolled_back)
    return RollbackStatus(record=record.n, id=record.id[:256], message=record.message[:4096])
