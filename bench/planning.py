"""The control plane: what is next for each of a thousand live cycles, and the memory of a process that drives them."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from checkpoints import child, published
from lines import Line, Sample, alternating, one
from sizes import Size

import snapshots as make
from emrakul.core.plan import next_actions
from emrakul.core.snapshot import Phase, Snapshot

GROUP = "the control plane"
MOST = 300e6


def lines(size: Size, folder: Path) -> Iterator[Line]:
    run = next(iter(name for name in published(size, folder) if name.startswith("narrow")))
    here = folder / "holding"
    try:
        held = child("holding.py", str(folder / run), str(here), str(size.cycles_live))
    finally:
        shutil.rmtree(here, ignore_errors=True)
    live = stages(size.cycles_live)
    looks = Sample(tuple(held["looks"])).times(1e6)
    _, all_of_them = alternating(size.repeats, lambda: None, lambda: [next_actions(one, make.NOW) for one in live])
    yield Line(
        group=GROUP, what=f"next_actions(), each of {size.cycles_live:,} live cycles", unit="us",
        figure=all_of_them.times(1e6 / len(live)), reference="one look at a live cycle on the local store",
        against=looks,
    )  # fmt: skip
    yield Line(
        group=GROUP, what=f"peak RSS of one process with {size.cycles_live:,} live cycles", unit="MB",
        figure=one(held["peak"] / 1e6), reference="the same process before the first",
        against=one(held["before"] / 1e6), target=f"at most {MOST / 1e6:.0f} MB", reached=held["peak"] <= MOST,
    )  # fmt: skip


def stages(count: int) -> list[Snapshot]:
    """Cycles at every place where one can stand, in turn."""
    applied = {"rounds": (make.round_(),), "decision": make.decision()}
    places = [
        make.snapshot(admitted=None, state=make.state(live=None)),
        make.snapshot(),
        make.snapshot(rounds=(make.round_(answered=1),), jobs=(make.job(Phase.ANALYSE, 0),)),
        make.snapshot(rounds=(make.round_(),)),
        make.snapshot(**applied, on=(make.on(),), jobs=(make.job(Phase.APPLY, 2),)),
        make.snapshot(**applied, on=(make.on(candidate="c", asked=True),), jobs=(make.job(Phase.VALIDATE, 2),)),
        make.snapshot(**applied, on=(make.validated(),)),
    ]
    return [replace(places[number % len(places)], cycle=f"c{number}-0123456789") for number in range(count)]
