"""The Job of one launch: a pure function of what is launched, so that a restarted operator builds the same one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from emrakul.api import labels
from emrakul.api.resource import API_VERSION
from emrakul.core.snapshot import Phase
from emrakul.runtime import commands
from emrakul.runtime.overrides import INDEX
from emrakul.runtime.pods import CONTAINER, RECHECK, ROLES, Body, Owner, Role, Terms, template
from leyline import exits

RETRIES = 2
"""Times that a worker which died without saying why is started again."""
BACKSTOP_SECONDS = 60
"""On top of all limits: then the Job controller ends what an operator should have ended."""
RECHECK_PHASE = "recheck"
"""In the phase label of a recovery validation, which is no phase of a cycle."""

_LETTER = {Phase.ANALYSE: "a", Phase.APPLY: "w", Phase.VALIDATE: "v"}
_NAME = 63 - len("-99999")
"""Longest name of a Job: with its index it is the host name of a pod."""


def job(terms: Terms, phase: Phase, *, cycle_uri: str, launch: int, step: int, workers: int, memory_bytes: int) -> Body:
    """The Job of a cycle's phase. Workers of analysis and apply are told apart by index, even a single one."""
    indexed = phase is not Phase.VALIDATE
    settings = terms.settings
    return _job(
        terms,
        ROLES[phase],
        suffix=f"{_LETTER[phase]}{step}-{launch}",
        arguments=commands.command(
            phase, cycle_uri=cycle_uri, step=step, launch=launch, worker=f"$({INDEX})", of=workers
        ),
        limit=settings.checkpoint_analysis_timeout if indexed else settings.validation_timeout,
        memory_bytes=memory_bytes,
        marks={labels.PHASE: phase.value, labels.STEP: str(step), labels.LAUNCH: str(launch)},
        workers=workers if indexed else None,
    )


def recheck(terms: Terms, *, run_uri: str, record: int, attempt: int) -> Body:
    """The Job that says whether the pair of a record is sound, for a policy after a rollback."""
    return _job(
        terms,
        RECHECK,
        suffix=f"r{record}-{attempt}",
        arguments=commands.recheck(run_uri=run_uri, record=record),
        limit=terms.settings.validation_timeout,
        memory_bytes=terms.settings.validation_memory_limit,
        marks={labels.PHASE: RECHECK_PHASE, labels.STEP: str(record), labels.LAUNCH: str(attempt)},
        workers=None,
    )


def _job(
    terms: Terms,
    role: Role,
    *,
    suffix: str,
    arguments: tuple[str, ...],
    limit: int,
    memory_bytes: int,
    marks: Mapping[str, str],
    workers: int | None,
) -> Body:
    owner = terms.owner
    common = {**_of(owner), labels.MANAGED_BY: labels.EMRAKUL, labels.CLASS: terms.config.operator_class, **marks}
    queue = {labels.QUEUE: terms.queue} if terms.queue else {}
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {
            "name": f"{labels.short(owner.name, _NAME - 1 - len(suffix))}-{suffix}",
            "namespace": owner.namespace,
            "labels": {**common, **queue},
            "ownerReferences": [
                {
                    "apiVersion": API_VERSION,
                    "kind": owner.kind,
                    "name": owner.name,
                    "uid": owner.uid,
                    "controller": True,
                    # true would need the right to set the owner's finalizers
                    "blockOwnerDeletion": False,
                }
            ],
        },
        "spec": {
            # the queue's controller lets it go; nobody here ever touches the field again
            **({"suspend": True} if queue else {}),
            "activeDeadlineSeconds": terms.settings.startup_timeout + limit + BACKSTOP_SECONDS,
            "podReplacementPolicy": "Failed",
            "podFailurePolicy": {"rules": _rules(indexed=workers is not None)},
            **(_indexed(workers) if workers is not None else {"backoffLimit": RETRIES}),
            "template": template(terms, role, arguments=arguments, memory_bytes=memory_bytes, labels=common),
        },
    }


def _of(owner: Owner) -> dict[str, str]:
    if owner.kind == "PruningCycle":
        return {labels.CYCLE: owner.name, labels.CYCLE_UID: owner.uid}
    return {labels.POLICY: owner.name, labels.POLICY_UID: owner.uid}


def _indexed(workers: int) -> dict[str, Any]:
    return {
        "completionMode": "Indexed",
        "completions": workers,
        "parallelism": workers,
        "backoffLimitPerIndex": RETRIES,
    }


def _rules(*, indexed: bool) -> list[dict[str, Any]]:
    """What becomes of a failed pod: the first rule that fits decides. What none fits counts as one failure."""
    rules: list[dict[str, Any]] = [
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
        {"action": "FailJob", "onExitCodes": _codes(exits.BAD_INPUT, exits.KEY)},
    ]
    if indexed:
        rules.append({"action": "FailIndex", "onExitCodes": _codes(exits.GAVE_UP)})
    return rules


def _codes(*values: int) -> dict[str, Any]:
    return {"containerName": CONTAINER, "operator": "In", "values": sorted(values)}
