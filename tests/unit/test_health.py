"""The health server, asked over real HTTP: what makes it unready, and what alone makes it dead."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Any

import aiohttp
import pytest

from emrakul.cluster.health import Health, HealthServer
from emrakul.cluster.metrics import Metrics
from leyline.log import StoreReverted
from leyline.store import NotFound, StoreError, Unreachable

Ask = Callable[[str], Awaitable[tuple[int, Any]]]
DOWN = Unreachable("https://store.example: no answer")


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def health(clock: Clock) -> Health:
    """Of an operator that has listed everything."""
    found = Health(Metrics(), operator_class="gpu", clock=clock, now=lambda: datetime.fromtimestamp(clock.now, UTC))
    found.listed()
    return found


def served(health: Health, test: Callable[[Ask], Awaitable[None]]) -> None:
    async def main() -> None:
        server = HealthServer(health, port=0)
        port = await server.start()
        async with aiohttp.ClientSession() as session:

            async def ask(path: str) -> tuple[int, Any]:
                async with session.get(f"http://127.0.0.1:{port}{path}") as answer:
                    json = answer.content_type == "application/json"
                    return answer.status, await (answer.json() if json else answer.text())

            try:
                await test(ask)
            finally:
                await server.stop()

    asyncio.run(main())


def test_it_says_how_it_is(health: Health, clock: Clock) -> None:
    health.metrics.live_cycles = 3
    health.metrics.trainer(12.0, None)
    health.heard()
    clock.now += 7
    health.store_said("s3://a/one")

    async def test(ask: Ask) -> None:
        status, found = await ask("/health/emrakul")
        assert status == 200
        assert found.pop("version")
        assert found == {
            "operatorClass": "gpu",
            "ready": True,
            "message": None,
            "leftOut": [],
            "liveCycles": 3,
            "store": {"reachable": True, "answering": 1, "failing": 0, "lastError": None, "since": None},
            "watch": {"deaf": False, "lastEventSeconds": 7.0},
            "slos": {
                "analysisSuccess": {"target": 0.95, "value": None, "met": None},
                "checkpointOverheadSeconds": {"target": 300.0, "value": 12.0, "met": True},
                "trainingTimeShare": {"target": 0.01, "value": None, "met": None},
            },
        }

    served(health, test)


def test_it_is_not_ready_before_the_first_listing() -> None:
    health = Health(Metrics())

    async def test(ask: Ask) -> None:
        assert await ask("/readyz") == (503, "the first listing of cycles and policies is not done yet\n")
        assert await ask("/healthz") == (200, "ok\n")
        health.listed()
        assert await ask("/readyz") == (200, "ok\n")

    served(health, test)


def test_a_store_that_is_away_makes_it_unready_and_never_dead(health: Health, clock: Clock) -> None:
    async def test(ask: Ask) -> None:
        health.store_said("s3://a/one")
        health.store_said("s3://a/one", DOWN)
        clock.now += 60
        health.store_said("s3://a/one", DOWN)
        assert await ask("/readyz") == (503, "no store answers: https://store.example: no answer\n")
        assert await ask("/healthz") == (200, "ok\n")
        _, found = await ask("/health/emrakul")
        assert (found["ready"], found["message"]) == (False, "no store answers: https://store.example: no answer")
        assert found["store"] == {
            "reachable": False,
            "answering": 0,
            "failing": 1,
            "lastError": "https://store.example: no answer",
            "since": "1970-01-01T00:16:40+00:00",
        }
        health.store_said("s3://a/one")
        assert await ask("/readyz") == (200, "ok\n")

    served(health, test)


@pytest.mark.parametrize("error", [NotFound("log/0/3.json does not exist"), StoreReverted("record 3 is gone")])
def test_a_store_that_says_what_it_lacks_does_answer(health: Health, error: StoreError) -> None:
    health.store_said("s3://a/one", DOWN)
    health.store_said("s3://a/one", error)
    assert health.unready is None


def test_one_tenants_store_is_not_everybodys(health: Health) -> None:
    health.store_said("s3://a/one")
    health.store_said("s3://b/two", DOWN)
    assert health.unready is None
    found = health.report()["store"]
    assert (found["reachable"], found["answering"], found["failing"]) == (True, 1, 1)
    assert found["lastError"] == str(DOWN)


def test_a_store_that_nobody_asks_any_more_says_nothing(health: Health, clock: Clock) -> None:
    health.store_said("s3://a/gone", DOWN)
    health.store_said("s3://b/idle")
    clock.now += 299
    assert health.report()["store"]["failing"] == 1
    clock.now += 2
    assert health.unready is None
    assert health.report()["store"] == {
        "reachable": True,
        "answering": 0,
        "failing": 0,
        "lastError": None,
        "since": None,
    }


def test_without_its_supervisor_it_is_dead(health: Health) -> None:
    async def test(ask: Ask) -> None:
        health.supervisor = asyncio.create_task(asyncio.sleep(60))
        assert await ask("/healthz") == (200, "ok\n")
        health.supervisor.cancel()
        await asyncio.wait([health.supervisor])
        assert (await ask("/healthz"))[0] == 503
        assert await ask("/readyz") == (503, "the supervisor has ended, so nothing is reconciled any more\n")

    served(health, test)


def test_deaf_is_dead_and_idle_is_not(health: Health, clock: Clock) -> None:
    health.heard()
    clock.now += 24 * 3600
    assert health.dead is None
    assert health.report()["watch"] == {"deaf": False, "lastEventSeconds": 86400.0}
    health.deaf = "version 12 of pruningcycles b has been listed for 90 s"
    assert health.dead == health.unready == health.deaf
    assert health.report()["watch"]["deaf"] is True


def test_metrics_are_prometheus_text(health: Health) -> None:
    async def main() -> None:
        server = HealthServer(health, port=0)
        port = await server.start()
        url = f"http://127.0.0.1:{port}/metrics"
        async with aiohttp.ClientSession() as session, session.get(url) as answer:
            assert answer.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
            text = await answer.text()
        assert "\nemrakul_live_cycles 0.0\n" in text
        assert "\nprocess_resident_memory_bytes " in text
        await server.stop()

    asyncio.run(main())


def test_a_port_that_is_taken_is_an_error(health: Health) -> None:
    async def main() -> None:
        first, second = HealthServer(health, port=0), HealthServer(health, port=0)
        second._wanted = await first.start()
        with pytest.raises(OSError, match="address already in use"):
            await second.start()
        await second.stop()
        await first.stop()
        await first.stop()

    asyncio.run(main())
