"""The checkpoints that cycles work on: published once, in one process, into folders, and copied onto a server."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from sizes import Size

from leyline.store import CHUNK, ObjectStore

HERE = Path(__file__).parent
NARROW = 16
"""Width where only the number of layers counts."""


def child(script: str, *arguments: str, environment: Mapping[str, str] | None = None) -> Any:
    """What a process of its own says in its last line. References are processes too, so nothing is left behind."""
    done = subprocess.run(
        [sys.executable, str(HERE / script), *arguments],
        env=os.environ | dict(environment or {}),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


@cache
def published(size: Size, folder: Path) -> dict[str, Any]:
    """What the trainer said of each run: `wide-<layers>-<width>`, and `narrow-<groups>` without an evaluation."""
    wide = {wide_run(*shape): shape for shape in {(size.layers, size.width), *size.models}}
    narrow = {f"narrow-{groups}": (groups + 1, NARROW) for groups in size.groups}
    wanted = {**narrow, **dict(sorted(wide.items(), key=lambda item: item[1]))}
    arguments = [f"{folder / name}:{layers}:{width}" for name, (layers, width) in wanted.items()]
    return dict(zip(wanted, child("publish.py", *arguments), strict=True))


def wide_run(layers: int, width: int) -> str:
    return f"wide-{layers}-{width}"


def copied(source: ObjectStore, target: ObjectStore) -> None:
    """Every object of a run, in bounded memory."""
    for head in source.list(""):
        chunks = (source.get_range(head.key, at, min(at + CHUNK, head.size)) for at in range(0, head.size, CHUNK))
        target.put_stream(head.key, chunks, size=head.size)
