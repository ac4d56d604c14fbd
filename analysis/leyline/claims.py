"""Work stealing without a queue: workers that share only an object store divide a list of tasks among themselves.

A worker writes `attempts/<task>/<n>` before it begins and `responses/<task>/<worker>-<n>` when it is done, both
put-if-absent. An attempt without an answer is dead when it is too old or its beats have stopped, and then anybody
may try again. Claims save work, they do not guard it: answers are pure, so two attempts at once are harmless.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import NamedTuple

from leyline import layout
from leyline.messages import WorkLimits
from leyline.store import Exists, Head, ObjectStore, StoreError

MISSED_BEATS = 3
"""Beats that may be missing before an attempt counts as dead."""

_LONGEST_POLL = 1.0


@dataclass(frozen=True, kw_only=True)
class Task:
    """One piece of work; `id` is a folder name. It may take `extra_seconds` on top of limits.attempt_seconds."""

    id: str
    extra_seconds: float = 0.0


class Answer(NamedTuple):
    """Who answered, in which attempt: the name of the response object, `<worker>-<attempt>`."""

    worker: int
    attempt: int


@dataclass(frozen=True, kw_only=True)
class TaskState:
    """What the store says of one task at one moment."""

    answers: frozenset[Answer] = frozenset()
    live: frozenset[int] = frozenset()
    dead: frozenset[int] = frozenset()
    earlier: frozenset[int] = frozenset()
    """Open attempts of an earlier launch: once over they were interrupted, which is no sign of a task that kills."""
    attempts: int = 0
    """Attempts made; the number of the next one."""

    @property
    def workers(self) -> frozenset[int]:
        """The different workers that answered."""
        return frozenset(answer.worker for answer in self.answers)

    def answered(self, limits: WorkLimits) -> bool:
        return len(self.workers) >= limits.replicas

    def given_up(self, limits: WorkLimits) -> bool:
        return not self.answered(limits) and len(self.dead) >= limits.attempts


@dataclass(frozen=True, kw_only=True)
class Share:
    """What became of one worker's part in the tasks."""

    answered: tuple[str, ...]
    """Tasks that this call answered, in order."""
    given_up: tuple[str, ...] = ()
    """Tasks with limits.attempts dead attempts and no answer: the phase has failed."""


Compute = Callable[[Task, int, float], bytes]
"""(task, attempt number, buffer scale) -> the response's bytes. The scale halves with each dead attempt."""


def attempt_states(
    heads: Iterable[Head],
    *,
    cycle: str,
    tasks: Sequence[Task],
    limits: WorkLimits,
    now: datetime,
    since: datetime | None = None,
) -> dict[str, TaskState]:
    """The state of every task. Pure. `since` is the newest launch's start mark; what began before it was interrupted.

    `heads` are the objects below attempts/ and responses/ of the cycle (others are passed over), `now` is the
    store's clock. An attempt that answered late is an answer, not a dead attempt.
    """
    begun: dict[str, dict[int, datetime]] = {task.id: {} for task in tasks}
    beaten: dict[tuple[str, int], datetime] = {}
    answers: dict[str, set[Answer]] = {task.id: set() for task in tasks}
    for head in heads:
        folder, _, rest = head.key.removeprefix(layout.attempts(cycle)).partition("/")
        if head.key.startswith(layout.attempts(cycle)) and folder in begun:
            number, _, beat = rest.partition(".")
            if number.isdecimal():
                attempt = (folder, int(number))
                beaten[attempt] = max(head.modified, beaten.get(attempt, head.modified))
                if not beat:
                    begun[folder][attempt[1]] = head.modified
            continue
        folder, _, rest = head.key.removeprefix(layout.responses(cycle)).partition("/")
        if head.key.startswith(layout.responses(cycle)) and folder in answers:
            worker, _, number = rest.partition("-")
            if worker.isdecimal() and number.isdecimal():
                answers[folder].add(Answer(int(worker), int(number)))
    states = {}
    for task in tasks:
        open_ = begun[task.id].keys() - {answer.attempt for answer in answers[task.id]}
        longest = timedelta(seconds=limits.attempt_seconds + task.extra_seconds)
        silent = timedelta(seconds=MISSED_BEATS * limits.beat_seconds)
        over = {n for n in open_ if now - begun[task.id][n] > longest or now - beaten[task.id, n] > silent}
        earlier = {n for n in open_ if since is not None and begun[task.id][n] < since}
        states[task.id] = TaskState(
            answers=frozenset(answers[task.id]),
            live=frozenset(open_ - over),
            dead=frozenset(over - earlier),
            earlier=frozenset(earlier),
            attempts=max(begun[task.id], default=-1) + 1,
        )
    return states


def read_states(
    store: ObjectStore, *, cycle: str, tasks: Sequence[Task], limits: WorkLimits, since: datetime | None = None
) -> dict[str, TaskState]:
    """attempt_states of what the store holds now: two listings and the store's clock."""
    # Attempts before responses: one that is answered in between counts as answered, not as lost.
    heads = [*store.list(layout.attempts(cycle)), *store.list(layout.responses(cycle))]
    return attempt_states(heads, cycle=cycle, tasks=tasks, limits=limits, now=store.now(), since=since)


def order(tasks: Sequence[Task], *, worker: int, of: int) -> tuple[tuple[Task, ...], tuple[Task, ...]]:
    """A worker's own share, and the others' tasks in the order in which it helps: back from where its own begins.

    A share is one stretch of the list: neighbours lie in the same chunks, and a chunk is read by everybody who needs a
    byte of it. Dealt out in turns, the tasks of a float32 checkpoint read 1.8 times its bytes, of a bfloat16 one 2.7.
    """
    first, last = worker * len(tasks) // of, (worker + 1) * len(tasks) // of
    return tuple(tasks[first:last]), (*tasks[:first][::-1], *tasks[last:][::-1])


def share(
    *,
    store: ObjectStore,
    cycle: str,
    tasks: Sequence[Task],
    worker: int,
    of: int,
    limits: WorkLimits,
    compute: Compute,
    mark: str | None = None,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Share:
    """Answer tasks until each is answered, by whomever, or one is given up. `mark`: this launch's start mark.

    With replicas, a worker answers every task at most once, and leaves when there is none that it could answer.
    What `compute` raises ends the call; the attempt then counts as dead as soon as its beats are missed.
    """
    if not 0 <= worker < of:
        raise ValueError(f"worker {worker} of {of}: workers are numbered from 0")
    if limits.replicas > of:
        raise ValueError(f"consensus needs answers of {limits.replicas} different workers, there are {of}; start more")
    since = store.head(mark).modified if mark else None
    return _Worker(store, cycle, tuple(tasks), worker, of, limits, compute, clock, sleep, since).run()


@dataclass
class _Worker:
    store: ObjectStore
    cycle: str
    tasks: tuple[Task, ...]
    number: int
    of: int
    limits: WorkLimits
    compute: Compute
    clock: Callable[[], float]
    sleep: Callable[[float], None]
    since: datetime | None
    # Tells our attempt from one of an earlier process with the same worker number.
    token: str = field(default_factory=lambda: uuid.uuid4().hex)
    gone: dict[str, frozenset[int]] | None = None
    """Attempts of an earlier process with our number, found at the first look."""

    def run(self) -> Share:
        done: list[str] = []
        own, others = order(self.tasks, worker=self.number, of=self.of)
        mine = {task.id for task in own}
        pause = 0.02
        while True:
            states = self._look()
            if lost := tuple(task.id for task in self.tasks if states[task.id].given_up(self.limits)):
                return Share(answered=tuple(done), given_up=lost)
            todo = deque(task for task in (*own, *others) if self._may_begin(states[task.id]))
            if not todo:
                if all(self._over(state) for state in states.values()):
                    return Share(answered=tuple(done))
                self.sleep(pause)
                pause = min(2 * pause, _LONGEST_POLL, self.limits.beat_seconds)
                continue
            pause = 0.02
            # Within the own share the claims themselves notice a thief; a thief looks before each step.
            while todo:
                task = todo.popleft()
                if not self._attempt(task, states[task.id]):
                    break  # somebody else was faster
                done.append(task.id)
                if task.id not in mine or (todo and todo[0].id not in mine):
                    break

    def _look(self) -> dict[str, TaskState]:
        states = read_states(self.store, cycle=self.cycle, tasks=self.tasks, limits=self.limits, since=self.since)
        if self.gone is None:
            self.gone = self._of_earlier_self(states)
        for id_, gone in self.gone.items():
            gone &= states[id_].live
            state = states[id_]
            states[id_] = replace(state, live=state.live - gone, dead=state.dead | (gone - state.earlier))
        return states

    def _of_earlier_self(self, states: Mapping[str, TaskState]) -> dict[str, frozenset[int]]:
        """Live attempts with our number: those of a process before us, which is gone, so nobody need wait for them."""
        return {
            id_: frozenset(n for n in state.live if self._owner(id_, n) == self.number)
            for id_, state in states.items()
            if not self._over(state)
        }

    def _owner(self, id_: str, attempt: int) -> int:
        text = self.store.get(f"{layout.attempts(self.cycle, id_)}{attempt}").decode()
        return int(text.partition(" ")[0])

    def _over(self, state: TaskState) -> bool:
        return state.answered(self.limits) or self.number in state.workers

    def _may_begin(self, state: TaskState) -> bool:
        wanted = self.limits.replicas - len(state.workers) - len(state.live)
        return not self._over(state) and wanted > 0

    def _attempt(self, task: Task, state: TaskState) -> bool:
        """Claim, compute, answer. False if another worker has claimed it."""
        number = state.attempts
        key = f"{layout.attempts(self.cycle, task.id)}{number}"
        try:
            self.store.put_if_absent(key, f"{self.number} {self.token}".encode())
        except Exists:
            return False
        over = threading.Event()
        beats = threading.Thread(target=self._beat, args=(key, task, over), daemon=True)
        beats.start()
        try:
            data = self.compute(task, number, 0.5 ** len(state.dead))
        finally:
            over.set()
            beats.join()
        self.store.put_if_absent(f"{layout.responses(self.cycle, task.id)}{self.number}-{number}", data)
        return True

    def _beat(self, key: str, task: Task, over: threading.Event) -> None:
        """A new object each beat, until the answer is there or the attempt has run out of its own time."""
        end = self.clock() + self.limits.attempt_seconds + task.extra_seconds
        count = 0
        while not over.wait(self.limits.beat_seconds) and self.clock() < end:
            with suppress(StoreError):  # a beat too few only costs a second attempt
                self.store.put_if_absent(f"{key}.beat-{count}", b"")
            count += 1
