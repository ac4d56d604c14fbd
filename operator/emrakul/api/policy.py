"""PruningPolicy: a run, its store and its settings, for every cycle on it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema

from emrakul.api.resource import (
    CheckpointName,
    Condition,
    Count,
    Counts,
    Digest,
    Label,
    Message,
    Metadata,
    Model,
    RunUri,
    Text,
    Url,
)
from emrakul.guidance import Guidance, read_guidance
from emrakul.settings import Settings
from leyline.messages import Stage


class SecretRef(Model):
    """A Secret of the policy's own namespace."""

    name: Label
    """The Secret's name."""


class KeyRef(Model):
    """One key of a Secret of the policy's own namespace."""

    name: Label
    """The Secret's name."""
    key: Text = "ca.crt"
    """The key in it."""


class StoreSpec(Model):
    """How the run's object store is reached. On the command line credentials come from the usual AWS variables."""

    endpoint: Url | None = None
    """Of a store other than AWS, with http:// or https://."""
    region: Text | None = None
    """The store's region, such as eu-central-1."""
    credentials_secret_ref: SecretRef | None = None
    """With AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY; left out: workload identity."""
    worker_credentials_secret_ref: SecretRef | None = None
    """The same for worker pods, of a user who may not write `log/`; left out: credentialsSecretRef."""
    ca_bundle_ref: KeyRef | None = None
    """PEM certificates that the endpoint's own is checked with."""


def _target(value: Any) -> Any:
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


_TARGET = r"^(last-good|baseline|\d{1,9})$"

Target = Annotated[
    str,
    BeforeValidator(_target),
    Field(pattern=_TARGET, max_length=9),
    WithJsonSchema(
        {
            "anyOf": [{"type": "integer"}, {"type": "string", "pattern": _TARGET, "maxLength": 9}],
            "x-kubernetes-int-or-string": True,
        }
    ),
]


class RollbackSpec(Model):
    """A person's rollback, carried out once for each id."""

    id: Label
    """Any word that was not used before."""
    to: Target = "last-good"
    """`last-good`, `baseline`, or the record of a pair."""


Objects = Annotated[tuple[dict[str, Any], ...], Field(max_length=32)]
Strings = Annotated[dict[str, Text], Field(max_length=32)]


class PodOverrides(Model):
    """What worker pods get on top, in Kubernetes' own words."""

    tolerations: Objects = ()
    """As in a pod."""
    node_selector: Strings = {}
    """As in a pod."""
    affinity: dict[str, Any] | None = None
    """As in a pod."""
    topology_spread_constraints: Objects = ()
    """As in a pod."""
    labels: Strings = {}
    """Added to every pod; our own stay as they are."""
    annotations: Strings = {}
    """Added to every pod."""
    service_account_name: Label | None = None
    """As in a pod; in the cycle's namespace, with no rights in the API."""
    image_pull_secrets: Annotated[tuple[SecretRef, ...], Field(max_length=8)] = ()
    """As in a pod."""
    resources: dict[str, Any] | None = None
    """As in a container, but for the memory limit, which comes from the settings."""
    env: Objects = ()
    """As in a container."""
    volumes: Objects = ()
    """As in a pod."""
    volume_mounts: Objects = ()
    """As in a container."""
    priority_class_name: Text | None = None
    """As in a pod."""
    runtime_class_name: Text | None = None
    """As in a pod."""
    security_context: dict[str, Any] | None = None
    """Of the pod, over the restricted one. `runAsUser: null` leaves the user to the cluster; a plain `kubectl apply` of
    a change drops nulls, `kubectl apply --server-side` keeps them."""


def _guidance(value: Any) -> Any:
    return read_guidance(value, camel=True) if isinstance(value, dict) else value


class PolicySpec(Model):
    """How a run is pruned."""

    run: RunUri
    """The run's prefix: s3://bucket/prefix, or on one machine file:///folder, /folder or ./folder."""
    store: StoreSpec = StoreSpec()
    """How the object store is reached; left out: AWS, by workload identity."""
    settings: Settings = Settings()
    """How fast and how carefully it is pruned; what is left out has its default."""
    baseline: CheckpointName | None = None
    """Checkpoint that accuracy is measured against in the end and that is never deleted; left out: the first."""
    every: Annotated[int, Field(strict=True, ge=1, le=100_000)] = 1
    """Only each so-many-th checkpoint gets a cycle."""
    guidance: Annotated[Guidance, BeforeValidator(_guidance)] = Guidance()
    """Tamiyo's: caps the stage, holds, or lowers the rate."""
    rollback: RollbackSpec | None = None
    """Moves the tip back, once for each id; the run then holds ValidationOnly."""
    resume_after_rollback: Label | None = None
    """The id of the rollback whose hold ends."""
    pod_overrides: PodOverrides = PodOverrides()
    """What worker pods get on top."""
    queue: Label | None = None
    """Of a queueing controller: Jobs are created suspended with its label."""
    sink: Url | None = None
    """Where outcomes go as CloudEvents, with http:// or https://."""
    history_limit: Annotated[int, Field(strict=True, ge=0, le=1000)] = 20
    """Finished cycles of this policy that stay as resources."""
    ttl_seconds_after_finished: Annotated[int, Field(strict=True, ge=0, le=2**31)] = 7 * 86400
    """How long the policy's finished cycles stay as resources: seven days."""
    operator_class: Label | None = None
    """Which operator takes it, where there are several."""


class Seen(Model):
    """The newest log record that was read: a log that is shorter or other than this was put back, and is not used."""

    record: Count
    """The record's number."""
    digest: Digest
    """SHA-256 of the record."""


class TipStatus(Model):
    """The pair that a trainer loads."""

    record: Count
    """Its record in the log."""
    checkpoint: Text
    """Its name."""
    step: Count
    """Its training step."""
    counts: Counts = {}
    """Masked units by kind."""


class RolledBackStatus(Model):
    """What became of the policy's rollback."""

    id: Text
    """As the policy asked for it."""
    record: Count | None = None
    """Its record in the log, once it is done."""
    message: Message = ""
    """What became of it."""


class PolicyStatus(Model):
    """Where the run stands: a view of its log, rebuilt whenever it is lost."""

    observed_generation: Count = 0
    """Generation of the spec that this status speaks of."""
    conditions: Annotated[tuple[Condition, ...], Field(max_length=4)] = ()
    """Ready: the run is followed."""
    message: Message | None = None
    """One sentence, with what to do."""
    stage: Stage | None = None
    """Where the schedule stands."""
    streak: Count | None = None
    """Committed cycles in a row that count for promotion."""
    breaker: Text | None = None
    """closed, open or half-open."""
    hold: Text | None = None
    """The rollback that holds the run at ValidationOnly: write its id to resumeAfterRollback."""
    live: Text | None = None
    """The cycle that runs, by its name in the log."""
    tip: TipStatus | None = None
    """What a trainer loads."""
    rollback: RolledBackStatus | None = None
    """The newest that the policy asked for."""
    recovery: Text | None = None
    """What recovery validation found after the newest rollback: passed, failed or pending."""
    cycles: Annotated[dict[str, Count], Field(max_length=64)] = {}
    """Ended cycles of the run by outcome/reason."""
    seen: Seen | None = None
    """The newest log record that this rests on."""
    untrusted: bool | None = None
    """True where no trust key is set, so that nobody's signature was required."""


class PruningPolicy(Model):
    """A run, its store and its settings."""

    api_version: Literal["emrakul.dev/v1alpha1"] = "emrakul.dev/v1alpha1"
    kind: Literal["PruningPolicy"] = "PruningPolicy"
    metadata: Metadata
    spec: PolicySpec
    status: PolicyStatus = PolicyStatus()
