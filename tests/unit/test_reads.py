"""No byte is read twice that need not be: counted at the store, through the workers of whole cycles."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

import builders
from builders import MODEL_ID, Run
from counted import Counted
from emrakul.core.snapshot import Phase
from emrakul.settings import Settings
from emrakul.work import work
from leyline import layout
from leyline.claims import Task, order
from leyline.ids import parameter_uuid
from leyline.local import LocalStore
from leyline.store import CHUNK
from leyline.topology import Group, Kind, Member, Parameter, Topology
from whole import BY_MAGNITUDE, SINGLE_WEIGHTS, Threads, committed, cycle, publish

ROWS, COLUMNS, LAYERS = 2500, 2000, 5
NAMES = [f"layer{number}.weight" for number in range(LAYERS)]


def topology() -> Topology:
    """Five layers of 5 M weights, each a request of its own: none of them begins or ends with a chunk."""
    shape = (ROWS, COLUMNS)
    members = tuple(Member(parameter=name, role="producer", axis=0) for name in NAMES)
    group = Group(id="rows", kind=Kind.CHANNEL, units=ROWS, members=members, gates=("x",))
    parameters = {name: Parameter(uuid=parameter_uuid(name, shape, MODEL_ID), shape=shape) for name in NAMES}
    return Topology(model_id=MODEL_ID, parameters=parameters, groups=(group,))


def published(folder: Path, dtype: str, names: list[str], shards: int) -> tuple[Counted, Run]:
    random = np.random.default_rng(0)
    weights = {name: builders.tensor(random.random((ROWS, COLUMNS), dtype=np.float32) + 1, dtype) for name in names}
    store = Counted(LocalStore(folder))
    return store, publish(store, topology=topology(), weights=weights, shards=shards)


@pytest.fixture(scope="module", params=["F32", "F32 in two shards", "BF16, last layer first"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Counted, Run]:
    names = NAMES[::-1] if "last" in request.param else NAMES
    dtype, shards = request.param.split(" ")[0].strip(","), 2 if "shards" in request.param else 1
    return published(tmp_path_factory.mktemp("run"), dtype, names, shards)


def once(run: Run, times: int = 1) -> Counter[tuple[str, int]]:
    """Every chunk of the weights, as often as this."""
    sizes = {path: run.metadata.object(path).digest.size for path in run.metadata.weights if "index" not in path}
    return Counter({(run.prefix + path, n): times for path, size in sizes.items() for n in range(-(-size // CHUNK))})


class Phases(Threads):
    """Remembers what each phase read of base and candidate."""

    def __init__(self, store: Counted, cycle_uri: str) -> None:
        super().__init__(store, cycle_uri)
        self.store = store
        self.base: dict[str, Counter[tuple[str, int]]] = {}
        self.candidate: dict[str, Counter[tuple[str, int]]] = {}

    def start(self, phase: Phase, **launch: object) -> None:
        self.store.forget()
        super().start(phase, **launch)
        name = f"{phase.value} {launch['step']}" if phase is Phase.ANALYSE else phase.value
        self.base[name] = self.store.chunks("checkpoints/")
        self.candidate[name] = self.store.chunks("cycles/")


def read(store: Counted, text: str, workers: int) -> tuple[Phases, str]:
    """What the phases of a cycle read, and its name."""
    made: list[Phases] = []

    def runtime(uri: str) -> Phases:
        made.append(Phases(store, uri))
        return made[0]

    ended = cycle(store, Settings.from_yaml(text), workers=workers, runtime=runtime)
    committed(ended)
    return made[0], ended.cycle


def test_a_structured_cycle_reads_its_base_once_a_phase(case: tuple[Counted, Run]) -> None:
    store, run = case
    phases, name = read(store, BY_MAGNITUDE, 1)
    assert phases.base["analyse 0"] == once(run)
    told = work(store, name, None)[Phase.ANALYSE].bytes_read
    assert 0 <= told - sum(run.metadata.object(path).digest.size for path in run.metadata.weights) < 600_000
    assert phases.base["apply"] == once(run)
    copies = {key.rpartition("/")[2]: n for (key, _), n in phases.candidate["validate"].items()}
    assert copies
    assert set(phases.candidate["validate"].values()) == {1}
    assert phases.candidate["validate"].total() == once(run).total()
    assert phases.base["validate"] <= once(run), "of the base what differs, once"


def test_basic_pruning_reads_its_base_three_times_and_twice_where_keys_are_short(tmp_path: Path) -> None:
    for dtype, refined in (("F32", 1), ("BF16", 0)):
        store, run = published(tmp_path / dtype, dtype, NAMES, 1)
        phases, _ = read(store, SINGLE_WEIGHTS, 1)
        assert phases.base["analyse 1"] == once(run)
        assert phases.base["analyse 2"].total() == refined * once(run).total(), dtype
        assert phases.base["analyse 3"] == once(run)
        assert phases.base["apply"] == once(run)


def test_more_workers_read_again_what_lies_across_their_borders_and_no_more(tmp_path: Path) -> None:
    store, run = published(tmp_path, "F32", NAMES, 1)
    phases, name = read(store, BY_MAGNITUDE, 3)
    tasks = [Task(id=f"0-{number}") for number in range(LAYERS)]
    answered = {
        task.id: int(next(store.list(layout.responses(name, task.id))).key.rpartition("/")[2].partition("-")[0])
        for task in tasks
    }
    borders = sum(answered[a.id] != answered[b.id] for a, b in pairwise(tasks))
    stolen = sum(task not in order(tasks, worker=answered[task.id], of=3)[0] for task in tasks)
    twice = phases.base["analyse 0"].total() - once(run).total()
    assert 0 < twice <= borders + 4 * stolen, "of what is stolen, two chunks had been read ahead"
