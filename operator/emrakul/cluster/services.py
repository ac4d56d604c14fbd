"""What reconcilers share: one of each for the whole operator, handed in and never global."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from emrakul.api import labels
from emrakul.cluster.access import OpenRun, Runs
from emrakul.cluster.health import Health
from emrakul.cluster.kube import Body, Kube
from emrakul.cluster.metrics import Metrics
from emrakul.cluster.sink import Sinks
from emrakul.cluster.supervisor import Key
from emrakul.runtime.config import OperatorConfig
from leyline.fold import RunState

CYCLE = "PruningCycle"
POLICY = "PruningPolicy"


@dataclass(kw_only=True)
class Services:
    """Clients, configuration and figures."""

    kube: Kube
    config: OperatorConfig
    runs: Runs
    metrics: Metrics
    health: Health
    sinks: Sinks
    wake: Callable[[Key], None]
    waiting: dict[str, set[Key]] = field(default_factory=dict)
    """Keys by run that want to know when something happens there. Only wakes: nothing is lost without it."""
    committed: dict[str, set[Key]] = field(default_factory=dict)
    """Keys by run that want to know of a rollback."""

    @property
    def identity(self) -> str:
        """How the log names this operator: what another one admitted is not ours to end."""
        return f"{self.config.operator_class}@{self.kube.cluster}"

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        return asyncio.get_running_loop()

    def watches(self, namespace: str) -> bool:
        """Whether resources of this namespace are this operator's."""
        return not self.config.namespaces or namespace in self.config.namespaces

    def attend(self, run: OpenRun, key: Key) -> None:
        """Be woken whenever something ends or goes back in this run."""
        self.waiting.setdefault(run.access.name, set()).add(key)

    def remember(self, run: OpenRun, key: Key) -> None:
        """An ended cycle whose masks are in force: be woken if the run goes back, and for nothing else."""
        self.leave(key)
        self.committed.setdefault(run.access.name, set()).add(key)

    def leave(self, key: Key) -> None:
        for by_run in (self.waiting, self.committed):
            for run in [run for run, keys in by_run.items() if key in keys]:
                by_run[run].discard(key)
                if not by_run[run]:
                    del by_run[run]

    def happened(self, run: OpenRun, state: RunState, *, but: Key) -> None:
        """Wake whom it concerns that the log has moved since this was last said."""
        name, moved, back = run.access.name, state.n > run.told, state.rolled_back > run.told
        run.told = max(run.told, state.n)
        wanted = self.waiting.get(name, set()) if moved else set()
        if back:
            wanted = wanted | self.committed.get(name, set())
        for key in wanted - {but}:
            self.wake(key)

    def ours(self, body: Body) -> bool:
        """Whether this operator handles the object now."""
        meta = body["metadata"]
        if "deletionTimestamp" in meta:
            return False
        if (meta.get("annotations") or {}).get(labels.RECONCILE) == labels.DISABLED:
            return False
        return (body.get("spec", {}).get("operatorClass") or "") == self.config.operator_class
