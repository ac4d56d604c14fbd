"""Workers as Jobs: the runtime of a cluster. It is called in a reconciler's thread; `Jobs` reaches the API for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from typing import Any, Protocol

from emrakul.api.resource import GROUP, parse_time
from emrakul.core.snapshot import Job, Phase
from emrakul.runtime.jobstatus import events_from, job_of, needs_pods

Body = dict[str, Any]

LAUNCHED = f"{GROUP}/launched"
"""Annotation: when the Job was launched by the store's clock, which all limits are measured by."""

Build = Callable[[Phase, int, int, int, int, datetime], Body]
"""The Job of a phase, launch and step, with so many workers of so many bytes, launched now by the store's clock."""


class Jobs(Protocol):
    """The Jobs of one owner in the API, read live."""

    def list(self) -> tuple[Body, ...]:
        """All that are not being deleted."""
        ...

    def pods(self, job: Body) -> tuple[Body, ...]: ...

    def events(self, uid: str) -> tuple[Body, ...]:
        """What was told of the object with this UID."""
        ...

    def create(self, job: Body) -> None:
        """Make it, or find that it was made for this very owner before."""
        ...

    def delete(self, job: Body) -> None: ...


class KubernetesRuntime:
    """The Jobs of one cycle. Between two changes of its own it reads them once a reconcile."""

    name = "kubernetes"

    def __init__(self, jobs: Jobs, build: Build) -> None:
        self._jobs = jobs
        self._build = build
        self._found: tuple[tuple[Body, Job], ...] | None = None

    def start(self, phase: Phase, *, launch: int, step: int, workers: int, memory_bytes: int, now: datetime) -> None:
        self._jobs.create(self._build(phase, launch, step, workers, memory_bytes, now))
        self._found = None

    def jobs(self) -> tuple[Job, ...]:
        return tuple(job for _, job in self._look())

    def stop(self, phase: Phase | None = None) -> None:
        """Delete a phase's Jobs, or all. Their pods follow in the background and can only write what is ignored."""
        for body, job in self._look():
            if phase in (None, job.phase):
                self._jobs.delete(body)
        self._found = None

    def workers(self, phase: Phase) -> int | None:
        """Of the newest launch of a phase, while its Job is there."""
        counts = [int(body["spec"].get("completions", 1)) for body, job in self._look() if job.phase is phase]
        return counts[-1] if counts else None

    def forget(self) -> None:
        """Read the Jobs anew at the next look."""
        self._found = None

    def _look(self) -> tuple[tuple[Body, Job], ...]:
        if self._found is None:
            read = []
            for body in self._jobs.list():
                pods = self._jobs.pods(body) if needs_pods(body) else ()
                told = events_from(body, pods)
                events = self._jobs.events(told) if told else ()
                read.append((body, _by_the_stores_clock(body, job_of(body, pods, events))))
            self._found = tuple(sorted(read, key=lambda one: (one[1].launch, one[1].created)))
        return self._found


def launched(job: Body, now: datetime) -> Body:
    """The Job, marked with the store's time of its launch."""
    job["metadata"].setdefault("annotations", {})[LAUNCHED] = now.isoformat()
    return job


def _by_the_stores_clock(body: Body, job: Job) -> Job:
    """What the API server's clock says, moved to the store's: the two may be far apart."""
    marked = (body["metadata"].get("annotations") or {}).get(LAUNCHED)
    if marked is None:
        return job
    made = parse_time(body["metadata"]["creationTimestamp"])
    return replace(job, created=job.created + (parse_time(marked) - made))
