"""Names that must come out the same in every process: parameters, checkpoints, cycles."""

from __future__ import annotations

import re
import uuid
from collections.abc import Sequence

_NAMESPACE = uuid.UUID("6f1d3f0e-52a4-5c5b-9d0a-6d2f0c8f7e11")
_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
MAX_STEP = 10**12 - 1
"""The largest that a checkpoint's name can say."""
_CHECKPOINT = re.compile(r"^(\d{1,12})-(\d{1,9})-([0-9a-f]{8})$")


def canonical_name(name: str) -> str:
    """The parameter's own name, without what DDP, torch.compile, FSDP and activation checkpointing put around it."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    while name.startswith("module."):
        name = name.removeprefix("module.")
    return name


def parameter_uuid(name: str, shape: Sequence[int], model_id: str) -> str:
    """Stable id of a parameter: the same on any device, dtype, shard or wrapper; another if the shape changes."""
    text = "\0".join((canonical_name(name), "x".join(map(str, shape)), model_id))
    return str(uuid.uuid5(_NAMESPACE, text))


def checkpoint_name(step: int, term: int, nonce: str) -> str:
    """`<step>-<term>-<nonce>`: the term fences names of a trainer that was rolled back; the nonce is 8 hex digits."""
    name = f"{step}-{term}-{nonce}"
    if not _CHECKPOINT.match(name):
        raise ValueError(f"checkpoint name {name!r}: step and term must be non-negative, the nonce 8 hex digits")
    return name


def checkpoint_step(name: str) -> int:
    """The training step in a checkpoint's name."""
    if not (match := _CHECKPOINT.match(name)):
        raise ValueError(f"{name!r} is no checkpoint name; it looks like 4000-1-0f3a9b2c (step, term, nonce)")
    return int(match[1])


def checkpoint_term(name: str) -> int:
    """The term of the trainer that named this checkpoint."""
    if not (match := _CHECKPOINT.match(name)):
        raise ValueError(f"{name!r} is no checkpoint name; it looks like 4000-1-0f3a9b2c (step, term, nonce)")
    return int(match[2])


def cycle_name(base: int, settings_digest: str) -> str:
    """Deterministic: the same base record and settings are the same cycle, whoever asks for it."""
    return f"c{base}-{settings_digest[:10]}"
