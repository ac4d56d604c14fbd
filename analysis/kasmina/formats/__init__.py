"""Checkpoint formats: from parameters to byte extents, and from bytes to numbers. No torch, no unpickling."""

from kasmina.formats.elements import elements, zero_is_zero_byte
from kasmina.formats.index import TensorRef, bind, check_objects, read_index, read_slots
from kasmina.formats.stream import stream

__all__ = [
    "TensorRef",
    "bind",
    "check_objects",
    "elements",
    "read_index",
    "read_slots",
    "stream",
    "zero_is_zero_byte",
]
