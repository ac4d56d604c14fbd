"""Real English without a download: docstrings of the standard library, as first lines with their bodies."""

from __future__ import annotations

import ast
import hashlib
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

_APART = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "turtledemo"}


@dataclass(frozen=True)
class Docstring:
    """A docstring of a module, class or function."""

    first: str
    """Its first line."""
    body: str
    """All that follows, on one line."""


@cache
def docstrings(n: int) -> tuple[Docstring, ...]:
    """`n` of them, no two alike, from files in an order that is scattered and always the same for one Python version.

    ValueError if the standard library has fewer; a first line has at least three words, a body eight.
    """
    found: dict[str, Docstring] = {}
    bodies: set[str] = set()
    for each in _all():
        long_enough = len(each.first.split()) >= 3 and len(each.body.split()) >= 8
        if long_enough and each.first not in found and each.body not in bodies:
            found[each.first] = each
            bodies.add(each.body)
        if len(found) == n:
            return tuple(sorted(found.values(), key=lambda one: _scattered(one.first)))
    raise ValueError(f"the standard library of this Python has {len(found)} docstrings of two parts, {n} are needed")


def _all() -> Iterator[Docstring]:
    root = Path(sysconfig.get_path("stdlib"))
    files = [path for path in root.rglob("*.py") if not _APART & set(path.relative_to(root).parts)]
    for path in sorted(files, key=lambda path: _scattered(path.relative_to(root).as_posix())):
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):  # files that are meant not to parse
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Module):
                first, _, body = (ast.get_docstring(node) or "").partition("\n")
                yield Docstring(" ".join(first.split()), " ".join(body.split()))


def _scattered(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
