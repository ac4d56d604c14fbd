"""Which resources of ended cycles go, and when. Pure; their records in the log stay for good."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime, timedelta
from typing import Any

from emrakul.api import labels
from emrakul.api.cycle import CycleStatus
from emrakul.api.resource import ConditionType, parse_time


def seconds_left(status: CycleStatus, ttl: int | None, now: datetime) -> float | None:
    """Until the resource goes; 0 or less: now. None: never by its age."""
    ended = next((c for c in status.conditions if c.type is ConditionType.COMPLETE and c.status == "True"), None)
    if ended is None or ttl is None:
        return None
    return (parse_time(ended.last_transition_time) + timedelta(seconds=ttl) - now).total_seconds()


def beyond(cycles: Iterable[dict[str, Any]], limit: int) -> tuple[dict[str, Any], ...]:
    """Of a policy's resources, the ended ones beyond the newest `limit`, oldest first.

    The newest stays if the log has no record of it, whatever the limit: its policy would make it again.
    """
    oldest_first = sorted(cycles, key=base_of)
    ended = [body for body in oldest_first if (body.get("status") or {}).get("outcome")]
    found = ended[: max(0, len(ended) - limit)]
    return tuple(body for body in found if "cycle" in body["status"] or body is not oldest_first[-1])


def base_of(body: dict[str, Any]) -> int:
    """The record of the pair that a policy made the cycle for; -1 for a person's."""
    text = (body["metadata"].get("labels") or {}).get(labels.BASE, "")
    return int(text) if text.isdecimal() else -1
