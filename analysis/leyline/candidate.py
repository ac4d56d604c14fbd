"""The candidate as a list of tasks: which objects of a checkpoint are copied with zeroes, and what each copy says."""

from __future__ import annotations

from collections.abc import Mapping

from leyline.claims import Task
from leyline.messages import CheckpointMetadata, StoredObject
from leyline.store import CHUNK
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
