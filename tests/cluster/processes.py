"""Long-running processes that survive the command that started them, and are ended by their own id."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Daemon:
    """One process: `folder` holds its `<name>.pid` and `<name>.log`.

    Python's subprocess ties a process to its parent; here another command, or a run after a crash, must find it again.
    """

    name: str
    command: tuple[str, ...]
    folder: Path
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def log(self) -> Path:
        return self.folder / f"{self.name}.log"

    @property
    def _pid_file(self) -> Path:
        return self.folder / f"{self.name}.pid"

    def start(self) -> None:
        """Starts it unless it runs."""
        if self.running:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        out = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            pid = os.posix_spawnp(
                self.command[0],
                self.command,
                {**os.environ, **self.environment},
                file_actions=[
                    (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                    (os.POSIX_SPAWN_DUP2, out, 1),
                    (os.POSIX_SPAWN_DUP2, out, 2),
                ],
                setsid=True,  # Ctrl-C in the terminal is for the tests
            )
        finally:
            os.close(out)
        self._pid_file.write_text(identity(pid) or "")

    def stop(self, *, grace: float = 10) -> None:
        """Ends it: SIGTERM, and SIGKILL when `grace` seconds were not enough."""
        for number, seconds in ((signal.SIGTERM, grace), (signal.SIGKILL, 10)):
            if not self.running:
                break
            with suppress(ProcessLookupError):
                os.kill(self._pid, number)
            with suppress(TimeoutError):
                wait_until(f"{self.name} has ended", lambda: not self.running, seconds=seconds, every=0.05)
        self._pid_file.unlink(missing_ok=True)

    @property
    def running(self) -> bool:
        """Whether the very process that was started still lives: an id alone may have gone to another process."""
        with suppress(FileNotFoundError, ValueError):
            with suppress(ChildProcessError):  # a child that ended stays a zombie until its parent asks
                os.waitpid(self._pid, os.WNOHANG)
            return identity(self._pid) == self._pid_file.read_text()
        return False

    @property
    def _pid(self) -> int:
        return int(self._pid_file.read_text().split()[0])

    def wait(self, ready: Callable[[], bool], *, seconds: float) -> None:
        """Waits until `ready()`; an end before that, or too long a wait, is an error that shows the log's end."""

        def settled() -> bool:
            return not self.running or ready()

        try:
            wait_until(f"{self.name} is ready", settled, seconds=seconds)
        except TimeoutError as error:
            raise RuntimeError(f"{error}; the end of {self.log}:\n{self._tail()}") from None
        if not self.running:
            raise RuntimeError(f"{self.name} ended before it was ready; the end of {self.log}:\n{self._tail()}")

    def _tail(self) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-15:])


def identity(pid: int) -> str | None:
    """`pid start-time`, which no two processes of one boot share; None for one that has ended."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    state, *rest = stat.rpartition(")")[2].split()  # the name before it may hold spaces
    return None if state in "ZX" else f"{pid} {rest[18]}"


def wait_until(what: str, probe: Callable[[], bool], *, seconds: float, every: float = 0.2) -> None:
    """Polls `probe` until it is true; a TimeoutError after `seconds` says `what` did not come."""
    deadline = time.monotonic() + seconds
    while not probe():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {seconds:.0f} s: {what}")
        time.sleep(every)
