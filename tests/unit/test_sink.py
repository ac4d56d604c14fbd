"""Events on their way to a real HTTP server that is dead, slow, broken, or takes them."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import pytest
from aiohttp import web

from emrakul.cluster.metrics import Metrics
from emrakul.cluster.sink import CONTENT_TYPE, Event, Sink, Sinks, event_of
from leyline.messages import AnalysisResults, Stage
from servers import free_ports

RUN = "s3://models/resnet"


def results(cycle: str = "12-0a1b2c3d", **said: Any) -> AnalysisResults:
    whole: dict[str, Any] = {
        "idempotency_key": cycle,
        "run": "resnet",
        "cycle": cycle,
        "checkpoint": "4000-1-0f3a9b2c",
        "outcome": "Committed",
        "reason": "Pruned",
        "message": "pruned 6 of 224 channels.",
        "stage": Stage.CONSERVATIVE,
        "next_stage": Stage.CONSERVATIVE,
        "streak": 1,
        **said,
    }
    return AnalysisResults.model_validate(whole)


@dataclass
class Server:
    """A sink that answers as it is told, and remembers what it took."""

    status: int = 204
    slow: float = 0.0
    refused: str = ""
    """The id of an event that it never takes."""
    port: int = field(default_factory=lambda: free_ports(1)[0])
    asked: int = 0
    taken: list[Event] = field(default_factory=list)
    headers: list[str] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/events"

    @asynccontextmanager
    async def up(self) -> AsyncIterator[None]:
        app = web.Application()
        app.router.add_post("/events", self._take)
        app.router.add_post("/elsewhere", self._take)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", self.port).start()
        try:
            yield
        finally:
            await runner.cleanup()

    async def _take(self, request: web.Request) -> web.Response:
        self.asked += 1
        event = json.loads(await request.read())
        self.headers.append(request.headers["Content-Type"])
        await asyncio.sleep(self.slow)
        if event["id"] == self.refused:
            return web.Response(status=400)
        if self.status == 302:
            return web.Response(status=302, headers={"Location": "/elsewhere"})
        if self.status < 300:
            self.taken.append(event)
        return web.Response(status=self.status)


class Outbox:
    """What an operator knows of each event: made so often, and noted as delivered."""

    def __init__(self, sinks: Sinks) -> None:
        self.sinks = sinks
        self.made: list[str] = []
        self.noted: list[str] = []
        self.broken = 0
        """Notes that fail before one works."""

    def offer(self, cycle: str, url: str) -> None:
        def make() -> Event:
            self.made.append(cycle)
            return event_of(results(cycle), run=RUN)

        def note() -> None:
            if self.broken:
                self.broken -= 1
                raise OSError("the store does not answer")
            self.noted.append(cycle)

        self.sinks.offer(f"{RUN}/{cycle}", url, make, note)


def value(metrics: Metrics, name: str) -> float:
    return metrics.registry.get_sample_value(name) or 0.0


async def until(done: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not done():
            await asyncio.sleep(0.01)


def driven(test: Callable[[Outbox, Metrics], Awaitable[None]], **options: Any) -> Metrics:
    metrics = Metrics()

    async def main() -> None:
        async with Sinks(metrics, **{"backoff": (0.02, 0.1), "try_seconds": 0.3, **options}) as sinks:
            await test(Outbox(sinks), metrics)

    asyncio.run(main())
    return metrics


# --- the event --------------------------------------------------------------------------------------------------------


def test_an_event_says_what_cloudevents_ask_for() -> None:
    event = event_of(results(), run=RUN, at=datetime(2026, 11, 21, 9, 30, tzinfo=UTC))
    data = event.pop("data")
    assert event == {
        "specversion": "1.0",
        "id": "12-0a1b2c3d",
        "source": "s3://models/resnet",
        "type": "dev.emrakul.cycle.ended.v1",
        "subject": "12-0a1b2c3d",
        "datacontenttype": "application/json",
        "time": "2026-11-21T09:30:00Z",
    }
    assert AnalysisResults.model_validate(data) == results()


def test_a_rollback_is_an_event_of_its_run() -> None:
    event = event_of(results("", idempotency_key="rollback-9-baseline"), run=RUN)
    assert (event["type"], event["id"], event["subject"]) == (
        "dev.emrakul.run.rolledback.v1",
        "rollback-9-baseline",
        "rollback-9-baseline",
    )
    assert "time" not in event


# --- one try ----------------------------------------------------------------------------------------------------------


def sent(server: Server, url: str = "", *, up: bool = True) -> str:
    async def main() -> str:
        sink = Sink(try_seconds=0.3)
        try:
            if not up:
                return await sink.send(url or server.url, event_of(results(), run=RUN))
            async with server.up():
                return await sink.send(url or server.url, event_of(results(), run=RUN))
        finally:
            await sink.close()

    return asyncio.run(main())


def test_a_sink_gets_structured_json() -> None:
    server = Server()
    assert sent(server) == ""
    assert server.taken == [event_of(results(), run=RUN)]
    assert server.headers == [CONTENT_TYPE] == ["application/cloudevents+json; charset=utf-8"]


@pytest.mark.parametrize("status", [200, 202, 204])
def test_any_2xx_is_taken(status: int) -> None:
    assert sent(Server(status=status)) == ""


@pytest.mark.parametrize("status", [302, 400, 404, 429, 500, 503])
def test_anything_else_is_not(status: int) -> None:
    assert sent(Server(status=status)) == f"it answers {status}"


def test_a_redirect_is_not_followed() -> None:
    server = Server(status=302)
    sent(server)
    assert server.asked == 1


def test_a_slow_sink_is_left() -> None:
    assert sent(Server(slow=5)) == "it does not answer within 0.3 s"


def test_a_dead_sink_is_told() -> None:
    assert "Cannot connect to host 127.0.0.1" in sent(Server(), up=False)


@pytest.mark.parametrize("url", ["http://", "ftp://x/y", "no url?key=secret", "http://[::1", "https://a..b/"])
def test_an_address_that_is_none_is_an_answer_too(url: str) -> None:
    why = sent(Server(), url, up=False)
    assert why
    assert "secret" not in why


# --- in the background ------------------------------------------------------------------------------------------------


def test_what_is_offered_is_delivered_and_noted_once() -> None:
    server = Server()

    async def test(outbox: Outbox, metrics: Metrics) -> None:
        async with server.up():
            outbox.offer("1-a", server.url)
            outbox.offer("1-a", server.url)
            assert len(outbox.sinks) == 1
            assert value(metrics, "emrakul_sink_undelivered") == 1
            await until(lambda: outbox.noted == ["1-a"])
            await until(lambda: len(outbox.sinks) == 0)

    metrics = driven(test)
    assert [event["id"] for event in server.taken] == ["1-a"]
    assert value(metrics, "emrakul_sink_undelivered") == 0


@pytest.mark.parametrize("trouble", ["dead", "slow", "broken"])
def test_a_sink_that_recovers_gets_everything(trouble: str) -> None:
    server = Server(status=500 if trouble == "broken" else 204, slow=5 if trouble == "slow" else 0)

    async def test(outbox: Outbox, metrics: Metrics) -> None:
        for number in range(5):
            outbox.offer(f"{number}-a", server.url)
        if trouble == "dead":
            await asyncio.sleep(0.2)
        else:
            async with server.up():
                await until(lambda: server.asked >= 3)
        assert (outbox.noted, len(outbox.sinks)) == ([], 5)
        assert value(metrics, "emrakul_sink_undelivered") == 5
        server.status, server.slow = 204, 0
        async with server.up():
            await until(lambda: len(outbox.noted) == 5)

    driven(test)
    assert sorted(event["id"] for event in server.taken) == [f"{number}-a" for number in range(5)]


def test_a_dead_sink_blocks_nobody() -> None:
    dead, slow, server = Server(), Server(slow=60), Server()

    async def test(outbox: Outbox, metrics: Metrics) -> None:
        async with server.up(), slow.up():
            loop = asyncio.get_running_loop()
            began = loop.time()
            for number in range(100):
                outbox.offer(f"dead-{number}", dead.url)
                outbox.offer(f"slow-{number}", slow.url)
            outbox.offer("mine", server.url)
            assert loop.time() - began < 0.2  # the offers themselves
            await until(lambda: "mine" in outbox.noted)
            assert loop.time() - began < 2

    driven(test, try_seconds=30.0)


def test_one_event_that_is_refused_holds_up_no_other() -> None:
    server = Server(refused="1-bad")

    async def test(outbox: Outbox, metrics: Metrics) -> None:
        async with server.up():
            for cycle in ("1-bad", "2-good", "3-good"):
                outbox.offer(cycle, server.url)
            await until(lambda: len(outbox.noted) == 2)
            assert len(outbox.sinks) == 1

    driven(test)
    assert [event["id"] for event in server.taken] == ["2-good", "3-good"]


def test_the_id_is_the_same_when_it_is_sent_again() -> None:
    """The operator dies between delivery and note, so the next one sends again."""
    server = Server()

    async def first(outbox: Outbox, metrics: Metrics) -> None:
        outbox.broken = 1_000
        async with server.up():
            outbox.offer("1-a", server.url)
            await until(lambda: len(server.taken) == 1)
            await until(lambda: outbox.broken < 998)
        assert outbox.noted == []

    async def second(outbox: Outbox, metrics: Metrics) -> None:
        async with server.up():
            outbox.offer("1-a", server.url)
            await until(lambda: outbox.noted == ["1-a"])

    driven(first)
    assert len(server.taken) == 1  # one process does not send what was taken, however often the note fails
    driven(second)
    one, two = server.taken
    assert one == two
    assert one["id"] == results("1-a").idempotency_key


def test_an_event_that_cannot_be_made_now_is_made_later() -> None:
    server = Server()
    tries: list[int] = []

    def make() -> Event:
        tries.append(1)
        if len(tries) < 3:
            raise OSError("the store does not answer")
        return event_of(results(), run=RUN)

    async def test(outbox: Outbox, metrics: Metrics) -> None:
        async with server.up():
            outbox.sinks.offer("key", server.url, make, lambda: outbox.noted.append("key"))
            await until(lambda: outbox.noted == ["key"])

    driven(test)
    assert (len(tries), len(server.taken)) == (3, 1)


def test_memory_is_bounded_and_the_fullest_sink_loses_its_oldest() -> None:
    full, other = Server(), Server()

    async def test(outbox: Outbox, metrics: Metrics) -> None:
        outbox.offer("other", other.url)
        for number in range(30):
            outbox.offer(f"{number}", full.url)
        assert len(outbox.sinks) == 10
        async with full.up(), other.up():
            await until(lambda: len(outbox.sinks) == 0)

    metrics = driven(test, most=10)
    assert [event["id"] for event in other.taken] == ["other"]
    assert sorted(int(event["id"]) for event in full.taken) == list(range(21, 30))
    assert value(metrics, "emrakul_sink_dropped_total") == 21


def test_what_was_dropped_can_be_offered_again() -> None:
    server = Server()

    async def test(outbox: Outbox, metrics: Metrics) -> None:
        for number in range(5):
            outbox.offer(f"{number}-a", server.url)
        assert len(outbox.sinks) == 2
        async with server.up():
            await until(lambda: len(outbox.sinks) == 0)
            assert sorted(outbox.noted) == ["3-a", "4-a"]
            outbox.offer("0-a", server.url)
            await until(lambda: "0-a" in outbox.noted)

    driven(test, most=2)


def test_after_a_week_an_event_is_given_up() -> None:
    server = Server(refused="1-bad")
    now = [0.0]

    async def test(outbox: Outbox, metrics: Metrics) -> None:
        async with server.up():
            outbox.offer("1-bad", server.url)
            await until(lambda: server.asked >= 2)
            assert len(outbox.sinks) == 1
            now[0] = 8 * 24 * 3600.0
            await until(lambda: len(outbox.sinks) == 0)

    metrics = driven(test, clock=lambda: now[0])
    assert (value(metrics, "emrakul_sink_dropped_total"), server.taken) == (1, [])


def test_the_log_says_trouble_once_and_no_secret(caplog: pytest.LogCaptureFixture) -> None:
    server = Server(status=503)

    async def test(outbox: Outbox, metrics: Metrics) -> None:
        url = server.url.replace("http://", "http://user:secret@") + "?token=secret"
        async with server.up():
            outbox.offer("1-a", url)
            await until(lambda: server.asked >= 4)
            server.status = 204
            await until(lambda: len(outbox.noted) == 1)

    with caplog.at_level(logging.INFO, logger="emrakul"):
        driven(test)
    place = server.url
    assert [record.message for record in caplog.records if record.name == "emrakul"] == [
        f"sink {place}: it answers 503; it is tried again, 1 wait",
        f"sink {place} takes events again",
    ]
