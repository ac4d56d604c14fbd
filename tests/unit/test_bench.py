"""`make bench SIZE=small`: every line has a figure, a reference and a ratio; not how fast, the machine is anybody's."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

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
    is_drawn(tmp_path, found)


def is_drawn(folder: Path, report: dict[str, Any]) -> None:
    """The page that a full report would give: every line, what was missed, charts, and the larger model."""
    script = "import sys, json; sys.path[:0] = sys.argv[1:3]; import page; from pathlib import Path; "
    script += "page.keep(json.loads(Path(sys.argv[3]).read_text()), Path(sys.argv[4]))"
    missed = [line | {"target": "a lot", "reached": False} for line in report["lines"][:1]]
    (folder / "full.json").write_text(json.dumps(report | {"size": "full", "lines": missed + report["lines"][1:]}))
    (folder / "docs").mkdir()
    paths = (str(BENCH), str(BENCH.parent / "tests"), str(folder / "full.json"), str(folder / "docs"))
    subprocess.run([sys.executable, "-c", script, *paths], check=True)
    text = (folder / "docs" / "benchmarks.md").read_text()
    assert all(f"| {line['what']} |" in text for line in report["lines"])
    assert "## Missed" in text and "## A larger model" in text and "Calculated" in text
    assert "| dead-unit proof | " in text
    drawn = sorted((folder / "docs" / "benchmarks").iterdir())
    assert [path.name for path in drawn] == ["cycle-local.svg", "cycle-seaweedfs.svg", "growth.svg"]
    for path in drawn:
        assert ElementTree.parse(path).getroot().tag.endswith("svg")
        assert f"(benchmarks/{path.name})" in text
