"""The log's records: what each kind says. A run's whole truth is the sequence of these, and a fold over it."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import Field

from leyline.envelope import Role
from leyline.messages import Fraction, MaskRef, Stage, SystemStatePacket
from leyline.model import Value
from leyline.policy import Breaker, Ladder

PROTOCOL = 1
"""Version of the log's rules; an operator admits a cycle under it and workers of another one refuse it."""


class Kind(StrEnum):
    """What a record does; `rules.py` says when it may."""

    GENESIS = "genesis"
    OPEN = "open"
    PUBLISH = "publish"
    ADMIT = "admit"
    PRUNE = "prune"
    OUTCOME = "outcome"
    ROLLBACK = "rollback"
    RESUME = "resume"
    RETIRE = "retire"


WRITERS: dict[Kind, tuple[Role, ...]] = {
    Kind.GENESIS: ("trainer", "operator"),
    Kind.OPEN: ("trainer",),
    Kind.PUBLISH: ("trainer",),
    Kind.ADMIT: ("operator",),
    Kind.PRUNE: ("operator",),
    Kind.OUTCOME: ("operator",),
    Kind.ROLLBACK: ("operator", "trainer"),
    Kind.RESUME: ("operator",),
    Kind.RETIRE: ("operator",),
}
"""Whose key may have signed a record, where trust is configured; see `writers`."""


class Pair(Value):
    """What a trainer loads: a checkpoint with the masks that belong to it. Named by the record that made it."""

    record: int
    checkpoint: str
    masks: MaskRef | None = None
    candidate: str | None = None
    """Folder of masked objects ("cycles/…/candidate/"), where a cycle wrote them."""


class Genesis(Value):
    kind: Literal[Kind.GENESIS] = Kind.GENESIS
    run_id: str
    model_id: str


class Open(Value):
    """A trainer takes the run: older trainers may no longer publish."""

    kind: Literal[Kind.OPEN] = Kind.OPEN


class Publish(Value):
    """A new checkpoint."""

    kind: Literal[Kind.PUBLISH] = Kind.PUBLISH
    step: int
    epoch: int
    term: int
    """The trainer's term; refused once another open or a rollback has raised it."""
    report: SystemStatePacket | None = None
    imported_from: str | None = None
    """Where a checkpoint that no trainer of ours wrote was found, and still lies."""


class Admit(Value):
    """The live cycle, with everything frozen that it will use."""

    kind: Literal[Kind.ADMIT] = Kind.ADMIT
    base: int
    """The base pair's record."""
    stage: Stage
    settings: dict[str, Any]
    settings_digest: str
    accuracy_drop: float
    """The gate: a published pair with a report is good within it."""
    runtime: str
    operator_class: str = ""
    """`class@cluster` of the operator that admitted it: several may work on one store."""
    resource: str = ""
    """`namespace/name` of its PruningCycle in a cluster; "" on one machine."""
    images: dict[str, str] = {}
    protocol: int = PROTOCOL
    guidance: dict[str, Any] = {}
    baseline: str | None = None
    """The policy's choice of a baseline, by checkpoint; None: the first publish."""
    forced: str | None = None
    """SHA-256 of a decision that a person forces, instead of the strategy's."""


class End(Value):
    """How a cycle ended, and what the schedule remembers of it."""

    base: int
    outcome: str
    ladder: Ladder
    breaker: Breaker
    carry: dict[str, Fraction] | None = None
    """New carries by "domain/kind", where this cycle changed them."""
    accuracy: float | None = None
    """The candidate's accuracy, as urabrask measured it."""


class Prune(End):
    """The candidate becomes the tip. Only after urabrask's PASS for this very pair."""

    kind: Literal[Kind.PRUNE] = Kind.PRUNE
    candidate: str


class Outcome(End):
    """The cycle ended without masks; a late prune of it is refused."""

    kind: Literal[Kind.OUTCOME] = Kind.OUTCOME


class Rollback(Value):
    """The tip is an older pair again; what came after it is condemned."""

    kind: Literal[Kind.ROLLBACK] = Kind.ROLLBACK
    to: int
    """The target pair's record."""
    by: Literal["person", "trainer", "operator"]
    strategy: Literal["immediate", "progressive", "baseline", "named"]


class Resume(Value):
    """Ends the hold that a person's rollback left."""

    kind: Literal[Kind.RESUME] = Kind.RESUME
    rollback: str


class Retire(Value):
    """These pairs' objects may be deleted, after a grace time."""

    kind: Literal[Kind.RETIRE] = Kind.RETIRE
    pairs: tuple[int, ...]


Body = Annotated[
    Genesis | Open | Publish | Admit | Prune | Outcome | Rollback | Resume | Retire, Field(discriminator="kind")
]


def writers(body: Body) -> tuple[Role, ...]:
    """Whose key must have signed this record. A trainer may roll back for itself, never in a person's name."""
    if isinstance(body, Rollback) and body.by != "trainer":
        return ("operator",)
    return WRITERS[body.kind]


class Draft(Value):
    """A record before it has its place in the log."""

    id: str = Field(min_length=1, max_length=200)
    """The cycle, rollback request or checkpoint that this is about. One record per id (a cycle: one admit, one end)."""
    body: Body
    checkpoint: str | None = None
    masks: MaskRef | None = None
    baked: MaskRef | None = None
    evidence: dict[str, str] = {}
    """SHA-256 by path, of everything that this record rests on."""
    reason: str = ""
    message: str = ""

    @property
    def kind(self) -> Kind:
        return self.body.kind

    @property
    def slot(self) -> tuple[str, str]:
        """What there is only one of: a cycle's end is one, be it prune or outcome."""
        kind = "end" if self.kind in (Kind.PRUNE, Kind.OUTCOME) else self.kind.value
        return kind, self.id


class Record(Draft):
    """One record of the log."""

    version: Literal[1] = 1
    n: int = Field(ge=0)
    prev: str
    """SHA-256 of record n-1's bytes; empty for the genesis."""
    term: int
    tip: Pair | None
    """The pair to load from here on."""
    state: str
    """SHA-256 of the resulting RunState, which lies in `state/`."""
