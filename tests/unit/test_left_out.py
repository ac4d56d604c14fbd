"""Namespaces that may not be read: left out after a while, told, and noticed when they may be read."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest

from emrakul.cluster import main
from emrakul.cluster.freshness import Freshness
from emrakul.cluster.health import Health
from emrakul.cluster.kube import Forbidden, Kube
from emrakul.cluster.metrics import Metrics
from emrakul.runtime.config import Images, OperatorConfig

CONFIG = OperatorConfig(images=Images(worker="w", validator="v"), namespaces=("team-a", "team-b"))


class Listing:
    """Forbids a namespace for the first so many times."""

    def __init__(self, **forbidden: int) -> None:
        self.forbidden = {name.replace("_", "-"): times for name, times in forbidden.items()}

    async def list(self, _kind: object, namespace: str, **_: Any) -> None:
        if self.forbidden.get(namespace, 0) > 0:
            self.forbidden[namespace] -= 1
            raise Forbidden(f"{namespace} is forbidden")


def readable(listing: Listing, health: Health) -> OperatorConfig:
    return asyncio.run(main._readable(cast(Kube, listing), CONFIG, health))


@pytest.fixture
def health() -> Health:
    return Health(Metrics())


def test_what_an_api_server_forbids_for_a_moment_is_asked_for_again(health: Health) -> None:
    assert readable(Listing(team_b=2), health).namespaces == ("team-a", "team-b")
    assert health.left_out == ()


def test_what_stays_forbidden_is_left_out_and_told(health: Health, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(main, "PATIENCE_SECONDS", 0.1)
    assert readable(Listing(team_b=1000), health).namespaces == ("team-a",)
    assert health.left_out == ("team-b",)
    with pytest.raises(main.Ended, match="none of the namespaces team-a, team-b can be listed"):
        readable(Listing(team_a=1000, team_b=1000), health)


def test_what_may_be_read_later_ends_the_process_so_that_it_is_watched(
    health: Health, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(main, "LISTING_SECONDS", 0.01)
    monkeypatch.setattr(main, "WATCHED", ())
    health.left_out = ("team-b",)
    listing = Listing(team_b=3)
    with pytest.raises(main.Ended, match="namespace team-b can be read now"):
        asyncio.run(main._listen(cast(Kube, listing), CONFIG, Freshness(), health))
    assert listing.forbidden["team-b"] == 0
