"""`make bench`: measures, prints the table, and writes it as JSON; `--page` also writes docs/benchmarks.

Each line has a reference that was measured in the same run. The groups of lines are modules of this folder.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "bench"), str(ROOT / "tests"), str(ROOT / "examples")]

import machine  # noqa: E402
import page  # noqa: E402
import table  # noqa: E402
from lines import Line  # noqa: E402
from sizes import SIZES, Size  # noqa: E402

GROUPS = ("cycles", "transfer", "scoring", "planning", "training", "growth")
"""In this order: a process that has not loaded torch starts its children faster."""


def measured(name: str, size: Size, folder: Path) -> Iterator[Line]:
    """The lines of one group; its modules are loaded here, so that one group does without another's needs."""
    from importlib import import_module

    lines: Callable[[Size, Path], Iterator[Line]] = import_module(name).lines
    return lines(size, folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=sorted(SIZES), default="full")
    parser.add_argument("--only", action="append", choices=GROUPS, help="a group of lines; may be given again")
    parser.add_argument("--json", type=Path, help="where the report goes, besides the table")
    parser.add_argument("--page", action="store_true", help="write docs/benchmarks.json, .md and the charts")
    given = parser.parse_args()
    size = SIZES[given.size]
    began = time.monotonic()
    lines: list[Line] = []
    with tempfile.TemporaryDirectory(prefix="emrakul-bench-") as folder:
        for name in given.only or GROUPS:
            for line in measured(name, size, Path(folder)):
                lines.append(line)
                print(table.row(line), file=sys.stderr, flush=True)
    report: dict[str, Any] = {
        **machine.described(),
        "size": size.name,
        "seconds": round(time.monotonic() - began),
        "lines": [line.to_json() for line in lines],
    }
    print(table.text(report))
    if given.json:
        given.json.write_text(json.dumps(report, indent=1) + "\n")
    if given.page:
        page.keep(report, ROOT / "docs")


if __name__ == "__main__":
    main()
