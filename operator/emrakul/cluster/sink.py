"""Oona: outcomes as CloudEvents 1.0 over HTTP, at least once, and a dead sink in nobody's way.

What waits here is only a wish: who offers an event finds out from a mark in the run that it was not sent, and offers it
again, after a restart too. The id is the message's idempotency key, so a sink that got one twice can tell.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

import aiohttp

from emrakul.cluster.metrics import Metrics
from leyline.messages import AnalysisResults
from leyline.model import canonical_json

log = logging.getLogger("emrakul")

CONTENT_TYPE = "application/cloudevents+json; charset=utf-8"
CYCLE_ENDED = "dev.emrakul.cycle.ended.v1"
RUN_ROLLED_BACK = "dev.emrakul.run.rolledback.v1"
"""A run went back by itself or by a person: there is no cycle then."""

TRY_SECONDS = 5.0
BACKOFF_SECONDS = (1.0, 300.0)
"""After a failure: from the first to the second, doubling, for the whole sink."""
KEEP_SECONDS = 7 * 24 * 3600.0
"""How long an event is tried; the resources that could offer it again live as long by default."""
MOST = 1000
"""Events that wait, over all sinks. Then the sink with most of them loses its oldest."""

Event = dict[str, Any]


def event_of(results: AnalysisResults, *, run: str, at: datetime | None = None) -> Event:
    """The CloudEvent of a cycle's results. `run` is the run's URI.

    `at` must be the same whenever this is called for the same results: the store's time of them, or nothing.
    """
    event: Event = {
        "specversion": "1.0",
        "id": results.idempotency_key,
        "source": run,
        "type": CYCLE_ENDED if results.cycle else RUN_ROLLED_BACK,
        "subject": results.cycle or results.idempotency_key,
        "datacontenttype": "application/json",
        "data": json.loads(results.canonical()),
    }
    return event if at is None else {**event, "time": at.isoformat().replace("+00:00", "Z")}


class Sink:
    """Sends single events; what goes wrong is an answer, never an exception."""

    def __init__(self, *, try_seconds: float = TRY_SECONDS) -> None:
        """In a running event loop."""
        self._session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=try_seconds))

    async def send(self, url: str, event: Event) -> str:
        """Post it in structured mode: "" if the sink took it (any 2xx), else why not.

        Redirects are not followed and answers are not read: the address is a tenant's, the network is ours.
        """
        headers = {"Content-Type": CONTENT_TYPE}
        try:
            data = canonical_json(event)
            async with self._session.post(url, data=data, headers=headers, allow_redirects=False) as answer:
                return "" if 200 <= answer.status < 300 else f"it answers {answer.status}"
        except TimeoutError:
            return f"it does not answer within {self._session.timeout.total:g} s"
        except aiohttp.InvalidURL:  # whose text is the address, with what may be secret in it
            return "its address is no http:// or https:// URL"
        except (aiohttp.ClientError, OSError, ValueError) as error:
            return str(error) or type(error).__name__

    async def close(self) -> None:
        await self._session.close()


@dataclass
class _Offer:
    key: str
    make_event: Callable[[], Event]
    on_delivered: Callable[[], None]
    since: float
    taken: bool = False
    """The sink has it; what is left is to note that."""


@dataclass
class _Lane:
    """What waits for one sink. Lanes do not wait for each other."""

    offers: deque[_Offer] = field(default_factory=deque)
    task: asyncio.Task[None] | None = None


class Sinks:
    """Takes offers at once and delivers them in the background."""

    def __init__(
        self,
        metrics: Metrics,
        *,
        most: int = MOST,
        backoff: tuple[float, float] = BACKOFF_SECONDS,
        try_seconds: float = TRY_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._metrics = metrics
        self._most = most
        self._backoff = backoff
        self._try_seconds = try_seconds
        self._clock = clock
        self._lanes: dict[str, _Lane] = {}
        self._keys: set[str] = set()

    async def __aenter__(self) -> Self:
        self._sink = Sink(try_seconds=self._try_seconds)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop at once: what still waits has no mark and is offered again."""
        tasks = [lane.task for lane in self._lanes.values() if lane.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._sink.close()

    def __len__(self) -> int:
        """Offers that wait."""
        return len(self._keys)

    def offer(self, key: str, url: str, make_event: Callable[[], Event], on_delivered: Callable[[], None]) -> None:
        """Deliver an event some time. A key that waits already is not taken twice. Returns at once.

        `make_event` and `on_delivered` run in a thread and may read and write the store; both are tried again if they
        raise. An event that was taken is not sent again because the note of it failed.
        """
        if key in self._keys:
            return
        lane = self._lanes.setdefault(url, _Lane())
        lane.offers.append(_Offer(key, make_event, on_delivered, self._clock()))
        self._keys.add(key)
        if len(self._keys) > self._most:
            self._drop(max(self._lanes.values(), key=lambda lane: len(lane.offers)))
        if lane.task is None:
            lane.task = asyncio.create_task(self._run(url, lane), name=f"sink {_shown(url)}")
        self._metrics.sink_undelivered(len(self._keys))

    def _drop(self, lane: _Lane, place: int = 0) -> None:
        self._keys.discard(lane.offers[place].key)
        del lane.offers[place]
        self._metrics.sink_dropped()

    async def _run(self, url: str, lane: _Lane) -> None:
        """Until nothing waits for this sink."""
        pause = 0.0
        while lane.offers:
            offer = lane.offers.popleft()
            trouble = await self._deliver(url, offer)
            if not trouble:
                self._keys.discard(offer.key)
                if pause:
                    log.info("sink %s takes events again", _shown(url))
                pause = 0.0
            else:
                # to the end: one event that a sink refuses must not hold up the others
                lane.offers.append(offer)
                if self._clock() - offer.since > KEEP_SECONDS:
                    self._drop(lane, -1)
                if not pause:
                    log.warning("sink %s: %s; it is tried again, %d wait", _shown(url), trouble, len(lane.offers))
                pause = min(pause * 2, self._backoff[1]) or self._backoff[0]
            self._metrics.sink_undelivered(len(self._keys))
            if pause:
                await asyncio.sleep(pause * random.uniform(0.8, 1.2))  # noqa: S311
        del self._lanes[url]

    async def _deliver(self, url: str, offer: _Offer) -> str:
        """Why it has to be tried again; "" if not."""
        try:
            if not offer.taken:
                event = await asyncio.to_thread(offer.make_event)
                if trouble := await self._sink.send(url, event):
                    return trouble
                offer.taken = True
            await asyncio.to_thread(offer.on_delivered)
        except Exception as error:
            return str(error) or type(error).__name__
        return ""


def _shown(url: str) -> str:
    """Without what may be secret: user, password, query."""
    try:
        parts = urlsplit(url)
        return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()
    except ValueError:
        return "of an address that is none"
