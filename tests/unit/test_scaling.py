"""Worker scaling: the formula is arithmetic, agrees with its keys, and W keeps to its bounds."""

from __future__ import annotations

import gc
import sys
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import pytest

from emrakul.invalid import Invalid
from emrakul.scaling import evaluate, formula_workers, workers
from emrakul.settings import Consensus, Settings

NAMES = {"num_params": 10**9, "worker_calculation_rate": 500_000, "worker_time_budget": 300}
THREE = Settings(consensus=Consensus(replicas=3))


@pytest.mark.parametrize(
    ("params", "wanted"), [(1, 1), (150_000_000, 1), (150_000_001, 2), (10**9, 7), (10**10, 67), (0, 1)]
)
def test_the_specifications_formula(params: int, wanted: int) -> None:
    assert formula_workers(Settings(), params) == wanted


@pytest.mark.parametrize(
    ("formula", "value"),
    [
        ("num_params / (worker_calculation_rate * worker_time_budget)", Fraction(20, 3)),
        ("num_params // worker_calculation_rate // worker_time_budget", 6),
        ("max(2, min(8, ceil(num_params / 150000000)))", 7),
        ("floor(-1.5) + 2 * (3 - 1)", 2),
        ("0.1 + 0.2", Fraction(3, 10)),
    ],
)
def test_arithmetic_is_exact(formula: str, value: Fraction | int) -> None:
    assert evaluate(formula, NAMES) == value


@pytest.mark.parametrize(
    "formula",
    [
        "__import__('os')", "num_params.bit_length()", "num_params ** 9", "[1][0]", "lambda: 1", "params",
        "1 if 1 else 2",
        "ceil()", "ceil(1, 2)", "max(1)", "ceil(x=1)", "ceil(*[1])", "'7'", "True", "1e400", "9" * 30, "1 +", "",
        "ceil",
        "1 + " * 60 + "1", "-" * 30 + "1", "1 / 0", "1; 2", "x := 3", "f'{1}'", "1 % 2", "1j",
    ],
)  # fmt: skip
def test_what_is_no_arithmetic_is_refused(formula: str) -> None:
    with pytest.raises(Invalid, match="worker_scaling_formula"):
        evaluate(formula, NAMES)


@pytest.mark.parametrize(
    ("formula", "agrees"),
    [
        ("ceil(num_params / (500000 * 300))", True),
        ("num_params / 500000 / 300", True),
        ("(num_params + 149999999) // 150000000", True),
        ("2 * num_params / (worker_calculation_rate * worker_time_budget)", True),
        ("8", True),
        ("ceil(num_params / (1000000 * 300))", False),
        ("num_params / (300 * 300)", False),
        ("num_params / (worker_calculation_rate * 600)", False),
        ("num_params // 7", False),
    ],
)
def test_literals_must_agree_with_the_keys(formula: str, agrees: bool) -> None:
    text = f"worker_scaling_formula: '{formula}'"
    if agrees:
        Settings.from_yaml(text)
    else:
        with pytest.raises(Invalid, match="write these names in the formula"):
            Settings.from_yaml(text)


def test_w_is_bounded_by_requests_and_on_one_machine_by_cores() -> None:
    assert workers(Settings(), num_params=1000, requests=16) == 4
    assert workers(Settings(), num_params=10**9, requests=200) == 7
    assert workers(Settings(), num_params=10**9, requests=5) == 5
    assert workers(Settings(), num_params=10**9, requests=200, cores=2) == 2


def test_consensus_needs_three_workers_whatever_the_cores() -> None:
    assert workers(THREE, num_params=1000, requests=1, cores=1) == 3
    assert workers(THREE, num_params=10**9, requests=200) == 7


def test_a_persons_number_wins_but_not_over_consensus() -> None:
    assert workers(Settings(), num_params=1000, requests=2, cores=2, override=7) == 7
    assert workers(THREE, num_params=1000, requests=2, override=3) == 3
    with pytest.raises(Invalid, match="cannot reach consensus"):
        workers(THREE, num_params=1000, requests=2, override=1)


AUTO = "worker_calculation_rate: auto"
NAMED = "ceil(num_params / (worker_calculation_rate * worker_time_budget))"


def test_auto_puts_the_measured_rate_into_the_default_formula() -> None:
    auto = Settings.from_yaml(AUTO)
    assert formula_workers(auto, 10**9, 50_000) == 67
    assert formula_workers(auto, 10**9) == formula_workers(Settings(), 10**9) == 7, "nothing measured: the default"
    assert formula_workers(Settings(), 10**9, 50_000) == 7, "a number is what was asked for"
    assert workers(auto, num_params=10**9, requests=200, measured=50_000) == 67
    assert workers(auto, num_params=10**9, requests=200, measured=100_000_000) == 4
    assert auto.digest() == Settings().digest(), "how fast workers are changes no decision, and no cycle's name"


@pytest.mark.parametrize(
    "formula", ["ceil(num_params/(500000*300))", NAMED, "max(2, num_params // worker_calculation_rate)"]
)
def test_auto_takes_the_default_formula_and_those_that_name_it(formula: str) -> None:
    assert Settings.from_yaml(f"{{{AUTO}, worker_scaling_formula: '{formula}'}}").worker_calculation_rate == "auto"


@pytest.mark.parametrize(
    "formula", ["8", "num_params / 500000 / 300", "2 * num_params / (500000 * worker_time_budget)"]
)
def test_auto_refuses_a_formula_that_does_not_name_it(formula: str) -> None:
    with pytest.raises(Invalid, match=r"does not name it.* write ceil\(num_params / \(worker_calculation_rate"):
        Settings.from_yaml(f"{{{AUTO}, worker_scaling_formula: '{formula}'}}")


@pytest.mark.parametrize("rate", ["0", "-5", "2.5", "fast", "true", "'500000'"])
def test_a_rate_is_a_whole_number_or_auto(rate: str) -> None:
    with pytest.raises(Invalid, match=r"worker_calculation_rate.*or auto"):
        Settings.from_yaml(f"worker_calculation_rate: {rate}")


class Cycle:
    """Garbage that only the collector finds, and whose end lets another thread run: where threads meet in a parser."""

    def __init__(self) -> None:
        self.me = self

    def __del__(self) -> None:
        sum(range(100))


def test_threads_may_read_formulas_at_once() -> None:
    def read(thread: int) -> None:
        for number in range(600):
            Cycle()
            evaluate(f"ceil(num_params / ({number + 1} * {thread + 1}))", NAMES)

    interval, thresholds = sys.getswitchinterval(), gc.get_threshold()
    try:
        sys.setswitchinterval(1e-6)
        gc.set_threshold(1)
        with ThreadPoolExecutor(8) as threads:
            list(threads.map(read, range(8)))
    finally:
        sys.setswitchinterval(interval)
        gc.set_threshold(*thresholds)
