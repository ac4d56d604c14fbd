"""Work stealing: who answers what, who is dead, and when a task is given up."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from leyline import layout
from leyline.claims import Answer, Share, Task, TaskState, attempt_states, order, read_states, share
from leyline.local import LocalStore
from leyline.messages import WorkLimits
from leyline.store import Head, ObjectStore

CYCLE = "c7-0123456789"
QUICK = WorkLimits(attempt_seconds=20, beat_seconds=0.1)
NOW = datetime(2026, 1, 1, tzinfo=UTC)


def tasks(n: int) -> tuple[Task, ...]:
    return tuple(Task(id=f"0-{i}") for i in range(n))


def work(store: ObjectStore, *, n: int, worker: int, of: int, limits: WorkLimits = QUICK, slow: float = 0) -> Share:
    def compute(task: Task, attempt: int, scale: float) -> bytes:
        time.sleep(slow)
        return f"{task.id} at {scale}".encode()

    return share(store=store, cycle=CYCLE, tasks=tasks(n), worker=worker, of=of, limits=limits, compute=compute)


def keys(store: ObjectStore, prefix: str) -> list[str]:
    return [head.key.removeprefix(prefix) for head in store.list(prefix)]


def head(key: str, age: float) -> Head:
    return Head(key=key, size=1, pin="1", modified=NOW - timedelta(seconds=age))


def state_of(*heads: Head, extra: float = 0) -> TaskState:
    task = Task(id="0-0", extra_seconds=extra)
    return attempt_states(heads, cycle=CYCLE, tasks=[task], limits=WorkLimits(), now=NOW)["0-0"]


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "run")


def test_each_worker_has_a_share_and_helps_from_the_far_end() -> None:
    own, others = order(tasks(9), worker=1, of=3)
    assert [t.id for t in own] == ["0-3", "0-4", "0-5"]
    assert [t.id for t in others] == ["0-7", "0-6", "0-2", "0-1", "0-0", "0-8"]
    assert order(tasks(2), worker=0, of=1) == (tasks(2), ())
    assert order((), worker=2, of=3) == ((), ())


def test_workers_that_never_see_each_other_still_cover_everything() -> None:
    for of in range(1, 8):
        for worker in range(of):
            own, others = order(tasks(5), worker=worker, of=of)
            assert {t.id for t in (*own, *others)} == {t.id for t in tasks(5)}


def test_a_quick_task_costs_one_attempt_and_one_response(store: LocalStore) -> None:
    assert work(store, n=4, worker=0, of=1) == Share(answered=("0-0", "0-1", "0-2", "0-3"))
    assert keys(store, layout.attempts(CYCLE)) == ["0-0/0", "0-1/0", "0-2/0", "0-3/0"]
    assert keys(store, layout.responses(CYCLE)) == ["0-0/0-0", "0-1/0-0", "0-2/0-0", "0-3/0-0"]


def test_a_lone_worker_does_the_work_of_those_that_never_came(store: LocalStore) -> None:
    assert work(store, n=5, worker=1, of=3).answered == ("0-1", "0-2", "0-3", "0-0", "0-4")


def test_a_worker_that_finds_everything_answered_returns(store: LocalStore) -> None:
    work(store, n=3, worker=0, of=1)
    before = list(store.list(""))
    assert work(store, n=3, worker=1, of=2) == Share(answered=())
    assert list(store.list("")) == before


def test_an_attempt_is_live_while_it_beats_and_dead_when_it_is_silent_or_old() -> None:
    attempts = layout.attempts(CYCLE, "0-0")
    young, beat = head(f"{attempts}0", 14), head(f"{attempts}0.beat-1", 2)
    assert state_of(young).live == {0}
    assert state_of(head(f"{attempts}0", 16)).dead == {0}
    assert state_of(head(f"{attempts}0", 16), beat).live == {0}
    assert state_of(head(f"{attempts}0", 31), beat).dead == {0}
    assert state_of(head(f"{attempts}0", 31), beat, extra=2).live == {0}
    assert state_of(head(f"{attempts}0", 31), head(f"{attempts}1", 1)).attempts == 2


def test_an_answer_that_came_late_counts() -> None:
    state = state_of(head(f"{layout.attempts(CYCLE, '0-0')}0", 100), head(f"{layout.responses(CYCLE, '0-0')}3-0", 1))
    assert state.answers == {Answer(worker=3, attempt=0)}
    assert state.answered(WorkLimits())
    assert not state.dead


def test_three_dead_attempts_give_a_task_up_and_an_answer_saves_it() -> None:
    dead = [head(f"{layout.attempts(CYCLE, '0-0')}{n}", 100) for n in range(3)]
    assert not state_of(*dead[:2]).given_up(WorkLimits())
    assert state_of(*dead).given_up(WorkLimits())
    assert not state_of(*dead, head(f"{layout.responses(CYCLE, '0-0')}3-1", 1)).given_up(WorkLimits())


def test_objects_of_other_tasks_and_rounds_are_passed_over() -> None:
    assert state_of(head(f"{layout.attempts(CYCLE, '1-0')}0", 1), head("log/0/0.json", 1)) == TaskState()
    assert state_of(head(f"{layout.attempts(CYCLE, '0-0')}junk", 1)) == TaskState()


def test_a_dead_workers_task_is_stolen_with_half_the_buffer(store: LocalStore) -> None:
    store.put_if_absent(f"{layout.attempts(CYCLE, '0-1')}0", b"1 token-of-the-dead")
    started = time.monotonic()
    assert work(store, n=2, worker=0, of=2).answered == ("0-0", "0-1")
    assert time.monotonic() - started >= 0.25  # three missed beats
    assert store.get(f"{layout.responses(CYCLE, '0-1')}0-1") == b"0-1 at 0.5"


def test_a_live_attempt_is_waited_for_and_not_stolen(store: LocalStore) -> None:
    limits = WorkLimits(beat_seconds=0.3)
    other = threading.Thread(
        target=work, args=(store,), kwargs={"n": 2, "worker": 1, "of": 2, "limits": limits, "slow": 0.7}
    )
    other.start()
    while not keys(store, layout.attempts(CYCLE)):
        time.sleep(0.01)
    assert work(store, n=2, worker=0, of=2, limits=limits).answered == ("0-0",)
    other.join()
    assert [key for key in keys(store, layout.responses(CYCLE)) if key.startswith("0-1")] == ["0-1/1-0"]
    assert "0-1/0.beat-0" in keys(store, layout.attempts(CYCLE))


def test_an_attempt_without_end_stops_beating_and_is_stolen(store: LocalStore) -> None:
    limits = WorkLimits(attempt_seconds=0.4, beat_seconds=0.1)
    stuck = threading.Thread(
        target=work, args=(store,), kwargs={"n": 1, "worker": 0, "of": 2, "limits": limits, "slow": 2}
    )
    stuck.start()
    while not keys(store, layout.attempts(CYCLE)):
        time.sleep(0.01)
    assert work(store, n=1, worker=1, of=2, limits=limits).answered == ("0-0",)
    assert stuck.is_alive()
    stuck.join()
    assert keys(store, layout.responses(CYCLE)) == ["0-0/0-0", "0-0/1-1"]
    assert len([key for key in keys(store, layout.attempts(CYCLE)) if key.startswith("0-0/0.beat-")]) <= 4


def test_the_same_worker_started_again_does_not_wait_for_its_dead_self(store: LocalStore) -> None:
    store.put_if_absent(f"{layout.attempts(CYCLE, '0-0')}0", b"0 token-of-an-earlier-process")
    limits = WorkLimits(beat_seconds=600, attempt_seconds=600)
    assert work(store, n=1, worker=0, of=1, limits=limits).answered == ("0-0",)
    assert store.get(f"{layout.responses(CYCLE, '0-0')}0-1") == b"0-0 at 0.5"


def test_after_three_dead_attempts_the_worker_gives_up(store: LocalStore) -> None:
    for n in range(3):
        store.put_if_absent(f"{layout.attempts(CYCLE, '0-1')}{n}", b"5 token-of-the-dead")
    time.sleep(0.35)
    assert work(store, n=2, worker=0, of=1) == Share(answered=(), given_up=("0-1",))
    states = read_states(store, cycle=CYCLE, tasks=tasks(2), limits=QUICK)
    assert [id_ for id_, state in states.items() if state.given_up(QUICK)] == ["0-1"]


def test_a_scorer_that_raises_three_times_is_given_up(store: LocalStore) -> None:
    def broken(task: Task, attempt: int, scale: float) -> bytes:
        raise RuntimeError("this task kills its worker")

    def once() -> Share:
        return share(store=store, cycle=CYCLE, tasks=tasks(1), worker=0, of=1, limits=QUICK, compute=broken)

    for _ in range(3):
        with pytest.raises(RuntimeError, match="kills its worker"):
            once()
    assert once().given_up == ("0-0",)


def test_with_replicas_each_task_is_answered_by_that_many_workers(store: LocalStore) -> None:
    limits = WorkLimits(replicas=3)
    workers = [
        threading.Thread(target=work, args=(store,), kwargs={"n": 4, "worker": i, "of": 5, "limits": limits})
        for i in range(5)
    ]
    for thread in workers:
        thread.start()
    for thread in workers:
        thread.join()
    states = read_states(store, cycle=CYCLE, tasks=tasks(4), limits=limits)
    assert all(len(state.workers) == len(state.answers) == 3 for state in states.values())


def test_with_replicas_a_worker_answers_a_task_once_and_leaves_the_rest_to_others(store: LocalStore) -> None:
    limits = WorkLimits(replicas=3)
    assert len(work(store, n=4, worker=0, of=3, limits=limits).answered) == 4
    assert work(store, n=4, worker=0, of=3, limits=limits).answered == ()
    assert len(work(store, n=4, worker=1, of=3, limits=limits).answered) == 4


def test_consensus_with_too_few_workers_is_refused(store: LocalStore) -> None:
    with pytest.raises(ValueError, match="3 different workers, there are 2"):
        work(store, n=1, worker=0, of=2, limits=WorkLimits(replicas=3))
    with pytest.raises(ValueError, match="worker 2 of 2"):
        work(store, n=1, worker=2, of=2)


WORKER = """
import sys, time
from leyline.claims import Task, share
from leyline.local import LocalStore
from leyline.messages import WorkLimits
root, cycle, worker, of, slow = sys.argv[1:]
share(store=LocalStore(root), cycle=cycle, tasks=[Task(id=f"0-{i}") for i in range(6)], worker=int(worker), of=int(of),
      limits=WorkLimits(attempt_seconds=20, beat_seconds=0.2),
      compute=lambda task, attempt, scale: time.sleep(float(slow)) or task.id.encode())
"""


def test_a_killed_process_leaves_its_tasks_to_the_others(store: LocalStore, tmp_path: Path) -> None:
    def start(worker: int, slow: float) -> subprocess.Popen[bytes]:
        arguments = [str(tmp_path / "run"), CYCLE, str(worker), "2", str(slow)]
        return subprocess.Popen([sys.executable, "-c", WORKER, *arguments])

    victim = start(1, 60)
    while not keys(store, layout.attempts(CYCLE)):
        time.sleep(0.02)
    os.kill(victim.pid, signal.SIGKILL)
    victim.wait()
    assert start(0, 0).wait(timeout=30) == 0
    answered = {key.split("/")[0] for key in keys(store, layout.responses(CYCLE))}
    assert answered == {f"0-{i}" for i in range(6)}


def test_an_interrupted_launch_is_no_sign_of_a_task_that_kills_workers() -> None:
    """Three interruptions of the same command, and then the same command goes on."""
    begun = datetime(2026, 1, 1, tzinfo=UTC)
    heads = [Head(key=f"cycles/c/attempts/0-0/{n}", size=1, pin="p", modified=begun) for n in range(3)]
    later = begun + timedelta(hours=1)
    tasks = [Task(id="0-0")]
    plain = attempt_states(heads, cycle="c", tasks=tasks, limits=WorkLimits(), now=later)["0-0"]
    assert plain.given_up(WorkLimits())
    since = begun + timedelta(minutes=30)
    state = attempt_states(heads, cycle="c", tasks=tasks, limits=WorkLimits(), now=later, since=since)["0-0"]
    assert not state.given_up(WorkLimits())
    assert (state.dead, state.live, state.attempts) == (frozenset(), frozenset(), 3)
