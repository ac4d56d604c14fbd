"""READY.json: the envelope that makes a set of objects a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence

from leyline import layout
from leyline.envelope import Role, SigningKey, Trust, open_envelope, seal
from leyline.messages import CheckpointMetadata
from leyline.model import Malformed
from leyline.store import NotFound, ObjectStore

PAYLOAD = "application/vnd.emrakul.checkpoint+json"
WRITERS: tuple[Role, ...] = ("trainer",)


def seal_ready(metadata: CheckpointMetadata, keys: Sequence[SigningKey] = ()) -> bytes:
    """The bytes of READY.json, which is written after everything that it lists."""
    return seal(metadata.canonical(), PAYLOAD, keys)


def read_ready(store: ObjectStore, name: str, *, trust: Trust | None) -> CheckpointMetadata:
    """What the checkpoint `name` is. With `trust`, only a trainer's signature counts (Untrusted).

    Malformed if it is not there, speaks of another checkpoint, or names an object that it does not list.
    """
    key = layout.checkpoint(name, layout.READY)
    try:
        data = store.get(key)
    except NotFound as error:
        raise Malformed(f"checkpoint {name} has no {layout.READY}, so it is not whole; publish it again") from error
    payload = open_envelope(data, PAYLOAD, trust, roles=WRITERS, name=key)
    metadata = CheckpointMetadata.parse(payload, name=key)
    if metadata.name != name:
        raise Malformed(f"{key} speaks of checkpoint {metadata.name}; it was copied there, publish {name} again")
    listed = {stored.path for stored in metadata.objects}
    if len(listed) != len(metadata.objects):
        raise Malformed(f"{key} lists an object twice; publish the checkpoint again")
    named = (*metadata.weights, metadata.optimizer, metadata.topology, metadata.importance, metadata.tracker)
    if missing := [path for path in named if path and path not in listed]:
        raise Malformed(f"{key} names {missing[0]}, but lists no such object; publish the checkpoint again")
    return metadata
