"""PruningCycle: one pass over one checkpoint. Its spec asks, its status is a view of the log."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from emrakul.api.resource import (
    Condition,
    Count,
    Counts,
    Digest,
    Label,
    Message,
    Metadata,
    Model,
    Number,
    Text,
    Uri,
)
from leyline.messages import Stage
from leyline.reasons import Outcome, Reason
from leyline.topology import Kind

LATEST = "latest"
"""Instead of a checkpoint's name: the pair that the run's log says is to be loaded."""

_NAME = r"\d{1,12}-\d{1,9}-[0-9a-f]{8}"


class PolicyRef(Model):
    """A policy of the same namespace; for the command line, another document of the same file."""

    name: Label


class CycleSpec(Model):
    """What is asked. Immutable but for `suspend` and `ttlSecondsAfterFinished`."""

    checkpoint: Annotated[str, Field(pattern=rf"^(.+/checkpoints/{_NAME}/?|{_NAME}|{LATEST})$", max_length=1024)]
    """A checkpoint's name, `latest`, or in full `<run>/checkpoints/<name>`, which needs no policy."""
    policy_ref: PolicyRef | None = None
    """The policy with run, store and settings."""
    suspend: Annotated[bool, Field(strict=True)] = False
    """True stops the cycle's workers; false goes on with them."""
    ttl_seconds_after_finished: Annotated[int, Field(strict=True, ge=0, le=2**31)] | None = None
    """How long the resource stays after the end; its record in the log stays for good."""
    operator_class: Label | None = None
    """Which operator takes it, where there are several."""

    @property
    def run(self) -> str | None:
        """The run URI, if `checkpoint` is written in full."""
        return self.checkpoint.partition("/checkpoints/")[0] if "/checkpoints/" in self.checkpoint else None

    @property
    def checkpoint_name(self) -> str | None:
        """The checkpoint's name; None for the latest."""
        name = self.checkpoint.rstrip("/").rpartition("/")[2]
        return None if name == LATEST else name


class RequestCount(Model):
    answered: Count = 0
    total: Count = 0


class BudgetStatus(Model):
    """What one kind in one domain was allowed, and what bound it."""

    domain: Text
    kind: Kind
    requested: Number
    """Rate of the stage."""
    live: Count
    original: Count
    allowed: Count
    eligible: Count
    achieved: Count
    bound: Text
    """The constraint that bound."""


class AccuracyStatus(Model):
    """On the evaluation set, base and candidate with the same samples."""

    base: Number | None = None
    candidate: Number | None = None
    drop: Number | None = None


class MasksStatus(Model):
    """Where the masks lie; never the masks themselves."""

    uri: Uri
    digest: Digest
    counts: Counts = {}
    """Masked units by kind, those of earlier cycles included."""


class Timings(Model):
    """Seconds of each phase, from its first start mark."""

    analysis: Number | None = None
    apply: Number | None = None
    validation: Number | None = None
    total: Number | None = None


class Rates(Model):
    """Bytes a second, over all workers."""

    analysis: Count | None = None
    apply: Count | None = None


class CycleStatus(Model):
    """What became of it: rebuilt from the log and the store whenever it is lost."""

    observed_generation: Count = 0
    conditions: Annotated[tuple[Condition, ...], Field(max_length=8)] = ()
    state: Text | None = None
    """One word for people: Waiting, Analyzing, Applying, Validating, Committing, or the outcome."""
    outcome: Outcome | None = None
    reason: Reason | None = None
    message: Message | None = None
    stage: Stage | None = None
    run: Uri | None = None
    checkpoint: Text | None = None
    base: Count | None = None
    """Record of the base pair."""
    record: Count | None = None
    """Record that ended the cycle."""
    workers: Count | None = None
    requests: RequestCount | None = None
    budgets: Annotated[tuple[BudgetStatus, ...], Field(max_length=64)] = ()
    counts: Counts = {}
    """Units that this cycle pruned, by kind."""
    accuracy: AccuracyStatus | None = None
    masks: MasksStatus | None = None
    candidate: Uri | None = None
    timings: Timings | None = None
    rates: Rates | None = None
    untrusted: bool | None = None
    """True where no trust key is set, so that nobody's signature was required."""


class PruningCycle(Model):
    """One pass over one checkpoint."""

    api_version: Literal["emrakul.dev/v1alpha1"] = "emrakul.dev/v1alpha1"
    kind: Literal["PruningCycle"] = "PruningCycle"
    metadata: Metadata
    spec: CycleSpec
    status: CycleStatus = CycleStatus()

    @model_validator(mode="after")
    def _room_for_children(self) -> PruningCycle:
        if len(self.metadata.name) > 46:
            raise ValueError(
                f"metadata.name has {len(self.metadata.name)} characters; a cycle's may have 46, so that its jobs and "
                "pods can be named after it"
            )
        return self
