"""The queue of keys: one key in one hand, none forgotten, failures with backoff."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

import pytest

from emrakul.cluster.supervisor import Key, Supervisor

A, B = Key("PruningCycle", "team", "a"), Key("PruningCycle", "team", "b")


def supervised(test: Callable[[Supervisor], Awaitable[None]], reconcile: object, **options: object) -> None:
    async def run() -> None:
        supervisor = Supervisor(reconcile, **options)  # type: ignore[arg-type]
        task = asyncio.create_task(supervisor.run())
        try:
            await asyncio.wait_for(test(supervisor), 10)
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    asyncio.run(run())


def test_a_key_is_never_in_two_hands_and_is_looked_at_again_if_it_was_woken_meanwhile() -> None:
    running, most, looks = 0, 0, 0

    async def reconcile(_key: Key) -> None:
        nonlocal running, most, looks
        running, looks = running + 1, looks + 1
        most = max(most, running)
        await asyncio.sleep(0.05)
        running -= 1

    async def test(supervisor: Supervisor) -> None:
        supervisor.wake(A)
        await asyncio.sleep(0.02)
        for _ in range(5):
            supervisor.wake(A)
        await asyncio.sleep(0.3)

    supervised(test, reconcile)
    assert (most, looks) == (1, 2)


def test_keys_do_not_wait_for_each_other_but_for_a_free_hand() -> None:
    running, most = 0, 0

    async def reconcile(_key: Key) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.05)
        running -= 1

    async def test(supervisor: Supervisor) -> None:
        for n in range(6):
            supervisor.wake(Key("PruningCycle", f"team-{n}", "one"))
        await asyncio.sleep(0.4)

    supervised(test, reconcile, workers=3)
    assert most == 3


def test_a_tenant_whose_store_hangs_does_not_hold_up_another() -> None:
    done: list[str] = []

    async def reconcile(key: Key) -> None:
        await asyncio.sleep(60 if key.namespace == "slow" else 0)
        done.append(key.namespace)

    async def test(supervisor: Supervisor) -> None:
        for n in range(20):
            supervisor.wake(Key("PruningCycle", "slow", str(n)))
        await asyncio.sleep(0.05)
        supervisor.wake(Key("PruningCycle", "quick", "one"))
        await asyncio.sleep(0.1)

    supervised(test, reconcile, workers=4)
    assert done == ["quick"]


def test_a_failure_that_is_told_does_not_wake_itself() -> None:
    looks = 0

    async def test(supervisor: Supervisor) -> None:
        async def fail(key: Key) -> None:
            nonlocal looks
            looks += 1
            asyncio.get_running_loop().call_later(0.01, supervisor.wake, key)  # the event of the status it wrote
            raise OSError("away")

        supervisor._reconcile = fail
        supervisor.wake(A)
        await asyncio.sleep(0.5)

    async def nothing(_key: Key) -> None:
        return None

    supervised(test, nothing, expected=(OSError,))
    assert looks == 1


def test_what_a_reconcile_answers_is_when_it_is_looked_at_again() -> None:
    looks: list[Key] = []

    async def reconcile(key: Key) -> float | None:
        looks.append(key)
        return 0.05 if key == A else None

    async def test(supervisor: Supervisor) -> None:
        supervisor.wake(A)
        supervisor.wake(B)
        await asyncio.sleep(0.3)
        assert len(supervisor) == 1, "a key that waits for events only is not kept"

    supervised(test, reconcile)
    assert looks.count(A) >= 3
    assert looks.count(B) == 1


def test_an_earlier_time_stands() -> None:
    looks = 0

    async def reconcile(_key: Key) -> None:
        nonlocal looks
        looks += 1

    async def test(supervisor: Supervisor) -> None:
        supervisor.wake(A, after=60)
        supervisor.wake(A, after=0.05)
        supervisor.wake(A, after=30)
        await asyncio.sleep(0.2)

    supervised(test, reconcile)
    assert looks == 1


def test_trouble_is_a_sentence_and_a_fault_of_ours_a_trace(caplog: pytest.LogCaptureFixture) -> None:
    async def reconcile(key: Key) -> None:
        raise OSError("the store is away") if key == A else KeyError("oops")

    async def test(supervisor: Supervisor) -> None:
        supervisor.wake(A)
        supervisor.wake(B)
        await asyncio.sleep(0.1)

    with caplog.at_level(logging.WARNING, "emrakul"):
        supervised(test, reconcile, expected=(OSError,))
    told = {record.levelname: record for record in caplog.records}
    assert "the store is away; looking again in 1 s" in told["WARNING"].getMessage()
    assert told["WARNING"].exc_info is None
    assert told["ERROR"].exc_info is not None


def test_it_does_not_outlive_a_fault_of_its_own() -> None:
    async def reconcile(_key: Key) -> None:
        return None

    async def run() -> None:
        supervisor = Supervisor(reconcile)
        supervisor._next = None  # type: ignore[method-assign,assignment]
        with pytest.raises(BaseException):  # noqa: B017
            await asyncio.wait_for(supervisor.run(), 5)

    asyncio.run(run())
