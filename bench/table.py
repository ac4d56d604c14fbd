"""The report as a table: one row a line, for people and for Markdown alike."""

from __future__ import annotations

from typing import Any

from lines import Line

HEAD = "| what | figure | n, spread | reference | figure | ratio | target |\n|---|---|---|---|---|---|---|"


def text(report: dict[str, Any]) -> str:
    """Every group under its name."""
    lines = [Line.from_json(line) for line in report["lines"]]
    parts = [heading(report)]
    for group in dict.fromkeys(line.group for line in lines):
        parts += ["", f"### {group[0].upper()}{group[1:]}", "", HEAD]
        parts += [row(line) for line in lines if line.group == group]
    return "\n".join(parts)


def heading(report: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    return (
        f"{report['date']}, commit {report['commit']}, size {report['size']}, {report['seconds']:,} s in all. "
        f"{report['cores']} cores, {report['processor']}, {report['memory_bytes'] / 1e9:.0f} GB, {report['system']}; "
        f"{versions}."
    )


def row(line: Line) -> str:
    mark = {True: " (reached)", False: " **(missed)**", None: ""}[line.reached]
    cells = (
        line.what,
        f"{number(line.figure.median)} {line.unit}",
        spread(line),
        line.reference,
        f"{number(line.against.median)} {line.unit}",
        f"{line.ratio:.2f}",
        f"{line.target}{mark}",
    )
    return f"| {' | '.join(cells)} |"


def spread(line: Line) -> str:
    """How often it was measured, and the lowest and highest."""
    values = line.figure.values
    if len(values) == 1:
        return "1"
    return f"{len(values)}: {number(min(values))} to {number(max(values))}"


def number(value: float) -> str:
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"
