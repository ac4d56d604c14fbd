"""Events of a cycle: one for each condition that flipped, named after it, so that a restart posts none twice. Pure."""

from __future__ import annotations

import hashlib

from emrakul.api import labels
from emrakul.api.cycle import CycleStatus
from emrakul.api.resource import API_VERSION, Condition, ConditionType
from emrakul.cluster.kube import Body
from leyline.reasons import Outcome

MESSAGE = 1024
_FINE = (Outcome.COMMITTED, Outcome.VALIDATED_ONLY, Outcome.NOTHING_TO_PRUNE)


def events(body: Body, before: CycleStatus, after: CycleStatus) -> tuple[Body, ...]:
    """What is worth telling of a status that was just written, oldest first."""
    was = {condition.type: condition.status for condition in before.conditions}
    flipped = [c for c in after.conditions if was.get(c.type) != c.status and _tells(c)]
    return tuple(_event(body, condition, after) for condition in flipped)


def _tells(condition: Condition) -> bool:
    if condition.type is ConditionType.COMPLETE:
        return True
    return condition.status == "True" and condition.type in (
        ConditionType.ADMITTED,
        ConditionType.ANALYZED,
        ConditionType.VALIDATED,
    )


def _event(body: Body, condition: Condition, status: CycleStatus) -> Body:
    meta = body["metadata"]
    complete = condition.type is ConditionType.COMPLETE
    reason = status.reason.value if complete and status.reason else condition.reason
    message = f"{condition.reason}: {condition.message}" if complete else condition.message
    digest = hashlib.sha256(f"{meta['uid']}/{condition.type}/{condition.status}".encode()).hexdigest()[:10]
    time = condition.last_transition_time
    return {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {
            "name": f"{meta['name']}.{digest}",
            "namespace": meta["namespace"],
            "labels": {labels.MANAGED_BY: labels.EMRAKUL},
        },
        "involvedObject": {
            "apiVersion": API_VERSION,
            "kind": "PruningCycle",
            "name": meta["name"],
            "namespace": meta["namespace"],
            "uid": meta["uid"],
        },
        "type": "Normal" if not complete or status.outcome in _FINE else "Warning",
        "reason": reason,
        "message": (message or condition.type.value)[:MESSAGE],
        "firstTimestamp": time,
        "lastTimestamp": time,
        "count": 1,
        "source": {"component": "emrakul-operator"},
        "reportingComponent": "emrakul-operator",
        "reportingInstance": "emrakul-operator",
    }
