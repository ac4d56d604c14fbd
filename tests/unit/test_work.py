"""What workers say of their work: in their answers, in a cycle's status and explanation, and in the next cycle's W."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

import drafts
from emrakul.api.cycle import CycleStatus
from emrakul.cli import main
from emrakul.cluster.status import Facts, cycle_status
from emrakul.core.plan import Plan
from emrakul.core.snapshot import Phase, Snapshot
from emrakul.settings import Settings
from emrakul.timeline import phases
from emrakul.work import Rate, work
from leyline import answers, layout
from leyline.candidate import Copied
from leyline.local import LocalStore
from leyline.log import Log
from leyline.messages import StructuralAnalysisResponse
from leyline.store import ObjectStore
from leyline.work import Work, add_up
from whole import SINGLE_WEIGHTS, Threads, committed, cycle, publish

AUTO = Settings.from_yaml(SINGLE_WEIGHTS + "worker_calculation_rate: auto\nworker_time_budget: 300\n")
NUMBER = Settings.from_yaml(SINGLE_WEIGHTS)
EARLIER = drafts.cycle(2)


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    found = LocalStore(tmp_path / "run")
    publish(found)
    return found


class Noted(Threads):
    """Remembers how many workers were started for each phase."""

    started: dict[Phase, int]

    def start(self, phase: Phase, *, workers: int, **launch: Any) -> None:
        self.started = {**getattr(self, "started", {}), phase: workers}
        super().start(phase, workers=workers, **launch)


def driven(store: ObjectStore, settings: Settings) -> tuple[Snapshot, dict[Phase, int]]:
    """A cycle, and its numbers of workers as nobody overrides them."""
    made: list[Noted] = []

    def runtime(uri: str) -> Noted:
        made.append(Noted(store, uri))
        return made[0]

    return cycle(store, settings, workers=None, runtime=runtime), made[0].started


def measured(store: ObjectStore, request: str, *, parameters: int, seconds: float, **said: Any) -> None:
    """An answer of an earlier cycle."""
    known = {"idempotency_key": "k", "request": request, "parameters": parameters, "seconds": seconds}
    message = StructuralAnalysisResponse.model_validate(known | {"bytes_read": 4 * parameters} | said)
    store.put_if_absent(answers.path(EARLIER, request, 0, 0), answers.pack(message, {}))


def earlier_cycle(store: ObjectStore) -> None:
    """One that scored one parameter a second in its whole rounds, and seemed to be faster in the others."""
    log = Log(store)
    log.append(drafts.admitted(2), base=-1)
    measured(store, "1-0", parameters=30, seconds=20)
    measured(store, "1-1", parameters=10, seconds=20)
    measured(store, "1-2", parameters=10**9, seconds=1, status="failed")
    measured(store, "3-0", parameters=10**9, seconds=1)
    log.append(drafts.ended(2), base=-1)


def rate_of(store: ObjectStore, snapshot: Snapshot) -> Rate:
    key = layout.calculation_rate(snapshot.cycle)
    return Rate.parse(store.get(key), name=key)


def test_auto_takes_the_rate_of_the_runs_newest_measured_cycle(store: LocalStore) -> None:
    earlier_cycle(store)
    ended, started = driven(store, AUTO)
    committed(ended)
    assert rate_of(store, ended) == Rate(worker_calculation_rate=1, cycle=EARLIER)
    assert started[Phase.ANALYSE] == 6, "1,569 parameters at one a second in 300 s each"


def test_without_a_measurement_auto_is_the_specifications_default(store: LocalStore) -> None:
    ended, started = driven(store, AUTO)
    assert rate_of(store, ended) == Rate(worker_calculation_rate=500_000)
    assert started[Phase.ANALYSE] == 4, "analysis_parallel_workers"


def test_a_number_looks_nowhere(store: LocalStore) -> None:
    earlier_cycle(store)
    ended, started = driven(store, NUMBER)
    assert started[Phase.ANALYSE] == 4
    assert not list(store.list(layout.calculation_rate(ended.cycle)))


class Dies(Noted):
    """The operator's process ends as it starts the analysis."""

    def start(self, phase: Phase, *, workers: int, **launch: Any) -> None:
        self.started = {phase: workers}
        raise KeyboardInterrupt


def test_after_a_restart_w_is_the_same_though_gc_took_the_answers(store: LocalStore) -> None:
    earlier_cycle(store)
    made: list[Dies] = []

    def runtime(uri: str) -> Dies:
        made.append(Dies(store, uri))
        return made[0]

    with pytest.raises(KeyboardInterrupt):
        cycle(store, AUTO, workers=None, runtime=runtime)
    for head in list(store.list(layout.responses(EARLIER))):
        store.delete(head.key)
    ended, started = driven(store, AUTO)
    committed(ended)
    assert made[0].started[Phase.ANALYSE] == started[Phase.ANALYSE] == 6


def test_the_rate_changes_no_key_and_no_decision(tmp_path: Path) -> None:
    found = []
    for name, settings in (("auto", AUTO), ("number", NUMBER)):
        store = LocalStore(tmp_path / name)
        publish(store)
        earlier_cycle(store)
        ended, _ = driven(store, settings)
        base = committed(ended)
        keys = (
            layout.requests(ended.cycle, 1),
            layout.decision(ended.cycle),
            layout.manifest(ended.cycle, base),
            layout.masks(ended.cycle, base),
            layout.verdict(ended.cycle, base),
        )
        found.append((ended.cycle, [store.get(key) for key in keys]))
    assert found[0] == found[1]


# --- in answers, status and explanation -------------------------------------------------------------------------------


def test_every_phase_says_what_it_read_and_how_long_it_took(store: LocalStore) -> None:
    ended = cycle(store, NUMBER, workers=2)
    base = committed(ended)
    size = store.head("checkpoints/100-0-00000064/model.safetensors").size
    found = work(store, ended.cycle, base)
    assert found[Phase.ANALYSE].bytes_read >= 3 * size, "three rounds, and all of a small checkpoint is one chunk"
    assert size <= found[Phase.APPLY].bytes_read <= 2 * size, "of so small a checkpoint the header is all"
    assert found[Phase.VALIDATE].bytes_read >= 2 * size, "candidate and base"
    assert found[Phase.APPLY].parameters == 1578, "buffers are copied too"
    assert found[Phase.VALIDATE].parameters == 1569
    assert all(one.seconds > 0 and one.peak_rss > 10e6 for one in found.values())
    key = next(store.list(layout.responses(ended.cycle, f"apply-{base}-0"))).key
    assert Copied.parse(store.get(key), name=key).bytes_read >= size


def test_what_gc_deleted_is_in_no_phase(store: LocalStore) -> None:
    ended = cycle(store, NUMBER, workers=2)
    base = committed(ended)
    assert ended.admitted is not None
    told = phases(store, ended.admitted, ended.end)
    assert told.keys() == {"analyse", "apply", "validate", "cycle"}
    store.delete(layout.manifest(ended.cycle, base))
    assert phases(store, ended.admitted, ended.end) == {name: told[name] for name in ("analyse", "cycle")}


def test_a_cycle_that_is_gone_or_damaged_has_no_work(store: LocalStore) -> None:
    store.put_if_absent(answers.path(EARLIER, "0-0", 0, 0), b"junk")
    store.put_if_absent(f"{layout.responses(EARLIER, 'apply-2-0')}0-0", b"junk")
    store.put_if_absent(layout.validation_work(EARLIER, 2), b"junk")
    assert work(store, EARLIER, 2) == {}
    assert add_up(()) == Work()


def test_a_status_shows_the_rates_that_were_measured(store: LocalStore) -> None:
    ended = cycle(store, NUMBER)
    done = {
        Phase.ANALYSE: Work(seconds=8, bytes_read=4_000_000, parameters=1_000_000),
        Phase.APPLY: Work(seconds=9, bytes_read=4_000_000),
        Phase.VALIDATE: Work(seconds=2, bytes_read=6_000_000),
    }
    facts = Facts(run=store.uri, seconds={"analyse": 4.0, "apply": 2.0, "validate": 30.0}, work=done)
    now = datetime(2026, 1, 1, tzinfo=UTC)
    rates = cycle_status(CycleStatus(), ended, Plan(state="Committed"), facts, generation=1, now=now).rates
    assert rates is not None
    assert (rates.analysis, rates.apply) == (1_000_000, 2_000_000), "of all workers, over the time of the phase"
    assert rates.validation == 3_000_000, "the gate's time is not the comparison's"
    assert rates.calculation == 125_000, "of one worker"
    none = Facts(run=store.uri, seconds={"analyse": 4.0})
    assert cycle_status(CycleStatus(), ended, Plan(state="x"), none, generation=1, now=now).rates is None


def test_explain_tells_what_the_workers_read(store: LocalStore, capsys: pytest.CaptureFixture[str]) -> None:
    ended = cycle(store, NUMBER)
    assert main(["explain", store.uri, ended.cycle]) == 0
    said = capsys.readouterr().out
    assert all(f"{phase} read" in said for phase in ("analyse", "apply", "validate"))
    assert "parameters/s; memory at most" in said
