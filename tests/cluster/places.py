"""Where the test cluster keeps what it builds and what it runs: one folder that git ignores."""

from __future__ import annotations

import hashlib
from pathlib import Path

SOURCES = Path(__file__).resolve().parent
CACHE = SOURCES.parent.parent / ".cache" / "cluster"
STATE = CACHE / "state"

# Names that the kernel shares between working copies: each copy has its own.
NAME = "emrakul-" + hashlib.sha256(bytes(STATE)).hexdigest()[:6]


def keep(path: Path, text: str) -> Path:
    """Writes a configuration file unless it reads so already: containerd and others act on every write."""
    if not path.exists() or path.read_text() != text:
        path.write_text(text)
    return path
