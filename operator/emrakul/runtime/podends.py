"""How workers ended, and why others have not begun: read from the status of their pods, never guessed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from emrakul.api.resource import parse_time
from emrakul.runtime.pods import CONTAINER, Body
from leyline import exits

_INDEX = "batch.kubernetes.io/job-completion-index"
_STARTING = ("ContainerCreating", "PodInitializing")
"""Reasons of a wait that say nothing; if it lasts, only the pod's events do."""
_POWERS = {"k": 3, "M": 6, "G": 9, "T": 12}


@dataclass(frozen=True, kw_only=True)
class End:
    """How one worker failed."""

    at: datetime
    code: int | None
    """None where it never ran: its node refused or removed it."""
    said: str
    out_of_memory: str = ""


def ends(pods: Iterable[Body]) -> tuple[End, ...]:
    """The newest failure of each worker that has not succeeded since, oldest first.

    Disrupted pods are left out, for the Job ignores them, and so are deleted ones, which were ended by somebody else.
    """
    failed: dict[str, tuple[datetime, Body]] = {}
    succeeded = set()
    for pod in pods:
        index = _index(pod)
        match _status(pod).get("phase"):
            case "Succeeded":
                succeeded.add(index)
            case "Failed" if not _disrupted(pod) and not _deleted(pod):
                one = (_ended_at(pod), pod)
                failed[index] = max(failed.get(index, one), one, key=lambda found: found[0])
    left = [one for index, one in failed.items() if index not in succeeded]
    return tuple(_end(at, pod) for at, pod in sorted(left, key=lambda found: found[0]))


def waits(pods: Iterable[Body]) -> str:
    """Why a worker has not begun, in its own pod's words; "" if none of them says."""
    said = [text for pod in _beginning(pods) if (text := _waiting(pod) or _unscheduled(pod))]
    return said[0] if said else ""


def silent(pods: Iterable[Body]) -> Body | None:
    """A pod that has not begun and whose status does not say why."""
    return next((pod for pod in _beginning(pods) if not _waiting(pod) and not _unscheduled(pod)), None)


def _end(at: datetime, pod: Body) -> End:
    terminated = _terminated(pod)
    code = terminated.get("exitCode")
    words = str(terminated.get("message") or _status(pod).get("message") or terminated.get("reason") or "")
    said = exits.sentence(words)
    limit = _memory_limit(pod)
    memory = ""
    if terminated.get("reason") == "OOMKilled":
        memory = f"a worker was OOMKilled at its limit of {limit}"
    elif code == exits.OUT_OF_MEMORY:
        memory = f"{said} (the limit is {limit})"
    return End(at=at, code=code, said=said, out_of_memory=memory)


def _ended_at(pod: Body) -> datetime:
    return parse_time(_terminated(pod).get("finishedAt") or pod["metadata"]["creationTimestamp"])


def _beginning(pods: Iterable[Body]) -> Sequence[Body]:
    pending = [pod for pod in pods if _status(pod).get("phase", "Pending") == "Pending" and not _deleted(pod)]
    return sorted(pending, key=lambda pod: str(pod["metadata"]["name"]))


def _waiting(pod: Body) -> str:
    """ImagePullBackOff, CreateContainerConfigError and the like."""
    waiting = _state(pod).get("waiting") or {}
    reason = waiting.get("reason", "")
    return "" if not reason or reason in _STARTING else ": ".join(filter(None, (reason, waiting.get("message", ""))))


def _unscheduled(pod: Body) -> str:
    found = _condition(pod, "PodScheduled")
    return str(found.get("message") or found.get("reason", "")) if found.get("status") == "False" else ""


def _memory_limit(pod: Body) -> str:
    """In MB, like every size here; the API server writes 2000000000 as 2G."""
    container = next(one for one in pod["spec"]["containers"] if one["name"] == CONTAINER)
    quantity = str(container["resources"]["limits"]["memory"])
    power = _POWERS.get(quantity[-1], 0)
    number = quantity[:-1] if power else quantity
    return f"{int(number) * 10**power / 1e6:.0f} MB" if number.isdecimal() else quantity


def _index(pod: Body) -> str:
    return str((pod["metadata"].get("annotations") or {}).get(_INDEX, ""))


def _deleted(pod: Body) -> bool:
    return "deletionTimestamp" in pod["metadata"]


def _disrupted(pod: Body) -> bool:
    return _condition(pod, "DisruptionTarget").get("status") == "True"


def _condition(pod: Body, kind: str) -> dict[str, Any]:
    return next((one for one in _status(pod).get("conditions") or () if one["type"] == kind), {})


def _terminated(pod: Body) -> dict[str, Any]:
    return _state(pod).get("terminated") or {}


def _state(pod: Body) -> dict[str, Any]:
    statuses = _status(pod).get("containerStatuses") or ()
    return next((one.get("state") or {} for one in statuses if one["name"] == CONTAINER), {})


def _status(pod: Body) -> dict[str, Any]:
    return pod.get("status") or {}
