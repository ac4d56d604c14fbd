"""Whether the watch still tells what happens: what it has delivered, against what a listing shows.

A watch can end without an error, and an operator that no longer hears does nothing while it looks well. Silence says
nothing of it, since a cluster may be idle; only a listing that shows what the watch should have told does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

_BACK = "the cluster's data went back, and what was seen since is not so any more; starting anew"
DEAF_SECONDS = 90.0
"""How long a version may be listed and not delivered."""


@dataclass
class _Heard:
    """One resource: what came of it."""

    delivered: dict[str, int] = field(default_factory=dict)
    """The highest version delivered of each object, by UID."""
    missing: dict[str, tuple[int, float]] = field(default_factory=dict)
    """The version that is listed and not delivered, and when it was first listed."""
    listed: int = -1
    """The highest version of a list."""


class Freshness:
    """What was heard of each resource. `resource` names one watch and the listing that belongs to it.

    Listings must be live (no resourceVersion in the request): one from a cache may be older than the one before.
    """

    def __init__(self) -> None:
        self._heard: dict[str, _Heard] = {}

    def delivered(self, resource: str, uid: str, version: str) -> None:
        """The watch told of this object at this version."""
        heard = self._heard.setdefault(resource, _Heard())
        heard.delivered[uid] = max(int(version), heard.delivered.get(uid, -1))
        if uid in heard.missing and heard.missing[uid][0] <= heard.delivered[uid]:
            del heard.missing[uid]

    def deleted(self, resource: str, uid: str) -> None:
        """The watch told that this object is gone."""
        heard = self._heard.setdefault(resource, _Heard())
        heard.delivered.pop(uid, None)
        heard.missing.pop(uid, None)

    def known(self, resource: str) -> Mapping[str, int]:
        """The version delivered of each object by UID: what a listing that begins now must show, or a later one."""
        return dict(self._heard.setdefault(resource, _Heard()).delivered)

    def listed(
        self, resource: str, version: str, items: Mapping[str, str], now: float, *, known: Mapping[str, int] = {}
    ) -> str | None:
        """Compare with a listing: its version, and the version of each object by UID. A sentence if we are deaf.

        `known` was asked for before the listing began.
        """
        heard = self._heard.setdefault(resource, _Heard())
        seen = max(heard.listed, *known.values()) if known else heard.listed
        if int(version) < seen:
            return f"the listing of {resource} is at version {version}, and {seen} was seen before: {_BACK}"
        if back := next((uid for uid, text in items.items() if int(text) < known.get(uid, -1)), None):
            return f"{resource} {back} is at version {items[back]}, and {known[back]} was seen before: {_BACK}"
        heard.listed = int(version)
        self._forget(heard, items)
        for uid, text in items.items():
            if heard.delivered.get(uid, -1) < int(text):
                # an older version that is still missing keeps its time: a busy object must not hide a dead watch
                heard.missing.setdefault(uid, (int(text), now))
        for uid, (missing, since) in heard.missing.items():
            if now - since >= DEAF_SECONDS:
                return (
                    f"version {missing} of {resource} {uid} has been listed for {now - since:.0f} s, and the watch "
                    "has not told of it: it does not hear any more; starting anew"
                )
        return None

    def _forget(self, heard: _Heard, items: Mapping[str, str]) -> None:
        """Objects that are gone. What was delivered at a later version than the list's was made while it was read."""
        heard.missing = {uid: seen for uid, seen in heard.missing.items() if uid in items}
        heard.delivered = {
            uid: version for uid, version in heard.delivered.items() if uid in items or version > heard.listed
        }
