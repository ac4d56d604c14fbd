"""What the operator measures, for Prometheus. Labels come from closed sets: no name, run or namespace is one.

Each end is counted by whoever wrote the status that made it one, so a cycle counts once however often it is looked at.
"""

from __future__ import annotations

import math
from enum import StrEnum
from functools import partial
from typing import get_args

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)

from emrakul.cluster.objectives import WINDOW, Measured, success_rate
from leyline.log import StoreReverted
from leyline.messages import Stage
from leyline.policy import Breaker
from leyline.reasons import OUTCOME_OF, Outcome, Reason
from leyline.store import Changed, Damaged, Refused, Unreachable, Unsuitable

NOBODYS_FAULT = frozenset({Reason.SUPERSEDED, Reason.DELETED, Reason.ROLLED_BACK_MEANWHILE})
"""An analysis that ended for these was stopped, and has not failed."""

BREAKERS: tuple[str, ...] = get_args(Breaker.model_fields["state"].annotation)
VERBS = ("GET", "LIST", "POST", "APPLY", "DELETE")
CODES = ("200", "201", "400", "401", "403", "404", "409", "410", "422", "429", "500", "503", "504")
NO_ANSWER = "none"
OTHER = "other"
STORE_ERRORS: dict[type[Exception], str] = {
    Unreachable: "unreachable",
    Refused: "refused",
    StoreReverted: "reverted",
    Damaged: "damaged",
    Changed: "changed",
    Unsuitable: "unsuitable",
}


class Kind(StrEnum):
    """What is reconciled."""

    CYCLE = "cycle"
    POLICY = "policy"


class Metrics:
    """One registry, and one method for each thing that happens."""

    def __init__(self) -> None:
        # else each counter has a second series, which says when this process began
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.measured = Measured()
        self._runs: dict[str, tuple[Stage, str]] = {}
        self.live_cycles = 0
        """Admitted and not ended; whoever knows sets it."""
        self._declare()

    def _declare(self) -> None:
        registry = self.registry
        self._overhead = Histogram(
            "emrakul_checkpoint_overhead_seconds",
            "Seconds that a checkpoint held its training: publish, sync, wait and load.",
            buckets=(1, 2, 5, 10, 30, 60, 120, 180, 300, 600, 1200),
            registry=registry,
        )
        self._share = Histogram(
            "emrakul_training_time_share",
            "Share of training time that the importance tracker takes, as the trainer measured it.",
            buckets=(0.001, 0.002, 0.004, 0.006, 0.008, 0.01, 0.015, 0.02, 0.05, 0.1),
            registry=registry,
        )
        self._started = Counter("emrakul_analysis_started_total", "Analyses that were started.", registry=registry)
        self._completed = Counter(
            "emrakul_analysis_completed_total", "Analyses that came to a decision.", registry=registry
        )
        self._failed = Counter(
            "emrakul_analysis_failed_total", "Analyses that ended without a decision.", registry=registry
        )
        rate = Gauge(
            "emrakul_analysis_success_rate",
            f"Share that came to a decision, of the newest {WINDOW} analyses that are over; NaN before the first.",
            registry=registry,
        )
        rate.set_function(self._success_rate)
        self._effectiveness = Histogram(
            "emrakul_logical_pruning_effectiveness",
            "Units that a committed cycle pruned, of those that its stage asked for.",
            buckets=(0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0),
            registry=registry,
        )
        self._validation = Histogram(
            "emrakul_validation_time_seconds",
            "Seconds that validation took.",
            buckets=(1, 2, 5, 10, 20, 30, 45, 60, 120, 300, 600),
            registry=registry,
        )
        self._coverage = Histogram(
            "emrakul_structured_pruning_coverage",
            "Parameters in known groups, of all parameters of a cycle's model.",
            buckets=(0.1, 0.25, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0),
            registry=registry,
        )
        cycles = Counter("emrakul_cycles_total", "Cycles that ended.", ("outcome", "reason"), registry=registry)
        # every series from the start: the first of its kind must count as an increase
        self._cycles = {reason: cycles.labels(OUTCOME_OF[reason].value, reason.value) for reason in Reason}
        live = Gauge("emrakul_live_cycles", "Cycles that are admitted and have not ended.", registry=registry)
        live.set_function(lambda: self.live_cycles)
        stages = Gauge("emrakul_stage_runs", "Runs by the stage of their schedule.", ("stage",), registry=registry)
        for stage in Stage:
            stages.labels(stage.value).set_function(partial(self._runs_at, 0, stage))
        breakers = Gauge(
            "emrakul_breaker_runs", "Runs by the state of their circuit breaker.", ("state",), registry=registry
        )
        for state in BREAKERS:
            breakers.labels(state).set_function(partial(self._runs_at, 1, state))
        errors = Counter("emrakul_store_errors_total", "What stores answered.", ("kind",), registry=registry)
        self._store_errors = {kind: errors.labels(kind) for kind in (*STORE_ERRORS.values(), OTHER)}
        self._undelivered = Gauge(
            "emrakul_sink_undelivered", "Events that wait for a sink to take them.", registry=registry
        )
        self._dropped = Counter(
            "emrakul_sink_dropped_total",
            "Events that left the queue untaken: it was full, or the sink refused them for a week.",
            registry=registry,
        )
        reconcile = Histogram(
            "emrakul_reconcile_seconds",
            "Seconds of one look at an object, with all that it made the operator do.",
            ("kind",),
            buckets=(0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60),
            registry=registry,
        )
        self._reconcile = {kind: reconcile.labels(kind.value) for kind in Kind}
        self._requests = Counter(
            "emrakul_api_requests_total", "Requests to the API server.", ("verb", "code"), registry=registry
        )

    def exposition(self) -> bytes:
        """Everything, in Prometheus' text format 0.0.4."""
        return generate_latest(self.registry)

    # --- cycles ---

    def _success_rate(self) -> float:
        rate = success_rate(self.measured.analyses)
        return math.nan if rate is None else rate

    def analysis_started(self) -> None:
        self._started.inc()

    def analysis_completed(self) -> None:
        """It came to a decision, whatever becomes of that."""
        self._completed.inc()
        self.measured.analyses.append(True)

    def cycle_ended(
        self,
        outcome: Outcome,
        reason: Reason,
        *,
        analysing: bool = False,
        validation_seconds: float | None = None,
        achieved: float = 0.0,
        requested: float = 0.0,
        coverage: float | None = None,
    ) -> None:
        """Once per cycle. `analysing`: it ended in its analysis, which was started and came to no decision.

        `achieved` of `requested` units count for a committed cycle. ValueError where outcome and reason do not belong
        together: nothing is counted then.
        """
        outcome, reason = Outcome(outcome), Reason(reason)
        if OUTCOME_OF[reason] is not outcome:
            raise ValueError(f"{reason} is a reason of {OUTCOME_OF[reason]}, not of {outcome}")
        self._cycles[reason].inc()
        if analysing and reason not in NOBODYS_FAULT:
            self._failed.inc()
            self.measured.analyses.append(False)
        if validation_seconds is not None:
            self._validation.observe(validation_seconds)
        if outcome is Outcome.COMMITTED and requested > 0:
            self._effectiveness.observe(achieved / requested)
        if coverage is not None:
            self._coverage.observe(coverage)

    def trainer(self, held_seconds: float | None, tracking_share: float | None) -> None:
        """What a training's newest report says of itself; once per checkpoint. None is what it did not measure."""
        if held_seconds is not None:
            self._overhead.observe(held_seconds)
            self.measured.held.append(held_seconds)
        if tracking_share is not None:
            self._share.observe(tracking_share)
            self.measured.shares.append(tracking_share)

    # --- runs ---

    def run_state(self, run: str, stage: Stage, breaker: str) -> None:
        """Where a run stands now; it is counted there until it is told again, or gone."""
        if breaker not in BREAKERS:
            raise ValueError(f"{breaker} is no state of a breaker ({', '.join(BREAKERS)})")
        self._runs[run] = Stage(stage), breaker

    def run_gone(self, run: str) -> None:
        """Nobody follows this run any more."""
        self._runs.pop(run, None)

    def _runs_at(self, place: int, value: str) -> float:
        return sum(state[place] == value for state in tuple(self._runs.values()))

    # --- the operator itself ---

    def store_error(self, error: Exception) -> None:
        """A store's answer that was no answer."""
        self._store_errors[next((kind for of, kind in STORE_ERRORS.items() if isinstance(error, of)), OTHER)].inc()

    def sink_undelivered(self, waiting: int) -> None:
        self._undelivered.set(waiting)

    def sink_dropped(self) -> None:
        self._dropped.inc()

    def reconciled(self, kind: str, seconds: float) -> None:
        """One look at an object of this kind."""
        self._reconcile[Kind(kind)].observe(seconds)

    def api_request(self, verb: str, code: int) -> None:
        """A request to the API server; code 0 where it did not answer."""
        said = NO_ANSWER if code == 0 else str(code)
        self._requests.labels(verb if verb in VERBS else OTHER, said if said in (*CODES, NO_ANSWER) else OTHER).inc()
