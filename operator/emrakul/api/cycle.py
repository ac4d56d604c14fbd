"""PruningCycle: one pass over one checkpoint. Its spec asks, its status is a view of the log."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from emrakul.api.policy import PodOverrides, Seen, StoreSpec
from emrakul.api.resource import (
    CHECKPOINT,
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
    Url,
)
from leyline.messages import Stage
from leyline.reasons import Outcome, Reason
from leyline.topology import Kind

LATEST = "latest"
"""Instead of a checkpoint's name: the pair that the run's log says is to be loaded."""

Checkpoint = Annotated[
    str, Field(pattern=rf"^(.+/checkpoints/({CHECKPOINT}/?|{LATEST})|{CHECKPOINT}|{LATEST})$", max_length=1024)
]


class PolicyRef(Model):
    """A policy of the same namespace; for the command line, another document of the same file."""

    name: Label
    """The policy's name."""


class CycleSpec(Model):
    """What is asked. Immutable but for `suspend` and `ttlSecondsAfterFinished`."""

    checkpoint: Checkpoint
    """A checkpoint's name, `latest`, or in full `<run>/checkpoints/<name or latest>`, which needs no policy."""
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
    """Pieces of analysis that have an answer."""
    total: Count = 0
    """Pieces of analysis."""


class BudgetStatus(Model):
    """What one kind in one domain was allowed, and what bound it."""

    domain: Text
    """`host`, or one seed module."""
    kind: Kind
    """What the units are."""
    requested: Number
    """Rate of the stage."""
    live: Count
    """Units that were not masked before."""
    original: Count
    """Units that the model was made with."""
    allowed: Count
    """Units that might go in this cycle."""
    eligible: Count
    """Units whose score is low enough."""
    achieved: Count
    """Units that went."""
    bound: Text
    """The constraint that bound."""


class AccuracyStatus(Model):
    """On the evaluation set, base and candidate with the same samples."""

    base: Number | None = None
    """Share that the base gets right."""
    candidate: Number | None = None
    """Share that the candidate gets right."""
    drop: Number | None = None
    """Difference of the two: 0.02 is two points."""


class MasksStatus(Model):
    """Where the masks lie; never the masks themselves."""

    uri: Uri
    """Where they lie."""
    digest: Digest
    """SHA-256 of the masks."""
    counts: Counts = {}
    """Masked units by kind, those of earlier cycles included."""


class Timings(Model):
    """Seconds of each phase, from its first start mark."""

    analysis: Number | None = None
    """Scoring, decision included."""
    apply: Number | None = None
    """Writing the candidate."""
    validation: Number | None = None
    """Checking it."""
    total: Number | None = None
    """From admission to the end."""


class Rates(Model):
    """Bytes a second, over all workers: what they read, over the time of the phase."""

    analysis: Count | None = None
    """Read for scoring."""
    apply: Count | None = None
    """Read for the candidate; about as many are written."""
    validation: Count | None = None
    """Read back of candidate and base, over the time of their comparison."""
    calculation: Count | None = None
    """Parameters that one worker scored in a second: what worker_calculation_rate could be."""


class Evidence(Model):
    """An object in the store, and the SHA-256 of its bytes."""

    uri: Uri
    """Where it lies."""
    digest: Digest
    """SHA-256 of its bytes."""


class RollbackStatus(Model):
    """The rollback that took back what this cycle had committed."""

    record: Count
    """Its record in the log."""
    id: Text
    """Its id."""
    message: Message
    """Why."""


class Frozen(Model):
    """What a policy said when the cycle was admitted; the settings are in its admit record."""

    store: StoreSpec = StoreSpec()
    """How the store is reached."""
    pod_overrides: PodOverrides | None = None
    """What worker pods get on top."""
    queue: Label | None = None
    """Of a queueing controller."""
    sink: Url | None = None
    """Where the outcome goes."""


class CycleStatus(Model):
    """What became of it: rebuilt from the log and the store whenever it is lost."""

    observed_generation: Count = 0
    """Generation of the spec that this status speaks of."""
    conditions: Annotated[tuple[Condition, ...], Field(max_length=8)] = ()
    """Admitted, Analyzed, Validated, Committed; Complete with every outcome, Failed with that one alone."""
    state: Text | None = None
    """One word for people: Waiting, Analyzing, Applying, Validating, Committing, or the outcome."""
    progress: Text | None = None
    """How far analysis is: 12/16 requests."""
    pruned: Text | None = None
    """What the cycle pruned of what its stage asked for: 10/10 channels."""
    cycle: Text | None = None
    """Its name in the run's log and in the store."""
    outcome: Outcome | None = None
    """How it ended."""
    reason: Reason | None = None
    """Why it ended so."""
    message: Message | None = None
    """One sentence, with what to do."""
    stage: Stage | None = None
    """The run's stage when the cycle was admitted."""
    run: Uri | None = None
    """The run URI."""
    checkpoint: Text | None = None
    """Name of the base."""
    base: Count | None = None
    """Record of the base pair."""
    record: Count | None = None
    """Record that ended the cycle."""
    workers: Count | None = None
    """Analysis workers."""
    requests: RequestCount | None = None
    """Pieces of analysis."""
    budgets: Annotated[tuple[BudgetStatus, ...], Field(max_length=64)] = ()
    """By domain and kind."""
    counts: Counts = {}
    """Units that this cycle pruned, by kind."""
    coverage: Number | None = None
    """Share of the weights that structured pruning can reach."""
    accuracy: AccuracyStatus | None = None
    """What the gate measured."""
    masks: MasksStatus | None = None
    """Where the masks lie."""
    decision: Evidence | None = None
    """decision.json: `emrakul explain` reads it."""
    candidate: Uri | None = None
    """Where the masked checkpoint lies."""
    rollback: RollbackStatus | None = None
    """Of a committed cycle that was taken back."""
    timings: Timings | None = None
    """Seconds of each phase."""
    rates: Rates | None = None
    """Bytes a second."""
    untrusted: bool | None = None
    """True where no trust key is set, so that nobody's signature was required."""
    images: Annotated[dict[str, Annotated[str, Field(max_length=512)]], Field(max_length=8)] = {}
    """Of the workers, as they were frozen at admission."""
    seen: Seen | None = None
    """The newest log record that this rests on."""
    frozen: Frozen | None = None
    """The policy at admission."""


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
