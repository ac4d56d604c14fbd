"""Every setting, its default and its rule, in one place: files, resources, chart values and docs come from here.

Keys and defaults are the specification's, with ours beside them. snake_case in files, camelCase in resources.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic.alias_generators import to_camel

from emrakul.invalid import Invalid, read_yaml, sentence
from emrakul.quantities import Bytes, Rate, Seconds, Share, share_text
from emrakul.scaling import DEFAULT_FORMULA, DEFAULT_RATE, check_formula
from leyline.messages import Stage
from leyline.model import Value, key_of

Flag = Annotated[bool, Field(strict=True)]
Count = Annotated[int, Field(strict=True, ge=1, le=1000)]
Natural = Annotated[int, Field(strict=True, ge=0, le=1_000_000_000)]
Positive = Annotated[int, Field(strict=True, ge=1, le=10**12)]
Note = Annotated[str, Field(max_length=200)]
UnitKind = Literal["channel", "head", "layer"]
Scorer = Literal["taylor", "michel", "block_influence", "contribution", "fisher", "wanda", "magnitude"]

UNIT_KINDS: tuple[UnitKind, ...] = ("channel", "head", "layer")

SCORERS: tuple[Scorer, ...] = ("taylor", "michel", "block_influence", "contribution", "wanda", "fisher", "magnitude")
"""Every scorer in the default order: of those that suit a kind of unit, the first decides."""


class Section(Value):
    """A part of the settings: frozen, closed, with camelCase names for resources."""

    model_config = ConfigDict(
        alias_generator=to_camel, validate_by_name=True, validate_by_alias=True, use_attribute_docstrings=True
    )


class ProgressiveSchedule(Section):
    """Epochs and rates of the schedule: validation only, then conservative, moderate, aggressive."""

    phase_1_epochs: Natural = 30
    """Epochs 1 to this run whole cycles, but no masks enter the log."""
    phase_2_start_epoch: Natural = 31
    """The first epoch that may commit masks; always phase_1_epochs + 1."""
    conservative_threshold: Share = Fraction(1, 100)
    """Share of the live units that one cycle may prune at stage Conservative (and ValidationOnly)."""
    moderate_threshold: Share = Fraction(3, 100)
    """The same at stage Moderate."""
    aggressive_threshold: Share = Fraction(5, 100)
    """The same at stage Aggressive."""
    promotion_cycles: Count = 3
    """Committed cycles in a row, each within half the allowed drop, before the next stage."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.phase_2_start_epoch != self.phase_1_epochs + 1:
            raise ValueError(
                f"phase_2_start_epoch is {self.phase_2_start_epoch} and phase_1_epochs is {self.phase_1_epochs}; "
                f"active pruning starts with the next epoch, so write {self.phase_1_epochs + 1} or change both"
            )
        rates = (self.conservative_threshold, self.moderate_threshold, self.aggressive_threshold)
        if not rates[0] <= rates[1] <= rates[2]:
            raise ValueError(
                "conservative_threshold, moderate_threshold and aggressive_threshold are "
                f"{', '.join(map(share_text, rates))}; each must be at least the one before it"
            )
        return self


class SafetyConstraints(Section):
    """Hard limits that no stage, guidance or person's decision loosens."""

    min_channel_retention: Share = Fraction(8, 10)
    """Share of a group's original channels that always stays; in basic pruning, of a parameter's weights."""
    min_attention_heads: Count = 2
    """Query heads that stay in every attention layer."""
    max_layer_removal: Share = Fraction(25, 100)
    """Share of the original layers that may ever be masked."""
    accuracy_drop_threshold: Share = Fraction(2, 100)
    """Largest drop of one cycle against its base, in absolute points: 0.02 is two points."""
    cumulative_accuracy_drop: Share = Fraction(4, 100)
    """Largest drop of all cycles together, against the same weights unmasked or the baseline."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.cumulative_accuracy_drop < self.accuracy_drop_threshold:
            raise ValueError(
                f"cumulative_accuracy_drop is {share_text(self.cumulative_accuracy_drop)}, less than "
                f"accuracy_drop_threshold {share_text(self.accuracy_drop_threshold)} of a single cycle; raise it"
            )
        return self


class StructuredPruning(Section):
    """Pruning of channels, heads and layers."""

    enabled: Flag = True
    """False: basic pruning of single weights only, at the outer conservative_threshold."""
    kinds: Annotated[tuple[UnitKind, ...], Field(min_length=1, max_length=len(UNIT_KINDS))] = UNIT_KINDS
    """Kinds of units that may go; the others stay, and their carry waits. For a model whose heads fail the gate while
    its channels would pass, write [channel]."""
    progressive_schedule: ProgressiveSchedule = ProgressiveSchedule()
    safety_constraints: SafetyConstraints = SafetyConstraints()

    @field_validator("kinds")
    @classmethod
    def _once(cls, kinds: tuple[UnitKind, ...]) -> tuple[UnitKind, ...]:
        """In one order, so that the same choice is the same settings."""
        if len(set(kinds)) != len(kinds):
            raise ValueError(f"kinds names a kind twice: {', '.join(kinds)}")
        return tuple(kind for kind in UNIT_KINDS if kind in kinds)


class RankingTarget(Section):
    """How far the order of the scores agrees with the order by exact importance."""

    metric: Note = "kendall_tau"
    """Documentation only: Kendall's tau."""
    target: Share = Fraction(85, 100)
    """At least this."""


class PrecisionTarget(Section):
    """How far the scores themselves agree with exact importance."""

    metric: Note = "MAPE_vs_Fisher"
    """Documentation only: mean absolute percentage error against the empirical Fisher information."""
    target: Share = Fraction(5, 100)
    """At most this."""


class ClassificationTarget(Section):
    """How well the scores tell the units that exact importance would take from the others."""

    metric: Note = "AUC"
    """Documentation only: area under the ROC curve."""
    target: Share = Fraction(95, 100)
    """At least this."""


class AccuracyTargets(Section):
    """What importance is measured against by the accuracy command; nothing is gated by them."""

    importance_ranking: RankingTarget = RankingTarget()
    """Of the scores' order."""
    pruning_precision: PrecisionTarget = PrecisionTarget()
    """Of the scores' size."""
    binary_classification: ClassificationTarget = ClassificationTarget()
    """Of what is taken and what is left."""


class Consensus(Section):
    """How many workers must answer each request."""

    replicas: Annotated[Literal[1, 3], Field(json_schema_extra={"type": "integer"})] = 1
    """3: a strict majority of different workers must agree, at three times the cost."""


class RollbackLimits(Section):
    """How far back a progressive rollback goes."""

    depth: Count = 5
    """Older good pairs that it tries, and that gc therefore keeps, before the baseline."""


class BreakerLimits(Section):
    """When pruning stops by itself, and when it tries again."""

    failures: Count = 3
    """Failures in a row that open the breaker."""
    checkpoints: Count = 3
    """Checkpoints after which one ValidationOnly cycle is let through."""


def _scorers(value: Any) -> Any:
    """One scorer or a list of them."""
    return (value,) if isinstance(value, str) else value


class Settings(Section):
    """The whole of a policy's settings."""

    enable_checkpoint_pruning: Flag = False
    """Feature flag: false ends every cycle ValidatedOnly."""
    checkpoint_analysis_timeout: Seconds = 300
    """Limit of analysis, and again of apply, from the first start mark."""
    analysis_parallel_workers: Count = 4
    """Analysis workers at least."""
    worker_scaling_formula: Annotated[str, Field(max_length=200)] = DEFAULT_FORMULA
    """Workers for a model of num_params parameters; may name worker_calculation_rate and worker_time_budget."""
    worker_calculation_rate: Rate = DEFAULT_RATE
    """Parameters a worker scores in a second; auto: as the workers of the run's newest measured cycle did."""
    worker_time_budget: Positive = 300
    """Seconds an analysis should take."""
    structured_pruning: StructuredPruning = StructuredPruning()
    conservative_threshold: Share = Fraction(1, 100)
    """Rate of basic pruning."""
    safety_margin: Share = Fraction(1, 2)
    """A unit may go only if its score's upper bound is at most (1 - this) times the median of its kind."""
    min_importance_samples: Natural = 1000
    """Samples that the statistics must rest on."""
    accuracy_targets: AccuracyTargets = AccuracyTargets()
    enable_safety_validation: Flag = True
    """False ends every cycle ValidatedOnly: nothing is committed without a verdict."""
    validation_timeout: Seconds = 60
    """Limit of urabrask's work."""
    importance_aggregation_threads: Count = 2
    """Scoring threads of one worker."""
    analysis_memory_limit: Bytes = 2_000_000_000
    """Memory of one analysis or apply worker."""
    current_implementation: Note = "logical_pruning"
    """Documentation only: parameters are masked, not removed."""
    expected_benefits: Note = "validation_only"
    """Documentation only: masks save neither memory nor time."""
    physical_compaction_planned: Note = "phase_2"
    """Documentation only."""

    # ours
    importance: Annotated[tuple[Scorer, ...], Field(max_length=len(SCORERS)), BeforeValidator(_scorers)] = ()
    """Scorers that decide, before the default order; all others are reported beside them."""
    importance_reliability: Share = Fraction(6, 10)
    """Agreement of the two halves of the statistics (corrected tau) below which a cycle declines."""
    head_redundancy: Share = Fraction(9, 10)
    """Similarity of two heads from which on never both go in one cycle."""
    validation_memory_limit: Bytes = 4_000_000_000
    """Memory of the validator: one model and 1 GB."""
    startup_timeout: Seconds = 600
    """From a launch to its first start mark: image pulls, scheduling, queues."""
    consensus: Consensus = Consensus()
    rollback: RollbackLimits = RollbackLimits()
    breaker: BreakerLimits = BreakerLimits()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        check_formula(self)
        if len(set(self.importance)) != len(self.importance):
            raise ValueError(f"importance names a scorer twice: {', '.join(self.importance)}")
        if self.safety_margin == 1:
            raise ValueError("safety_margin is 1, so that no unit could ever go; write less than 1")
        return self

    @classmethod
    def from_yaml(cls, text: str, *, name: str = "settings") -> Self:
        """Read a settings file, with or without the outer `emrakul:` key. Invalid says what is wrong and where."""
        documents = read_yaml(text, name=name)
        if len(documents) > 1:
            raise Invalid(f"{name} has {len(documents)} YAML documents; settings are one")
        content = documents[0] if documents else {}
        if isinstance(content, dict) and set(content) == {"emrakul"}:
            content = {} if content["emrakul"] is None else content["emrakul"]
        if not isinstance(content, dict):
            raise Invalid(f"{name} is {type(content).__name__} in YAML; settings are a mapping of keys to values")
        return cls._read(content, name=name, camel=False)

    @classmethod
    def from_resource(cls, content: dict[str, Any], *, name: str) -> Self:
        """Read `spec.settings` of a resource: camelCase keys, fractions as text."""
        refuse_floats(content, name)
        return cls._read(content, name=name, camel=True)

    @classmethod
    def _read(cls, content: dict[str, Any], *, name: str, camel: bool) -> Self:
        try:
            return cls.model_validate(content, by_alias=camel, by_name=not camel)
        except ValidationError as error:
            raise Invalid(sentence(error, cls, name=name, camel=camel)) from error

    def frozen(self) -> dict[str, Any]:
        """Plain JSON of every setting, as the admit record keeps it; `model_validate` reads it back."""
        plain = self.model_dump(mode="json")
        if not isinstance(plain, dict):
            raise TypeError("settings are a mapping")
        return plain

    def digest(self) -> str:
        """SHA-256 over the settings that can change which units go.

        Times, memory, worker counts and documentation stay outside, so that a result is the same result whoever
        computes it and however fast. `sha256()` covers everything.
        """
        plain = self.frozen()
        return key_of(**{name: value for name, value in plain.items() if name not in _OUTSIDE})

    @property
    def replicas(self) -> int:
        return self.consensus.replicas

    @property
    def scorers(self) -> tuple[Scorer, ...]:
        """Every scorer in the order in which they decide: the chosen ones first."""
        return (*self.importance, *(name for name in SCORERS if name not in self.importance))

    def rate(self, stage: Stage) -> Fraction:
        """Share of live units that a structured cycle may prune at `stage`. ValidationOnly works conservatively."""
        schedule = self.structured_pruning.progressive_schedule
        if stage is Stage.MODERATE:
            return schedule.moderate_threshold
        if stage is Stage.AGGRESSIVE:
            return schedule.aggressive_threshold
        return schedule.conservative_threshold

    @property
    def constraints(self) -> SafetyConstraints:
        return self.structured_pruning.safety_constraints


_OUTSIDE = frozenset(
    {
        "checkpoint_analysis_timeout",
        "analysis_parallel_workers",
        "worker_scaling_formula",
        "worker_calculation_rate",
        "worker_time_budget",
        "accuracy_targets",
        "validation_timeout",
        "importance_aggregation_threads",
        "analysis_memory_limit",
        "validation_memory_limit",
        "startup_timeout",
        "consensus",
        "current_implementation",
        "expected_benefits",
        "physical_compaction_planned",
    }
)


def refuse_floats(content: Any, where: str) -> None:
    """Numbers with a point are text in a resource: what a float becomes on its way through an API server varies."""
    if isinstance(content, float):
        raise Invalid(f'{where} is the number {content}; fractions in a resource are text, write "{content}"')
    inner = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in inner:
        refuse_floats(value, f"{where}.{key}")
