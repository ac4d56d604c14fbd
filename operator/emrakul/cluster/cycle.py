"""Brings one PruningCycle to where its run's log says it is, and the log one step on.

Read the resource and its Jobs live, look at the run, write the status, then act; again until there is nothing to do.
An outcome stands in the log and in the status before anything of the cycle is cleaned up.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

from pydantic import ValidationError

from emrakul.api.cycle import CycleStatus
from emrakul.api.policy import PodOverrides
from emrakul.asking import ask_for, base_of
from emrakul.cluster.access import Access, NotReady, OpenRun
from emrakul.cluster.children import Taken, children_of
from emrakul.cluster.ended import EndedCycles
from emrakul.cluster.kube import CYCLES, Body, Forbidden, Rejected
from emrakul.cluster.orphans import Live, Orphans
from emrakul.cluster.services import Services
from emrakul.cluster.source import NotYet, Over, Source, Sources
from emrakul.cluster.status import Facts, cycle_status, refused
from emrakul.cluster.subject import Subject, seen_of, status_of, subject_of
from emrakul.cluster.supervisor import RESYNC_SECONDS, Key
from emrakul.cluster.telling import Teller
from emrakul.control import Controller, Seen, name_of, next_try
from emrakul.core import plan
from emrakul.core.snapshot import Ask, Phase
from emrakul.finding import Finding
from emrakul.invalid import Invalid
from emrakul.runtime.jobs import job
from emrakul.runtime.kubernetes import KubernetesRuntime, launched
from emrakul.runtime.pods import Owner, Terms
from emrakul.timeline import phases
from emrakul.work import work
from leyline.log import NoRun, StoreReverted
from leyline.model import Malformed
from leyline.reasons import Outcome, Reason
from leyline.records import Admit, End
from leyline.store import StoreError
from leyline.work import Work

log = logging.getLogger("emrakul")

SOON_SECONDS = 10.0
"""Until what a resource waits for (a Secret, a policy, a run) is looked for again."""
PROGRESS_SECONDS = 10.0
FEW = 100
"""Live cycles up to which each is looked at so often."""
STEPS = 50
"""Looks of one reconcile: more than a cycle has, so a fault of ours cannot turn without end."""
KEPT = 256
"""Cycles whose readings are kept between two reconciles; those of others are read again."""
SEARCHED = 300
"""Records from the newest backwards in which a cycle looks for its own, once, if its status is lost."""


@dataclass(kw_only=True)
class _Driven:
    """What is kept of a cycle between two reconciles: readings, no decisions."""

    controller: Controller
    runtime: KubernetesRuntime
    run: OpenRun
    seconds: Mapping[str, float] | None = None
    """Of each phase, once the cycle has ended."""
    work: Mapping[Phase, Work] | None = None
    """Of each phase's workers, likewise."""
    refused_since: float | None = None
    """When the API server first said no to what the cycle needs, by the loop's clock."""


@dataclass
class CycleReconciler:
    """All cycles of this operator."""

    services: Services
    orphans: Orphans
    sources: Sources
    teller: Teller
    ended: EndedCycles
    _driven: OrderedDict[str, _Driven] = field(default_factory=OrderedDict)
    _known: dict[Key, Access] = field(default_factory=dict)
    """Runs of cycles that have not ended, for when their resource is gone."""
    _searched: dict[Key, str] = field(default_factory=dict)
    """UIDs for which the log was searched."""

    async def reconcile(self, key: Key) -> float | None:
        """One resource: seconds until it is looked at again, or None if only an event matters."""
        body = await self.services.kube.get(CYCLES, key.namespace, key.name)
        if body is None:
            return await self._gone(key)
        if not self.services.ours(body):
            return None
        subject = subject_of(key, body)
        if isinstance(subject, str) and status_of(body).cycle is not None:
            log.warning("%s: %s", key, subject)
            return RESYNC_SECONDS
        if isinstance(subject, str):
            generation = int(body["metadata"].get("generation", 0))
            status = refused(
                status_of(body), Reason.INVALID_INPUT, subject, run=None, generation=generation, now=_now()
            )
            await self.teller.write(key, body, status)
            return None
        if subject.status.outcome is not None:
            self._driven.pop(subject.uid, None)
            self._known.pop(key, None)
            return await self.ended.finish(subject)
        try:
            return await self._drive(subject)
        except Over as over:
            if subject.status.cycle is not None:  # it is live in the log: only its record can end it
                await self.teller.unable(subject, "Waiting", str(over))
                return RESYNC_SECONDS
            run = subject.cycle.spec.run
            done = refused(subject.status, over.reason, str(over), run=run, generation=subject.generation, now=_now())
            await self.teller.conclude(subject, done)
            return 0.0
        except (NotYet, NotReady, NoRun) as error:
            await self.teller.unable(subject, "Waiting", str(error))
            return SOON_SECONDS
        except Invalid as error:  # a newer version admitted it
            await self.teller.unable(subject, "Waiting", str(error))
            return RESYNC_SECONDS
        except StoreError as error:
            reverted, known = isinstance(error, StoreReverted), self._known.get(key)
            self.services.health.store_said(known.name if known else str(key), error)
            self.services.metrics.store_error(error)
            await self.teller.unable(subject, "StoreReverted" if reverted else "Waiting", str(error))
            if not reverted:
                raise
            return RESYNC_SECONDS
        except (Malformed, ValidationError, Rejected, Forbidden) as error:
            await self.teller.unable(subject, "Waiting", str(error))
            raise

    # --- the live cycle ---

    async def _drive(self, subject: Subject) -> float | None:
        source = await self.sources.of(subject)
        subject = replace(subject, status=subject.status.model_copy(update={"frozen": source.frozen}))
        access = Access(namespace=subject.key.namespace, run=source.run, store=source.frozen.store)
        self._known[subject.key] = access
        known = subject.uid in self._driven
        run = await self.services.runs.open(
            access, seen=seen_of(subject.status) if known else await self.sources.seen(subject, source)
        )
        self.services.attend(run, subject.key)
        async with run.lock:
            ask, name = await asyncio.to_thread(self._ask, subject, run, source)
        live = Live()
        if name is None:
            async with run.lock:
                live = await self.orphans.check(run)
            withdrawn = source.withdrawn or await self.sources.overtaken(subject)
            ask = replace(ask, withdrawn=withdrawn, live_is_driven=live.driven)
        driven = self._controller(subject, run, source, ask, name)
        for _ in range(STEPS):
            async with run.lock:
                look = await asyncio.to_thread(driven.controller.look, ask)
                worth = _is_worth_telling(look)
                facts = await asyncio.to_thread(_facts, driven, look, subject.status) if worth else None
            self.services.health.store_said(run.access.name)
            if (other := _driven_by_another(subject, look)) is not None:
                await self.teller.unable(subject, "Waiting", other)
                return RESYNC_SECONDS if live.left is None else live.left
            if _may_try_again(subject, look):
                async with run.lock:
                    name, _ = await asyncio.to_thread(next_try, run.log, ask)
                driven = self._controller(subject, run, source, ask, name)
                continue
            if facts is not None:
                subject = await self._tell(subject, look, facts)
            if subject.status.outcome is not None and (look.plan.refused or not look.plan.actions):
                self.services.happened(run, look.snapshot.state, but=subject.key)
                return 0.0  # cleaned up in the next turn, from the status as it was written
            if not look.plan.actions:
                return self._wait(look, live)
            await self._act(subject, driven, look)
        return 1.0

    async def _act(self, subject: Subject, driven: _Driven, look: Seen) -> None:
        """What the look asked for. A Job that the API server does not take ends the cycle, at once or after a time."""
        async with driven.run.lock:
            try:
                await asyncio.to_thread(driven.controller.act, look)
                driven.refused_since = None
                return
            except (Invalid, Rejected, Forbidden, Taken) as error:
                now = self.services.loop.time()
                since = driven.refused_since = driven.refused_since or now
                limit = driven.controller.ask.settings.startup_timeout
                if isinstance(error, Forbidden | Taken) and now - since < limit:
                    refusal = error
                else:
                    finding = Finding(Reason.NOT_SCHEDULED, str(error))
                    await asyncio.to_thread(driven.controller.give_up, look, finding)
                    return
        await self.teller.unable(subject, look.plan.state, str(refusal))
        raise refusal

    def _wait(self, look: Seen, live: Live) -> float:
        """Until the next limit, or until the live cycle that is in the way may turn out to be nobody's."""
        wait = look.plan.wait.total_seconds() if look.plan.wait else RESYNC_SECONDS
        if live.left is not None:
            wait = min(wait, live.left)
        # people like to see how far it is; with many cycles, only what happens is looked at
        longest = PROGRESS_SECONDS if len(self.teller.live) <= FEW else RESYNC_SECONDS
        return min(max(wait, 0.1), longest)

    def _ask(self, subject: Subject, run: OpenRun, source: Source) -> tuple[Ask, str | None]:
        """What is asked, and the cycle's name in the log if it is admitted. In a thread: it reads the log."""
        status = subject.status
        if status.cycle is not None:
            self._searched.pop(subject.key, None)  # if the status is lost later, it is searched for again
        known = (status.base, status.cycle) if status.cycle and status.base is not None else self._own(subject, run)
        if known is not None:
            base, name = known
            ask = Ask(base=base, settings=source.spec.settings, runtime=KubernetesRuntime.name)
        else:
            name = None
            try:
                base = base_of(subject.cycle, run.log.tail().state)
                ask = ask_for(base, source.spec, store=run.store, runtime=KubernetesRuntime.name)
            except Invalid as error:
                raise Over(Reason.INVALID_INPUT, str(error)) from error
        images = self.services.config.images
        return (
            replace(
                ask,
                operator_class=self.services.identity,
                resource=subject.resource,
                images={"worker": images.worker, "validator": images.validator},
                suspend=subject.cycle.spec.suspend,
            ),
            name,
        )

    def _own(self, subject: Subject, run: OpenRun) -> tuple[int, str] | None:
        """The cycle that this very resource was admitted for, where its status does not say so (any more)."""
        tail = run.log.tail()
        candidates = [tail.state.live.admitted] if tail.state.live else []
        if self._searched.get(subject.key) != subject.uid:
            self._searched[subject.key] = subject.uid
            candidates += range(tail.record.n, max(-1, tail.record.n - SEARCHED), -1)
        for n in candidates:
            record, _ = run.log.read(n)
            if isinstance(record.body, Admit) and record.body.resource == subject.resource:
                return record.body.base, record.id
        return None

    def _controller(self, subject: Subject, run: OpenRun, source: Source, ask: Ask, name: str | None) -> _Driven:
        cycle = name or name_of(ask)
        kept = self._driven.get(subject.uid)
        if kept is not None and kept.controller.cycle == cycle and kept.run is run:
            self._driven.move_to_end(subject.uid)
            kept.runtime.forget()
            return kept
        made: list[KubernetesRuntime] = []
        children = children_of(self.services, subject)

        def runtime(uri: str) -> KubernetesRuntime:
            def build(phase: Phase, launch: int, step: int, count: int, memory_bytes: int, now: datetime) -> Body:
                terms = self._terms(subject, source, controller.ask)
                body = job(
                    terms, phase, cycle_uri=uri, launch=launch, step=step, workers=count, memory_bytes=memory_bytes
                )
                return launched(body, now)

            made.append(KubernetesRuntime(children, build))
            return made[0]

        controller = Controller(run.store, run.log, ask, runtime, trust=self.services.runs.trust, cycle=name)
        driven = _Driven(controller=controller, runtime=made[0], run=run)
        self._driven[subject.uid] = driven
        while len(self._driven) > KEPT:
            self._driven.popitem(last=False)
        return driven

    def _terms(self, subject: Subject, source: Source, ask: Ask) -> Terms:
        key = subject.key
        return Terms(
            owner=Owner(kind="PruningCycle", name=key.name, uid=subject.uid, namespace=key.namespace),
            config=self.services.config,
            settings=ask.settings,
            images=ask.images,
            store=source.frozen.store,
            overrides=source.frozen.pod_overrides or PodOverrides(),
            queue=source.frozen.queue,
        )

    # --- what is told ---

    async def _tell(self, subject: Subject, look: Seen, facts: Facts) -> Subject:
        status = cycle_status(
            subject.status, look.snapshot, look.plan, facts, generation=subject.generation, now=_now()
        )
        return await self.teller.conclude(subject, status)

    # --- the end ---

    async def _gone(self, key: Key) -> float | None:
        """The resource was deleted. If its cycle is still live, that ends too, once it is absent for a second time."""
        self.teller.count_live(key, live=False)
        self.ended.forget(key)
        self._searched.pop(key, None)
        if (access := self._known.get(key)) is None:
            self.services.leave(key)
            return None
        left = None
        try:
            run = await self.services.runs.open(access)
            async with run.lock:
                left = (await self.orphans.check(run)).left
                state = (await asyncio.to_thread(run.log.tail)).state
            if left is None:
                self.services.happened(run, state, but=key)
        except (NotReady, NoRun) as error:  # its Secret went with it: the next cycle of the run ends this one
            log.info("%s is deleted, and its run cannot be reached: %s", key, error)
        if left is None:
            self._known.pop(key, None)
            self.services.leave(key)
        return left


# --- parts ------------------------------------------------------------------------------------------------------------


def _facts(driven: _Driven, look: Seen, before: CycleStatus) -> Facts:
    """In a thread: it reads the log, and for an ended cycle when its objects were written. Both never change."""
    run, snapshot = driven.run, look.snapshot
    record = snapshot.end or snapshot.admitted
    seen = seen_of(before)
    if record is not None and (seen is None or seen[0] != record.n):
        seen = (record.n, run.log.read(record.n)[1])
    if driven.seconds is None and snapshot.end is not None and snapshot.admitted is not None:
        driven.seconds = phases(run.store, snapshot.admitted, snapshot.end)
        driven.work = work(run.store, snapshot.cycle, snapshot.base)
    return Facts(
        run=run.store.uri,
        seen=seen if record else None,
        seconds=driven.seconds,
        work=driven.work,
        workers=driven.runtime.workers(Phase.ANALYSE),
    )


def _is_worth_telling(look: Seen) -> bool:
    """Before it begins, whenever it waits or works for long, and once it has ended: between, the next look is near.

    Of an end nothing is told until its record stands: another one may come first.
    """
    actions = look.plan.actions
    return not actions or look.snapshot.end is not None or isinstance(actions[0], plan.Admit | plan.Decide)


def _may_try_again(subject: Subject, look: Seen) -> bool:
    """A person's new resource for a cycle that another resource's end left undone: they want it done now."""
    end, admitted = look.snapshot.end, look.snapshot.admitted
    return (
        subject.by_policy is None
        and end is not None
        and isinstance(end.body, End)
        and end.body.outcome == Outcome.SKIPPED
        and admitted is not None
        and isinstance(admitted.body, Admit)
        and admitted.body.resource not in ("", subject.resource)
    )


def _driven_by_another(subject: Subject, look: Seen) -> str | None:
    """Two resources may ask for the very same cycle: the one it was admitted for drives it, the other tells its end."""
    admitted = look.snapshot.admitted
    if admitted is None or look.snapshot.end is not None or not isinstance(admitted.body, Admit):
        return None
    if admitted.body.resource in ("", subject.resource):
        return None
    return f"the same cycle ({admitted.id}) is carried out for PruningCycle {admitted.body.resource.rpartition('/')[0]}"


def _now() -> datetime:
    return datetime.now(UTC)
