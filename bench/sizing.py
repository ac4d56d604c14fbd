"""How long a larger model would take on a larger machine: calculated from a report's rates, never measured."""

from __future__ import annotations

from dataclasses import dataclass

from lines import Line

PARAMETERS, BYTES = 10e9, 20e9
"""In bfloat16: in float32 the gate's one model (40 GB) would not fit the memory."""
CORES, MEMORY = 16, 32e9
NETWORK = 2.5e9
"""Bytes a second that a store elsewhere gives: 20 Gbit/s."""
SHARDS = 4
"""Of 5 GB, as kasmina writes them: so many workers write at once."""
GATE = 1e9
"""Beside the model."""


@dataclass(frozen=True)
class Sized:
    """One row."""

    what: str
    value: float
    unit: str
    how: str


def sized(lines: list[Line], cores: int) -> list[Sized]:
    """Each phase at the rate that it had, as far as it would use more cores, and no faster than the network."""

    def line(what: str) -> Line:
        return next(each for each in lines if "SeaweedFS" in each.group and each.what == f"{cores} workers, {what}")

    size = 1e6 * line("analysis, bytes read").against.median
    """Bytes of the model that was measured, in float32."""

    def rate(what: str, passes: float, times: float) -> tuple[float, str]:
        one = passes * size / line(what).figure.median
        return min(one * times, NETWORK), f"{one / 1e6:,.0f} MB/s measured x {times:g}, at most {NETWORK / 1e9:g} GB/s"

    rows = []
    for what, name, passes, times in (
        ("analysis", "analysis", 1, CORES / cores),
        ("apply, read and write", "apply", 2, SHARDS),
        ("byte checks, candidate and base", "validate: byte checks", 2, 1),
    ):
        speed, how = rate(name, passes, times)
        rows.append(Sized(what, passes * BYTES / speed, "s", how))
    proof = line("validate: dead-unit proof").figure.median
    per = proof / (size / 4) * PARAMETERS * cores / CORES
    rows.append(Sized("dead-unit proof", per, "s", f"{proof:.1f} s measured, by parameters and cores"))
    rows.append(Sized("storage phases", sum(row.value for row in rows[:3]), "s", "the first three together"))
    worker = next(each for each in lines if "SeaweedFS" in each.group and each.what == "peak RSS, elesh").figure
    held = CORES * worker.median / 1e3
    rows.append(Sized("memory, workers", held, "GB", f"{CORES} x the {worker.median:,.0f} MB measured"))
    rows.append(Sized("memory, gate", (BYTES + GATE) / 1e9, "GB", f"one model and 1 GB; of {MEMORY / 1e9:.0f} GB"))
    return rows
