"""Snapshots of a cycle at every place where it can stand, for tests of the pure core."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

from emrakul.core.snapshot import Ask, Job, OnBase, Phase, Round, Snapshot
from emrakul.settings import Settings
from leyline.fold import LiveCycle, PairState, RunState
from leyline.messages import (
    Budget,
    CheckpointMetadata,
    Decision,
    GateResult,
    GroupDecision,
    ImportanceStats,
    Stage,
    Verdict,
)
from leyline.records import Admit, Outcome, Record
from leyline.topology import Kind

NOW = datetime(2026, 1, 1, 12, tzinfo=UTC)
CYCLE = "c2-0123456789"
CHECKPOINT = "400-1-00000000"
SETTINGS = Settings.from_yaml("{enable_checkpoint_pruning: true}")


def seconds(n: float) -> timedelta:
    return timedelta(seconds=n)


def pair(record: int = 2, **changes: Any) -> PairState:
    values = {"record": record, "checkpoint": CHECKPOINT, "step": 400, "epoch": 40, "parent": None, "good": True}
    return PairState.model_validate({**values, **changes})


def state(*pairs: PairState, **changes: Any) -> RunState:
    known = pairs or (pair(),)
    live = LiveCycle(id=CYCLE, base=2, admitted=3, settings_digest="", runtime="local")
    values = {
        "n": 3,
        "run_id": "r",
        "model_id": "m",
        "term": 1,
        "tip": known[-1].record,
        "pairs": known,
        "live": live,
        "baseline": known[0].record,
    }
    return RunState.model_validate({**values, **changes})


def admitted(stage: Stage = Stage.CONSERVATIVE, settings: Settings = SETTINGS, base: int = 2) -> Record:
    body = Admit(
        base=base,
        stage=stage,
        settings=settings.frozen(),
        settings_digest=settings.sha256(),
        accuracy_drop=0.02,
        runtime="local",
    )
    return Record(id=CYCLE, body=body, n=3, prev="", term=1, tip=None, state="")


def ended(outcome: str = "Skipped", reason: str = "AnalysisTimeout") -> Record:
    from leyline.policy import Breaker, Ladder

    body = Outcome(base=2, outcome=outcome, ladder=Ladder(), breaker=Breaker())
    return Record(id=CYCLE, body=body, n=4, prev="", term=1, tip=None, state="", reason=reason, message="It ended.")


def statistics(**changes: Any) -> ImportanceStats:
    values = {
        "idempotency_key": "k",
        "run_id": "r",
        "checkpoint": CHECKPOINT,
        "step": 400,
        "source": "tracked",
        "samples": 2000,
        "sampled_steps": 100,
        "first_step": 300,
        "last_step": 400,
    }
    return ImportanceStats.model_validate({**values, **changes})


def ready(**changes: Any) -> CheckpointMetadata:
    values = {
        "idempotency_key": CHECKPOINT,
        "run_id": "r",
        "model_id": "m",
        "name": CHECKPOINT,
        "step": 400,
        "epoch": 40,
        "term": 1,
        "format": "safetensors",
        "weights": ("model.safetensors",),
        "topology": "topology.json",
        "objects": (),
        "num_params": 1000,
        "num_bytes": 4000,
        "statistics": statistics(),
    }
    return CheckpointMetadata.model_validate({**values, **changes})


def round_(method: str = "structured", *, answered: int = 4, requests: int = 4, **changes: Any) -> Round:
    number = {"structured": 0, "histogram": 1, "refine": 2, "select": 3}[method]
    return Round(number=number, method=method, requests=requests, answered=answered, **changes)


def decision(**changes: Any) -> Decision:
    budget = Budget(
        domain="host",
        kind=Kind.CHANNEL,
        live=336,
        original=336,
        requested=0.01,
        carry_out="9/25",
        allowed=3,
        eligible=20,
        achieved=3,
        bound="rate",
    )
    values = {
        "cycle": CYCLE,
        "base": 2,
        "checkpoint": CHECKPOINT,
        "stage": Stage.CONSERVATIVE,
        "method": "structured",
        "policy_state": "p",
        "settings": "s",
        "groups": (GroupDecision(group="conv1", pruned=(1, 2, 3)),),
        "budgets": (budget,),
    }
    return Decision.model_validate({**values, **changes})


def verdict(outcome: str = "PASS", **changes: Any) -> Verdict:
    gate = GateResult(
        against="base",
        outcome="PASS",
        n=1000,
        right_reference=970,
        right_candidate=968,
        lost=3,
        gained=1,
        drop=0.002,
        upper=0.006,
        allowed=0.02,
    )
    values = {
        "cycle": CYCLE,
        "base": 2,
        "checkpoint": CHECKPOINT,
        "candidate": "cand",
        "masks": "masks",
        "outcome": outcome,
        "gates": (gate,),
    }
    return Verdict.model_validate({**values, **changes})


def on(base: int = 2, **changes: Any) -> OnBase:
    return OnBase(**{"base": base, "updated": True, **changes})


def validated(base: int = 2, outcome: str = "PASS", **changes: Any) -> OnBase:
    return on(base, candidate="cand", asked=True, verdict=verdict(outcome, base=base, **changes))


def job(phase: Phase, step: int, **changes: Any) -> Job:
    values: dict[str, Any] = {"launch": 0, "created": NOW - seconds(10), "running": True}
    return Job(**{"phase": phase, "step": step, **values, **changes})


def snapshot(**changes: Any) -> Snapshot:
    """An admitted cycle on a checkpoint that is fine, nothing done yet."""
    values: dict[str, Any] = {
        "cycle": CYCLE,
        "ask": Ask(base=2, settings=SETTINGS, runtime="local"),
        "state": state(),
        "admitted": admitted(),
        "end": None,
        "pair": pair(),
        "ready": ready(),
        "groups": 4,
    }
    return Snapshot(**{**values, **changes})
