"""One queue of keys, and the workers that reconcile them: one key is never in two hands, and none is forgotten.

Events only wake a key. What a reconciler answers is when to look again by itself; what it raises is tried again with
backoff. If this ends, so does the process: an operator that is alive and does nothing would be worse than none.
"""

from __future__ import annotations

import asyncio
import heapq
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from itertools import count

log = logging.getLogger("emrakul")

WORKERS = 16
RESYNC_SECONDS = 60.0
"""Every live key is looked at again after this long, whatever was or was not heard."""
BACKOFF_SECONDS = (1.0, 60.0)
"""After a failure: from the first to the second, doubling."""


@dataclass(frozen=True, order=True)
class Key:
    """One object to reconcile."""

    kind: str
    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.kind} {self.namespace}/{self.name}"


Reconcile = Callable[[Key], Awaitable[float | None]]
"""Brings one object to where it should be. Seconds after which to look again; None: only an event matters."""


@dataclass
class _State:
    due: float | None = None
    queued: bool = False
    """Its turn has come, and it waits for a free hand."""
    running: bool = False
    again: bool = False
    """Woken while it ran: what it read may be old."""
    failures: int = 0
    retry: float = 0.0
    """After a failure, not before: a failure that writes a status must not wake itself."""


class Supervisor:
    """Runs `reconcile` for every key that was woken or is due."""

    def __init__(
        self, reconcile: Reconcile, *, workers: int = WORKERS, expected: tuple[type[Exception], ...] = ()
    ) -> None:
        """`expected` are troubles of others, told in a sentence; anything else is a fault of ours."""
        self._reconcile = reconcile
        self._expected = expected
        self._workers = workers
        self._states: dict[Key, _State] = {}
        self._due: list[tuple[float, int, Key]] = []
        self._numbers = count()
        self._changed = asyncio.Event()
        self._slots = asyncio.Semaphore(workers)
        self._rooms: dict[str, asyncio.Semaphore] = {}

    def wake(self, key: Key, *, after: float = 0.0) -> None:
        """Look at this key, now or after so many seconds; an earlier time that was set before stays."""
        state = self._states.setdefault(key, _State())
        if state.queued:
            return
        if state.running:
            state.again = True
            return
        self._schedule(key, state, max(asyncio.get_running_loop().time() + after, state.retry))

    def __len__(self) -> int:
        """Keys that are known."""
        return len(self._states)

    async def run(self) -> None:
        """Until cancelled. A fault in this loop itself ends it, and with it the process."""
        loop = asyncio.get_running_loop()
        async with asyncio.TaskGroup() as tasks:
            while True:
                key = self._next(loop.time())
                if key is None:
                    left = self._due[0][0] - loop.time() if self._due else None
                    self._changed.clear()
                    with suppress(TimeoutError):
                        await asyncio.wait_for(self._changed.wait(), left)
                    continue
                self._states[key].queued = True
                tasks.create_task(self._one(key), name=str(key))

    def _next(self, now: float) -> Key | None:
        while self._due and self._due[0][0] <= now:
            due, _, key = heapq.heappop(self._due)
            state = self._states.get(key)
            if state is not None and state.due == due and not (state.running or state.queued):
                state.due = None
                return key
        return None

    def _schedule(self, key: Key, state: _State, due: float) -> None:
        if state.due is not None and state.due <= due:
            return
        state.due = due
        heapq.heappush(self._due, (due, next(self._numbers), key))
        self._changed.set()

    async def _one(self, key: Key) -> None:
        state = self._states[key]
        async with self._room(key.namespace), self._slots:
            state.queued, state.running = False, True
            after = await self._look(key, state)
            state.running = False
        self._after(key, state, after)

    def _room(self, namespace: str) -> asyncio.Semaphore:
        """Half of the hands at the most: a tenant whose store hangs must not hold up all others."""
        return self._rooms.setdefault(namespace, asyncio.Semaphore(max(1, self._workers // 2)))

    async def _look(self, key: Key, state: _State) -> float | None:
        try:
            after = await self._reconcile(key)
            state.failures, state.retry = 0, 0.0
        except Exception as error:
            state.failures += 1
            after = min(BACKOFF_SECONDS[0] * 2 ** (state.failures - 1), BACKOFF_SECONDS[1])
            if isinstance(error, self._expected):
                log.warning("%s: %s; looking again in %.0f s", key, error, after)
            else:
                log.exception("%s: a fault of ours; looking again in %.0f s", key, after)
            state.retry = asyncio.get_running_loop().time() + after
        return after

    def _after(self, key: Key, state: _State, after: float | None) -> None:
        now = asyncio.get_running_loop().time()
        again, state.again = state.again, False
        if again:
            self._schedule(key, state, max(now, state.retry))
        elif after is None:
            del self._states[key]
        else:
            self._schedule(key, state, now + after)
