"""Brings one PruningCycle to where its run's log says it is, and the log one step on.

Read the resource and its Jobs live, look at the run, write the status, then act; again until there is nothing to do.
An outcome stands in the log and in the status before anything of the cycle is cleaned up.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

from pydantic import ValidationError

from emrakul.api import labels
from emrakul.api.cycle import CycleStatus, Frozen, PruningCycle, RollbackStatus
from emrakul.api.manifest import parse_resource, run_of
from emrakul.api.policy import PodOverrides, PolicySpec, PruningPolicy, StoreSpec
from emrakul.api.resource import API_VERSION, ConditionType
from emrakul.asking import ask_for, base_of
from emrakul.cluster import announce, figures, retention
from emrakul.cluster.access import Access, NotReady, OpenRun
from emrakul.cluster.children import Children, Taken
from emrakul.cluster.kube import CYCLES, EVENTS, POLICIES, Body, Forbidden, KubeError, Rejected
from emrakul.cluster.orphans import Orphans
from emrakul.cluster.outbox import offer
from emrakul.cluster.services import CYCLE, Services
from emrakul.cluster.status import Facts, cycle_status, refused, unable
from emrakul.cluster.supervisor import RESYNC_SECONDS, Key
from emrakul.control import Controller, Seen, name_of
from emrakul.core import plan
from emrakul.core.snapshot import Ask, Phase
from emrakul.finding import Finding
from emrakul.invalid import Invalid
from emrakul.runtime.jobs import job
from emrakul.runtime.kubernetes import KubernetesRuntime, launched
from emrakul.runtime.overrides import layered
from emrakul.runtime.pods import Owner, Terms
from emrakul.timeline import phases
from leyline.log import NoRun, StoreReverted
from leyline.model import Malformed
from leyline.reasons import Outcome, Reason
from leyline.records import Admit
from leyline.store import StoreError

log = logging.getLogger("emrakul")

SOON_SECONDS = 10.0
"""Until what a resource waits for (a Secret, a policy, a run) is looked for again."""
PROGRESS_SECONDS = 10.0
FEW = 100
"""Live cycles up to which each is looked at so often."""
STEPS = 50
"""Looks of one reconcile: more than a cycle has, so a fault of ours cannot turn without end."""
KEPT_UNSENT_SECONDS = 7 * 86400.0
"""How long a resource outlives its time while its sink has not taken the outcome."""
KEPT = 256
"""Cycles whose readings are kept between two reconciles; those of others are read again."""
SEARCHED = 300
"""Records from the newest backwards in which a cycle looks for its own, once, if its status is lost."""


@dataclass(frozen=True, kw_only=True)
class _Subject:
    """One resource, as it was read."""

    key: Key
    body: Body
    cycle: PruningCycle
    status: CycleStatus

    @property
    def uid(self) -> str:
        return str(self.body["metadata"]["uid"])

    @property
    def resource(self) -> str:
        """How the log names it: a later resource of the same name is another one."""
        return f"{self.key.namespace}/{self.key.name}/{self.uid}"

    @property
    def generation(self) -> int:
        return int(self.body["metadata"].get("generation", 0))

    @property
    def by_policy(self) -> str | None:
        """UID of the policy that made it."""
        return (self.body["metadata"].get("labels") or {}).get(labels.POLICY_UID)


@dataclass(frozen=True, kw_only=True)
class _Source:
    """Where a cycle's run is, and what is asked of it until it is admitted."""

    run: str
    frozen: Frozen
    spec: PolicySpec
    withdrawn: Finding | None = None
    """Its policy is gone: it ends on what was frozen if it has begun, and does not begin if it has not."""


@dataclass(kw_only=True)
class _Driven:
    """What is kept of a cycle between two reconciles: readings, no decisions."""

    controller: Controller
    runtime: KubernetesRuntime
    run: OpenRun
    seconds: Mapping[str, float] | None = None
    """Of each phase, once the cycle has ended."""
    refused_since: float | None = None
    """When the API server first said no to what the cycle needs, by the loop's clock."""


class _Over(Exception):
    """The cycle ends before its run is looked at."""

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class _NotYet(Exception):
    """Something that the cycle needs is not there."""


@dataclass
class CycleReconciler:
    """All cycles of this operator."""

    services: Services
    orphans: Orphans
    _driven: OrderedDict[str, _Driven] = field(default_factory=OrderedDict)
    _known: dict[Key, Access] = field(default_factory=dict)
    _searched: set[str] = field(default_factory=set)
    _cleaned: set[str] = field(default_factory=set)
    _live: set[Key] = field(default_factory=set)

    async def reconcile(self, key: Key) -> float | None:
        """One resource: seconds until it is looked at again, or None if only an event matters."""
        body = await self.services.kube.get(CYCLES, key.namespace, key.name)
        if body is None:
            return await self._gone(key)
        if not self.services.ours(body):
            return None
        subject = _subject(key, body)
        if isinstance(subject, str) and _status(body).cycle is not None:
            log.warning("%s: %s", key, subject)
            return RESYNC_SECONDS
        if isinstance(subject, str):
            generation = int(body["metadata"].get("generation", 0))
            status = refused(_status(body), Reason.INVALID_INPUT, subject, run=None, generation=generation, now=_now())
            await self._write(key, body, status)
            return None
        if subject.status.outcome is not None:
            return await self._finished(subject)
        try:
            return await self._drive(subject)
        except _Over as over:
            if subject.status.cycle is not None:  # it is live in the log: only its record can end it
                await self._unable(subject, "Waiting", str(over))
                return RESYNC_SECONDS
            run = subject.cycle.spec.run
            done = refused(subject.status, over.reason, str(over), run=run, generation=subject.generation, now=_now())
            await self._conclude(subject, done)
            return 0.0
        except (_NotYet, NotReady, NoRun) as error:
            await self._unable(subject, "Waiting", str(error))
            return SOON_SECONDS
        except StoreReverted as error:
            self.services.metrics.store_error(error)
            await self._unable(subject, "StoreReverted", str(error))
            return RESYNC_SECONDS
        except StoreError as error:
            self.services.health.store_failed(subject.status.run or subject.key.name, error)
            self.services.metrics.store_error(error)
            await self._unable(subject, "Waiting", str(error))
            raise
        except (Malformed, ValidationError, Rejected, Forbidden) as error:
            await self._unable(subject, "Waiting", str(error))
            raise

    # --- the live cycle ---

    async def _drive(self, subject: _Subject) -> float | None:
        source = await self._source(subject)
        subject = replace(subject, status=subject.status.model_copy(update={"frozen": source.frozen}))
        run = await self.services.runs.open(
            Access(namespace=subject.key.namespace, run=source.run, store=source.frozen.store),
            seen=_seen(subject.status),
        )
        self._known[subject.key] = run.access
        self.services.attend(run.store.uri, subject.key)
        async with run.lock:
            ask, name = await asyncio.to_thread(self._ask, subject, run, source)
        if name is None:
            ask = replace(ask, withdrawn=source.withdrawn or await self._overtaken(subject))
        driven = self._controller(subject, run, source, ask, name)
        for _ in range(STEPS):
            async with run.lock:
                look = await asyncio.to_thread(driven.controller.look, ask)
                worth = _is_worth_telling(look)
                facts = await asyncio.to_thread(_facts, driven, look, subject.status) if worth else None
            self.services.health.store_answered(run.store.uri)
            if (other := _driven_by_another(subject, look)) is not None:
                async with run.lock:
                    left = await self.orphans.check(run)
                await self._unable(subject, "Waiting", other)
                return min(left or RESYNC_SECONDS, RESYNC_SECONDS)
            if facts is not None:
                subject = await self._tell(subject, look, facts)
            if subject.status.outcome is not None and (look.plan.refused or not look.plan.actions):
                self.services.happened(run.store.uri, but=subject.key)
                return 0.0  # cleaned up in the next turn, from the status as it was written
            if not look.plan.actions:
                return await self._wait(run, look)
            await self._act(subject, driven, look)
        return 1.0

    async def _act(self, subject: _Subject, driven: _Driven, look: Seen) -> None:
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
        await self._unable(subject, look.plan.state, str(refusal))
        raise refusal

    async def _wait(self, run: OpenRun, look: Seen) -> float:
        """Until the next limit, or until the live cycle that is in the way may turn out to be nobody's."""
        wait = look.plan.wait.total_seconds() if look.plan.wait else RESYNC_SECONDS
        if look.snapshot.admitted is None and look.snapshot.state.live is not None:
            async with run.lock:
                wait = min(wait, await self.orphans.check(run) or wait)
        # people like to see how far it is; with many cycles, only what happens is looked at
        longest = PROGRESS_SECONDS if len(self._live) <= FEW else RESYNC_SECONDS
        return min(max(wait, 0.1), longest)

    async def _source(self, subject: _Subject) -> _Source:
        """As frozen at admission, else as the policy (or the chart) says now. _Over if the tenant may not."""
        config, status = self.services.config, subject.status
        defaults = config.defaults
        if _is_admitted(status) and status.frozen is not None and status.run is not None:
            source = _Source(run=status.run, frozen=status.frozen, spec=PolicySpec(run=status.run))
        elif status.frozen is not None and status.run is not None and (gone := await self._policy_gone(subject)):
            spec = PolicySpec(run=status.run)
            source = _Source(run=status.run, frozen=status.frozen, spec=spec, withdrawn=gone)
        else:
            policy = await self._policy(subject)
            try:
                run = run_of(subject.cycle, policy, name=f"PruningCycle {subject.key.name}")
            except Invalid as error:
                raise _Over(Reason.INVALID_INPUT, str(error)) from error
            spec = policy.spec if policy else PolicySpec(run=run, settings=defaults.settings)
            try:
                layered(config.workers.pod_overrides, spec.pod_overrides)
            except Invalid as error:
                raise _Over(Reason.INVALID_INPUT, f"podOverrides: {error}") from error
            source = _Source(run=run.rstrip("/"), frozen=frozen_of(spec, defaults.store), spec=spec)
        if not config.allows(subject.key.namespace, source.run):
            raise _Over(
                Reason.RUN_NOT_ALLOWED,
                f"namespace {subject.key.namespace} may not name the run {source.run}: no prefix of "
                "allowedRunPrefixes has it",
            )
        return source

    async def _policy(self, subject: _Subject) -> PruningPolicy | None:
        ref = subject.cycle.spec.policy_ref
        if ref is None:
            return None
        if gone := await self._policy_gone(subject):
            raise _Over(gone.reason, gone.message)
        body = await self.services.kube.get(POLICIES, subject.key.namespace, ref.name)
        if body is None:
            raise _NotYet(f"there is no PruningPolicy {ref.name} in namespace {subject.key.namespace}; apply it")
        try:
            return parse_resource(PruningPolicy, plain(body), f"PruningPolicy {ref.name}")
        except Invalid as error:
            raise _NotYet(str(error)) from error

    async def _policy_gone(self, subject: _Subject) -> Finding | None:
        """Why a policy's own cycle has no policy any more; another one of the same name did not make it."""
        ref = subject.cycle.spec.policy_ref
        if subject.by_policy is None or ref is None:
            return None
        body = await self.services.kube.get(POLICIES, subject.key.namespace, ref.name)
        if (
            body is not None
            and "deletionTimestamp" not in body["metadata"]
            and body["metadata"]["uid"] == subject.by_policy
        ):
            return None
        return Finding(Reason.SUPERSEDED, f"its policy {ref.name} was deleted before the cycle began")

    def _ask(self, subject: _Subject, run: OpenRun, source: _Source) -> tuple[Ask, str | None]:
        """What is asked, and the cycle's name in the log if it is admitted. In a thread: it reads the log."""
        status = subject.status
        if status.cycle is not None:
            self._searched.discard(subject.uid)  # if the status is lost later, it is searched for again
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
                raise _Over(Reason.INVALID_INPUT, str(error)) from error
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

    def _own(self, subject: _Subject, run: OpenRun) -> tuple[int, str] | None:
        """The cycle that this very resource was admitted for, where its status does not say so (any more)."""
        tail = run.log.tail()
        candidates = [tail.state.live.admitted] if tail.state.live else []
        if subject.uid not in self._searched:
            self._searched.add(subject.uid)
            candidates += range(tail.record.n, max(-1, tail.record.n - SEARCHED), -1)
        for n in candidates:
            record, _ = run.log.read(n)
            if isinstance(record.body, Admit) and record.body.resource == subject.resource:
                return record.body.base, record.id
        return None

    async def _overtaken(self, subject: _Subject) -> Finding | None:
        """A policy's cycle that has not begun when its policy made a newer one. A person's is never overtaken."""
        if subject.by_policy is None:
            return None
        selector = f"{labels.POLICY_UID}={subject.by_policy}"
        others = (await self.services.kube.list(CYCLES, subject.key.namespace, labels=selector, metadata=True)).items
        newest = max(others, key=retention.base_of, default=subject.body)
        if retention.base_of(newest) <= retention.base_of(subject.body):
            return None
        return Finding(Reason.SUPERSEDED, f"cycle {newest['metadata']['name']} works on a newer checkpoint")

    def _controller(self, subject: _Subject, run: OpenRun, source: _Source, ask: Ask, name: str | None) -> _Driven:
        cycle = name or name_of(ask)
        kept = self._driven.get(subject.uid)
        if kept is not None and kept.controller.cycle == cycle and kept.run is run:
            self._driven.move_to_end(subject.uid)
            kept.runtime.forget()
            return kept
        made: list[KubernetesRuntime] = []
        children = self._children(subject)

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

    def _children(self, subject: _Subject) -> Children:
        return Children(
            kube=self.services.kube,
            loop=self.services.loop,
            namespace=subject.key.namespace,
            owner=labels.CYCLE_UID,
            uid=subject.uid,
        )

    def _terms(self, subject: _Subject, source: _Source, ask: Ask) -> Terms:
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

    async def _tell(self, subject: _Subject, look: Seen, facts: Facts) -> _Subject:
        status = cycle_status(
            subject.status, look.snapshot, look.plan, facts, generation=subject.generation, now=_now()
        )
        return await self._conclude(subject, status)

    async def _conclude(self, subject: _Subject, status: CycleStatus) -> _Subject:
        """Write the status if it is another one; events and figures follow only once it stands."""
        before = _status(subject.body)
        self._count_live(subject.key, live=_is_admitted(status) and status.outcome is None)
        if status == before:
            return replace(subject, status=status)
        body = await self._write(subject.key, subject.body, status)
        if body is None:  # deleted meanwhile; the next event says so
            return replace(subject, status=status)
        for event in announce.events(body, before, status):
            with suppress(KubeError):  # a full namespace or a posted one: the status has told it
                await self.services.kube.create(EVENTS, subject.key.namespace, event)
        figures.count(self.services.metrics, before, status)
        return replace(subject, body=body, status=status)

    def _count_live(self, key: Key, *, live: bool) -> None:
        (self._live.add if live else self._live.discard)(key)
        self.services.metrics.live_cycles = len(self._live)

    async def _unable(self, subject: _Subject, state: str, message: str) -> None:
        run = subject.cycle.spec.run
        status = unable(subject.status, state, message, run=run, generation=subject.generation)
        await self._conclude(subject, status)

    async def _write(self, key: Key, body: Body, status: CycleStatus) -> Body | None:
        meta = {"name": key.name, "namespace": key.namespace, "uid": body["metadata"]["uid"]}
        applied = {"apiVersion": API_VERSION, "kind": CYCLE, "metadata": meta, "status": status.dump()}
        return await self.services.kube.apply_status(CYCLES, key.namespace, applied)

    # --- the end ---

    async def _finished(self, subject: _Subject) -> float | None:
        """Jobs go, the outcome goes out, and in the end the resource goes too, if it has a time to live."""
        self._driven.pop(subject.uid, None)
        status = subject.status
        if subject.uid not in self._cleaned:
            children = self._children(subject)
            for found in await children.found():
                await children.remove(found)
            self._cleaned.add(subject.uid)
        if status.observed_generation != subject.generation:
            current = status.model_copy(update={"observed_generation": subject.generation})
            subject = await self._conclude(subject, current)
        run, unsent = await self._ended_run(subject), False
        if run is not None:
            self.services.attend(run.store.uri, subject.key)  # what it committed may be rolled back
            async with run.lock:
                undone = await asyncio.to_thread(_undone, run, status)
            if undone is not None:
                subject = await self._conclude(subject, status.model_copy(update={"rollback": undone}))
            unsent = await self._send(subject, run)
        left = retention.seconds_left(status, subject.cycle.spec.ttl_seconds_after_finished, _now())
        if left is None or left > 0:
            # what a sink has not taken may be given up for others: then it is offered again
            return min(left or RESYNC_SECONDS, RESYNC_SECONDS) if unsent else left
        if unsent and left > -KEPT_UNSENT_SECONDS:
            return RESYNC_SECONDS
        if await self.recorded(subject.key.namespace, status):
            await self.services.kube.delete(CYCLES, subject.key.namespace, subject.key.name, uid=subject.uid)
            return None
        return RESYNC_SECONDS

    async def _ended_run(self, subject: _Subject) -> OpenRun | None:
        """The run of an ended cycle, where it still can be reached; nothing that is left to do is worth an error."""
        status = subject.status
        if status.run is None or status.frozen is None or status.record is None:
            return None
        access = Access(namespace=subject.key.namespace, run=status.run, store=status.frozen.store)
        try:
            run = await self.services.runs.open(access, seen=_seen(status))
        except (NotReady, StoreError) as error:
            log.debug("%s: %s", subject.key, error)
            return None
        self._known.setdefault(subject.key, run.access)
        return run

    async def _send(self, subject: _Subject, run: OpenRun) -> bool:
        """Whether the outcome still waits for its sink."""
        status = subject.status
        url = (status.frozen.sink if status.frozen else None) or self.services.config.sink
        if url is None or status.cycle is None:
            return False
        return await offer(self.services.sinks, url, run, status.cycle)

    async def recorded(self, namespace: str, status: CycleStatus) -> bool:
        """Whether the log has, as read back now, the record that the status speaks of; one that has none needs none."""
        if status.record is None or status.run is None or status.frozen is None:
            return status.cycle is None
        access = Access(namespace=namespace, run=status.run, store=status.frozen.store)
        run = await self.services.runs.open(access, seen=_seen(status))
        async with run.lock:
            record, _ = await asyncio.to_thread(run.log.read, status.record)
        return record.id == status.cycle

    async def _gone(self, key: Key) -> float | None:
        """The resource was deleted. If its cycle is still live, that ends too, once it is absent for a second time."""
        self._count_live(key, live=False)
        access = self._known.get(key)
        if access is None:
            return None
        try:
            run = await self.services.runs.open(access)
        except (NotReady, NoRun) as error:  # its Secret went with it: the next cycle of the run ends this one
            log.info("%s is deleted, and its run cannot be reached: %s", key, error)
            self._known.pop(key, None)
            self.services.leave(key)
            return None
        async with run.lock:
            left = await self.orphans.check(run)
        if left is None:
            self._known.pop(key, None)
            self.services.leave(key)
            self.services.happened(run.store.uri, but=key)
        return left


# --- parts ------------------------------------------------------------------------------------------------------------


def frozen_of(spec: PolicySpec, default: StoreSpec) -> Frozen:
    """What a cycle takes along of its policy; a policy that says nothing of its store uses the chart's."""
    return Frozen(
        store=spec.store if spec.store != StoreSpec() else default,
        pod_overrides=spec.pod_overrides if spec.pod_overrides != PodOverrides() else None,
        queue=spec.queue,
        sink=spec.sink,
    )


def _subject(key: Key, body: Body) -> _Subject | str:
    """The resource, or why it is none: older objects may not fit a newer schema."""
    try:
        cycle = parse_resource(PruningCycle, plain(body), f"PruningCycle {key.name}")
    except Invalid as error:
        return str(error)
    return _Subject(key=key, body=body, cycle=cycle, status=_status(body))


def plain(body: Body) -> Body:
    """Without what others may hang on an object: labels and annotations are no input."""
    return {**body, "metadata": {name: body["metadata"].get(name) for name in ("name", "namespace")}}


def _status(body: Body) -> CycleStatus:
    """The status as it stands; one that does not fit is made again from the store."""
    try:
        return CycleStatus.model_validate(body.get("status") or {})
    except ValidationError:
        return CycleStatus()


def _seen(status: CycleStatus) -> tuple[int, str] | None:
    return (status.seen.record, status.seen.digest) if status.seen else None


def _is_admitted(status: CycleStatus) -> bool:
    return any(c.type is ConditionType.ADMITTED and c.status == "True" for c in status.conditions)


def _facts(driven: _Driven, look: Seen, before: CycleStatus) -> Facts:
    """In a thread: it reads the log, and for an ended cycle when its objects were written. Both never change."""
    run, snapshot = driven.run, look.snapshot
    record = snapshot.end or snapshot.admitted
    seen = (before.seen.record, before.seen.digest) if before.seen else None
    if record is not None and (seen is None or seen[0] != record.n):
        seen = (record.n, run.log.read(record.n)[1])
    if driven.seconds is None and snapshot.end is not None and snapshot.admitted is not None:
        driven.seconds = phases(run.store, snapshot.admitted, snapshot.end)
    return Facts(
        run=run.store.uri,
        seen=seen if record else None,
        seconds=driven.seconds,
        workers=driven.runtime.workers(Phase.ANALYSE),
    )


def _is_worth_telling(look: Seen) -> bool:
    """Before it begins, whenever it waits or works for long, and once it has ended: between, the next look is near.

    Of an end nothing is told until its record stands: another one may come first.
    """
    actions = look.plan.actions
    return not actions or look.snapshot.end is not None or isinstance(actions[0], plan.Admit | plan.Decide)


def _driven_by_another(subject: _Subject, look: Seen) -> str | None:
    """Two resources may ask for the very same cycle: the one it was admitted for drives it, the other tells its end."""
    admitted = look.snapshot.admitted
    if admitted is None or look.snapshot.end is not None or not isinstance(admitted.body, Admit):
        return None
    if admitted.body.resource in ("", subject.resource):
        return None
    return f"the same cycle ({admitted.id}) is carried out for PruningCycle {admitted.body.resource.rpartition('/')[0]}"


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


def _now() -> datetime:
    return datetime.now(UTC)
