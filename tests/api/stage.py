"""One tenant's part of the cluster: a namespace, a Secret, a run, an operator, and the test as Job controller."""

from __future__ import annotations

import base64
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from api.apiclient import CYCLES, EVENTS, JOBS, NAMESPACES, PODS, POLICIES, SECRETS, Api, Body, Refused
from api.jobs import JobController
from api.operators import Operator, wait_for
from cluster.apiserver import ApiServer
from leyline.log import Log
from leyline.records import Kind, Record
from leyline.s3 import Credentials, S3Store
from runs import published_run, trainer
from servers import S3Server

API_VERSION = "emrakul.dev/v1alpha1"
SETTINGS: Body = {
    "enableCheckpointPruning": True,
    "minImportanceSamples": 200,
    "structuredPruning": {
        "progressiveSchedule": {
            "phase1Epochs": 1,
            "phase2StartEpoch": 2,
            "conservativeThreshold": "0.05",
            "moderateThreshold": "0.05",
            "aggressiveThreshold": "0.05",
        }
    },
}
"""A cycle on `runs.published_run` with these commits."""


@dataclass
class Stage:
    """Nothing runs until `begin`; everything of it ends with `end`."""

    server: ApiServer
    api: Api
    s3: S3Server
    folder: Path
    namespace: str = field(default_factory=lambda: f"test-{uuid.uuid4().hex[:8]}")
    kubeconfig: Path | None = None
    """Of the operator; None is the administrator's."""
    _operator: Operator | None = None
    jobs: JobController = field(init=False)

    def __post_init__(self) -> None:
        self.api.create(NAMESPACES, "", {"metadata": {"name": self.namespace}})
        self.run = f"s3://{self.s3.bucket}/{self.namespace}/one"
        self.jobs = JobController(self.api, self.open, namespace=self.namespace)

    # --- the store ---

    def open(self, uri: str) -> S3Store:
        bucket, _, prefix = uri.removeprefix("s3://").partition("/")
        keys = Credentials(access_key=self.s3.access_key, secret_key=self.s3.secret_key)
        return S3Store(bucket, prefix, endpoint=self.s3.endpoint, region="us-east-1", credentials=keys)

    @property
    def store(self) -> S3Store:
        return self.open(self.run)

    def publish(self, *, masked: bool = False, secret: bool = True) -> None:
        """The run as its trainer left it, and the Secret to reach it with."""
        published_run(self.store, masked=masked)
        if secret:
            self.secret()

    def secret(self, name: str = "s3") -> None:
        keys = {"AWS_ACCESS_KEY_ID": self.s3.access_key, "AWS_SECRET_ACCESS_KEY": self.s3.secret_key}
        data = {name: base64.b64encode(value.encode()).decode() for name, value in keys.items()}
        self.api.create(SECRETS, self.namespace, {"metadata": {"name": name}, "data": data})

    @property
    def store_spec(self) -> Body:
        return {"endpoint": self.s3.endpoint, "region": "us-east-1", "credentialsSecretRef": {"name": "s3"}}

    def trains_on(self, step: int) -> None:
        """The trainer comes back, takes what the log says, and publishes again."""
        came = trainer(self.store)
        came.run.sync()
        came.publish(step)

    def records(self) -> list[Record]:
        """The run's whole log."""
        log = Log(self.store)
        return [log.read(0)[0], *log.since(0)]

    @property
    def checkpoint(self) -> str:
        """URI of the newest that the trainer published."""
        newest = [record for record in self.records() if record.kind is Kind.PUBLISH][-1]
        return f"{self.run}/checkpoints/{newest.checkpoint}"

    # --- the processes ---

    @property
    def operator(self) -> Operator:
        assert self._operator is not None, "the test has not begun"
        return self._operator

    def begin(self, **config: Any) -> None:
        """Start the operator, of this namespace alone unless `config` says otherwise, and the Job controller."""
        self.configure(**config)
        self.operator.start()
        self.jobs.__enter__()
        wait_for(lambda: (self.operator.health() or {}).get("ready"), seconds=60)

    def configure(self, environment: Mapping[str, str] | None = None, **config: Any) -> None:
        whole = {"namespaces": [self.namespace], **config}
        self._operator = Operator(
            self.folder / "operator", self.kubeconfig or self.server.admin, config=whole, environment=environment
        )

    def end(self, *, told: bool = True) -> None:
        self.jobs.__exit__()
        if self._operator is not None:
            self._operator.__exit__()
            if told:
                print(self._operator.log.read_text()[-20_000:])
        for kind in (CYCLES, POLICIES, JOBS):
            with suppress(Refused):  # the namespace itself may be gone
                self.api.ask("DELETE", kind.format(f"namespaces/{self.namespace}/"))

    # --- what people write ---

    def policy(self, name: str = "digits", *, settings: Body | None = None, **spec: Any) -> Body:
        chosen = SETTINGS if settings is None else settings
        whole = {"run": self.run, "store": self.store_spec, "settings": chosen, **spec}
        return self.apply("PruningPolicy", name, whole)

    def cycle(self, name: str, **spec: Any) -> Body:
        """A person's cycle on the newest checkpoint."""
        return self.apply("PruningCycle", name, {"checkpoint": self.checkpoint, **spec})

    def apply(self, kind: str, name: str, spec: Body) -> Body:
        place = CYCLES if kind == "PruningCycle" else POLICIES
        body = {"apiVersion": API_VERSION, "kind": kind, "metadata": {"name": name}, "spec": spec}
        return self.api.create(place, self.namespace, body)

    def paste(self, text: str) -> Body:
        body = yaml.safe_load(text)
        return self.api.create(CYCLES, self.namespace, body)

    def made_by(self, policy: str, name: str, *, base: int) -> None:
        """A cycle as the policy makes it for the pair of this record."""
        owner = self.api.get(POLICIES, self.namespace, policy)
        assert owner is not None
        labels = {
            "app.kubernetes.io/managed-by": "emrakul",
            "emrakul.dev/policy": policy,
            "emrakul.dev/policy-uid": owner["metadata"]["uid"],
            "emrakul.dev/base": str(base),
        }
        spec = {"checkpoint": self.checkpoint.rpartition("/")[2], "policyRef": {"name": policy}}
        metadata = {"name": name, "labels": labels}
        body = {"apiVersion": API_VERSION, "kind": "PruningCycle", "metadata": metadata, "spec": spec}
        self.api.create(CYCLES, self.namespace, body)

    def change(self, kind: str, name: str, **spec: Any) -> None:
        self.api.patch(kind, self.namespace, name, {"spec": spec})

    def warn(self, about: Body, reason: str, message: str) -> None:
        """An event as a controller tells it."""
        meta = about["metadata"]
        involved = {"apiVersion": "batch/v1", "kind": "Job", "uid": meta["uid"], "name": meta["name"]}
        body = {
            "metadata": {"generateName": f"{meta['name']}."},
            "involvedObject": {**involved, "namespace": self.namespace},
            "type": "Warning",
            "reason": reason,
            "message": message,
            "lastTimestamp": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        }
        self.api.create(EVENTS, self.namespace, body)

    def failed_pod(self, job: Body, *, code: int, message: str) -> None:
        """A pod of the Job as the kubelet leaves it when its container ends with this code."""
        meta, template = job["metadata"], job["spec"]["template"]
        labels = {**template["metadata"]["labels"], "batch.kubernetes.io/job-name": meta["name"]}
        owner = {"apiVersion": "batch/v1", "kind": "Job", "name": meta["name"], "uid": meta["uid"]}
        name = f"{meta['name']}-x"
        spec = {"metadata": {"name": name, "labels": labels, "ownerReferences": [owner]}, "spec": template["spec"]}
        self.api.create(PODS, self.namespace, spec)
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        ended = {"terminated": {"exitCode": code, "message": message, "reason": "Error", "finishedAt": now}}
        container = {"name": "worker", "image": "", "imageID": "", "ready": False, "restartCount": 0, "state": ended}
        status = {"phase": "Failed", "containerStatuses": [container]}
        self.api.patch(PODS, self.namespace, name, {"status": status}, status=True)

    # --- what they see ---

    def cycles(self) -> list[Body]:
        return self.api.list(CYCLES, self.namespace)

    def status(self, name: str | None = None, *, kind: str = CYCLES) -> Body:
        """Of the one cycle that there is, or of the named object; empty while there is none."""
        if name is None:
            found = self.api.list(kind, self.namespace)
            return (found[0].get("status") or {}) if len(found) == 1 else {}
        return (self.api.get(kind, self.namespace, name) or {}).get("status") or {}

    def wait(self, found: Callable[[], Any], *, seconds: float = 60.0) -> Any:
        return wait_for(found, seconds=seconds)

    def reached(self, state: str, name: str | None = None, *, kind: str = CYCLES, seconds: float = 60.0) -> Body:
        """The status, once its state (or outcome) is this."""
        want: set[str | None] = {None, state}

        def there() -> Body | None:
            status = self.status(name, kind=kind)
            assert status.get("outcome") in want, status
            return status if status.get("state") == state else None

        return wait_for(there, seconds=seconds, told=lambda: self.status(name, kind=kind))

    def launched(self, phase: str, launch: int = 0) -> Body:
        """The Job of a phase, once it is made."""
        want = {"emrakul.dev/phase": phase, "emrakul.dev/launch": str(launch)}
        return wait_for(
            lambda: next(
                (j for j in self.api.list(JOBS, self.namespace) if want.items() <= j["metadata"]["labels"].items()),
                None,
            )
        )

    def events(self) -> list[Body]:
        return self.api.list(EVENTS, self.namespace)

    def errors(self) -> list[str]:
        """Lines of the operator's log that nobody may see."""
        lines = self.operator.log.read_text().splitlines()
        return [line for line in lines if " ERROR " in line or line.startswith("Traceback") or "Forbidden" in line]


def condition(status: Body, kind: str) -> Body:
    return next((one for one in status.get("conditions", ()) if one["type"] == kind), {})
