"""Every label, annotation and name that the operator gives to objects of the cluster. Nobody else spells one."""

from __future__ import annotations

import hashlib

from emrakul.api.resource import GROUP

MANAGED_BY = "app.kubernetes.io/managed-by"
EMRAKUL = "emrakul"
CYCLE = f"{GROUP}/cycle"
"""Name of the PruningCycle that a Job, its pods or an event belongs to."""
CYCLE_UID = f"{GROUP}/cycle-uid"
POLICY = f"{GROUP}/policy"
"""Name of the policy that made a cycle; a cycle without it is a person's."""
POLICY_UID = f"{GROUP}/policy-uid"
BASE = f"{GROUP}/base"
"""Log record of the pair that a policy made a cycle for."""
PHASE = f"{GROUP}/phase"
LAUNCH = f"{GROUP}/launch"
STEP = f"{GROUP}/step"
"""The round (analyse), the base (apply, validate) or the record (recheck) that a Job works on."""
CLASS = f"{GROUP}/operator-class"

RECONCILE = f"{GROUP}/reconcile"
"""Annotation; `disabled` makes the operator leave an object alone."""
DISABLED = "disabled"

QUEUE = "kueue.x-k8s.io/queue-name"

CYCLE_NAME = 46
"""Longest name of a cycle, so that its Jobs are named after it without being shortened."""


def short(name: str, length: int) -> str:
    """`name`, or its beginning and a digest of the whole where it is longer than `length`."""
    if len(name) <= length:
        return name
    digest = hashlib.sha256(name.encode()).hexdigest()[:6]
    return f"{name[: length - 7].rstrip('-.')}-{digest}"


def cycle_name(policy: str, cycle: str) -> str:
    """The resource that a policy makes for a cycle of its run's log: the same name however often it is asked."""
    return f"{short(policy, CYCLE_NAME - 1 - len(cycle))}-{cycle}"
