"""Recovery validation: would a trainer that loads this record's pair now get a whole, working model?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kasmina.formats import bind, read_index, stream
from leyline import layout
from leyline.digest import sha256_hex
from leyline.envelope import Trust
from leyline.log import Log
from leyline.masks import Masks
from leyline.messages import Candidate, CheckpointMetadata
from leyline.model import Malformed
from leyline.ready import read_ready
from leyline.records import Pair, Prune
from leyline.store import Damaged, NotFound, ObjectStore
from leyline.topology import Topology
from urabrask.decided import misfits
from urabrask.structure import NotTheBase, check_bytes
from urabrask.validate import read_masks, read_topology


@dataclass(frozen=True, kw_only=True)
class Loadable:
    """A pair whose bytes, structure and masks were checked."""

    metadata: CheckpointMetadata
    topology: Topology
    masks: Masks | None
    candidate: Candidate | None
    """None where a trainer loads the checkpoint and puts the masks on."""


Answers = Callable[[ObjectStore, Loadable], str]
"""Evaluates the pair (urabrask.measure) and says how; needs torch, so it is passed in."""


def recheck(store: ObjectStore, *, record: int, trust: Trust | None, answers: Answers) -> str:
    """What was checked, as a sentence. Malformed, Damaged or Untrusted says why the pair cannot be loaded."""
    log = Log(store, trust=trust)
    pair, ready, manifest = _pair(log, record)
    key = layout.checkpoint(pair.checkpoint, layout.READY)
    _prove(store, key, ready)
    metadata = read_ready(store, pair.checkpoint, trust)
    topology = read_topology(store, metadata)
    bind(read_index(store, layout.checkpoint(metadata.name), metadata), topology)
    for stored in metadata.objects:
        for _ in stream(store, layout.checkpoint(metadata.name, stored.path), stored.digest, ahead=1):
            pass
    masks = read_masks(store, pair.masks) if pair.masks else None
    if masks is not None and (fault := next(misfits(masks, topology), "")):
        raise Malformed(f"record {record}: {fault}")
    candidate, note = _candidate(store, pair, metadata, masks, topology, manifest)
    loadable = Loadable(metadata=metadata, topology=topology, masks=masks, candidate=candidate)
    return f"record {record}: checkpoint {metadata.name} is whole{note}; {answers(store, loadable)}"


def _pair(log: Log, number: int) -> tuple[Pair, str | None, str | None]:
    """The pair that the record made, with the digests of READY.json and of the manifest that the log rests on."""
    try:
        record, _ = log.read(number)
    except NotFound as error:
        raise Malformed(f"the log has no record {number}; name one that `emrakul history` shows") from error
    pair = record.tip
    if pair is None or pair.record != number:
        raise Malformed(f"record {number} is a {record.kind.value}, it made no pair; name a publish or prune record")
    manifest = None
    if isinstance(record.body, Prune):
        manifest = record.evidence.get(f"{record.body.candidate}{_MANIFEST}")
    while isinstance(record.body, Prune):
        record, _ = log.read(record.body.base)
    return pair, record.evidence.get(layout.checkpoint(pair.checkpoint, layout.READY)), manifest


_MANIFEST = "MANIFEST.json"


def _candidate(
    store: ObjectStore,
    pair: Pair,
    metadata: CheckpointMetadata,
    masks: Masks | None,
    topology: Topology,
    digest: str | None,
) -> tuple[Candidate | None, str]:
    """The candidate, if it is whole: else a trainer takes the checkpoint and the masks, which are the same bytes."""
    if pair.candidate is None or masks is None:
        return None, ""
    try:
        key = f"{pair.candidate}{_MANIFEST}"
        _prove(store, key, digest)
        candidate = Candidate.parse(store.get(key), name=key)
        check_bytes(store, metadata, candidate, masks, topology)
    except (NotFound, Damaged, Malformed, NotTheBase) as error:
        return None, f", its candidate is not ({error}), so the masks are put on when it is loaded"
    return candidate, ", and so is its candidate"


def _prove(store: ObjectStore, key: str, digest: str | None) -> None:
    if digest is not None and (found := sha256_hex(store.get(key))) != digest:
        raise Damaged(f"{key} has SHA-256 {found[:12]}, the log rests on {digest[:12]}; it was exchanged")
