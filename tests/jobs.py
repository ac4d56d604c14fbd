"""Jobs, their pods and events as an API server would show them, for tests of what reads and builds them."""

from __future__ import annotations

from typing import Any

from emrakul.api.policy import PodOverrides, StoreSpec
from emrakul.core.snapshot import Phase
from emrakul.runtime import jobs
from emrakul.runtime.config import OperatorConfig
from emrakul.runtime.pods import Owner, Terms
from emrakul.settings import Settings

Body = dict[str, Any]

CYCLE_URI = "s3://bucket/run/cycles/c2-0123456789"
IMAGES = {"worker": "example.org/emrakul-worker@sha256:aa", "validator": "example.org/emrakul-validator@sha256:bb"}
UID = "6f1c0f5e-0000-4000-8000-000000000001"


def overrides(**values: Any) -> PodOverrides:
    """In the words of a resource."""
    return PodOverrides.model_validate(values, by_alias=True, by_name=False)


def config(**values: Any) -> OperatorConfig:
    return OperatorConfig.model_validate({"images": IMAGES, **values}, by_alias=True, by_name=False)


def owner(name: str = "digits", **values: Any) -> Owner:
    return Owner(**{"kind": "PruningCycle", "name": name, "uid": UID, "namespace": "team", **values})


def terms(**values: Any) -> Terms:
    usual: dict[str, Any] = {
        "owner": owner(),
        "config": config(),
        "settings": Settings(),
        "images": IMAGES,
        "store": StoreSpec(),
        "overrides": PodOverrides(),
    }
    return Terms(**{**usual, **values})


def job(phase: Phase = Phase.ANALYSE, *, step: int = 0, launch: int = 0, workers: int = 4, **values: Any) -> Body:
    memory = 4_000_000_000 if phase is Phase.VALIDATE else 2_000_000_000
    return jobs.job(
        terms(**values), phase, cycle_uri=CYCLE_URI, launch=launch, step=step, workers=workers, memory_bytes=memory
    )


def recheck(**values: Any) -> Body:
    policy = owner(kind="PruningPolicy", name="digits-policy")
    return jobs.recheck(terms(**{"owner": policy, **values}), run_uri="s3://bucket/run", record=7, attempt=0)


def pod_of(made: Body) -> Body:
    spec: Body = made["spec"]["template"]["spec"]
    return spec


def container_of(made: Body) -> Body:
    (container,) = pod_of(made)["containers"]
    assert isinstance(container, dict)
    return container


def seen(made: Body, *, created: str = "2026-01-01T12:00:00Z", suspend: bool | None = None, **status: Any) -> Body:
    """A Job after the API server and the Job controller."""
    spec = {**made["spec"], **({} if suspend is None else {"suspend": suspend})}
    metadata = {**made["metadata"], "uid": "job-uid", "creationTimestamp": created}
    return {**made, "metadata": metadata, "spec": spec, "status": status}


def ended(kind: str = "Failed", message: str = "", **values: Any) -> list[Body]:
    """Conditions of a Job that has ended."""
    return [{"type": kind, "status": "True", "message": message, **values}]


def pod(phase: str, *, index: int | None = 0, name: str = "pod", memory: str = "2G", **values: Any) -> Body:
    """A pod; `state` is its container's, other values go into its status."""
    state = values.pop("state", None)
    metadata: Body = {"name": name, "uid": f"{name}-uid", "creationTimestamp": "2026-01-01T12:00:00Z"}
    if index is not None:
        metadata["annotations"] = {"batch.kubernetes.io/job-completion-index": str(index)}
    if values.pop("deleted", False):
        metadata["deletionTimestamp"] = "2026-01-01T12:05:00Z"
    statuses = {"containerStatuses": [{"name": "worker", "state": state}]} if state else {}
    container = {"name": "worker", "resources": {"limits": {"memory": memory}}}
    return {"metadata": metadata, "spec": {"containers": [container]}, "status": {"phase": phase, **statuses, **values}}


def failed(code: int, said: str = "", *, second: int = 0, reason: str = "Error", **values: Any) -> Body:
    """A pod whose container ended with an exit code, so many seconds after noon."""
    terminated = {"exitCode": code, "reason": reason, "message": said, "finishedAt": f"2026-01-01T12:00:{second:02}Z"}
    return pod("Failed", state={"terminated": terminated}, **values)


def waiting(reason: str, message: str = "", **values: Any) -> Body:
    return pod("Pending", state={"waiting": {"reason": reason, **({"message": message} if message else {})}}, **values)


def warning(message: str, *, second: int = 0, reason: str = "FailedCreate", **values: Any) -> Body:
    metadata = {"creationTimestamp": "2026-01-01T12:00:00Z"}
    times = {"lastTimestamp": f"2026-01-01T12:00:{second:02}Z"}
    return {"type": "Warning", "reason": reason, "message": message, "metadata": metadata, **times, **values}
