"""The test as Job controller: runs what a Job asks for inside this process, and writes the Job's status as it would.

Real workers on the real store; only the kubelet is missing. A test may hold Jobs back, fail them, or never see them.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from api.apiclient import JOBS, Api, Body, Refused
from emrakul.core.snapshot import Phase
from inprocess import InProcess
from leyline.store import ObjectStore
from urabrask.measure import pair_answers
from urabrask.recovery import recheck

Open = Callable[[str], ObjectStore]
"""The store of a run URI."""


class JobController:
    """Polls Jobs and carries each out once, in one thread."""

    def __init__(self, api: Api, open_: Open, *, namespace: str | None = None) -> None:
        self._api, self._open, self._namespace = api, open_, namespace
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.made: list[tuple[str, str]] = []
        """Name and UID of every Job that was seen."""
        self.hold: Callable[[Body], bool] = lambda _job: False
        """Whether a Job is left alone for now, as on a full cluster."""
        self.work: Callable[[Body, ObjectStore], bool] = run_workers
        """Does what a Job asks for: whether it has completed now."""
        self.watch: Callable[[Body], object] = lambda _job: None
        """Is shown every Job, again and again."""
        self.trouble: list[BaseException] = []

    def __enter__(self) -> JobController:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(60)

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                jobs = self._api.list(JOBS, self._namespace)
            except (OSError, Refused):  # the server is being restarted
                time.sleep(0.2)
                continue
            for job in jobs:
                try:
                    self._carry_out(job)
                except (OSError, Refused):
                    continue
                except BaseException as error:
                    self.trouble.append(error)
            time.sleep(0.05)

    def _carry_out(self, job: Body) -> None:
        meta = job["metadata"]
        if (meta["name"], meta["uid"]) not in self.made:
            self.made.append((meta["name"], meta["uid"]))
        self.watch(job)
        if job.get("status", {}).get("conditions") or "deletionTimestamp" in meta:
            return
        if job["spec"].get("suspend") or self.hold(job):
            return
        if self.work(job, self._open(run_of(job))):
            complete(self._api, job)


def arguments(job: Body) -> dict[str, str]:
    """`--round 0` as {"round": "0"}."""
    args = job["spec"]["template"]["spec"]["containers"][0]["args"]
    return {name.removeprefix("--"): value for name, value in zip(args[2::2], args[3::2], strict=True)}


def run_of(job: Body) -> str:
    given = arguments(job)
    return given["run"] if "run" in given else given["cycle"].partition("/cycles/")[0]


def run_workers(job: Body, store: ObjectStore) -> bool:
    """All workers of a Job, one after the other."""
    given = arguments(job)
    if "run" in given:
        recheck(store, record=int(given["record"]), trust=None, answers=pair_answers)
        return True
    phase = Phase(job["metadata"]["labels"]["emrakul.dev/phase"])
    step = given["round"] if phase is Phase.ANALYSE else given["base"]
    InProcess(store, given["cycle"]).start(
        phase,
        launch=int(given["launch"]),
        step=int(step),
        workers=job["spec"].get("completions", 1),
        memory_bytes=0,
        now=datetime.now(UTC),
    )
    return True


def complete(api: Api, job: Body) -> None:
    """As the Job controller does it: the criteria are met, then it is complete."""
    meta, count = job["metadata"], job["spec"].get("completions", 1)
    now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    met = {"type": "SuccessCriteriaMet", "status": "True", "lastTransitionTime": now, "reason": "CompletionsReached"}
    status: dict[str, Any] = {"startTime": now, "succeeded": count, "conditions": [met], "ready": 0}
    if job["spec"].get("completionMode") == "Indexed":
        status["completedIndexes"] = f"0-{count - 1}" if count > 1 else "0"
    api.patch(JOBS, meta["namespace"], meta["name"], {"status": status}, status=True)
    done = {"type": "Complete", "status": "True", "lastTransitionTime": now, "reason": "CompletionsReached"}
    status |= {"completionTime": now, "conditions": [met, done]}
    api.patch(JOBS, meta["namespace"], meta["name"], {"status": status}, status=True)


def start_time(api: Api, job: Body, **status: Any) -> None:
    """As the Job controller does it first; `status` is what else it knows of a Job that goes on."""
    meta = job["metadata"]
    now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    api.patch(JOBS, meta["namespace"], meta["name"], {"status": {"startTime": now, **status}}, status=True)


def fail(api: Api, job: Body, *, reason: str = "BackoffLimitExceeded") -> None:
    meta = job["metadata"]
    now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    target = {"type": "FailureTarget", "status": "True", "lastTransitionTime": now, "reason": reason}
    status: dict[str, Any] = {"startTime": now, "failed": 1, "conditions": [target], "ready": 0}
    api.patch(JOBS, meta["namespace"], meta["name"], {"status": status}, status=True)
    failed = {"type": "Failed", "status": "True", "lastTransitionTime": now, "reason": reason}
    status |= {"conditions": [target, failed]}
    api.patch(JOBS, meta["namespace"], meta["name"], {"status": status}, status=True)
