"""What reconcilers share: one of each for the whole operator, handed in and never global."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from emrakul.api import labels
from emrakul.cluster.access import Runs
from emrakul.cluster.health import Health
from emrakul.cluster.kube import Body, Kube
from emrakul.cluster.metrics import Metrics
from emrakul.cluster.sink import Sinks
from emrakul.cluster.supervisor import Key
from emrakul.runtime.config import OperatorConfig

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
    """Keys by run URI that want to know when something happens there. Only wakes: nothing is lost without it."""

    @property
    def identity(self) -> str:
        """How the log names this operator: what another one admitted is not ours to end."""
        return f"{self.config.operator_class}@{self.kube.cluster}"

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        return asyncio.get_running_loop()

    def attend(self, run: str, key: Key) -> None:
        self.waiting.setdefault(run, set()).add(key)

    def leave(self, key: Key) -> None:
        for run in [run for run, keys in self.waiting.items() if key in keys]:
            self.waiting[run].discard(key)
            if not self.waiting[run]:
                del self.waiting[run]

    def happened(self, run: str, *, but: Key) -> None:
        """Something moved in this run: whoever waits there looks."""
        for key in self.waiting.get(run, set()) - {but}:
            self.wake(key)

    def ours(self, body: Body) -> bool:
        """Whether this operator handles the object now."""
        meta = body["metadata"]
        if "deletionTimestamp" in meta:
            return False
        if (meta.get("annotations") or {}).get(labels.RECONCILE) == labels.DISABLED:
            return False
        return (body.get("spec", {}).get("operatorClass") or "") == self.config.operator_class
