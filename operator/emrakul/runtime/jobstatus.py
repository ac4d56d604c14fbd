"""A Job as the core sees it, from the Job, and where it does not say enough from its pods and from events."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from emrakul.api import labels
from emrakul.api.resource import parse_time
from emrakul.core.snapshot import Job, Phase
from emrakul.runtime import podends
from emrakul.runtime.pods import Body
from leyline import exits


def job_of(job: Body, pods: Sequence[Body] = (), events: Sequence[Body] = ()) -> Job:
    """What is known of one launch. `pods` and `events` are those that `needs_pods` and `events_from` ask for."""
    marks = job["metadata"]["labels"]
    ended = podends.ends(pods)
    running = terminal(job) is None
    return Job(
        phase=Phase(marks[labels.PHASE]),
        launch=int(marks[labels.LAUNCH]),
        step=int(marks[labels.STEP]),
        created=_since(job),
        running=running,
        suspended=_suspended(job),
        queued=labels.QUEUE in marks,
        exits=() if running else tuple(end.code for end in ended if end.code is not None),
        out_of_memory=next((end.out_of_memory for end in reversed(ended) if end.out_of_memory), ""),
        message=_message(job, pods, events, ended),
    )


def terminal(job: Body) -> dict[str, Any] | None:
    """Complete or Failed. Until then pods of it may still run, whatever else its conditions announce."""
    return _is_true(job, "Complete", "Failed")


def needs_pods(job: Body) -> bool:
    """Whether the Job's pods know more than the Job: some failed, or some are not ready."""
    status = _status(job)
    pending = status.get("active", 0) > status.get("ready", 0)
    return bool(status.get("failed")) or (_works(job) and pending)


def events_from(job: Body, pods: Sequence[Body]) -> str | None:
    """UID of the object whose events say why no worker has begun; None if that is known, or one has.

    Quotas and admission policies refuse pods, which only the Job's events tell. A Secret that is missing keeps a pod
    from starting, which only the pod's events tell.
    """
    status = _status(job)
    if not _works(job) or any(status.get(name) for name in ("ready", "succeeded", "failed")):
        return None
    if not pods:
        return str(job["metadata"]["uid"])
    silent = podends.silent(pods)
    return str(silent["metadata"]["uid"]) if silent else None


def _message(job: Body, pods: Sequence[Body], events: Sequence[Body], ended: Sequence[podends.End]) -> str:
    if _suspended(job):
        queue = job["metadata"]["labels"].get(labels.QUEUE)
        return f"suspended by queue {queue}" if queue else "suspended"
    # what bad input or a lacking key says explains the end of all; otherwise who failed last
    final = [end for end in ended if end.code in (exits.BAD_INPUT, exits.KEY)]
    if ended and (said := (final or ended)[-1].said):
        return said
    if (end := terminal(job)) is not None:
        return str(end.get("message", "")) if end["type"] == "Failed" else ""
    return podends.waits(pods) or _newest_warning(events)


def _newest_warning(events: Sequence[Body]) -> str:
    warnings = [event for event in events if event.get("type") == "Warning"]
    return str(max(warnings, key=_happened).get("message", "")) if warnings else ""


def _happened(event: Body) -> datetime:
    """A series counts its last; other writers fill other fields."""
    series = event.get("series") or {}
    text = series.get("lastObservedTime") or event.get("lastTimestamp") or event.get("eventTime")
    return parse_time(text or event["metadata"]["creationTimestamp"])


def _since(job: Body) -> datetime:
    """Since when it may start workers: a queue that lets it go, or lets it go again, sets its start time anew."""
    return parse_time(_status(job).get("startTime") or job["metadata"]["creationTimestamp"])


def _suspended(job: Body) -> bool:
    """Until the Job controller has seen that it is let go: its start time is an old one, or none, before that."""
    held = job["spec"].get("suspend") or _is_true(job, "Suspended")
    return bool(held) and terminal(job) is None


def _works(job: Body) -> bool:
    return terminal(job) is None and not _suspended(job)


def _is_true(job: Body, *kinds: str) -> dict[str, Any] | None:
    found = _status(job).get("conditions") or ()
    return next((one for one in found if one["type"] in kinds and one["status"] == "True"), None)


def _status(job: Body) -> dict[str, Any]:
    return job.get("status") or {}
