"""Brings one PruningPolicy's run on: its rollbacks, its hold, recovery after them, and the next cycle's resource."""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime

from pydantic import ValidationError

from emrakul.api import labels
from emrakul.api.cycle import CycleStatus
from emrakul.api.manifest import parse_resource
from emrakul.api.policy import PolicySpec, PolicyStatus, PruningPolicy, RolledBackStatus, Seen, TipStatus
from emrakul.api.resource import API_VERSION, Condition, ConditionStatus, ConditionType, set_condition
from emrakul.asking import ask_for
from emrakul.cluster import retention
from emrakul.cluster.access import Access, NotReady, OpenRun
from emrakul.cluster.ended import EndedCycles
from emrakul.cluster.kube import CYCLES, POLICIES, AlreadyExists, Body, Forbidden, Rejected
from emrakul.cluster.orphans import Live, Orphans
from emrakul.cluster.outbox import offer
from emrakul.cluster.recheck import Recheck
from emrakul.cluster.services import CYCLE, POLICY, Services
from emrakul.cluster.source import frozen_of
from emrakul.cluster.subject import plain, seen_of
from emrakul.cluster.supervisor import RESYNC_SECONDS, Key
from emrakul.control import name_of
from emrakul.invalid import Invalid
from emrakul.runtime.kubernetes import KubernetesRuntime
from emrakul.watch import Due, Follower, due
from leyline import layout
from leyline.fold import RunState
from leyline.log import NoRun, StoreReverted
from leyline.messages import SystemStatePacket
from leyline.model import Malformed
from leyline.reasons import REMEDY, Reason
from leyline.records import Kind, Publish
from leyline.store import NotFound, StoreError

log = logging.getLogger("emrakul")

POLL_SECONDS = 5.0
"""Between two looks at a run's log; more where there are more than a hundred policies."""
STEPS = 20
"""Things of one policy done in one reconcile."""


@dataclass
class _Followed:
    """What is kept of a policy between two reconciles: readings, no decisions."""

    follower: Follower
    run: OpenRun
    version: tuple[str, int]
    """UID and generation of the policy that it was made for."""
    tidied: float = float("-inf")
    looked_past: float = float("-inf")
    """When a live cycle of another runtime was last looked at."""
    counted: int = -1
    """The newest publish, by record, for which the trainer's own figures were counted."""
    sent: int = -1
    """The newest rollback, by record, that was offered to the sink."""


@dataclass
class PolicyReconciler:
    """All policies of this operator."""

    services: Services
    orphans: Orphans
    ended: EndedCycles
    _followed: dict[Key, _Followed] = field(default_factory=dict)

    async def reconcile(self, key: Key) -> float | None:
        """One resource: seconds until it is looked at again, or None if it is nobody's."""
        body = await self.services.kube.get(POLICIES, key.namespace, key.name)
        if body is None or not self.services.ours(body):
            self._forget(key)
            return None
        before = _status(body)
        try:
            policy = parse_resource(PruningPolicy, plain(body), f"PruningPolicy {key.name}")
        except Invalid as error:
            await self._unready(key, body, before, "Invalid", str(error))
            return None
        if not self.services.config.allows(key.namespace, policy.spec.run):
            why = (
                f"namespace {key.namespace} may not name the run {policy.spec.run}: no prefix of allowedRunPrefixes "
                f"has it. {REMEDY[Reason.RUN_NOT_ALLOWED]}"
            )
            await self._unready(key, body, before, "RunNotAllowed", why)
            return None
        try:
            return await self._follow(key, body, policy, before)
        except (NoRun, NotReady) as error:
            await self._unready(key, body, before, "Waiting", str(error))
            return self._poll()
        except Invalid as error:  # guidance that would loosen a constraint
            await self._unready(key, body, before, "Invalid", str(error))
            return RESYNC_SECONDS
        except StoreError as error:
            self.services.health.store_said(self._access(key, policy.spec).name, error)
            self.services.metrics.store_error(error)
            reverted = isinstance(error, StoreReverted)
            await self._unready(key, body, before, "StoreReverted" if reverted else "StoreUnreachable", str(error))
            if not reverted:
                raise
            return RESYNC_SECONDS
        except (Malformed, ValidationError, Rejected, Forbidden) as error:
            await self._unready(key, body, before, "Invalid", str(error))
            raise

    async def _follow(self, key: Key, body: Body, policy: PruningPolicy, before: PolicyStatus) -> float:
        spec = policy.spec
        run = await self.services.runs.open(self._access(key, spec), seen=seen_of(before))
        followed = self._follower(key, body, spec, run)
        follower = followed.follower
        self.services.attend(run, key)
        async with run.lock:
            for _ in range(STEPS):
                state = await asyncio.to_thread(_state, run)
                done = await asyncio.to_thread(follower.follow, state)
                if done is None:
                    break
                log.info("%s: %s", key, done)
            self.services.happened(run, state, but=key)
            status = await asyncio.to_thread(_told, before, body, run, state, follower)
            next_ = due(state, every=spec.every)
            live = await self.orphans.check(run) if state.live is not None else Live()
            await self._make_way(followed, spec, run, state, live)
            await asyncio.to_thread(self._count_report, followed, state)
            await self._tell_deleted(followed, state)
        if state.rolled_back > followed.sent:  # its results go out like a cycle's
            unsent = await offer(self.services, spec.sink, run, f"rollback-{state.rolled_back}")
            followed.sent = followed.sent if unsent else state.rolled_back
        self.services.health.store_said(run.access.name)
        self.services.metrics.run_state(run.store.uri, state.ladder.stage, state.breaker.state)
        if next_ is not None and (why := await self._begin(key, body, policy, run, next_)):
            status = status.model_copy(update={"message": why})
        await self._write(key, body, before, status)
        if self.services.loop.time() - followed.tidied > RESYNC_SECONDS:
            followed.tidied = self.services.loop.time()
            await self._tidy(key, body, spec)
        return self._poll() if live.left is None else min(self._poll(), live.left)

    def _access(self, key: Key, spec: PolicySpec) -> Access:
        frozen = frozen_of(spec, self.services.config.defaults.store)
        return Access(namespace=key.namespace, run=spec.run.rstrip("/"), store=frozen.store)

    def _follower(self, key: Key, body: Body, spec: PolicySpec, run: OpenRun) -> _Followed:
        known = self._followed.get(key)
        version = (body["metadata"]["uid"], body["metadata"].get("generation", 0))
        if known is None or known.run is not run or known.version != version:
            check = Recheck.of(self.services, key, body, spec)
            follower = Follower(run.store, run.log, spec, trust=self.services.runs.trust, validate=check)
            counted = known.counted if known is not None and known.run is run else -1
            known = _Followed(follower=follower, run=run, version=version, counted=counted)
            self._followed[key] = known
        return known

    async def _make_way(self, followed: _Followed, spec: PolicySpec, run: OpenRun, state: RunState, live: Live) -> None:
        """What another runtime left live must not hold this policy's next cycle back for ever."""
        now = self.services.loop.time()
        if state.live is None or live != Live() or now - followed.looked_past < RESYNC_SECONDS:
            return
        waits = due(state.model_copy(update={"live": None}), every=spec.every)
        if waits is None:
            return
        followed.looked_past = now
        ask = await asyncio.to_thread(ask_for, waits.base, spec, store=run.store, runtime=KubernetesRuntime.name)
        await self.orphans.abandon(run, ask)

    def _forget(self, key: Key) -> None:
        known = self._followed.pop(key, None)
        self.services.leave(key)
        if known is not None:
            self.services.metrics.run_gone(known.run.store.uri)

    def _poll(self) -> float:
        return min(max(POLL_SECONDS, len(self._followed) / 20), RESYNC_SECONDS)

    # --- cycles ---

    async def _begin(self, key: Key, body: Body, policy: PruningPolicy, run: OpenRun, found: Due) -> str:
        """Make the resource of the cycle that is due, always under the same name; or say why that is not possible."""
        uid = body["metadata"]["uid"]
        selector = f"{labels.POLICY_UID}={uid},{labels.BASE}={found.base}"
        if (await self.services.kube.list(CYCLES, key.namespace, labels=selector, metadata=True)).items:
            return ""  # made before, with other settings perhaps, and not admitted yet
        async with run.lock:
            ask = await asyncio.to_thread(
                ask_for, found.base, policy.spec, store=run.store, runtime=KubernetesRuntime.name
            )
        spec: Body = {"checkpoint": found.checkpoint, "policyRef": {"name": key.name}}
        spec["ttlSecondsAfterFinished"] = policy.spec.ttl_seconds_after_finished
        if policy.spec.operator_class:
            spec["operatorClass"] = policy.spec.operator_class
        name = labels.cycle_name(key.name, name_of(ask))
        made: Body = {
            "apiVersion": API_VERSION,
            "kind": CYCLE,
            "metadata": {
                "name": name,
                "namespace": key.namespace,
                "labels": {
                    labels.MANAGED_BY: labels.EMRAKUL,
                    labels.POLICY: key.name,
                    labels.POLICY_UID: uid,
                    labels.BASE: str(found.base),
                },
            },
            "spec": spec,
        }
        try:
            await self.services.kube.create(CYCLES, key.namespace, made)
        except AlreadyExists:
            return await self._taken(key, name, uid)
        return ""

    async def _taken(self, key: Key, name: str, uid: str) -> str:
        """The name of the cycle that is due is another resource's: why it waits, or "" if that was nobody's."""
        found = await self.services.kube.get(CYCLES, key.namespace, name)
        if found is None:
            return ""
        by, status = (found["metadata"].get("labels") or {}).get(labels.POLICY_UID), found.get("status") or {}
        if by not in (None, uid) and status.get("outcome") and "cycle" not in status:
            # of an earlier policy of this name, and never begun: ours is made at the next look
            await self.services.kube.delete(CYCLES, key.namespace, name, uid=found["metadata"]["uid"])
            return ""
        return f"PruningCycle {name} is there and is not of this policy; the next cycle waits until it is deleted"

    async def _tidy(self, key: Key, body: Body, spec: PolicySpec) -> None:
        """Resources of ended cycles beyond the limit go, each after its record was read back."""
        selector = f"{labels.POLICY_UID}={body['metadata']['uid']}"
        found = await self.services.kube.list(CYCLES, key.namespace, labels=selector)
        ours = [one for one in found.items if self.services.ours(one)]
        for ended in retention.beyond(ours, spec.history_limit):
            meta = ended["metadata"]
            try:
                if await self.ended.recorded(key.namespace, CycleStatus.model_validate(ended["status"])):
                    await self.services.kube.delete(CYCLES, key.namespace, meta["name"], uid=meta["uid"])
            except (NotReady, StoreError, Malformed, ValidationError) as error:
                log.info("cycle %s/%s stays, its record cannot be read: %s", key.namespace, meta["name"], error)

    # --- what is told ---

    def _count_report(self, followed: _Followed, state: RunState) -> None:
        """What the checkpoint before the newest one held its training: its report has the whole of it by then."""
        newest = next((pair for pair in reversed(state.pairs) if pair.candidate is None), None)
        if newest is None or newest.record <= followed.counted:
            return
        first, followed.counted = followed.counted < 0, newest.record
        body = followed.run.log.read(newest.record)[0].body
        if first or not isinstance(body, Publish) or body.report is None:
            return  # what was there before this process was counted by the one before it
        with suppress(NotFound):
            key = layout.report(body.term, body.report.step)
            packet = SystemStatePacket.parse(followed.run.store.get(key), name=key)
            self.services.metrics.trainer(packet.held_seconds, packet.tracking_share)

    async def _tell_deleted(self, followed: _Followed, state: RunState) -> None:
        """A cycle whose resource is gone has nobody else to tell its end."""
        end = await asyncio.to_thread(followed.follower.new_end, state)
        if end is None or end.reason != Reason.DELETED:
            return
        run = followed.run
        admitted = await asyncio.to_thread(run.log.find, (Kind.ADMIT.value, end.id), base=-1)
        if admitted is not None:
            await asyncio.to_thread(self.orphans.tell, run, admitted)
        await offer(self.services, followed.follower.policy.sink, run, end.id)

    async def _unready(self, key: Key, body: Body, before: PolicyStatus, reason: str, message: str) -> None:
        generation = int(body["metadata"].get("generation", 0))
        status = before.model_copy(
            update={
                "observed_generation": generation,
                "conditions": _ready(before, "False", reason, message, generation),
                "message": message[:4096],
            }
        )
        await self._write(key, body, before, status)

    async def _write(self, key: Key, body: Body, before: PolicyStatus, status: PolicyStatus) -> None:
        if status == before:
            return
        meta = {"name": key.name, "namespace": key.namespace, "uid": body["metadata"]["uid"]}
        applied = {"apiVersion": API_VERSION, "kind": POLICY, "metadata": meta, "status": status.dump()}
        await self.services.kube.apply_status(POLICIES, key.namespace, applied)


# --- parts: pure, but for the log's tail ------------------------------------------------------------------------------


def _state(run: OpenRun) -> RunState:
    return run.log.tail().state


def _status(body: Body) -> PolicyStatus:
    """The status as it stands; one that does not fit is made again from the log."""
    try:
        return PolicyStatus.model_validate(body.get("status") or {})
    except ValidationError:
        return PolicyStatus()


def _told(before: PolicyStatus, body: Body, run: OpenRun, state: RunState, follower: Follower) -> PolicyStatus:
    generation = int(body["metadata"].get("generation", 0))
    tail = run.log.tail()
    tip = state.tip_pair
    message = follower.impossible or f"record {state.n}: stage {state.ladder.stage.value}"
    if state.hold:
        message = f"held at ValidationOnly by rollback {state.hold}; write resumeAfterRollback: {state.hold} to end it"
    return PolicyStatus(
        observed_generation=generation,
        conditions=_ready(before, "True", "Following", f"run {state.run_id} of model {state.model_id}", generation),
        message=message[:4096],
        stage=state.ladder.stage,
        streak=state.ladder.streak,
        breaker=state.breaker.state,
        hold=state.hold,
        live=state.live.id if state.live else None,
        tip=TipStatus(
            record=tip.record, checkpoint=tip.checkpoint, step=tip.step, counts=tip.masks.counts if tip.masks else {}
        )
        if tip
        else None,
        rollback=_rolled_back(follower),
        recovery=follower.recovery.outcome if follower.recovery else before.recovery,
        cycles=state.counters,
        seen=Seen(record=tail.record.n, digest=tail.digest),
        untrusted=not run.log.signed,
    )


def _rolled_back(follower: Follower) -> RolledBackStatus | None:
    asked = follower.policy.rollback
    if asked is None:
        return None
    done = follower.asked_rollback()
    if done is None:
        return RolledBackStatus(id=asked.id, message=follower.impossible[:4096])
    return RolledBackStatus(id=asked.id, record=done.n, message=done.message[:4096])


def _ready(
    before: PolicyStatus, status: ConditionStatus, reason: str, message: str, generation: int
) -> tuple[Condition, ...]:
    return set_condition(
        before.conditions,
        ConditionType.READY,
        status,
        reason=reason,
        message=message,
        generation=generation,
        now=datetime.now(UTC),
    )
