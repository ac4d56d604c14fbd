"""The messages between the roles, as frozen values. `docs/contracts.md` and the JSON Schemas are generated from here.

Every message has a schema version and an idempotency key: the same key is the same message, so a replay is harmless.
Rates, times, memory, hosts, worker and attempt lie outside every digest that a key or the decision uses.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Literal

from pydantic import Field

from leyline.digest import ObjectDigest
from leyline.model import Value
from leyline.topology import Kind

Fraction = str
"""An exact fraction as text, "3/100" or "0": budgets and carries never pass through a float."""


Format = Literal["safetensors", "safetensors-sharded", "torch-zip", "torch-zip-sharded", "dcp"]
"""How the weights are stored. `-sharded`: several objects and a `.index.json`; `dcp`: torch.distributed.checkpoint."""


class Stage(StrEnum):
    """The progressive schedule. Order matters: promotion and demotion go one step along it."""

    VALIDATION_ONLY = "ValidationOnly"
    CONSERVATIVE = "Conservative"
    MODERATE = "Moderate"
    AGGRESSIVE = "Aggressive"


class Message(Value):
    """What every message carries."""

    schema_version: Literal[1] = 1
    idempotency_key: str = Field(min_length=1)


class StoredObject(Value):
    """One object of a checkpoint or candidate, by its path in that folder."""

    path: str
    digest: ObjectDigest


class MaskRef(Value):
    """A mask side-car in the run, by path from the run's root and SHA-256 of its bytes."""

    path: str
    digest: str
    counts: dict[str, int] = {}


# --- shared contracts -------------------------------------------------------------------------------------------------


class SystemStatePacket(Message):
    """How the training is doing, from the trainer (`kasmina.report`) or an outside system (source)."""

    step: int = Field(ge=0)
    epoch: int = Field(ge=0)
    loss: float | None = None
    grad_norm: float | None = None
    correct: int | None = None
    n: int | None = None
    """`correct` of `n` on the trainer's own evaluation, if it made one."""
    state: Literal["stable", "unstable", "unknown"] = "unknown"
    source: str = "trainer"
    record: int = -1
    """The newest log record that the trainer had applied when it wrote this."""
    # what lies outside every digest: the copy in a publish record has neither
    held_seconds: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    """Seconds that the newest checkpoint before this report held the training: its publish, and each sync, wait, load
    and report since. None before this process has published one."""
    tracking_share: float | None = Field(default=None, ge=0, le=1, allow_inf_nan=False)
    """The tracker's measured share of training time, 0.008 is 0.8 %; None before it could be compared."""


class EvaluationRef(Value):
    """How accuracy is measured: an exported program with its data, or the user's own function in their image.

    Contract: `input.<i>` [N, ...] and optional `target` int64 [N] in `data`; the program returns [N, C]. It is given
    `Program.batch` samples at a time, in their order, and may compare them: C is then the size of the batch, and a
    target the place in it.
    """

    data: str
    program: str | None = None
    function: str | None = None
    """`module:function` of the user's own image, instead of `program`."""


class IsolationReport(Value):
    """Gradient isolation between host and seeds, as the tracker saw it."""

    checked_steps: int = 0
    domains: tuple[str, ...] = ()
    leak: str | None = None
    """The parameter that received a foreign gradient; such a checkpoint is not published."""


class CheckpointMetadata(Message):
    """READY.json: everything about one checkpoint. The key is the checkpoint's name."""

    run_id: str
    model_id: str
    name: str
    step: int = Field(ge=0)
    epoch: int = Field(ge=0)
    term: int = Field(ge=0)
    format: Format
    weights: tuple[str, ...] = Field(min_length=1)
    """Paths of the objects that hold the model's weights (with the index, if there is one)."""
    optimizer: str | None = None
    """`<param>/<slot>` tensors (moments), in safetensors."""
    topology: str
    importance: str | None = None
    evaluation: EvaluationRef | None = None
    tracker: str | None = None
    """The tracker's own state, restored by a rollback to this checkpoint."""
    objects: tuple[StoredObject, ...]
    imported_from: str | None = None
    """Where the weights lie, if nobody of ours wrote them: the URI of a folder outside of the run, of which the objects
    in `weights` are read by their paths, and that is never written to or deleted from."""
    baked: MaskRef | None = None
    """The masks that the saved weights already carry."""
    num_params: int = Field(ge=0)
    num_bytes: int = Field(ge=0)
    statistics: ImportanceStats | None = None
    """What the importance file says of itself, in the clear: admission needs no key to judge samples and age."""

    def object(self, path: str) -> StoredObject:
        for stored in self.objects:
            if stored.path == path:
                return stored
        raise KeyError(f"checkpoint {self.name} lists no object {path}")


class TelemetryEvent(Message):
    """One measured figure, for Nissa."""

    run: str
    cycle: str = ""
    name: str
    value: float
    unit: str = ""
    labels: dict[str, str] = {}


# --- the six messages -------------------------------------------------------------------------------------------------


class ImportanceStats(Message):
    """Kasmina -> Emrakul: what the importance file of a checkpoint holds. Stored in its safetensors metadata.

    Tensors, float64, `<h>` being `odd` or `even` (the half of the mini-batches), EMA numerators over units:
    `<group>/<h>/abs` sum |q|, `<group>/<h>/sq` sum q squared, `<group>/<h>/n` [2] = (sum of weights, sum of squared
    weights); optional, by what was hooked: `<group>/<h>/act` sum of squared gate outputs (contribution norm; heads: of
    W_O a_h), `<group>/in` sum x_j squared of the consumers' input (Wanda), `<group>/cos` [2] = (sum of cosines, tokens)
    for layers, `<group>/gram` [heads, heads] for redundancy; `weight/<parameter>` diagonal Fisher (float32), or
    its sketch ([rows, cells] of `leyline.sketch`).
    """

    run_id: str
    checkpoint: str
    """The checkpoint whose weights the statistics belong to."""
    lineage: tuple[str, ...] = ()
    """Earlier checkpoints of this lineage, newest first (at most 8): statistics of another lineage are refused."""
    step: int
    source: Literal["tracked", "refreshed", "forward"]
    """tracked: EMA over training steps; refreshed: eval mode at these weights; forward: no gradients."""
    samples: int = Field(ge=0)
    """Samples in the EMA window, over both halves."""
    sampled_steps: int = Field(ge=0)
    first_step: int = 0
    last_step: int = 0
    decay: float = 1.0
    reduction: Literal["per-sample", "mini-batch"] = "per-sample"
    mini_batch: tuple[str, ...] = ()
    """Groups that no gate could be hooked for: their n counts mini-batches, and `samples` leaves them out unless
    `reduction` says that there are no others."""
    groups: tuple[str, ...] = ()
    isolation: IsolationReport = IsolationReport()
    tracker_cost: float | None = None
    """Measured share of training time, 0.008 is 0.8 %."""
    sketch: str | None = None
    """Said where per-weight statistics are a Count-Min sketch, with its size and error."""


class Slice(Value):
    """Elements [start, stop) of one parameter in C order; whole rows of axis 0."""

    parameter: str
    start: int = Field(ge=0)
    stop: int = Field(ge=0)

    @property
    def key(self) -> str:
        return f"{self.parameter}@{self.start}"


class Tie(Value):
    """Basic pruning's exact threshold for one slice: prune every key below `below`, and the first `equal` equal to it.

    A key is the float32 score's bit pattern (non-negative floats order like their bits).
    """

    below: int
    equal: int = 0


class StructuralAnalysisRequest(Message):
    """Emrakul -> Elesh: one piece of analysis, cut by topology alone (at most 5 M parameters).

    The key covers everything that determines the answer. `requests-<round>.json` holds a Requests list.
    """

    id: str
    """`<round>-<index>`, the folder of its answers."""
    cycle: str
    method: Literal["structured", "histogram", "refine", "select"]
    checkpoint: str
    inherited: MaskRef | None = None
    groups: tuple[str, ...] = ()
    """Groups whose gate statistics are scored here (each group in exactly one request)."""
    slices: tuple[Slice, ...] = ()
    """Weights to read: structured, their group norms; basic, their single scores."""
    importance: tuple[str, ...] = ()
    """Scorers by name, the first one decides."""
    buckets: dict[str, int] = {}
    """refine: the high 16 bits wanted, by slice key."""
    ties: dict[str, Tie] = {}
    """select: thresholds by slice key; a slice without one loses nothing."""


class WorkLimits(Value):
    """How workers share a phase. Outside every key: they change who computes, never what."""

    threads: int = Field(default=2, ge=1)
    """Scoring threads of one worker (importance_aggregation_threads)."""
    memory_bytes: int = Field(default=2_000_000_000, ge=1)
    """analysis_memory_limit; I/O buffers are cut to fit."""
    attempt_seconds: float = 30.0
    beat_seconds: float = 5.0
    attempts: int = 3
    replicas: int = Field(default=1, ge=1)
    """consensus.replicas: with 3, a request needs a strict majority of different workers."""


class Requests(Value):
    """`requests-<round>.json`: all requests of one round, in canonical order."""

    requests: tuple[StructuralAnalysisRequest, ...]
    limits: WorkLimits = WorkLimits()


class StructuralAnalysisResponse(Message):
    """Elesh -> Emrakul: the answer to one request; its arrays are the tensors of the same safetensors object.

    structured: `gate/<group>/<scorer>` [units] scores, `gate/<group>/<scorer>/se` standard errors,
    `gate/<group>/<scorer>/odd` and `/even` the halves; `gate/<group>/input` [units] root of the sum of x_j squared
    (channel Wanda's second factor); `gate/<group>/redundancy` [units, units] similarity of heads;
    `norm/<slice key>/<group>/<member index>/<first unit>` partial sums of squares, to be added in topology order
    (magnitude: of every member; Wanda: of the consumers), and `fisher/...` likewise, of w squared F / 2, where the
    statistics know every parameter (leyline.partial names and adds both). histogram and refine:
    `<slice key>/bucket` U32 and `<slice key>/count` I64, sparse; histogram, where no key has lower bits, an empty
    `<slice key>/whole`. select: `<slice key>/mask`, packed bits, 1 active.
    The key is the request's; `result` is the SHA-256 of the arrays, by which answers are compared.
    """

    request: str
    status: Literal["answered", "invalid", "importance", "failed"] = "answered"
    """invalid: the weights break a rule (NaN, a bad header); importance: the statistics are missing, corrupt or
    foreign; failed: the scorer could not do it."""
    reason: str = ""
    """A code of leyline.reasons where it is not answered."""
    message: str = ""
    result: str = ""
    # what lies outside every digest
    worker: int = 0
    attempt: int = 0
    seconds: float = 0.0
    bytes_read: int = 0
    parameters: int = 0
    peak_rss: int = 0


class PruningValidationRequest(Message):
    """Emrakul -> Urabrask: check this candidate against its base."""

    cycle: str
    base: int
    """Record of the base pair."""
    checkpoint: str
    inherited: MaskRef | None = None
    """Masks of the base pair: the first gate's reference."""
    reference: str | None = None
    """Checkpoint whose unmasked weights are the second gate's reference, where they are known (else the baseline)."""
    candidate: str
    """SHA-256 of the candidate's manifest."""
    accuracy_drop: float
    cumulative_drop: float
    min_channel_retention: float
    min_attention_heads: int
    max_layer_removal: float
    baseline: str | None = None
    """The baseline checkpoint, the second gate's reference where the unmasked weights are gone."""


class CheckpointUpdate(Message):
    """Emrakul -> Kasmina: apply this decision to this base. Stored as `on-<base>/update.json`."""

    cycle: str
    base: int
    """Record of the base pair."""
    checkpoint: str
    decision: str
    """SHA-256 of decision.json."""
    inherited: MaskRef | None = None
    """Masks of the base pair; the candidate carries them and the new ones."""
    limits: WorkLimits


class Candidate(Value):
    """The candidate's manifest, `candidate/MANIFEST.json`, written last: the candidate exists once it does."""

    schema_version: Literal[1] = 1
    cycle: str
    base: int
    checkpoint: str
    decision: str
    masks: MaskRef
    """All masks of the candidate: inherited and new."""
    objects: tuple[StoredObject, ...]
    """The masked objects (weights, optimizer), by the paths they have in the base."""
    weights_zeroed: int = 0
    """Weights (optimizer slots apart) that the masks zero."""


class AnalysisResults(Message):
    """Emrakul -> Tamiyo: how a cycle ended, and what the next one starts from. The key is the cycle's name."""

    run: str
    cycle: str
    checkpoint: str
    outcome: str
    reason: str
    message: str
    stage: Stage
    next_stage: Stage
    streak: int
    counts: dict[str, int] = {}
    budgets: tuple[Budget, ...] = ()
    accuracy_base: float | None = None
    accuracy_candidate: float | None = None
    breaker: str = "closed"


# --- between decision and verdict -------------------------------------------------------------------------------------


class Budget(Value):
    """What one kind in one domain was allowed, and what bound it."""

    domain: str
    kind: Kind
    live: int
    original: int
    requested: float
    carry_in: Fraction = "0"
    allowed: int
    """Units the rate and carry gave: floor(rate * live + carry), never above ceil(rate * live)."""
    eligible: int
    achieved: int
    carry_out: Fraction = "0"
    bound: str
    """The constraint that bound: rate, margin, retention, min_attention_heads, max_layer_removal."""


class GroupDecision(Value):
    group: str
    pruned: tuple[int, ...]
    """Units pruned by this cycle; the inherited ones are not repeated."""


class WeightDecision(Value):
    """Basic pruning: the mask bits of one slice lie in an answer."""

    slice: Slice
    answer: str
    """Folder of the request's answers in the run: who answered is no part of a decision."""
    result: str
    """Digest of the arrays; an answer that has it is the one that was used."""


class Decision(Value):
    """decision.json: which units go. Pure: responses, policy state and settings give it, whoever computes it."""

    schema_version: Literal[1] = 1
    cycle: str
    base: int
    checkpoint: str
    stage: Stage
    method: Literal["structured", "basic", "forced"]
    policy_state: str
    """Digest of the policy state that this decision was made from."""
    settings: str
    inherited: MaskRef | None = None
    groups: tuple[GroupDecision, ...] = ()
    weights: tuple[WeightDecision, ...] = ()
    budgets: tuple[Budget, ...] = ()
    reliability: dict[str, float] = {}
    """Spearman-Brown-corrected tau between the halves, by domain/kind."""
    limits: dict[str, float] = {}
    """The eligibility limit, (1 - margin) * median, by domain/kind."""
    used: dict[str, str] = {}
    """Request id -> result digest of the answer used."""
    fallback: str = ""
    """Why basic pruning was used instead of structured, where it was."""
    declined: str = ""
    """A code of leyline.reasons where nothing is to be pruned; the decision is written all the same."""
    message: str = ""
    """The sentence that goes with `declined`."""


class Check(Value):
    """One thing urabrask looked at."""

    name: str
    passed: bool
    message: str = ""


class GateResult(Value):
    """A paired accuracy comparison on n identical samples (pruning.md 4.14)."""

    against: str
    """`base` or `unmasked` or `baseline`."""
    outcome: Literal["PASS", "FAIL", "INCONCLUSIVE"]
    n: int
    right_reference: int
    right_candidate: int
    lost: int
    """Reference right, candidate wrong (b)."""
    gained: int
    """The reverse (c)."""
    drop: float
    upper: float
    """Upper 95 % bound of the drop (Agresti-Min)."""
    allowed: float
    needed: int = 0
    """INCONCLUSIVE: the samples it would need at this disagreement."""


class Verdict(Value):
    """verdict.json: urabrask's answer for one pair on one base, nobody else's.

    Sealed in a DSSE envelope: where trust is configured only one signed by a validator (or, on one machine, by the
    operator whose process it is) lets masks into the log.
    """

    schema_version: Literal[1] = 1
    cycle: str
    base: int
    checkpoint: str
    candidate: str
    """SHA-256 of the candidate's manifest."""
    masks: str
    """SHA-256 of the mask file."""
    outcome: Literal["PASS", "FAIL", "INCONCLUSIVE"]
    reason: str = ""
    """A code of leyline.reasons where it is no PASS."""
    message: str = ""
    checks: tuple[Check, ...] = ()
    gates: tuple[GateResult, ...] = ()
    trusted: bool = False


CheckpointMetadata.model_rebuild()
AnalysisResults.model_rebuild()
