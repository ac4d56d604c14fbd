"""Where the training's newest report is found."""

from __future__ import annotations

from leyline import layout
from leyline.messages import SystemStatePacket
from leyline.model import Malformed
from leyline.store import ObjectStore


def newest_report(store: ObjectStore, term: int) -> SystemStatePacket | None:
    """The newest report of a term: their names order by step. An object that is no report says nothing."""
    newest = None
    for head in store.list(layout.reports(term)):
        newest = head.key
    try:
        return SystemStatePacket.parse(store.get(newest), name=newest) if newest else None
    except Malformed:
        return None
