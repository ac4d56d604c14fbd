"""Which resources of ended cycles go."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

from emrakul.api import labels
from emrakul.api.cycle import CycleStatus
from emrakul.cluster.retention import beyond, seconds_left
from emrakul.cluster.status import refused
from leyline.reasons import Reason

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)


def ended() -> CycleStatus:
    return refused(CycleStatus(), Reason.SUPERSEDED, "newer", run=None, generation=1, now=NOON)


def cycle(base: int, outcome: str | None = "Committed") -> dict[str, Any]:
    status = {"outcome": outcome, "cycle": f"c-{base}"} if outcome else {}
    return {"metadata": {"name": f"c{base}", "labels": {labels.BASE: str(base)}}, "status": status}


def test_its_time_runs_from_its_end() -> None:
    assert seconds_left(ended(), 60, NOON + timedelta(seconds=20)) == 40
    assert seconds_left(ended(), 0, NOON) == 0


def test_one_that_has_not_ended_or_has_no_time_to_live_stays() -> None:
    assert seconds_left(CycleStatus(), 60, NOON) is None
    assert seconds_left(ended(), None, NOON + timedelta(days=900)) is None


def test_the_oldest_go_and_live_ones_never() -> None:
    found = beyond([cycle(9), cycle(2), cycle(30), cycle(1, None)], 2)
    assert [body["metadata"]["name"] for body in found] == ["c2"]
    assert beyond([cycle(1)], 1) == ()
    assert len(beyond([cycle(1), cycle(2)], 0)) == 2


def test_one_that_its_policy_would_make_again_stays() -> None:
    refused_ones = [cycle(1), cycle(2)]
    for one in refused_ones:
        del one["status"]["cycle"]
    assert [body["metadata"]["name"] for body in beyond(refused_ones, 0)] == ["c1"]
