"""A namespace that has a run: what a team sees of the operator."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from cluster import seaweedfs
from cluster.cluster import Cluster
from cluster.processes import wait_until
from leyline.log import Log
from leyline.records import Record
from leyline.s3 import S3Store

Body = dict[str, Any]
T = TypeVar("T")

POLICY = "small"


@dataclass(frozen=True)
class Tenant:
    """Its objects, by kubectl, and its run, by the store."""

    cluster: Cluster
    namespace: str
    store: S3Store

    @property
    def log(self) -> Log:
        return Log(self.store)

    def kubectl(self, *arguments: str, input: str | None = None, seconds: float = 120) -> str:
        return self.cluster.kubectl(f"--namespace={self.namespace}", *arguments, input=input, seconds=seconds)

    def apply(self, *objects: Body) -> None:
        self.kubectl("apply", "--filename=-", input=json.dumps({"apiVersion": "v1", "kind": "List", "items": objects}))

    def get(self, kind: str, name: str) -> Body:
        found: Body = json.loads(self.kubectl("get", kind, name, "--output=json"))
        return found

    def list(self, kind: str, *, labels: str = "") -> list[Body]:
        found: list[Body] = json.loads(self.kubectl("get", kind, f"--selector={labels}", "--output=json"))["items"]
        return found

    def patch(self, kind: str, name: str, spec: Mapping[str, Any]) -> None:
        self.kubectl("patch", kind, name, "--type=merge", f"--patch={json.dumps({'spec': spec})}")

    def cycle(self, *, seconds: float = 60) -> str:
        """The name of the cycle that the policy makes."""
        found = self.until("the policy makes a cycle", lambda: self.list("pruningcycles"), seconds=seconds)
        return str(found[-1]["metadata"]["name"])

    def job(self, phase: str, *, seconds: float = 120) -> Body:
        """The phase's newest Job, once there is one."""
        jobs = self.until(
            f"a Job for {phase}", lambda: self.list("jobs", labels=f"emrakul.dev/phase={phase}"), seconds=seconds
        )
        return max(jobs, key=lambda job: str(job["metadata"]["creationTimestamp"]))

    def status(self, name: str) -> Body:
        return dict(self.get("pruningcycle", name).get("status") or {})

    def ended(self, name: str, *, seconds: float = 180) -> Body:
        """The status of a cycle once it is Complete."""
        try:
            self.kubectl(
                "wait",
                f"pruningcycle/{name}",
                "--for=condition=Complete",
                f"--timeout={seconds}s",
                seconds=seconds + 30,
            )
        except RuntimeError as error:
            error.add_note(self.told())
            raise
        return self.status(name)

    def until(self, what: str, found: Callable[[], T], *, seconds: float = 60) -> T:
        """The first answer of `found` that is true."""
        answers: list[T] = []

        def probe() -> bool:
            answers.append(found())
            return bool(answers[-1])

        try:
            wait_until(what, probe, seconds=seconds)
        except TimeoutError as error:
            error.add_note(self.told())
            raise
        return answers[-1]

    def records(self, kind: type[Any] | None = None) -> list[Record]:
        """The run's log, or those of its records that have such a body."""
        log = self.log
        all_ = [log.read(n)[0] for n in range(log.tail().record.n + 1)]
        return [one for one in all_ if kind is None or isinstance(one.body, kind)]

    def told(self) -> str:
        """Everything that a person would look at."""
        return self.kubectl("describe", "pruningcycles,pruningpolicies,jobs,pods", seconds=60)


def policy(
    store: S3Store,
    *,
    settings: Mapping[str, Any] | None = None,
    structured: Mapping[str, Any] | None = None,
    **more: Any,
) -> Body:
    """Of the small model in tests/runs.py; `settings` and `more` are further keys of the settings and of the spec."""
    schedule = {
        "phase1Epochs": 1,
        "phase2StartEpoch": 2,
        "conservativeThreshold": "0.05",
        "moderateThreshold": "0.05",
        "aggressiveThreshold": "0.05",
    }
    chosen = {
        "enableCheckpointPruning": True,
        "minImportanceSamples": 200,
        "analysisParallelWorkers": 2,
        "analysisMemoryLimit": "400MB",
        "validationTimeout": 300,
        "structuredPruning": {"progressiveSchedule": schedule, **(structured or {})},
        **(settings or {}),
    }
    reached = {
        "endpoint": seaweedfs.ENDPOINT,
        "region": seaweedfs.REGION,
        "credentialsSecretRef": {"name": "store"},
    }
    return {
        "apiVersion": "emrakul.dev/v1alpha1",
        "kind": "PruningPolicy",
        "metadata": {"name": POLICY},
        "spec": {"run": store.uri, "store": reached, "settings": chosen, **more},
    }


def stays(what: str, probe: Callable[[], bool], *, seconds: float) -> None:
    """It is so now, and for a while."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        assert probe(), f"not for {seconds:.0f} s: {what}"
        time.sleep(1)
