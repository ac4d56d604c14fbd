"""READY.json: how a checkpoint's metadata is written and read. A checkpoint exists once this object does."""

from __future__ import annotations

from collections.abc import Sequence

from leyline import layout
from leyline.envelope import Role, SigningKey, Trust, open_envelope, seal
from leyline.messages import CheckpointMetadata
from leyline.model import Malformed
from leyline.store import NotLent, ObjectStore, StoreError, checked_key

PAYLOAD = "application/vnd.emrakul.checkpoint+json"
WRITERS: tuple[Role, ...] = ("trainer",)


def seal_ready(metadata: CheckpointMetadata, keys: Sequence[SigningKey]) -> bytes:
    """The bytes of READY.json."""
    return seal(metadata.canonical(), PAYLOAD, keys)


def read_ready(store: ObjectStore, name: str, trust: Trust | None) -> CheckpointMetadata:
    """The metadata of checkpoint `name`.

    NotFound where there is no such checkpoint, Damaged or Untrusted for the envelope, Malformed for what it says,
    NotLent where it was imported from a place that this run may not read.
    """
    key = layout.checkpoint(name, layout.READY)
    payload = open_envelope(store.get(key), PAYLOAD, trust, roles=WRITERS, name=key)
    metadata = CheckpointMetadata.parse(payload, name=key)
    if metadata.name != name:
        raise Malformed(f"{key} speaks of checkpoint {metadata.name}; it was copied there, publish it again")
    listed = {stored.path for stored in metadata.objects}
    for path in sorted(listed):
        try:
            checked_key(path)
        except StoreError as error:
            raise Malformed(f"{key} lists the object {path!r}, which leads out of the checkpoint; refused") from error
    if len(listed) != len(metadata.objects):
        raise Malformed(f"{key} lists an object twice; publish the checkpoint again")
    named = (*metadata.weights, metadata.optimizer, metadata.topology, metadata.importance, metadata.tracker)
    if missing := [path for path in named if path and path not in listed]:
        raise Malformed(f"{key} names {missing[0]}, but lists no such object; publish the checkpoint again")
    if metadata.imported_from is not None:
        _borrow(store, metadata, metadata.imported_from)
    return metadata


def _borrow(store: ObjectStore, metadata: CheckpointMetadata, origin: str) -> None:
    """An imported checkpoint's weights are read where they lie, under the keys that they would have in the run.

    Here and nowhere else: whoever reads a checkpoint reads READY.json first, and its signature was checked by now.
    """
    try:
        store.borrow(origin, {layout.checkpoint(metadata.name, path): path for path in metadata.weights})
    except NotLent:
        raise
    except StoreError as error:
        raise Malformed(f"checkpoint {metadata.name} says that it was imported from elsewhere: {error}") from error
