"""How the operator says how it is: liveness, readiness, what it measures, on a port of its own.

Liveness is this process alone: a store or a training that is in trouble is no reason to restart it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

from aiohttp import web

from emrakul.cluster.metrics import Metrics
from leyline.log import StoreReverted
from leyline.store import Changed, Damaged, Exists, NotFound, StoreError

TEXT = "text/plain; version=0.0.4; charset=utf-8"
"""Prometheus' text format, as every version of it reads it."""
STOP_SECONDS = 2.0
FORGET_SECONDS = 300.0
"""A store that was not asked for so long (live runs: each minute) is nobody's any more, and says nothing."""

OF_OBJECTS = (NotFound, Exists, Changed, Damaged, StoreReverted)


@dataclass(frozen=True)
class _Store:
    """What a run's store said last."""

    at: float
    error: str | None = None
    since: datetime | None = None
    """When it failed first."""


class Health:
    """What the operator knows of itself; the others tell it, the server reads it."""

    def __init__(
        self,
        metrics: Metrics,
        *,
        operator_class: str = "",
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self.metrics = metrics
        self.operator_class = operator_class
        self.supervisor: asyncio.Future[Any] | None = None
        """Whose end is ours."""
        self.deaf: str | None = None
        """The sentence of Freshness, on the way to the end of the process."""
        self.left_out: tuple[str, ...] = ()
        """Namespaces of the configuration that may not be read."""
        self._clock, self._now = clock, now
        self._listed = False
        self._heard: float | None = None
        self._stores: dict[str, _Store] = {}

    # --- told by the others ---

    def listed(self) -> None:
        """The first listing is done: every object that there is has been seen."""
        self._listed = True

    def heard(self) -> None:
        """The watch told something."""
        self._heard = self._clock()

    def store_said(self, run: str, error: StoreError | None = None) -> None:
        """What the store of this run answered last; that an object is damaged or gone is an answer too."""
        if error is None or isinstance(error, OF_OBJECTS):
            self._stores[run] = _Store(self._clock())
            return
        before = self._stores.get(run)
        since = before.since if before and before.since else self._now()
        self._stores[run] = _Store(self._clock(), str(error), since)

    # --- read by the server ---

    @property
    def dead(self) -> str | None:
        """Why this process should be restarted, or None."""
        if self.deaf is not None:
            return self.deaf
        if self.supervisor is not None and self.supervisor.done():
            return "the supervisor has ended, so nothing is reconciled any more"
        return None

    @property
    def unready(self) -> str | None:
        """Why nothing would come of a new resource now, or None. One tenant's broken store is not everybody's."""
        if self.dead is not None:
            return self.dead
        if not self._listed:
            return "the first listing of cycles and policies is not done yet"
        store = self._store()
        return None if store["reachable"] else f"no store answers: {store['lastError']}"

    def report(self) -> dict[str, Any]:
        """/health/emrakul."""
        return {
            "version": version("emrakul"),
            "operatorClass": self.operator_class,
            "ready": self.unready is None,
            "message": self.unready,
            "leftOut": self.left_out,
            "liveCycles": self.metrics.live_cycles,
            "store": self._store(),
            "watch": {
                "deaf": self.deaf is not None,
                "lastEventSeconds": None if self._heard is None else round(self._clock() - self._heard, 1),
            },
            "slos": {name: asdict(objective) for name, objective in self.metrics.measured.objectives().items()},
        }

    def _store(self) -> dict[str, Any]:
        """All stores as one: reachable while any of them answers, or none is known."""
        old = self._clock() - FORGET_SECONDS
        self._stores = {run: store for run, store in self._stores.items() if store.at > old}
        failing = [store for store in self._stores.values() if store.error is not None]
        newest = max(failing, key=lambda store: store.at, default=None)
        return {
            "reachable": newest is None or len(failing) < len(self._stores),
            "answering": len(self._stores) - len(failing),
            "failing": len(failing),
            "lastError": newest.error if newest else None,
            "since": newest.since.isoformat(timespec="seconds") if newest and newest.since else None,
        }


class HealthServer:
    """Serves a Health on every address of the pod."""

    def __init__(self, health: Health, *, port: int) -> None:
        self._health = health
        self._wanted = port
        self._runner: web.AppRunner | None = None

    async def start(self) -> int:
        """Listen; the port that it is. OSError if somebody else has it."""
        app = web.Application()
        app.add_routes(
            [
                web.get("/healthz", self._live),
                web.get("/readyz", self._ready),
                web.get("/health/emrakul", self._report),
                web.get("/metrics", self._metrics),
            ]
        )
        self._runner = web.AppRunner(app, access_log=None, handle_signals=False, shutdown_timeout=STOP_SECONDS)
        await self._runner.setup()
        await web.TCPSite(self._runner, "0.0.0.0", self._wanted).start()  # noqa: S104
        return int(self._runner.addresses[0][1])

    async def stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def _live(self, _: web.Request) -> web.Response:
        return _answer(self._health.dead)

    async def _ready(self, _: web.Request) -> web.Response:
        return _answer(self._health.unready)

    async def _report(self, _: web.Request) -> web.Response:
        return web.json_response(self._health.report())

    async def _metrics(self, _: web.Request) -> web.Response:
        return web.Response(body=self._health.metrics.exposition(), headers={"Content-Type": TEXT})


def _answer(trouble: str | None) -> web.Response:
    return web.Response(text=f"{trouble or 'ok'}\n", status=503 if trouble else 200)
