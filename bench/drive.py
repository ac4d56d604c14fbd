"""A process of its own, as `emrakul run` is one: drives a cycle and says what each phase took and held.

    python bench/drive.py RUN --workers 2 --data FOLDER --raw-bytes N [--commit]

Before and after each phase, while no worker runs, it reads and writes in the plainest way (raw.py).
"""

from __future__ import annotations

import argparse
import json
import os
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import machine
from checkpoints import child
from raw import Raw, name_of_raw, raw_of

from emrakul.control import LOOK_GROWTH, LOOK_SECONDS, Controller, Scale, name_of
from emrakul.core import plan
from emrakul.core.snapshot import Ask, Phase
from emrakul.finding import Finding
from emrakul.rollback import Request, roll_back
from emrakul.runtime.local import LocalRuntime
from emrakul.settings import Settings
from leyline import layout, tensors
from leyline.log import Log
from leyline.messages import Candidate
from leyline.open import open_store
from leyline.ready import read_ready
from leyline.reasons import Reason
from leyline.store import CHUNK, ObjectStore

SETTINGS = Path(__file__).with_name("settings.yaml")
WEIGHTS = "model.safetensors"
EVERY = 0.05
"""Seconds between two looks at the processes' memory."""


@dataclass
class Watched:
    """Peak memory (VmHWM) of processes, kept as long as they can be seen."""

    peaks: dict[str, int] = field(default_factory=dict)
    pids: dict[int, str] = field(default_factory=dict)
    phase: str = ""

    def started(self, pid: int) -> None:
        self.pids[pid] = self.phase

    def look(self) -> None:
        for pid, phase in list(self.pids.items()):
            peak = hwm(pid)
            if peak:
                self._seen(phase, peak)
                if phase == Phase.VALIDATE.value and _has_torch(pid) is False:
                    self._seen("checks", peak)

    def _seen(self, role: str, peak: int) -> None:
        self.peaks[role] = max(peak, self.peaks.get(role, 0))

    def forever(self) -> None:
        while True:
            self.look()
            time.sleep(EVERY)


def hwm(pid: int) -> int:
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return 0


def _has_torch(pid: int) -> bool | None:
    """None: it is ending, and has no memory any more."""
    with suppress(OSError):
        maps = Path(f"/proc/{pid}/maps").read_text()
        return "libtorch" in maps if maps else None
    return None


@dataclass
class References:
    """Plain reading, writing and hashing between the phases: seconds for `size` bytes. In a process of its own."""

    run: str
    data: Path
    key: str
    size: int
    taken: list[dict[str, float]] = field(default_factory=list)

    def measure(self) -> None:
        self.taken.append(child("raw.py", self.run, str(self.data), self.key, str(self.size)))


def drive(controller: Controller, watched: Watched, references: References) -> dict[str, Any]:
    """The cycle to its end; seconds of each phase, and of what the control plane does between them."""
    seconds: dict[str, float] = {}
    busy: dict[str, float] = {}
    running: tuple[str, float, tuple[int, int]] | None = None
    pause = LOOK_SECONDS[0]
    while True:
        began = time.perf_counter()
        seen = controller.look()
        todo = seen.plan
        if running and todo.actions:
            seconds[running[0]] = time.perf_counter() - running[1]
            busy[running[0]] = machine.busy(running[2])
            running = None
            began = time.perf_counter()
        if todo.done:
            references.measure()
            end = seen.snapshot.end
            assert end is not None
            return {
                "seconds": seconds,
                "busy": busy,
                "outcome": f"{end.body.outcome}/{end.reason}",  # type: ignore[union-attr]
                "message": end.message,
            }
        launched = next((a for a in todo.actions if isinstance(a, plan.Launch)), None)
        if launched is not None:
            watched.phase = launched.phase.value
            references.measure()
            running = launched.phase.value, time.perf_counter(), machine.jiffies()
            controller.act(seen)
            pause = LOOK_SECONDS[0]
            continue
        controller.act(seen)
        if todo.actions:
            name = type(todo.actions[-1]).__name__.lower()
            seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - began
            pause = LOOK_SECONDS[0]
            continue
        controller.wait(seen.snapshot, pause)
        pause = min(LOOK_GROWTH * pause, LOOK_SECONDS[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--workers", type=int, required=True)
    parser.add_argument("--data", type=Path, required=True, help="where the store keeps its data")
    parser.add_argument("--raw-bytes", type=int, required=True)
    parser.add_argument("--number", type=int, default=1, help="how many cycles of this kind, with this one")
    parser.add_argument("--commit", action="store_true", help="commit the masks, and then move the tip back")
    given = parser.parse_args()

    store = open_store(given.run)
    log = Log(store)
    settings = Settings.from_yaml(SETTINGS.read_text()).model_copy(update={"enable_checkpoint_pruning": given.commit})
    base = log.tail().state.pairs[0]
    ask = Ask(base=base.record, settings=settings, runtime="local")
    watched = Watched()
    threading.Thread(target=watched.forever, daemon=True).start()
    key = layout.checkpoint(base.checkpoint, WEIGHTS)
    size = store.head(key).size
    references = References(given.run, given.data, key, min(given.raw_bytes, size))
    cycle = name_of(ask) + (f"-{given.number}" if given.number > 1 else "")
    controller = Controller(
        store,
        log,
        ask,
        lambda uri: LocalRuntime(uri, on_start=watched.started),
        scale=Scale(override=given.workers),
        cycle=cycle,
    )
    found = drive(controller, watched, references)
    said = {
        **found,
        "workers": given.workers,
        "bytes": size,
        "parameters": size // 4,
        "validation": json.loads(store.get(layout.validation_telemetry(cycle, base.record))),
        "analysis": analysed(store, cycle),
        "changed": changed(store, base.checkpoint, cycle, base.record),
        "raw": references.taken,
        "raw_bytes": references.size,
        "raw_name": name_of_raw(given.run),
        "peaks": {**watched.peaks, "emrakul": hwm(os.getpid())},
    }
    if given.commit:
        said["moved"], said["moved_raw"] = moved(store, log, raw_of(given.run, given.data))
    else:
        store.delete(layout.candidate(cycle, base.record, WEIGHTS))  # the disk is not endless
    print(json.dumps(said))


def analysed(store: ObjectStore, cycle: str) -> dict[str, float]:
    """What the workers' own answers say: bytes read, and busy seconds, over all workers."""
    found = {"requests": 0.0, "bytes": 0.0, "seconds": 0.0}
    for head in store.list(layout.responses(cycle)):
        if "apply-" not in head.key:
            message = json.loads(tensors.unpack(store.get(head.key), name=head.key)[1]["message"])
            found["requests"] += 1
            found["bytes"] += message["bytes_read"]
            found["seconds"] += message["seconds"]
    return found


def changed(store: ObjectStore, checkpoint: str, cycle: str, base: int) -> int:
    """Bytes of the base whose chunks have other digests in the candidate: the checks must read these too."""
    key = layout.manifest(cycle, base)
    copy = Candidate.parse(store.get(key), name=key).objects[0].digest
    source = read_ready(store, checkpoint, None).object(WEIGHTS).digest
    numbers = [n for n, (mine, theirs) in enumerate(zip(copy.chunks, source.chunks, strict=True)) if mine != theirs]
    return sum(min(CHUNK, source.size - number * CHUNK) for number in numbers)


def moved(store: ObjectStore, log: Log, raw: Raw) -> tuple[float, float]:
    """Seconds to move the tip back to where it was before the cycle, and to write a small object plainly."""
    request = Request(id="bench", strategy="immediate", finding=Finding(Reason.ASKED, "the bench asks for it"))
    raw.write("raw/first", 1000)  # the first call of a client sets it up
    began = time.perf_counter()
    roll_back(store, log, request, trust=None)
    done = time.perf_counter()
    raw.write("raw/small", 1000)
    return done - began, time.perf_counter() - done


if __name__ == "__main__":
    main()
