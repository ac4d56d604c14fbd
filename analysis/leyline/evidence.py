"""What the log says that a pair rests on."""

from __future__ import annotations

from leyline import layout
from leyline.fold import PairState
from leyline.log import Log
from leyline.records import Prune


def evidence_of(log: Log, pair: PairState) -> tuple[str | None, str | None]:
    """SHA-256 of READY.json, and of the candidate's manifest, as the log has them. Records are never deleted."""
    record, _ = log.read(pair.record)
    manifest = None
    if isinstance(record.body, Prune):
        manifest = record.evidence.get(f"{record.body.candidate}MANIFEST.json")
    while isinstance(record.body, Prune):
        record, _ = log.read(record.body.base)
    return record.evidence.get(layout.checkpoint(pair.checkpoint, layout.READY)), manifest
