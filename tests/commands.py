"""`emrakul run` as a process of its own, its workers as the system sees them, and waiting for what they write."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

MANIFEST = """\
apiVersion: emrakul.dev/v1alpha1
kind: PruningPolicy
metadata: {{name: small}}
spec:
  run: {run}
  settings:
    enableCheckpointPruning: true
    minImportanceSamples: 200
    structuredPruning:
      enabled: {structured}
      progressiveSchedule:
        {{phase1Epochs: 1, phase2StartEpoch: 2,
         conservativeThreshold: "0.05", moderateThreshold: "0.05", aggressiveThreshold: "0.05"}}
{more}---
apiVersion: emrakul.dev/v1alpha1
kind: PruningCycle
metadata: {{name: small-1}}
spec:
  checkpoint: latest
  policyRef: {{name: small}}
"""
"""The settings of runs.SETTINGS, as a resource has them."""

SECONDS = 60.0
"""Nothing here takes so long; who waits longer has waited in vain."""


@dataclass(frozen=True)
class Command:
    """A running `emrakul run`."""

    process: subprocess.Popen[str]

    @property
    def pid(self) -> int:
        return self.process.pid

    def end(self) -> dict[str, Any]:
        """Its JSON, with its exit code as "exit" and what it said on stderr as "said"."""
        out, said = self.process.communicate(timeout=2 * SECONDS)
        return {"outcome": None, **(json.loads(out) if out else {}), "exit": self.process.returncode, "said": said}

    def kill(self) -> None:
        """SIGKILL, as the kernel does it when memory runs out; waits until its workers are gone too."""
        workers = self.workers()
        self.process.kill()
        self.process.communicate(timeout=SECONDS)
        wait(lambda: not any(_is_alive(pid) for pid in workers))

    def workers(self) -> Mapping[int, str]:
        """Command lines of its living children, by pid."""
        found = {}
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                state, parent = stat.read_text().rpartition(")")[2].split()[:2]
                words = stat.with_name("cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue  # it has just ended
            if int(parent) == self.pid and state != "Z":
                found[int(stat.parent.name)] = words
        return found

    def worker(self, module: str) -> int:
        """Pid of a worker, once there is one."""
        return wait(lambda: next((pid for pid, words in self.workers().items() if f"-m {module} " in words), None))


def emrakul(*arguments: str) -> dict[str, Any]:
    """The JSON of a command that succeeds, from a process of its own."""
    command = (sys.executable, "-m", "emrakul", *arguments, "--output", "json")
    said = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert isinstance(said, dict)
    return said


def emrakul_run(folder: Path, uri: str, *arguments: str, more: str = "", structured: bool = True) -> Command:
    """Start the command; `more` are further lines of settings in the policy, indented by four."""
    manifest = folder / f"cycle-{abs(hash(more))}.yaml"
    manifest.write_text(MANIFEST.format(run=uri, more=more, structured=str(structured).lower()))
    command = (sys.executable, "-m", "emrakul", "run", str(manifest), "--output", "json", *arguments)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return Command(process)


def wait(look: Callable[[], T | None]) -> T:
    """What `look` finds, as soon as it finds something; looks a thousand times a second."""
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        if found := look():
            return found
        time.sleep(0.001)
    raise AssertionError("waited in vain")


def appears(run: Path, pattern: str) -> list[Path]:
    """Files of a run in a folder that match, once there are any."""
    return wait(lambda: sorted(run.glob(pattern)))


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
