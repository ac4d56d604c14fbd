"""`make bench SIZE=small`: every line has a figure, a reference and a ratio; not how fast, the machine is anybody's."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "bench"
GROUPS = (
    "a cycle over 197 k parameters, SeaweedFS",
    "a cycle over 197 k parameters, local store",
    "one object of 35 MB, SeaweedFS",
    "one object of 35 MB, local store",
    "scoring, one core, in memory",
    "the control plane",
    "the trainer",
    "growth with parameters: a cycle on the local store, gate and proof apart",
    "growth with groups: one process, no validation",
    "growth with the log (in memory)",
)


@pytest.mark.slow
def test_the_small_bench_fills_the_whole_table(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    done = subprocess.run(
        [sys.executable, str(BENCH), "--size", "small", "--json", str(report)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(report.read_text())
    assert {"date", "commit", "cores", "processor", "versions"} <= set(found)
    assert tuple(dict.fromkeys(line["group"] for line in found["lines"])) == GROUPS
    for line in found["lines"]:
        assert math.isfinite(line["ratio"]) and line["ratio"] > 0, line
        assert line["values"] and line["reference_values"], line
        assert f"| {line['what']} |" in done.stdout
