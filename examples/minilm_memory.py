"""How much memory the workers of a run's cycles took at most, read from /proc while they run."""

from __future__ import annotations

import threading
from pathlib import Path
from types import TracebackType

_WORKERS = ("elesh", "kasmina.apply", "urabrask")
_SECONDS = 0.02


class Peaks:
    """A context in which the workers of one run are watched; afterwards `bytes` has each role's largest peak.

    VmHWM, which each process begins anew: ru_maxrss of a child would begin at what its parent held.
    """

    def __init__(self, run_uri: str) -> None:
        self.bytes: dict[str, int] = {}
        self._uri = run_uri
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Peaks:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(_SECONDS):
            for process in Path("/proc").glob("[0-9]*"):
                try:
                    arguments = (process / "cmdline").read_bytes().decode(errors="replace").split("\0")
                    if not any(argument.startswith(f"{self._uri}/cycles/") for argument in arguments):
                        continue
                    status = (process / "status").read_text()
                except OSError:  # it has ended
                    continue
                role = next((name for name in _WORKERS if name in arguments), None)
                peak = next((line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:")), None)
                if role and peak:
                    self.bytes[role] = max(self.bytes.get(role, 0), int(peak) * 1024)
