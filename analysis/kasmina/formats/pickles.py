"""Pickles read as data: plain values come out, and whatever would be called comes out as a record of the call.

Nothing is imported, looked up or executed, so there is nothing to escape from; names that no checkpoint of tensors
needs are refused all the same. Operations, memory and memo numbers are counted, so that a few bytes cannot cost much.

What comes out may be nested as deeply as the pickle is long: who reads it asks for the type of a value before it hashes
or prints that, both of which are recursions.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Collection
from sys import getsizeof
from typing import Any, NamedTuple

from leyline.model import Malformed

MAX_PICKLE = 16 * 1024 * 1024
"""Bytes of one pickle."""
MAX_OPERATIONS = 1_000_000
"""About 32,000 tensors; they are read in half a second and 100 MB."""
MAX_MEMORY = 40_000_000
"""Bytes of all values together; 32,000 tensors take 33 MB."""

MEMBER = "builtins.getattr"
"""How Python 3.11.0 to 3.11.3 pickle a member of an enum; taken of a name that is allowed itself, of nothing else."""

_LONGEST_GLOBAL = 256
_LONGEST_KEY = 16
"""Parts of a key that is a tuple: its hash is computed anew each time, and its text is that of all parts."""
_LONGEST_PART = 1024
"""Characters of each."""


class Global(NamedTuple):
    """A name that the pickle refers to: a function, a class, a dtype."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


class Persistent(NamedTuple):
    """What lies outside the pickle: torch's ("storage", type, key, device, number of elements)."""

    id: Any


class Call:
    """What unpickling would have made by calling `function`, and the state it would have been given."""

    __slots__ = ("args", "function", "state")

    def __init__(self, function: Global, args: tuple[Any, ...]) -> None:
        self.function, self.args = function, args
        self.state: Any = None


def read_pickle(data: bytes, allowed: Collection[str], *, name: str, start: int = 0) -> tuple[Any, int]:
    """The value whose pickle begins at byte `start`, and the byte behind it. Malformed names `name` and the rule.

    `allowed`: the globals it may name, "torch.FloatStorage". OrderedDict and Counter come out as dicts.
    """
    if len(data) > MAX_PICKLE:
        raise Malformed(f"{name} is a pickle of {len(data):,} bytes; more than {MAX_PICKLE:,} is refused. {_REMEDY}")
    return _Machine(data, allowed, name, start).run()


_REMEDY = "Save tensors and plain values only: torch.save(model.state_dict(), path)"


class _Machine:
    def __init__(self, data: bytes, allowed: Collection[str], name: str, start: int) -> None:
        self.data, self.allowed, self.name, self.at = data, allowed, name, start
        self.stack: list[Any] = []
        self.marked: list[list[Any]] = []
        self.memo: list[Any] = []
        self.room = MAX_MEMORY

    def run(self) -> tuple[Any, int]:
        try:
            for _ in range(MAX_OPERATIONS):
                code = self.data[self.at]
                self.at += 1
                if code == _STOP:
                    return self.stack.pop(), self.at
                _OPERATIONS[code](self)
        except KeyError as error:
            raise self._refused(f"operation {bytes([code])!r}, which no checkpoint of tensors needs") from error
        except (IndexError, struct.error, UnicodeDecodeError, TypeError, AttributeError) as error:
            raise Malformed(
                f"{self.name}: the pickle breaks off or contradicts itself at byte {self.at:,}; it is damaged, save it "
                "again"
            ) from error
        raise Malformed(
            f"{self.name}: the pickle has more than {MAX_OPERATIONS:,} operations, which no checkpoint needs. {_REMEDY}"
        )

    def _refused(self, what: str) -> Malformed:
        return Malformed(f"{self.name}: the pickle has {what}; nothing was executed. {_REMEDY}")

    def charge(self, count: int) -> None:
        """Count `count` bytes that a value takes."""
        self.room -= count
        if self.room < 0:
            raise Malformed(
                f"{self.name}: the values of the pickle take more than {MAX_MEMORY:,} bytes of memory, which no "
                f"checkpoint needs. {_REMEDY}"
            )

    def take(self, count: int) -> bytes:
        taken = self.data[self.at : self.at + count]
        if len(taken) != count:
            raise IndexError
        self.at += count
        return taken

    def skip(self, count: int) -> None:
        self.take(count)

    def number(self, layout: str) -> Any:
        (value,) = struct.unpack_from(layout, self.data, self.at)
        self.at += struct.calcsize(layout)
        return value

    def push(self, value: Any) -> None:
        """A value that was made just now; what exists already, as None does, costs nothing and is appended."""
        self.charge(getsizeof(value))
        self.stack.append(value)

    def text(self, layout: str) -> None:
        """Python writes half a surrogate pair too, but nothing else takes a name with one: no digest, no JSON."""
        raw = self.take(self.number(layout))
        self.charge(64 if raw.isascii() else 64 + 3 * len(raw))  # the decoded text may be wider than its bytes
        try:
            self.push(raw.decode())
        except UnicodeDecodeError as error:
            raise self._refused("text that is no Unicode") from error

    def bytes(self, layout: str) -> None:
        self.push(self.take(self.number(layout)))

    def latin(self, layout: str) -> None:
        """Text as Python 2 wrote it."""
        self.push(self.take(self.number(layout)).decode("latin-1"))

    def long(self) -> None:
        self.push(int.from_bytes(self.take(self.number("<B")), "little", signed=True))

    def mark(self) -> None:
        self.charge(_MARK)
        self.marked.append(self.stack)
        self.stack = []

    def pop_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.marked.pop()
        return items

    def pop(self) -> None:
        self.stack.pop()

    def drop_mark(self) -> None:
        self.pop_mark()

    def tuple(self, count: int) -> None:
        if len(self.stack) < count:
            raise IndexError
        items = tuple(self.stack[-count:])
        del self.stack[-count:]
        self.push(items)

    def put(self, number: int) -> None:
        """Numbers are given one after the other: one far above the last would only cost memory."""
        if number > len(self.memo):
            raise self._refused(f"memo number {number:,} after {len(self.memo):,}")
        self.memo[number : number + 1] = self.stack[-1:]

    def get(self, number: int) -> None:
        self.stack.append(self.memo[number])

    def append(self, items: list[Any]) -> None:
        if not isinstance(self.stack[-1], list):
            raise TypeError
        self.stack[-1].extend(items)

    def set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict) or len(items) % 2:
            raise TypeError
        before = getsizeof(target)
        for key, value in zip(items[::2], items[1::2], strict=True):
            _hashable(key)
            if key in target:
                raise Malformed(
                    f"{self.name}: the pickle has the key {str(key)[:80]!r} twice in one dict; save it again"
                )
            target[key] = value
        self.charge(getsizeof(target) - before)

    def global_(self) -> None:
        lines = self.data[self.at : self.at + 2 * _LONGEST_GLOBAL].split(b"\n", 2)
        if len(lines) < 3:
            raise IndexError
        self.at += len(lines[0]) + len(lines[1]) + 2
        self.named(lines[0].decode(), lines[1].decode())

    def stack_global(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise TypeError
        self.named(module, name)

    def named(self, module: str, name: str) -> None:
        found = Global(module, name)
        if str(found) not in self.allowed:
            raise self._refused(f"the name {str(found)[:_LONGEST_GLOBAL]!r}, which no checkpoint of tensors needs")
        self.charge(_NAME)
        self.push(found)

    def call(self) -> None:
        args, function = self.stack.pop(), self.stack.pop()
        if not isinstance(function, Global) or not isinstance(args, tuple):
            raise TypeError
        if str(function) == MEMBER and [type(one) for one in args] != [Global, str]:
            raise self._refused(f"the name {MEMBER!r} for something that is no member of an enum")
        self.push(_mapping(args, self.charge) if str(function) in _MAPPINGS else Call(function, args))

    def build(self) -> None:
        state = self.stack.pop()
        if isinstance(self.stack[-1], Call):
            self.stack[-1].state = state
        elif not isinstance(self.stack[-1], dict):  # of a dict it is the versions of its modules
            raise TypeError


_MAPPINGS = frozenset({"collections.OrderedDict", "collections.Counter"})
_PAIR = 100
"""Bytes of an item of a dict, at most, while the dict grows."""
_MARK = 128
"""Bytes of a list that something is put into."""
_NAME = 256
"""Bytes of a Global with its two texts, at most: those that are allowed are short."""


def _mapping(args: tuple[Any, ...], charge: Callable[[int], None]) -> dict[Any, Any]:
    """A dict of its own: to put something into it must not change the one that it was made from."""
    if not args:
        return {}
    (items,) = args if len(args) == 1 else (None,)
    if isinstance(items, dict):
        charge(getsizeof(items))  # before it is copied: one dict can be named as often as one likes
        return dict(items)
    # a list of pairs is Python 2's
    if not isinstance(items, list) or not all(isinstance(p, list | tuple) and len(p) == 2 for p in items):
        raise TypeError
    charge(_PAIR * len(items))
    for key, _ in items:
        _hashable(key)
    return dict(items)


def _hashable(key: Any) -> None:
    """Only keys whose hash is no recursion: that of a deep tuple would exhaust the stack. TypeError for others."""
    if isinstance(key, tuple) and not isinstance(key, Global):
        if len(key) > _LONGEST_KEY or not all(isinstance(part, str | int) for part in key):
            raise TypeError
        if any(isinstance(part, str) and len(part) > _LONGEST_PART for part in key):
            raise TypeError
    elif not isinstance(key, str | int | float | bytes | Global | Call | None):
        raise TypeError


_STOP = ord(".")
_OPERATIONS: dict[int, Callable[[_Machine], None]] = {
    0x80: lambda m: m.skip(1),  # the protocol; what it allows is judged operation by operation
    0x95: lambda m: m.skip(8),  # a frame
    ord("("): _Machine.mark,
    ord("0"): _Machine.pop,
    ord("1"): _Machine.drop_mark,
    ord("N"): lambda m: m.stack.append(None),
    0x88: lambda m: m.stack.append(True),
    0x89: lambda m: m.stack.append(False),
    ord("J"): lambda m: m.push(m.number("<i")),
    ord("K"): lambda m: m.stack.append(m.number("<B")),
    ord("M"): lambda m: m.push(m.number("<H")),
    0x8A: _Machine.long,
    ord("G"): lambda m: m.push(m.number(">d")),
    ord("X"): lambda m: m.text("<I"),
    0x8C: lambda m: m.text("<B"),
    0x8D: lambda m: m.text("<Q"),
    ord("B"): lambda m: m.bytes("<I"),
    ord("C"): lambda m: m.bytes("<B"),
    ord("T"): lambda m: m.latin("<I"),
    ord("U"): lambda m: m.latin("<B"),
    ord(")"): lambda m: m.stack.append(()),
    ord("t"): lambda m: m.push(tuple(m.pop_mark())),
    0x85: lambda m: m.push((m.stack.pop(),)),
    0x86: lambda m: m.tuple(2),
    0x87: lambda m: m.tuple(3),
    ord("]"): lambda m: m.push([]),
    ord("a"): lambda m: m.append([m.stack.pop()]),
    ord("e"): lambda m: m.append(m.pop_mark()),
    ord("}"): lambda m: m.push({}),
    ord("s"): lambda m: m.set_items([m.stack.pop(), m.stack.pop()][::-1]),
    ord("u"): lambda m: m.set_items(m.pop_mark()),
    ord("c"): _Machine.global_,
    0x93: _Machine.stack_global,
    ord("R"): _Machine.call,
    0x81: _Machine.call,  # an instance of a class: the same record
    ord("b"): _Machine.build,
    ord("Q"): lambda m: m.push(Persistent(m.stack.pop())),
    ord("q"): lambda m: m.put(m.number("<B")),
    ord("r"): lambda m: m.put(m.number("<I")),
    0x94: lambda m: m.put(len(m.memo)),
    ord("h"): lambda m: m.get(m.number("<B")),
    ord("j"): lambda m: m.get(m.number("<I")),
}
