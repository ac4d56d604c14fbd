"""Where a cycle's run is and what is asked of it: what was frozen at its admission, else what its policy says now."""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import ValidationError

from emrakul.api import labels
from emrakul.api.cycle import Frozen
from emrakul.api.manifest import parse_resource, run_of
from emrakul.api.policy import PodOverrides, PolicySpec, PruningPolicy, Seen, StoreSpec
from emrakul.cluster import retention
from emrakul.cluster.kube import CYCLES, POLICIES, Body
from emrakul.cluster.services import Services
from emrakul.cluster.subject import Subject, is_admitted, plain, seen_of
from emrakul.finding import Finding
from emrakul.invalid import Invalid
from emrakul.runtime.overrides import layered
from leyline.reasons import Reason


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where a cycle's run is, and what is asked of it until it is admitted."""

    run: str
    frozen: Frozen
    spec: PolicySpec
    withdrawn: Finding | None = None
    """Its policy is gone: it ends on what was frozen if it has begun, and does not begin if it has not."""


class Over(Exception):
    """The cycle ends before its run is looked at."""

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class NotYet(Exception):
    """Something that the cycle needs is not there."""


@dataclass(frozen=True)
class Sources:
    """Reads policies live."""

    services: Services

    async def of(self, subject: Subject) -> Source:
        """As frozen at admission, else as the policy (or the chart) says now. Over if the tenant may not."""
        status = subject.status
        if is_admitted(status) and status.frozen is not None and status.run is not None:
            source = Source(run=status.run, frozen=status.frozen, spec=PolicySpec(run=status.run))
        else:
            source = await self._asked(subject)
        if not self.services.config.allows(subject.key.namespace, source.run):
            raise Over(
                Reason.RUN_NOT_ALLOWED,
                f"namespace {subject.key.namespace} may not name the run {source.run}: no prefix of "
                "allowedRunPrefixes has it",
            )
        return source

    async def _asked(self, subject: Subject) -> Source:
        """What the policy says now, or the chart where the cycle names none."""
        config, status = self.services.config, subject.status
        body = await self._policy(subject)
        if gone := _gone(subject, body):
            if status.frozen is None or status.run is None:
                raise Over(gone.reason, gone.message)
            spec = PolicySpec(run=status.run)
            return Source(run=status.run, frozen=status.frozen, spec=spec, withdrawn=gone)
        policy = _parsed(subject, body)
        try:
            run = run_of(subject.cycle, policy, name=f"PruningCycle {subject.key.name}")
        except Invalid as error:
            raise Over(Reason.INVALID_INPUT, str(error)) from error
        spec = policy.spec if policy else PolicySpec(run=run, settings=config.defaults.settings)
        try:
            layered(config.workers.pod_overrides, spec.pod_overrides)
        except Invalid as error:
            raise Over(Reason.INVALID_INPUT, f"podOverrides: {error}") from error
        return Source(run=run.rstrip("/"), frozen=frozen_of(spec, config.defaults.store), spec=spec)

    async def seen(self, subject: Subject, source: Source) -> tuple[int, str] | None:
        """The newest record that the cycle's status or its policy's names, for a run that this process has not read.

        A policy has mostly seen more: on an older copy of the log the cycle alone would go on where it must not.
        """
        own, body = seen_of(subject.status), await self._policy(subject)
        if body is None or str(body["spec"].get("run", "")).rstrip("/") != source.run:
            return own
        try:
            its = Seen.model_validate((body.get("status") or {})["seen"])
        except (KeyError, ValidationError):  # made again from the log
            return own
        return max((its.record, its.digest), own or (-1, ""))

    async def _policy(self, subject: Subject) -> Body | None:
        """The object that the cycle names as its policy, if there is one."""
        ref = subject.cycle.spec.policy_ref
        return await self.services.kube.get(POLICIES, subject.key.namespace, ref.name) if ref else None

    async def overtaken(self, subject: Subject) -> Finding | None:
        """A policy's cycle that has not begun when its policy made a newer one. A person's is never overtaken."""
        if subject.by_policy is None:
            return None
        selector = f"{labels.POLICY_UID}={subject.by_policy}"
        others = (await self.services.kube.list(CYCLES, subject.key.namespace, labels=selector, metadata=True)).items
        newest = max(others, key=retention.base_of, default=subject.body)
        if retention.base_of(newest) <= retention.base_of(subject.body):
            return None
        return Finding(Reason.SUPERSEDED, f"cycle {newest['metadata']['name']} works on a newer checkpoint")

    async def would_come_again(self, subject: Subject) -> bool:
        """Whether a policy would make this resource again if it went: the log has no record that it was made."""
        if subject.by_policy is None or subject.status.cycle is not None:
            return False
        return _gone(subject, await self._policy(subject)) is None and await self.overtaken(subject) is None


def _gone(subject: Subject, policy: Body | None) -> Finding | None:
    """Why a policy's own cycle has no policy any more; another one of the same name did not make it."""
    ref = subject.cycle.spec.policy_ref
    if subject.by_policy is None or ref is None:
        return None
    meta = policy["metadata"] if policy else {}
    if meta.get("uid") == subject.by_policy and "deletionTimestamp" not in meta:
        return None
    return Finding(Reason.SUPERSEDED, f"its policy {ref.name} was deleted before the cycle began")


def _parsed(subject: Subject, policy: Body | None) -> PruningPolicy | None:
    """The policy that the cycle names. NotYet if it is not there, or does not fit."""
    ref = subject.cycle.spec.policy_ref
    if ref is None:
        return None
    if policy is None:
        raise NotYet(f"there is no PruningPolicy {ref.name} in namespace {subject.key.namespace}; apply it")
    try:
        return parse_resource(PruningPolicy, plain(policy), f"PruningPolicy {ref.name}")
    except Invalid as error:
        raise NotYet(str(error)) from error


def frozen_of(spec: PolicySpec, default: StoreSpec) -> Frozen:
    """What a cycle takes along of its policy; a policy that says nothing of its store uses the chart's."""
    return Frozen(
        store=spec.store if spec.store != StoreSpec() else default,
        pod_overrides=spec.pod_overrides if spec.pod_overrides != PodOverrides() else None,
        queue=spec.queue,
        sink=spec.sink,
    )
