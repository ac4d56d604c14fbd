"""What is counted, under which names, and that nothing can make a series of its own."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from emrakul.cluster.metrics import BREAKERS, CODES, VERBS, Metrics
from emrakul.cluster.objectives import WINDOW, percentile, slo
from leyline.log import StoreReverted
from leyline.messages import Stage
from leyline.reasons import OUTCOME_OF, Outcome, Reason
from leyline.store import NotFound, Refused, Unreachable

OURS = re.compile(r"^(emrakul_[a-z_]+)(?:\{(.*)\})? ", re.M)


def series(metrics: Metrics) -> set[tuple[str, str]]:
    """(name, labels) of every line that is ours."""
    return {(name, labels) for name, labels in OURS.findall(metrics.exposition().decode())}


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(name, labels)


def committed(metrics: Metrics, **said: float) -> None:
    metrics.cycle_ended(Outcome.COMMITTED, Reason.PRUNED, **said)  # type: ignore[arg-type]


def test_the_names_that_were_promised_are_there_from_the_start() -> None:
    names = {name for name, _ in series(Metrics())}
    promised = {
        "emrakul_checkpoint_overhead_seconds_bucket",
        "emrakul_training_time_share_bucket",
        "emrakul_analysis_started_total",
        "emrakul_analysis_completed_total",
        "emrakul_analysis_failed_total",
        "emrakul_analysis_success_rate",
        "emrakul_logical_pruning_effectiveness_bucket",
        "emrakul_validation_time_seconds_bucket",
        "emrakul_structured_pruning_coverage_bucket",
        "emrakul_cycles_total",
        "emrakul_live_cycles",
        "emrakul_breaker_runs",
        "emrakul_stage_runs",
        "emrakul_store_errors_total",
        "emrakul_sink_undelivered",
        "emrakul_sink_dropped_total",
        "emrakul_reconcile_seconds_bucket",
    }
    assert promised <= names
    assert not [name for name in names if name.endswith("_created")]


def test_the_docs_have_every_metric_with_its_type_and_labels() -> None:
    metrics = Metrics()
    metrics.api_request("GET", 200)
    found = {}
    for family in metrics.registry.collect():
        labels = {name for sample in family.samples for name in sample.labels} - {"le"}
        suffix = "_total" if family.type == "counter" else ""
        found[f"{family.name}{suffix}"] = (family.type, labels)
    text = (Path(__file__).parents[2] / "docs" / "monitoring.md").read_text()
    rows = re.findall(r"^\| `(emrakul_\w+)` \| (\w+) \|([^|]*)\|", text, re.M)
    told = {name: (kind, set(re.findall(r"`(\w+)`", labels))) for name, kind, labels in rows}
    assert told == {name: said for name, said in found.items() if name.startswith("emrakul_")}


def test_an_ended_cycle_is_counted_where_it_belongs() -> None:
    metrics = Metrics()
    committed(metrics, validation_seconds=12.0, achieved=6, requested=8, coverage=0.97)
    metrics.cycle_ended(Outcome.SKIPPED, Reason.NOT_SCHEDULED)
    assert value(metrics, "emrakul_cycles_total", outcome="Committed", reason="Pruned") == 1
    assert value(metrics, "emrakul_cycles_total", outcome="Skipped", reason="NotScheduled") == 1
    assert value(metrics, "emrakul_cycles_total", outcome="Skipped", reason="Superseded") == 0
    assert value(metrics, "emrakul_validation_time_seconds_sum") == 12
    assert value(metrics, "emrakul_logical_pruning_effectiveness_sum") == 0.75
    assert value(metrics, "emrakul_structured_pruning_coverage_sum") == 0.97
    assert value(metrics, "emrakul_structured_pruning_coverage_count") == 1


def test_only_what_was_committed_is_effective() -> None:
    metrics = Metrics()
    metrics.cycle_ended(Outcome.ROLLED_BACK, Reason.ACCURACY_DROP, achieved=6, requested=8)
    committed(metrics, achieved=0, requested=0)
    assert value(metrics, "emrakul_logical_pruning_effectiveness_count") == 0


def test_an_analysis_that_runs_is_no_failure_yet() -> None:
    metrics = Metrics()
    assert value(metrics, "emrakul_analysis_success_rate") != value(metrics, "emrakul_analysis_success_rate")  # NaN
    for _ in range(3):
        metrics.analysis_started()
        metrics.analysis_completed()
    metrics.analysis_started()
    assert value(metrics, "emrakul_analysis_success_rate") == 1
    metrics.cycle_ended(Outcome.SKIPPED, Reason.ANALYSIS_TIMEOUT, analysing=True)
    assert value(metrics, "emrakul_analysis_success_rate") == 0.75
    metrics.cycle_ended(Outcome.SKIPPED, Reason.BREAKER_OPEN)  # never analysed
    metrics.cycle_ended(Outcome.SKIPPED, Reason.DELETED, analysing=True)  # a person's wish
    assert value(metrics, "emrakul_analysis_success_rate") == 0.75
    assert [value(metrics, f"emrakul_analysis_{what}_total") for what in ("started", "completed", "failed")] == [
        4,
        3,
        1,
    ]


def test_what_a_trainer_did_not_measure_is_not_counted() -> None:
    metrics = Metrics()
    metrics.trainer(None, None)
    metrics.trainer(40.0, None)
    metrics.trainer(None, 0.004)
    assert value(metrics, "emrakul_checkpoint_overhead_seconds_count") == 1
    assert value(metrics, "emrakul_checkpoint_overhead_seconds_sum") == 40
    assert value(metrics, "emrakul_training_time_share_sum") == 0.004


def test_runs_are_counted_where_they_stand_now() -> None:
    metrics = Metrics()
    metrics.run_state("s3://a/one", Stage.CONSERVATIVE, "closed")
    metrics.run_state("s3://a/two", Stage.CONSERVATIVE, "open")
    metrics.run_state("s3://a/two", Stage.MODERATE, "half-open")
    metrics.live_cycles = 2
    assert [value(metrics, "emrakul_stage_runs", stage=stage.value) for stage in Stage] == [0, 1, 1, 0]
    assert [value(metrics, "emrakul_breaker_runs", state=state) for state in BREAKERS] == [1, 0, 1]
    assert value(metrics, "emrakul_live_cycles") == 2
    metrics.run_gone("s3://a/two")
    metrics.run_gone("s3://a/two")
    assert value(metrics, "emrakul_stage_runs", stage="Moderate") == 0


def test_store_errors_are_counted_by_what_they_are() -> None:
    metrics = Metrics()
    for error in (Unreachable("a"), Unreachable("b"), StoreReverted("c"), Refused("d"), NotFound("e"), KeyError("f")):
        metrics.store_error(error)
    kinds = ("unreachable", "reverted", "refused", "other")
    assert [value(metrics, "emrakul_store_errors_total", kind=kind) for kind in kinds] == [2, 1, 1, 2]


def test_no_series_comes_of_a_value_that_nobody_knows() -> None:
    metrics = Metrics()
    before = series(metrics)
    for outcome, reason in [("Committed", "Nobody"), ("Nothing", "Pruned"), ("Skipped", "Pruned")]:
        with pytest.raises((ValueError, KeyError)):
            metrics.cycle_ended(outcome, reason)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no state of a breaker"):
        metrics.run_state("s3://a/one", Stage.MODERATE, "ajar")
    with pytest.raises(ValueError):
        metrics.run_state("s3://a/one", "Reckless", "open")  # type: ignore[arg-type]
    with pytest.raises(ValueError):
        metrics.reconciled("Pod", 1.0)
    metrics.store_error(RuntimeError("never seen"))
    assert series(metrics) == before
    assert value(metrics, "emrakul_cycles_total", outcome="Committed", reason="Pruned") == 0


def test_requests_have_a_bounded_set_of_series() -> None:
    metrics = Metrics()
    for verb in (*VERBS, "WATCH", "s3://a/one"):
        for code in range(0, 1000):
            metrics.api_request(verb, code)
    found = {labels for name, labels in series(metrics) if name == "emrakul_api_requests_total"}
    assert len(found) == (len(VERBS) + 1) * (len(CODES) + 2)
    assert 'code="none",verb="LIST"' in found
    assert 'code="other",verb="other"' in found


def test_the_number_of_series_does_not_depend_on_what_happens() -> None:
    metrics = Metrics()
    before = series(metrics)
    for reason in Reason:
        metrics.cycle_ended(OUTCOME_OF[reason], reason, validation_seconds=1.0, achieved=1, requested=1, coverage=1.0)
    for number in range(100):
        metrics.run_state(f"s3://a/{number}", Stage.AGGRESSIVE, "closed")
        metrics.trainer(float(number), 0.001)
        metrics.reconciled("cycle", 0.1)
    assert series(metrics) == before


# --- objectives -------------------------------------------------------------------------------------------------------


def test_nothing_measured_is_neither_met_nor_missed() -> None:
    found = slo(analyses=(), held=(), shares=())
    assert [(one.target, one.value, one.met) for one in found.values()] == [
        (0.95, None, None),
        (300.0, None, None),
        (0.01, None, None),
    ]


@pytest.mark.parametrize(
    ("name", "measured", "value", "met"),
    [
        ("analysisSuccess", {"analyses": [True] * 19 + [False]}, 0.95, True),
        ("analysisSuccess", {"analyses": [True] * 18 + [False]}, 18 / 19, False),
        ("analysisSuccess", {"analyses": [False]}, 0.0, False),
        ("checkpointOverheadSeconds", {"held": [10.0] * 19 + [900.0]}, 10.0, True),
        ("checkpointOverheadSeconds", {"held": [10.0] * 18 + [900.0]}, 900.0, False),
        ("checkpointOverheadSeconds", {"held": [300.0]}, 300.0, False),
        ("trainingTimeShare", {"shares": [0.008]}, 0.008, True),
        ("trainingTimeShare", {"shares": [0.01]}, 0.01, False),
    ],
)
def test_each_objective_by_itself(name: str, measured: dict[str, list[float]], value: float, met: bool) -> None:
    found = slo(**{"analyses": (), "held": (), "shares": (), **measured})  # type: ignore[arg-type]
    assert (found[name].value, found[name].met) == (value, met)
    assert {one.met for other, one in found.items() if other != name} == {None}


def test_a_percentile_is_a_value_that_was_measured() -> None:
    assert percentile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert percentile([5.0], 0.95) == 5.0
    assert percentile([float(n) for n in range(1, 101)]) == 95.0
    assert percentile([]) is None


def test_an_old_bad_day_is_forgotten() -> None:
    metrics = Metrics()
    metrics.trainer(1000.0, 0.5)
    metrics.cycle_ended(Outcome.SKIPPED, Reason.ANALYSIS_TIMEOUT, analysing=True)
    for _ in range(WINDOW):
        metrics.trainer(1.0, 0.001)
        metrics.analysis_completed()
    assert all(objective.met for objective in metrics.measured.objectives().values())
    assert metrics.measured.objectives()["checkpointOverheadSeconds"].value == 1.0
