"""The candidate as a list of tasks: which objects of a checkpoint are copied with zeroes, and what each copy says."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from leyline.claims import Task
from leyline.messages import CheckpointMetadata, StoredObject
from leyline.model import Malformed
from leyline.store import CHUNK, NotFound, ObjectStore
from leyline.work import Work

_SLOWEST = CHUNK
"""Bytes a second below which a copy counts as stuck."""


class Copied(Work):
    """The answer to one task: the object that now stands in the candidate's folder, and what it took to write it."""

    schema_version: int = 1
    object: StoredObject


def masked_objects(metadata: CheckpointMetadata) -> tuple[StoredObject, ...]:
    """What a candidate holds beside its masks: the weights with their index, and the optimizer's slots."""
    paths = (*metadata.weights, *((metadata.optimizer,) if metadata.optimizer else ()))
    return tuple(metadata.object(path) for path in paths)


def copy_tasks(metadata: CheckpointMetadata, *, base: int) -> Mapping[Task, StoredObject]:
    """One task an object, in the order of the metadata; a large object may take longer than a request."""
    return {
        Task(id=f"apply-{base}-{number}", extra_seconds=stored.digest.size / _SLOWEST): stored
        for number, stored in enumerate(masked_objects(metadata))
    }


@contextmanager
def named_by_the_cycle() -> Iterator[None]:
    """That an object which the cycle names is gone is a fault of the cycle, not of the store: Malformed."""
    try:
        yield
    except NotFound as error:
        raise Malformed(f"{error}, but the cycle names it; start a new cycle") from error


def get_named(store: ObjectStore, key: str) -> bytes:
    """A small object that the cycle names."""
    with named_by_the_cycle():
        return store.get(key)
