"""Whole cycles on checkpoints that were written by hand: the real control plane and the real workers, without torch.

Nothing here evaluates a model, so the validator's accuracy gate and its proof are left out; all its other checks run.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest.mock import patch

import numpy as np
from numpy.typing import NDArray

from builders import MODEL_ID, RUN_ID, Run, make_run
from drafts import genesis, opened, published
from elesh import worker as elesh
from emrakul.control import Controller, Scale
from emrakul.core.snapshot import Ask, Phase, Snapshot
from emrakul.runtime.commands import command
from emrakul.settings import Settings
from inprocess import Finishing
from kasmina import apply
from leyline import exits, layout
from leyline.log import Log
from leyline.masks import Masks
from leyline.messages import Candidate
from leyline.store import ObjectStore
from leyline.topology import Topology
from limits import memory_limit
from urabrask.__main__ import judge

BY_MAGNITUDE = """
enable_checkpoint_pruning: true
importance: [magnitude]
safety_margin: 0.0
conservative_threshold: 0.15
structured_pruning:
  progressive_schedule:
    {phase_1_epochs: 0, phase_2_start_epoch: 1,
     conservative_threshold: 0.15, moderate_threshold: 0.15, aggressive_threshold: 0.15}
"""
"""Units, by the weights alone; up to 15 % of them."""
SINGLE_WEIGHTS = BY_MAGNITUDE + "  enabled: false\n"
"""Single weights instead."""

_UNGATED = """
import sys
import urabrask.__main__ as validator
validator._measure = lambda *_: None
code = validator.main(sys.argv[1:])
assert "torch" not in sys.modules
sys.exit(code)
"""


class Threads(Finishing):
    """Its workers are threads of this process, all at once."""

    def __init__(self, store: ObjectStore, cycle_uri: str) -> None:
        super().__init__()
        self._store = store
        self._cycle = cycle_uri.rpartition("/")[2]

    def _codes(self, phase: Phase, launch: int, step: int, workers: int) -> list[int]:
        with ThreadPoolExecutor(workers) as pool:
            begun = [pool.submit(self._work, phase, launch, step, number, workers) for number in range(workers)]
        return [one.result() for one in begun]

    def _work(self, phase: Phase, launch: int, step: int, worker: int, of: int) -> int:
        store, cycle = self._store, self._cycle
        if phase is Phase.ANALYSE:
            share: dict[str, Any] = {"worker": worker, "of": of, "launch": launch, "log": lambda _line: None}
            return elesh.run(store, cycle=cycle, round_=step, **share)
        store.put_if_absent(layout.started(cycle, phase.value, launch), b"started")
        if phase is Phase.APPLY:
            plan = apply.read_plan(store, cycle=cycle, base=step, trust=None)
            return exits.GAVE_UP if apply.apply(store, plan, worker=worker, of=of) else exits.DONE
        with patch("urabrask.__main__._measure", lambda *_: None):
            judge(store, cycle=cycle, base=step, trust=None)
        return exits.DONE


class Limited(Finishing):
    """Its workers are processes, each under a hard limit of `memory` bytes."""

    def __init__(self, cycle_uri: str, memory: int) -> None:
        super().__init__()
        self.cycle_uri, self.memory = cycle_uri, memory
        self.ended: list[tuple[Phase, int, str]] = []
        """Exit code and last words of every worker."""

    def _work(self, phase: Phase, launch: int, step: int, worker: int, of: int) -> int:
        known = command(phase, cycle_uri=self.cycle_uri, step=step, launch=launch, worker=worker, of=of)
        arguments = ("-c", _UNGATED, *known[2:]) if phase is Phase.VALIDATE else known
        with memory_limit(self.memory) as limit:
            done = subprocess.run(
                (sys.executable, *arguments), preexec_fn=limit, capture_output=True, text=True, timeout=280
            )
        self.ended.append((phase, done.returncode, done.stderr.strip()[-2000:]))
        return done.returncode


def publish(store: ObjectStore, **content: Any) -> Run:
    """A run with one checkpoint, as `builders.make_run` takes it, in its log."""
    run = make_run(store, **content)
    log = Log(store)
    log.create(genesis(run=RUN_ID, model=run.topology.model_id or MODEL_ID))
    log.append(opened("trainer"), base=-1)
    log.append(published(run.metadata.name, term=log.tail().state.term, step=run.metadata.step), base=-1)
    return run


def cycle(
    store: ObjectStore,
    settings: Settings,
    *,
    workers: int | None = 1,
    runtime: Callable[[str], Any] | None = None,
) -> Snapshot:
    """One cycle on the run's tip, to its end."""
    log = Log(store)
    tip = log.tail().state.tip
    assert tip is not None
    ask = Ask(base=tip, settings=settings, runtime="local")
    make = runtime or (lambda uri: Threads(store, uri))
    return Controller(store, log, ask, make, scale=Scale(override=workers)).run()[0]


def committed(snapshot: Snapshot) -> int:
    """The base of a cycle that must have committed."""
    assert snapshot.end is not None
    assert snapshot.end.reason == "Pruned", f"{snapshot.end.reason}: {snapshot.end.message}"
    return snapshot.base


def manifest_of(store: ObjectStore, snapshot: Snapshot) -> Candidate:
    key = layout.manifest(snapshot.cycle, committed(snapshot))
    return Candidate.parse(store.get(key), name=key)


def masks_of_cycle(store: ObjectStore, snapshot: Snapshot) -> Masks:
    ref = manifest_of(store, snapshot).masks
    return Masks.from_bytes(store.get(ref.path), name=ref.path)


def gone(masks: Masks, topology: Topology) -> Mapping[str, NDArray[np.bool_]]:
    """Which elements of each parameter are pruned, flat; parameters that lose none are left out."""
    dead = {name: masks.dead(name) for name in topology.parameters}
    return {name: one.full().reshape(-1) for name, one in dead.items() if one is not None}
