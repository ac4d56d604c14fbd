"""Outcomes on their way to a sink: offered until a mark in the run says that the sink has taken them."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from emrakul.cluster.access import OpenRun
from emrakul.cluster.sink import Event, Sinks, event_of
from leyline import layout
from leyline.messages import AnalysisResults
from leyline.store import Exists, NotFound


async def offer(sinks: Sinks, url: str, run: OpenRun, cycle: str) -> bool:
    """The results of an ended cycle (or `rollback-<record>`). False once the run has the mark that they were sent."""
    if await asyncio.to_thread(_sent, run, cycle):
        return False

    def make() -> Event:
        key = layout.results(cycle)
        results = AnalysisResults.parse(run.store.get(key), name=key)
        return event_of(results, run=run.store.uri, at=run.store.head(key).modified)

    def delivered() -> None:
        with suppress(Exists):
            run.store.put_if_absent(layout.sent(cycle), b"{}")

    # the same URI at another endpoint is another run, and each sink hears for itself
    sinks.offer(f"{url} {run.access.name}/{cycle}", url, make, delivered)
    return True


def _sent(run: OpenRun, cycle: str) -> bool:
    try:
        run.store.head(layout.sent(cycle))
    except NotFound:
        return False
    return True
