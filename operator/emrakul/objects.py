"""Every object that one pair is loaded from, with the digest it must have, and whether it is there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from leyline import layout
from leyline.digest import ObjectDigest, sha256_hex, verified_range
from leyline.envelope import Trust
from leyline.evidence import evidence_of
from leyline.fold import PairState
from leyline.log import Log
from leyline.messages import Candidate
from leyline.model import Malformed
from leyline.ready import read_ready
from leyline.store import CHUNK, Changed, Damaged, NotFound, ObjectStore

SMALL = 1024 * 1024
"""Bytes up to which an object's digest is always checked; of larger ones only the size, unless asked."""

DAMAGE = (NotFound, Damaged, Changed, Malformed)
"""What says that an object is missing or wrong. A refusal, a timeout or a lacking signature says neither."""

_AT_ONCE = 8

Progress = Callable[[int], None]
"""Told how many bytes were read since the last call."""


@dataclass(frozen=True)
class Part:
    """One object of a pair, by its key in the run."""

    key: str
    digest: ObjectDigest


def parts(store: ObjectStore, log: Log, pair: PairState, trust: Trust | None) -> tuple[Part, ...]:
    """What READY.json and the candidate's manifest list, once both and the masks are what the log says they are.

    NotFound, Damaged or Malformed name the small object that is missing or wrong; Untrusted an unsigned READY.
    """
    ready, manifest = evidence_of(log, pair)
    _proven(store, layout.checkpoint(pair.checkpoint, layout.READY), ready)
    metadata = read_ready(store, pair.checkpoint, trust)
    folders = [(layout.checkpoint(metadata.name), metadata.objects)]
    if pair.masks is not None:
        _proven(store, pair.masks.path, pair.masks.digest)
    if pair.candidate is not None:
        key = f"{pair.candidate}MANIFEST.json"
        candidate = Candidate.parse(_proven(store, key, manifest), name=key)
        folders.append((pair.candidate, candidate.objects))
    return tuple(Part(folder + stored.path, stored.digest) for folder, objects in folders for stored in objects)


def evidence(log: Log, pair: PairState) -> dict[str, str]:
    """SHA-256 of the small objects that the pair rests on, by key, as far as the log has them."""
    ready, manifest = evidence_of(log, pair)
    found = {layout.checkpoint(pair.checkpoint, layout.READY): ready, f"{pair.candidate}MANIFEST.json": manifest}
    return {key: digest for key, digest in found.items() if digest}


def faults(store: ObjectStore, found: tuple[Part, ...], *, deep: bool = False) -> Iterator[str]:
    """A sentence for each object that is missing or wrong: its size, and if small or `deep` its digest."""

    def fault(part: Part) -> str | None:
        try:
            check(store, part, deep=deep or part.digest.size <= SMALL)
        except DAMAGE as error:
            return str(error)
        return None

    # a sharded checkpoint has hundreds of objects, and each costs a round trip
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        yield from (sentence for sentence in pool.map(fault, found) if sentence)


def check(store: ObjectStore, part: Part, *, deep: bool, progress: Progress = lambda _: None) -> None:
    """NotFound, or Damaged if size or (`deep`) a chunk's digest is another. One chunk is held at a time."""
    head = store.head(part.key)
    if head.size != part.digest.size:
        raise Damaged(
            f"{store.where(part.key)} is {head.size:,} bytes, its manifest says {part.digest.size:,}; restore it"
        )
    for start in range(0, head.size, CHUNK) if deep else ():
        stop = min(start + CHUNK, head.size)
        verified_range(store, part.key, part.digest, start, stop, head.pin)
        progress(stop - start)


def _proven(store: ObjectStore, key: str, digest: str | None) -> bytes:
    """A small object, compared with the digest that the log has of it, if it has one."""
    data = store.get(key)
    if digest is not None and (found := sha256_hex(data)) != digest:
        raise Damaged(f"{key} has SHA-256 {found[:12]}, the log says {digest[:12]}; it was exchanged, restore it")
    return data
