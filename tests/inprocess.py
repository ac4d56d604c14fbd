"""A runtime whose workers run inside this process, one after the other, on a store that a test may wrap.

The same code as the workers' commands run, in an order that is always the same: so that a test can count the writes of
a whole cycle and end the "process" at each of them.
"""

from __future__ import annotations

from datetime import datetime
from unittest.mock import patch

from elesh import worker as elesh
from emrakul.core.snapshot import Job, Phase
from kasmina import apply
from leyline import exits, layout
from leyline.store import ObjectStore
from urabrask.__main__ import judge


class Finishing:
    """A runtime that runs a launch to its end before `start` returns: one worker after the other."""

    name = "local"

    def __init__(self) -> None:
        self._jobs: list[Job] = []

    def start(self, phase: Phase, *, launch: int, step: int, workers: int, memory_bytes: int, now: datetime) -> None:
        codes = self._codes(phase, launch, step, workers)
        failed = tuple(code for code in codes if code != exits.DONE)
        self._jobs.append(Job(phase=phase, launch=launch, step=step, created=now, running=False, exits=failed))

    def jobs(self) -> tuple[Job, ...]:
        return tuple(self._jobs)

    def stop(self, phase: Phase | None = None) -> None:
        """Nothing runs on."""

    def _codes(self, phase: Phase, launch: int, step: int, workers: int) -> list[int]:
        return [self._work(phase, launch, step, number, workers) for number in range(workers)]

    def _work(self, phase: Phase, launch: int, step: int, worker: int, of: int) -> int:
        """The exit code of one worker."""
        raise NotImplementedError


class InProcess(Finishing):
    """Its workers are this process."""

    def __init__(self, store: ObjectStore, cycle_uri: str) -> None:
        super().__init__()
        self._store = store
        self._cycle = cycle_uri.rpartition("/")[2]

    def _work(self, phase: Phase, launch: int, step: int, worker: int, of: int) -> int:
        match phase:
            case Phase.ANALYSE:
                return elesh.run(
                    self._store,
                    cycle=self._cycle,
                    round_=step,
                    worker=worker,
                    of=of,
                    launch=launch,
                    log=lambda _line: None,
                )
            case Phase.APPLY:
                self._started(phase, launch)
                plan = apply.read_plan(self._store, cycle=self._cycle, base=step, trust=None)
                return exits.GAVE_UP if apply.apply(self._store, plan, worker=worker, of=of) else exits.DONE
            case Phase.VALIDATE:
                self._started(phase, launch)
                # on cores that others use too, torch's threads wait for each other twenty times as long as they work
                with patch("os.sched_getaffinity", return_value={0}):
                    judge(self._store, cycle=self._cycle, base=step, trust=None)
                return exits.DONE

    def _started(self, phase: Phase, launch: int) -> None:
        self._store.put_if_absent(layout.started(self._cycle, phase.value, launch), b"started")
