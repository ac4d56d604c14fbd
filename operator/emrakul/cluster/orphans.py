"""A live cycle whose resource is gone: somebody deleted it, so it ends; nobody makes it again."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from emrakul.cluster.access import OpenRun
from emrakul.cluster.kube import CYCLES, Forbidden
from emrakul.cluster.outbox import offer
from emrakul.cluster.services import Services
from emrakul.control import Controller
from emrakul.core import ending, plan
from emrakul.core.snapshot import Ask, Job, Phase
from emrakul.finding import Finding
from emrakul.runtime.kubernetes import KubernetesRuntime
from emrakul.watch import admitted_ask
from leyline.fold import RunState
from leyline.reasons import Reason
from leyline.records import Admit, Record

APART_SECONDS = 60.0
"""Between two looks that both find nothing: one alone may have read an old copy."""


@dataclass(frozen=True)
class Live:
    """What is known of a run's live cycle."""

    driven: bool = False
    """It is this operator's: its resource is there, or was a minute ago."""
    left: float | None = None
    """Seconds until the second look for a resource that is gone; 0: it was gone, and the cycle was ended now."""


@dataclass
class Orphans:
    """Remembers when a resource was first found absent; everything else is read each time."""

    services: Services
    _absent: dict[str, float] = field(default_factory=dict)

    async def check(self, run: OpenRun) -> Live:
        """Look at the run's live cycle, and end it if its resource is gone."""
        admitted = await asyncio.to_thread(_admitted, run)
        if admitted is None or not self._is_ours(admitted):
            return Live()
        assert isinstance(admitted.body, Admit)
        resource = admitted.body.resource
        namespace, name, uid = resource.split("/")
        try:
            body = await self.services.kube.get(CYCLES, namespace, name)
        except Forbidden:  # a namespace that is not ours any more: whoever it stands in the way of may abandon it
            return Live()
        if body is not None and body["metadata"]["uid"] == uid and "deletionTimestamp" not in body["metadata"]:
            self._absent.pop(resource, None)
            return Live(driven=True)
        now = self.services.loop.time()
        left = self._absent.setdefault(resource, now) + APART_SECONDS - now
        if left > 0:
            return Live(driven=True, left=left)
        self._absent.pop(resource)
        await asyncio.to_thread(_end, run, admitted)
        await asyncio.to_thread(self.tell, run, admitted)
        await offer(self.services, None, run, admitted.id)
        return Live(left=0.0)

    async def abandon(self, run: OpenRun, ask: Ask) -> None:
        """End a live cycle that nobody drives any more: another runtime's or another operator's, past its limits.

        `ask` is what would begin without it.
        """

        def look() -> None:
            controller = self._controller(run, ask)
            seen = controller.look()
            if seen.plan.actions and isinstance(seen.plan.actions[0], plan.Abandon):
                controller.act(seen)

        await asyncio.to_thread(look)

    def tell(self, run: OpenRun, admitted: Record) -> None:
        """The end's results, told like any other's."""
        self._controller(run, admitted_ask(admitted, KubernetesRuntime.name), admitted.id).step()

    def _controller(self, run: OpenRun, ask: Ask, cycle: str | None = None) -> Controller:
        return Controller(run.store, run.log, ask, lambda _: _NoJobs(), trust=self.services.runs.trust, cycle=cycle)

    def _is_ours(self, admitted: Record) -> bool:
        body = admitted.body
        return (
            isinstance(body, Admit)
            and body.runtime == KubernetesRuntime.name
            and body.operator_class == self.services.identity
            and body.resource.count("/") == 2
            and self.services.watches(body.resource.partition("/")[0])
        )


class _NoJobs:
    """The owner is gone, and the cluster collects its Jobs."""

    name = KubernetesRuntime.name

    def start(self, phase: Phase, **_: object) -> None:
        raise AssertionError(f"{phase} is never started for a cycle that has ended")

    def jobs(self) -> tuple[Job, ...]:
        return ()

    def stop(self, phase: Phase | None = None) -> None:
        pass


def _admitted(run: OpenRun) -> Record | None:
    state: RunState = run.log.tail().state
    return run.log.read(state.live.admitted)[0] if state.live is not None else None


def _end(run: OpenRun, admitted: Record) -> None:
    state = run.log.tail().state
    if state.live is not None and state.live.id == admitted.id:
        finding = Finding(Reason.DELETED, "its PruningCycle was deleted before it had ended")
        run.log.append(ending.abandoned(state, finding), base=admitted.n)
