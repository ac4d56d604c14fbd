"""Everything that is known of one cycle at one moment. Values only: `observe.py` gathers them, `plan.py` decides."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum

from emrakul.finding import Finding
from emrakul.guidance import Guidance
from emrakul.settings import Settings
from leyline.fold import PairState, RunState
from leyline.messages import CheckpointMetadata, Decision, Stage, SystemStatePacket, Verdict
from leyline.records import Admit, Record


class Phase(StrEnum):
    """What workers are started for. The names are those of the start marks."""

    ANALYSE = "analyse"
    APPLY = "apply"
    VALIDATE = "validate"


@dataclass(frozen=True, kw_only=True)
class Ask:
    """What somebody wants: a cycle on one base with one set of settings. Frozen into the admit record."""

    base: int
    settings: Settings
    runtime: str
    operator_class: str = ""
    resource: str = ""
    """`namespace/name` of the PruningCycle, in a cluster."""
    images: Mapping[str, str] = field(default_factory=dict)
    guidance: Guidance = field(default_factory=Guidance)
    """Tamiyo's; it can only hold back."""
    baseline: str | None = None
    """The policy's choice, by checkpoint."""
    forced: str | None = None
    """SHA-256 of a decision that a person forces."""
    suspend: bool = False
    live_is_driven: bool = False
    """The cycle that is live in this one's way is driven by the same operator: it is waited for, however long."""
    withdrawn: Finding | None = None
    """Why it shall not begin any more, if it has not: a newer one of its policy, or no policy."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One launch of a phase's workers, as its runtime sees it."""

    phase: Phase
    launch: int
    step: int
    """The round (analyse) or the base (apply, validate) that it works on."""
    created: datetime
    """Since when its workers may start: its launch, or when a queue last let it go."""
    running: bool
    suspended: bool = False
    """A queue holds it back; no time counts."""
    queued: bool = False
    """A queue may hold it back again and again: its limit runs from when it was last let go."""
    exits: tuple[int, ...] = ()
    """Exit codes of workers that ended for good without success."""
    out_of_memory: str = ""
    """Peak and limit, where a worker was ended for its memory."""
    message: str = ""
    """The last thing a failed worker said, or why nothing was scheduled."""


@dataclass(frozen=True, kw_only=True)
class Round:
    """One round of requests and what became of them."""

    number: int
    method: str
    requests: int
    answered: int
    given_up: tuple[str, ...] = ()
    """Requests with as many dead attempts as are allowed."""
    finding: Finding | None = None
    """An answer that says: this input breaks a rule, or these statistics cannot be used."""
    failed: str = ""
    """An answer that says: the scorer could not do it."""
    disputed: tuple[str, ...] = ()
    """Requests that enough workers have answered, with no majority among them."""
    dissenters: tuple[int, ...] = ()
    """Workers whose answer the majority contradicts."""

    @property
    def complete(self) -> bool:
        return self.answered == self.requests


@dataclass(frozen=True, kw_only=True)
class OnBase:
    """What the cycle has made on one base; more than one after a rebase."""

    base: int
    updated: bool
    """The update request is written."""
    candidate: str | None = None
    """SHA-256 of the candidate's manifest, once it exists."""
    asked: bool = False
    """The validation request is written."""
    verdict: Verdict | None = None
    refused: Finding | None = None
    """Why the verdict that stands does not count: it is damaged, or not signed where trust is configured."""


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """One cycle, its run, its facts in the store and its jobs, at one moment."""

    cycle: str
    ask: Ask
    state: RunState
    """The run now, at the newest record."""
    admitted: Record | None
    end: Record | None
    told: bool = False
    """Its AnalysisResults are written."""
    pair: PairState | None
    """The base pair as it was; None if the log does not have it."""
    live_quiet_since: datetime | None = None
    """When another live cycle was last active, by the store's clock."""
    live_settings: Settings | None = None
    """The other live cycle's own settings, frozen when it was admitted: its limits are theirs."""
    ready: CheckpointMetadata | None = None
    groups: int = 0
    """Groups in the checkpoint's topology."""
    coverage: float | None = None
    """Share of all weights in parameters that structured pruning can reach."""
    input: Finding | None = None
    """Why the checkpoint cannot be used at all."""
    rounds: tuple[Round, ...] = ()
    decision: Decision | None = None
    on: tuple[OnBase, ...] = ()
    marks: Mapping[tuple[Phase, int], datetime] = field(default_factory=dict)
    """When the first worker of a launch started, by phase and launch."""
    jobs: tuple[Job, ...] = ()
    report: SystemStatePacket | None = None
    """The newest report of the training."""
    untrusted: bool = False
    """A record or manifest without signature was read, and no trust is configured."""
    publishes: tuple[datetime, ...] = ()
    """When checkpoints came since the base, by the store's clock."""
    lineage: tuple[str, ...] = ()
    """The base's ancestors' checkpoints, nearest first."""
    evidence: Mapping[str, str] = field(default_factory=dict)
    """SHA-256 by path of what an end rests on: READY, requests, decision, candidates, verdicts."""
    interval: int | None = None
    """Steps between the last two checkpoints of this lineage."""

    @property
    def base(self) -> int:
        """The base that the cycle works on now: the newest it was rebased on."""
        return self.on[-1].base if self.on else self.ask.base

    @property
    def here(self) -> OnBase | None:
        return self.on[-1] if self.on else None

    @property
    def stage(self) -> Stage:
        """The stage frozen at admission."""
        assert self.admitted is not None
        assert isinstance(self.admitted.body, Admit)
        return self.admitted.body.stage

    def job(self, phase: Phase) -> Job | None:
        """The newest launch of a phase."""
        jobs = [job for job in self.jobs if job.phase == phase]
        return max(jobs, key=lambda job: (job.launch, job.created)) if jobs else None
