"""Outcomes on their way to a sink: offered until a mark in the run says that the sink has taken them."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from emrakul.cluster.access import OpenRun
from emrakul.cluster.services import Services
from emrakul.cluster.sink import Event, event_of
from leyline import layout
from leyline.messages import AnalysisResults
from leyline.store import Exists, NotFound


async def offer(services: Services, own: str | None, run: OpenRun, cycle: str) -> bool:
    """The results of an ended cycle (or `rollback-<record>`), to the sink of its `own`, else to the chart's.

    Whether they still wait: False once the run has the mark that they were sent, and where there is no sink.
    """
    url = own or services.config.sink
    if url is None or await asyncio.to_thread(_sent, run, cycle):
        return False

    def make() -> Event:
        key = layout.results(cycle)
        results = AnalysisResults.parse(run.store.get(key), name=key)
        return event_of(results, run=run.store.uri, at=run.store.head(key).modified)

    def delivered() -> None:
        with suppress(Exists):
            run.store.put_if_absent(layout.sent(cycle), b"{}")

    # the same URI at another endpoint is another run, and each sink hears for itself
    services.sinks.offer(f"{url} {run.access.name}/{cycle}", url, make, delivered)
    return True


def _sent(run: OpenRun, cycle: str) -> bool:
    try:
        run.store.head(layout.sent(cycle))
    except NotFound:
        return False
    return True
