"""The pod of one worker: the same container for all, with what its role needs and what a policy puts on top."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Literal

from emrakul.api.policy import PodOverrides, StoreSpec
from emrakul.core.snapshot import Phase
from emrakul.runtime import mounts, restricted
from emrakul.runtime.config import OperatorConfig
from emrakul.runtime.overrides import layered
from emrakul.settings import Settings

CONTAINER = "worker"
"""The only container that counts: webhooks may add others."""
STOP_SECONDS = 5
"""Between SIGTERM and SIGKILL: what a worker has not written by then somebody else writes."""

Body = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Owner:
    """The resource whose children the Jobs are."""

    kind: Literal["PruningCycle", "PruningPolicy"]
    name: str
    uid: str
    namespace: str


@dataclass(frozen=True, kw_only=True)
class Terms:
    """What all Jobs of one owner have in common."""

    owner: Owner
    config: OperatorConfig
    settings: Settings
    images: Mapping[str, str]
    """Of `worker` and `validator`, as they were frozen at admission."""
    store: StoreSpec
    overrides: PodOverrides
    """The policy's, which lie over the chart's."""
    queue: str | None = None


@dataclass(frozen=True, kw_only=True)
class Role:
    """What sets one kind of worker apart from the others."""

    image: Literal["worker", "validator"]
    scores: bool = False
    """It reads importance statistics, with as many threads as the settings say."""
    signs: bool = False
    single: bool = False
    """Its libraries start no threads of their own."""


ANALYSE = Role(image="worker", scores=True, single=True)
APPLY = Role(image="worker", single=True)
VALIDATE = Role(image="validator", signs=True)
RECHECK = Role(image="validator")
ROLES = {Phase.ANALYSE: ANALYSE, Phase.APPLY: APPLY, Phase.VALIDATE: VALIDATE}


def template(
    terms: Terms, role: Role, *, arguments: tuple[str, ...], memory_bytes: int, labels: Mapping[str, str]
) -> Body:
    """The pod template of a Job; `arguments` follow the interpreter. Invalid if the overrides ask for too much."""
    extra = layered(terms.config.workers.pod_overrides, terms.overrides)
    given = mounts.store(terms.store) + mounts.keys(terms.config.keys, signs=role.signs, decrypts=role.scores)
    mounted = (mounts.TEMPORARY_FOLDER, *given.mounts)
    env = (*given.env, *([{"name": "OMP_NUM_THREADS", "value": "1"}] if role.single else []))
    ours = {variable["name"] for variable in env}
    container = {
        "name": CONTAINER,
        "image": terms.images[role.image],
        "imagePullPolicy": terms.config.images.pull_policy,
        "command": ["python"],
        "args": list(arguments),
        "env": [*env, *(variable for variable in extra.env if variable.get("name") not in ours)],
        "resources": _resources(terms, role, memory_bytes, extra),
        "volumeMounts": [*(one.mount for one in mounted), *extra.volume_mounts],
        "securityContext": restricted.CONTAINER,
        # without a file of last words the end of the log is what the pod's status keeps
        "terminationMessagePolicy": "FallbackToLogsOnError",
    }
    account = extra.service_account_name or terms.config.workers.service_account_name
    chosen = {
        "serviceAccountName": account,
        "imagePullSecrets": [secret.dump() for secret in extra.image_pull_secrets],
        "nodeSelector": extra.node_selector,
        "affinity": extra.affinity,
        "tolerations": list(extra.tolerations),
        "topologySpreadConstraints": list(extra.topology_spread_constraints),
        "priorityClassName": extra.priority_class_name,
        "runtimeClassName": extra.runtime_class_name,
    }
    who = {**restricted.POD, **(extra.security_context or {})}
    made = {
        "metadata": {"labels": {**extra.labels, **labels}, "annotations": dict(extra.annotations)},
        "spec": {
            "restartPolicy": "Never",
            "terminationGracePeriodSeconds": STOP_SECONDS,
            "automountServiceAccountToken": False,
            "enableServiceLinks": False,
            "securityContext": {key: value for key, value in who.items() if value is not None},
            "containers": [container],
            "volumes": [*(one.volume for one in mounted), *extra.volumes],
            **{key: value for key, value in chosen.items() if value},
        },
    }
    return deepcopy(made)  # whoever changes it changes no constant and no policy


def _resources(terms: Terms, role: Role, memory_bytes: int, extra: PodOverrides) -> Body:
    """Memory is a promise both ways: a worker sizes its buffers by it, and the node keeps it free. CPU is a share."""
    threads = terms.settings.importance_aggregation_threads if role.scores else 1
    asked = extra.resources or {}
    return {
        "limits": {**asked.get("limits", {}), "memory": str(memory_bytes)},
        "requests": {"cpu": str(threads), "memory": str(memory_bytes), **asked.get("requests", {})},
    }
