"""PruningPolicy: a run, its store and its settings, for every cycle on it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from emrakul.api.resource import Label, Metadata, Model, RunUri, Text
from emrakul.guidance import Guidance, read_guidance
from emrakul.settings import Settings


class SecretRef(Model):
    """A Secret of the policy's own namespace."""

    name: Label


class KeyRef(Model):
    """One key of a Secret of the policy's own namespace."""

    name: Label
    key: Text = "ca.crt"


class StoreSpec(Model):
    """How the run's object store is reached. On the command line credentials come from the usual AWS variables."""

    endpoint: Annotated[str, Field(pattern=r"^https?://", max_length=512)] | None = None
    """Of a store other than AWS, with http:// or https://."""
    region: Text | None = None
    credentials_secret_ref: SecretRef | None = None
    """With AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY; left out: workload identity."""
    ca_bundle_ref: KeyRef | None = None


def _target(value: Any) -> Any:
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


class RollbackSpec(Model):
    """A person's rollback, carried out once for each id."""

    id: Label
    to: Annotated[
        str,
        BeforeValidator(_target),
        Field(pattern=r"^(last-good|baseline|\d{1,9})$", max_length=9),
    ] = "last-good"
    """`last-good`, `baseline`, or the record of a pair."""


Objects = Annotated[tuple[dict[str, Any], ...], Field(max_length=32)]
Strings = Annotated[dict[str, Text], Field(max_length=32)]


class PodOverrides(Model):
    """What worker pods get on top, in Kubernetes' own words."""

    tolerations: Objects = ()
    node_selector: Strings = {}
    affinity: dict[str, Any] | None = None
    topology_spread_constraints: Objects = ()
    labels: Strings = {}
    annotations: Strings = {}
    service_account_name: Label | None = None
    image_pull_secrets: Annotated[tuple[SecretRef, ...], Field(max_length=8)] = ()
    resources: dict[str, Any] | None = None
    env: Objects = ()
    volumes: Objects = ()
    volume_mounts: Objects = ()
    priority_class_name: Text | None = None
    runtime_class_name: Text | None = None
    security_context: dict[str, Any] | None = None


def _guidance(value: Any) -> Any:
    return read_guidance(value, camel=True) if isinstance(value, dict) else value


class PolicySpec(Model):
    """How a run is pruned."""

    run: RunUri
    """The run's prefix: s3://bucket/prefix, or on one machine file:///folder, /folder or ./folder."""
    store: StoreSpec = StoreSpec()
    settings: Settings = Settings()
    baseline: Annotated[str, Field(pattern=r"^\d{1,12}-\d{1,9}-[0-9a-f]{8}$")] | None = None
    """Checkpoint that accuracy is measured against in the end and that is never deleted; left out: the first."""
    every: Annotated[int, Field(strict=True, ge=1, le=100_000)] = 1
    """Only each so-many-th checkpoint gets a cycle."""
    guidance: Annotated[Guidance, BeforeValidator(_guidance)] = Guidance()
    """Tamiyo's: caps the stage, holds, or lowers the rate."""
    rollback: RollbackSpec | None = None
    resume_after_rollback: Label | None = None
    """The id of the rollback whose hold ends."""
    pod_overrides: PodOverrides = PodOverrides()
    queue: Label | None = None
    """Of a queueing controller: Jobs are created suspended with its label."""
    sink: Annotated[str, Field(pattern=r"^https?://", max_length=1024)] | None = None
    """Where outcomes go as CloudEvents, with http:// or https://."""
    history_limit: Annotated[int, Field(strict=True, ge=0, le=1000)] = 20
    """Finished cycles of this policy that stay as resources."""
    ttl_seconds_after_finished: Annotated[int, Field(strict=True, ge=0, le=2**31)] = 7 * 86400
    operator_class: Label | None = None


class PruningPolicy(Model):
    """A run, its store and its settings."""

    api_version: Literal["emrakul.dev/v1alpha1"] = "emrakul.dev/v1alpha1"
    kind: Literal["PruningPolicy"] = "PruningPolicy"
    metadata: Metadata
    spec: PolicySpec
