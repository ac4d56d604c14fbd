"""Bar charts as SVG, in a few lines. Text takes its colour from the reader's theme, light or dark."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

ROW, LEFT, RIGHT, BAR = 22, 300, 90, 380

STYLE = (
    "<style>text{font:12px system-ui,sans-serif;fill:#24292f}.own{fill:#0969da}.raw{fill:#8c959f}"
    "@media(prefers-color-scheme:dark){text{fill:#e6edf3}.own{fill:#4493f8}.raw{fill:#6e7681}}</style>"
)


def bars(title: str, rows: Sequence[tuple[str, float, float]], unit: str) -> str:
    """`rows`: (label, our figure, its reference); two bars a row, on one scale."""
    longest = max(value for _, ours, theirs in rows for value in (ours, theirs))
    height = 50 + len(rows) * (ROW * 2 + 6)
    parts = [f'<text x="8" y="18" font-weight="600">{escape(title)}</text>', legend()]
    for number, (label, ours, theirs) in enumerate(rows):
        y = 44 + number * (ROW * 2 + 6)
        parts.append(f'<text x="{LEFT - 8}" y="{y + 20}" text-anchor="end">{escape(label)}</text>')
        for offset, value, kind in ((0, ours, "own"), (ROW - 4, theirs, "raw")):
            wide = max(1.0, BAR * value / longest)
            parts.append(f'<rect class="{kind}" x="{LEFT}" y="{y + offset}" width="{wide:.1f}" height="14" rx="2"/>')
            parts.append(f'<text x="{LEFT + wide + 6:.1f}" y="{y + offset + 11}">{value:,.3g} {escape(unit)}</text>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {LEFT + BAR + RIGHT} {height}" role="img" '
        f'aria-label="{escape(title)}">{STYLE}{"".join(parts)}</svg>\n'
    )


def legend() -> str:
    x = LEFT
    return (
        f'<rect class="own" x="{x}" y="26" width="10" height="10"/><text x="{x + 14}" y="35">Emrakul</text>'
        f'<rect class="raw" x="{x + 90}" y="26" width="10" height="10"/><text x="{x + 104}" y="35">reference</text>'
    )
