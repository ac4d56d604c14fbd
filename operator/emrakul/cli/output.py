"""What commands print: one JSON document, or tables that are readable on 80 columns. Progress goes to stderr."""

from __future__ import annotations

import json as json_module
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any

from leyline.model import printable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

    from emrakul.core.snapshot import Phase
    from leyline.work import Work


@dataclass(frozen=True)
class Output:
    """Where a command's result goes, and in which form."""

    json: bool

    def document(self, value: Mapping[str, Any]) -> None:
        """The result as JSON."""
        print(json_module.dumps(value, indent=2, ensure_ascii=False))

    @cached_property
    def console(self) -> Console:
        from rich.console import Console

        return Console(highlight=False, markup=False, emoji=False)

    def line(self, text: str) -> None:
        """One sentence of a result."""
        self.console.print(shown(text))

    def facts(self, rows: Iterable[tuple[str, str]]) -> None:
        """Names with their values, one below the other; a long value is wrapped under itself."""
        from rich.table import Table

        table = Table.grid(padding=(0, 2))
        table.add_column(style="bold", no_wrap=True)
        table.add_column(overflow="fold")
        for name, value in rows:
            table.add_row(name, shown(value))
        self.console.print(table)

    def table(self, columns: Iterable[str], rows: Iterable[Iterable[str]], *, wide: str) -> None:
        """A table; the column `wide` takes what room is left and wraps, the others stay on one line."""
        from rich import box
        from rich.table import Table

        table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, expand=False)
        for name in columns:
            table.add_column(name, no_wrap=name != wide, overflow="fold")
        for row in rows:
            table.add_row(*map(shown, row))
        self.console.print(table)

    @contextmanager
    def progress(self) -> Iterator[Progress]:
        """Bars on stderr while it works; none where stderr is no terminal."""
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TransferSpeedColumn

        console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), TransferSpeedColumn())
        with Progress(*columns, console=console, transient=True, disable=not sys.stderr.isatty()) as bars:
            yield bars


def shown(text: str) -> str:
    """For a terminal: names in a checkpoint may come from anybody. Lines stay lines."""
    return "\n".join(map(printable, text.split("\n")))


def iso(moment: datetime) -> str:
    """For JSON."""
    return moment.astimezone(UTC).isoformat(timespec="seconds")


def ago(moment: datetime, now: datetime) -> str:
    """For people: "3 min ago"."""
    seconds = max(0.0, (now - moment).total_seconds())
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"


def size(count: int) -> str:
    """Bytes for people, decimal: "12.3 MB"."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def masked(counts: Mapping[str, int]) -> str:
    """For people: "3 channels, 1 head"."""
    return ", ".join(f"{n} {kind}{'' if n == 1 else 's'}" for kind, n in counts.items()) or "none"


def worked(work: Mapping[Phase, Work]) -> list[tuple[str, str]]:
    """For people, phase by phase: what the workers read, how fast one of them was, and what it held."""
    rows = []
    for phase, one in work.items():
        said = size(one.bytes_read)
        if one.seconds > 0:
            said += f" at {size(int(one.bytes_read / one.seconds))}/s a worker"
            if one.parameters:
                said += f", {one.parameters / one.seconds / 1e6:.1f} M parameters/s"
        rows.append((f"{phase} read", f"{said}; memory at most {size(one.peak_rss)}"))
    return rows
