"""Numbers from a tensor's raw bytes, without torch."""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray

from leyline.model import Malformed
from leyline.tensors import ITEMSIZE

Floats = NDArray[np.float32] | NDArray[np.float64]


FLOATS = frozenset({"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"})
"""The dtypes that `elements` reads."""


def elements(raw: bytes | bytearray | memoryview, dtype: str) -> Floats:
    """The elements [n] of `raw`: float64 for F64, float32 for every smaller float (each is exact there).

    Malformed for dtypes that hold no floats. F32 and F64 are views of `raw`, the others copies.
    """
    match dtype:
        case "F64":
            return np.frombuffer(raw, dtype="<f8")
        case "F32":
            return np.frombuffer(raw, dtype="<f4")
        case "F16":
            return np.frombuffer(raw, dtype="<f2").astype(np.float32)
        case "BF16":  # the upper half of a float32
            return (np.frombuffer(raw, dtype="<u2").astype(np.uint32) << np.uint32(16)).view(np.float32)
        case "F8_E4M3":
            return _e4m3()[np.frombuffer(raw, dtype=np.uint8)]
        case "F8_E5M2":  # the upper half of a float16
            halves = np.frombuffer(raw, dtype=np.uint8).astype(np.uint16) << np.uint16(8)
            return halves.view(np.float16).astype(np.float32)
    raise Malformed(f"a tensor of dtype {dtype} holds no floats that could be scored; exclude it from pruning")


def zero_is_zero_byte(dtype: str) -> bool:
    """Whether the number 0 is all zero bytes, so that a mask can be written without knowing the dtype further.

    False for every dtype that is not known to be: the zero byte of F8_E8M0 is 2 to the -127.
    """
    return dtype in ITEMSIZE


@cache
def _e4m3() -> NDArray[np.float32]:
    """All 256 values of E4M3FN (OCP 8-bit floating point, v1.0): bias 7, no infinities, NaN where all bits are set."""
    bits = np.arange(128)
    exponent, mantissa = bits >> 3, bits & 7
    subnormal = mantissa * 2.0**-9
    values = np.where(exponent == 0, subnormal, (1 + mantissa / 8) * 2.0 ** (exponent - 7))
    values[127] = np.nan
    return np.concatenate([values, -values]).astype(np.float32)
