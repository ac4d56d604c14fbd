"""Every way a cycle can end, in one place: outcome, reason, and the sentence that says what to do.

Conditions, events, metrics, the log and the docs use these and no others.
"""

from __future__ import annotations

from enum import StrEnum


class Outcome(StrEnum):
    """Terminal outcomes of a cycle. None of them harms the training."""

    COMMITTED = "Committed"
    VALIDATED_ONLY = "ValidatedOnly"
    NOTHING_TO_PRUNE = "NothingToPrune"
    SKIPPED = "Skipped"
    ROLLED_BACK = "RolledBack"
    FAILED = "Failed"


class Reason(StrEnum):
    """Why. The comment of each group is the outcome it belongs to."""

    # Committed
    PRUNED = "Pruned"
    # ValidatedOnly
    STAGE = "ValidationOnlyStage"
    FEATURE_DISABLED = "CheckpointPruningDisabled"
    VALIDATION_DISABLED = "SafetyValidationDisabled"
    HELD = "HeldAfterRollback"
    NO_EVALUATION = "NoEvaluation"
    BREAKER_PROBE = "BreakerHalfOpen"
    # NothingToPrune
    BELOW_ONE_UNIT = "BelowOneUnit"
    MARGIN = "NoUnitBelowMargin"
    RETENTION_REACHED = "RetentionReached"
    # Skipped
    ANALYSIS_TIMEOUT = "AnalysisTimeout"
    APPLY_TIMEOUT = "ApplyTimeout"
    VALIDATION_TIMEOUT = "ValidationTimeout"
    NOT_SCHEDULED = "NotScheduled"
    OUT_OF_MEMORY = "OutOfMemory"
    WORKERS_FAILED = "WorkersFailed"
    TOO_FEW_SAMPLES = "TooFewSamples"
    UNRELIABLE = "UnreliableImportance"
    NO_IMPORTANCE = "NoImportance"
    IMPORTANCE_CORRUPT = "ImportanceCorrupt"
    IMPORTANCE_FOREIGN = "ImportanceForeign"
    IMPORTANCE_STALE = "ImportanceStale"
    WRONG_KEY = "WrongDataKey"
    BREAKER_OPEN = "BreakerOpen"
    PROVISIONAL = "ProvisionalBase"
    SUPERSEDED = "Superseded"
    TOO_FREQUENT = "CheckpointsTooFrequent"
    ABANDONED = "Abandoned"
    DELETED = "Deleted"
    STORE_UNREACHABLE = "StoreUnreachable"
    ROLLED_BACK_MEANWHILE = "RunRolledBack"
    # RolledBack: the candidate was refused
    ACCURACY_DROP = "AccuracyDrop"
    CUMULATIVE_DROP = "CumulativeAccuracyDrop"
    INCONCLUSIVE = "GateInconclusive"
    PROOF_FAILED = "DeadUnitProofFailed"
    STRUCTURE = "StructureChanged"
    CONSTRAINT = "ConstraintBroken"
    # RolledBack: the run itself went back
    ASKED = "RollbackRequested"
    PROBATION = "WorseAfterPruning"
    # Failed
    INVALID_INPUT = "InvalidInput"
    UNTRUSTED = "Untrusted"
    RUN_NOT_ALLOWED = "RunNotAllowed"


OUTCOME_OF: dict[Reason, Outcome] = {
    Reason.PRUNED: Outcome.COMMITTED,
    **dict.fromkeys(
        (
            Reason.STAGE,
            Reason.FEATURE_DISABLED,
            Reason.VALIDATION_DISABLED,
            Reason.HELD,
            Reason.NO_EVALUATION,
            Reason.BREAKER_PROBE,
        ),
        Outcome.VALIDATED_ONLY,
    ),
    **dict.fromkeys((Reason.BELOW_ONE_UNIT, Reason.MARGIN, Reason.RETENTION_REACHED), Outcome.NOTHING_TO_PRUNE),
    **dict.fromkeys(
        (
            Reason.ANALYSIS_TIMEOUT,
            Reason.APPLY_TIMEOUT,
            Reason.VALIDATION_TIMEOUT,
            Reason.NOT_SCHEDULED,
            Reason.OUT_OF_MEMORY,
            Reason.WORKERS_FAILED,
            Reason.TOO_FEW_SAMPLES,
            Reason.UNRELIABLE,
            Reason.NO_IMPORTANCE,
            Reason.IMPORTANCE_CORRUPT,
            Reason.IMPORTANCE_FOREIGN,
            Reason.IMPORTANCE_STALE,
            Reason.WRONG_KEY,
            Reason.BREAKER_OPEN,
            Reason.PROVISIONAL,
            Reason.SUPERSEDED,
            Reason.TOO_FREQUENT,
            Reason.ABANDONED,
            Reason.DELETED,
            Reason.STORE_UNREACHABLE,
            Reason.ROLLED_BACK_MEANWHILE,
        ),
        Outcome.SKIPPED,
    ),
    **dict.fromkeys(
        (
            Reason.ACCURACY_DROP,
            Reason.CUMULATIVE_DROP,
            Reason.INCONCLUSIVE,
            Reason.PROOF_FAILED,
            Reason.STRUCTURE,
            Reason.CONSTRAINT,
            Reason.ASKED,
            Reason.PROBATION,
        ),
        Outcome.ROLLED_BACK,
    ),
    **dict.fromkeys((Reason.INVALID_INPUT, Reason.UNTRUSTED, Reason.RUN_NOT_ALLOWED), Outcome.FAILED),
}

REMEDY: dict[Reason, str] = {
    Reason.PRUNED: "The trainer applies the masks at its next checkpoint boundary.",
    Reason.STAGE: "Nothing to do: masks enter the log once the schedule leaves its validation-only phase.",
    Reason.FEATURE_DISABLED: "Set enable_checkpoint_pruning: true to let cycles commit.",
    Reason.VALIDATION_DISABLED: "Set enable_safety_validation: true; nothing is committed without a verdict.",
    Reason.HELD: "Resume the run (emrakul resume RUN) once the cause of the rollback is settled.",
    Reason.NO_EVALUATION: "Publish an evaluation set with the checkpoint, so that accuracy can be measured.",
    Reason.BREAKER_PROBE: "Nothing to do: this cycle tested whether pruning works again; the next may commit.",
    Reason.BELOW_ONE_UNIT: "Nothing to do: the fraction of a unit is carried to the next cycle.",
    Reason.MARGIN: "Every unit is too important; lower safety_margin only if the report shows redundant units.",
    Reason.RETENTION_REACHED: "Every group is at its floor; this model is as pruned as the constraints allow.",
    Reason.ANALYSIS_TIMEOUT: "Raise checkpoint_analysis_timeout or analysis_parallel_workers.",
    Reason.APPLY_TIMEOUT: "Raise checkpoint_analysis_timeout or look at the store's speed.",
    Reason.VALIDATION_TIMEOUT: "Raise validation_timeout or shrink the evaluation set.",
    Reason.NOT_SCHEDULED: "Make room for the worker pods, or raise startup_timeout.",
    Reason.OUT_OF_MEMORY: "Raise analysis_memory_limit; for the validator, validation_memory_limit.",
    Reason.WORKERS_FAILED: "Workers died again and again: look at their last words, at memory and at the machine.",
    Reason.TOO_FEW_SAMPLES: "Train longer between checkpoints, publish(refresh=N), or lower min_importance_samples.",
    Reason.UNRELIABLE: "Use publish(refresh=1000): the two halves of the statistics disagree.",
    Reason.NO_IMPORTANCE: "Publish with an ImportanceTracker, or set importance: [magnitude].",
    Reason.IMPORTANCE_CORRUPT: "Publish a new checkpoint; the statistics of this one cannot be read.",
    Reason.IMPORTANCE_FOREIGN: "Publish with the tracker of this run; the statistics belong to other weights.",
    Reason.IMPORTANCE_STALE: "Sample more often, or publish(refresh=N): the statistics are too old.",
    Reason.WRONG_KEY: "The checkpoint is fine: with the right key, emrakul run --again repeats the cycle.",
    Reason.BREAKER_OPEN: "Look at the last failures (emrakul history RUN); it tries again after three checkpoints.",
    Reason.PROVISIONAL: "Let the trainer sync() before it publishes; these weights lack masks that the run has.",
    Reason.SUPERSEDED: "Nothing to do: a newer state of the run replaced this cycle's base.",
    Reason.TOO_FREQUENT: "Set every: n in the policy as the message says, or publish less often.",
    Reason.ABANDONED: "Start the cycle again; the process that ran it stopped.",
    Reason.DELETED: "Nothing to do: a person deleted the cycle.",
    Reason.STORE_UNREACHABLE: "Check the store's endpoint and network; the cycle was given up.",
    Reason.ROLLED_BACK_MEANWHILE: "Nothing to do: the run was rolled back while this cycle ran.",
    Reason.ACCURACY_DROP: "Nothing to do: the candidate lost too much accuracy and was refused.",
    Reason.CUMULATIVE_DROP: "The model has lost its allowance over many cycles; stop pruning it, or fine-tune.",
    Reason.INCONCLUSIVE: "Use a larger evaluation set; the message says how many samples it needs.",
    Reason.PROOF_FAILED: "The masks do not stand for removal: declare the group's structure, or exclude it.",
    Reason.STRUCTURE: "The candidate differs from its base outside the masks; look for a second writer.",
    Reason.CONSTRAINT: "The decision breaks a hard constraint and was refused.",
    Reason.ASKED: "End the hold (emrakul resume RUN) once the cause is settled; trainers restart from the tip.",
    Reason.PROBATION: "Nothing to do: the trainer restarts from the pair before the masks that made it worse.",
    Reason.INVALID_INPUT: "Nothing of it was used; the next valid checkpoint starts a new cycle.",
    Reason.UNTRUSTED: "Sign with a trusted key, or add the publisher's key to the trust folder.",
    Reason.RUN_NOT_ALLOWED: "Ask whoever installed the operator to add the prefix to allowedRunPrefixes.",
}

COUNTS_FOR_BREAKER = frozenset({Outcome.ROLLED_BACK, Outcome.FAILED})
BREAKER_REASONS = frozenset({Reason.ANALYSIS_TIMEOUT, Reason.WORKERS_FAILED, Reason.OUT_OF_MEMORY})


def breaks(reason: Reason) -> bool:
    """Whether three of these in a row open the circuit breaker."""
    return OUTCOME_OF[reason] in COUNTS_FOR_BREAKER or reason in BREAKER_REASONS
