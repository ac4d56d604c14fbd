"""Checkpoint formats: from parameters to byte extents, and from bytes to numbers. No torch, no unpickling."""

from kasmina.formats.elements import FLOATS, elements, zero_is_zero_byte
from kasmina.formats.extents import Box, TensorRef, gather
from kasmina.formats.index import bind, check_objects, read_index, read_slots
from kasmina.formats.recognise import Recognised, read_recognised, recognise
from kasmina.formats.stream import Chunks, stream

__all__ = [
    "FLOATS",
    "Box",
    "Chunks",
    "Recognised",
    "TensorRef",
    "bind",
    "check_objects",
    "elements",
    "gather",
    "read_index",
    "read_recognised",
    "read_slots",
    "recognise",
    "stream",
    "zero_is_zero_byte",
]
