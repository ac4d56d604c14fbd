"""Workers as subprocesses of this one: the runtime for one machine, and the CLI's default."""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from emrakul.core.snapshot import Job, Phase
from emrakul.runtime.commands import command
from leyline import exits

RESTARTS = 2
"""Times that a worker which died (and did not say why) is started again, as a Job's backoffLimitPerIndex."""
STOP_SECONDS = 5.0
_FINAL = (exits.BAD_INPUT, exits.GAVE_UP, exits.KEY)
_MESSAGE_BYTES = 2000


@dataclass
class _Worker:
    """One worker process and its restarts."""

    arguments: tuple[str, ...]
    process: subprocess.Popen[bytes]
    log: tempfile._TemporaryFileWrapper[bytes]
    restarts: int = 0
    peak: int = 0
    """Bytes, the largest of its processes that was seen."""

    def said(self) -> str:
        """The last line that it wrote to standard error."""
        self.log.flush()
        size = self.log.seek(0, os.SEEK_END)
        self.log.seek(max(0, size - _MESSAGE_BYTES))
        return exits.sentence(self.log.read().decode(errors="replace"))


@dataclass
class _Launch:
    phase: Phase
    launch: int
    step: int
    created: datetime
    limit: int
    workers: list[_Worker] = field(default_factory=list)


class LocalRuntime:
    """Starts, watches and stops the workers of one cycle. Their output is kept only to say what went wrong."""

    name = "local"

    def __init__(
        self,
        cycle_uri: str,
        *,
        environment: Mapping[str, str] | None = None,
        on_start: Callable[[int], None] | None = None,
    ) -> None:
        self._cycle_uri = cycle_uri
        self._environment = {**os.environ, **(environment or {})}
        self._launches: list[_Launch] = []
        self._on_start = on_start

    def start(self, phase: Phase, *, launch: int, step: int, workers: int, memory_bytes: int, now: datetime) -> None:
        """Start `workers` processes; at most `memory_bytes` of data each."""
        begun = _Launch(phase, launch, step, now, memory_bytes)
        self._launches.append(begun)
        for number in range(workers):
            arguments = command(phase, cycle_uri=self._cycle_uri, step=step, launch=launch, worker=number, of=workers)
            log = tempfile.NamedTemporaryFile(prefix=f"emrakul-{phase.value}-{number}-", suffix=".log")  # noqa: SIM115
            begun.workers.append(_Worker(arguments, self._spawn(arguments, log, begun), log))

    def jobs(self) -> tuple[Job, ...]:
        """Every launch and what has become of it; workers that died are started again here."""
        return tuple(self._job(launch) for launch in self._launches)

    def stop(self, phase: Phase | None = None) -> None:
        """Stop a phase's workers (or all) and wait until they are gone."""
        workers = [w for launch in self._launches if phase in (None, launch.phase) for w in launch.workers]
        running = [worker for worker in workers if worker.process.poll() is None]
        for worker in running:
            worker.process.send_signal(signal.SIGTERM)
        end = time.monotonic() + STOP_SECONDS
        for worker in running:
            try:
                worker.process.wait(max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                worker.process.kill()
                worker.process.wait()
        for worker in workers:
            worker.restarts = RESTARTS

    def _job(self, launch: _Launch) -> Job:
        running, codes, message, memory = False, [], "", ""
        for worker in launch.workers:
            code = _reap(worker)
            if code is not None and code not in (exits.DONE, *_FINAL) and worker.restarts < RESTARTS:
                worker.restarts += 1
                worker.process = self._spawn(worker.arguments, worker.log, launch)
                code = None
            if code is None:
                running = True
            elif code != exits.DONE:
                codes.append(code)
                message = worker.said() or message
                if code == exits.OUT_OF_MEMORY:
                    memory = _used(worker.peak, launch.limit)
        return Job(
            phase=launch.phase,
            launch=launch.launch,
            step=launch.step,
            created=launch.created,
            running=running,
            exits=tuple(codes),
            out_of_memory=memory,
            message=message,
        )

    def _spawn(
        self, arguments: tuple[str, ...], log: tempfile._TemporaryFileWrapper[bytes], launch: _Launch
    ) -> subprocess.Popen[bytes]:
        def limits() -> None:
            resource.setrlimit(resource.RLIMIT_DATA, (launch.limit, launch.limit))
            _die_with_parent()

        process = subprocess.Popen(  # noqa: S603  our own interpreter and modules
            (sys.executable, *arguments),
            env=self._environment | ({"OMP_NUM_THREADS": "1"} if launch.phase is not Phase.VALIDATE else {}),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=log,
            # a session of its own: Ctrl-C in the terminal reaches us, and we stop the workers
            start_new_session=True,
            preexec_fn=limits,
        )
        if self._on_start is not None:
            self._on_start(process.pid)
        return process


def _reap(worker: _Worker) -> int | None:
    """The exit code, or None while it runs; keeps its peak memory as long as it can be seen.

    Not from wait4: ru_maxrss of a child begins at what its parent held when it was started.
    """
    if worker.process.returncode is None:
        worker.peak = max(worker.peak, _peak_rss(worker.process.pid))
    return worker.process.poll()


def _peak_rss(pid: int) -> int:
    """Bytes of memory that a running process held at most; 0 where there is no /proc, or nothing is left of it."""
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return 0


def _used(peak: int, limit: int) -> str:
    held = f"a worker's peak was {peak / 1e6:.0f} MB, " if peak else ""
    return f"{held}the limit is {limit / 1e6:.0f} MB"


def _die_with_parent() -> None:
    """Ask the kernel to end this worker when the process that started it is killed: nobody else would."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)
