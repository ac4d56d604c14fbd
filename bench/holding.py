"""A process of its own with everything that the operator imports: holds many live cycles, and says what that takes.

    python bench/holding.py RUN FOLDER COUNT

RUN is a published one; those in FOLDER are links to its objects. Each cycle is driven until its workers would run.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from datetime import datetime
from pathlib import Path

from drive import SETTINGS, hwm
from lines import seconds

import emrakul.cluster.main
from emrakul.control import Controller
from emrakul.core.snapshot import Ask, Job, Phase
from emrakul.settings import Settings
from leyline.local import LocalStore
from leyline.log import Log


class Waiting:
    """A runtime whose workers run for ever and do nothing."""

    name = "local"

    def __init__(self) -> None:
        self._jobs: tuple[Job, ...] = ()

    def start(self, phase: Phase, *, launch: int, step: int, now: datetime, **_: object) -> None:
        self._jobs = (*self._jobs, Job(phase=phase, launch=launch, step=step, created=now, running=True))

    def jobs(self) -> tuple[Job, ...]:
        return self._jobs

    def stop(self, phase: Phase | None = None) -> None:
        """There is nothing to stop."""


def live(run: Path, settings: Settings) -> Controller:
    """A cycle on the run's checkpoint, driven until it waits for its workers."""
    store = LocalStore(run)
    log = Log(store)
    base = log.tail().state.pairs[0].record
    controller = Controller(store, log, Ask(base=base, settings=settings, runtime="local"), lambda _: Waiting())
    while controller.step()[1].actions:
        pass
    return controller


def main() -> None:
    source, folder, count = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    settings = Settings.from_yaml(SETTINGS.read_text())
    assert emrakul.cluster.main
    before = hwm(os.getpid())
    held = []
    for number in range(count):
        run = folder / f"run-{number}"
        shutil.copytree(source, run, copy_function=os.link)
        held.append(live(run, settings))
    looks = [seconds(controller.look) for controller in held]
    print(json.dumps({"before": before, "peak": hwm(os.getpid()), "looks": looks}))


if __name__ == "__main__":
    main()
