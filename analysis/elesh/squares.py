"""Sums of squared weights per row and per column. Pure numpy, and bit by bit the same everywhere.

A slice is cut into segments and blocks by the parameter's shape alone; blocks are added in order. Only elementwise
operations and numpy's pairwise sum are used: BLAS and einsum add in an order that depends on the processor.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from leyline.model import Malformed

Vector = NDArray[np.float64]
Floats = NDArray[np.float32] | NDArray[np.float64]

BLOCK = 2**17
"""Elements that are squared at once: as float64 they fit into a core's cache."""
SEGMENT = 2**20
"""Elements that one thread works on at a time."""


class Axis(NamedTuple):
    """Sums wanted per index of `axis`; above 0, separately within each of `groups` equal parts of axis 0."""

    axis: int
    groups: int = 1


class Sums(NamedTuple):
    """Sums over one segment."""

    rows: Vector
    """Per row of the segment; of a piece of one row, its one sum."""
    columns: dict[tuple[Axis, int], Vector]
    """(axis, part of axis 0) -> per index of that axis."""


def segments(start: int, stop: int, shape: tuple[int, ...]) -> list[tuple[int, int]]:
    """Cut elements [start, stop), whole rows of axis 0, into pieces of about SEGMENT elements."""
    row = _size(shape[1:])
    if row > SEGMENT:  # pieces of single rows
        cuts = [at for first in range(start, stop, row) for at in range(first, first + row, SEGMENT)]
    else:
        step = row * _rows_per_block(row)
        cuts = list(range(start, stop, step * max(1, SEGMENT // step)))
    return list(zip(cuts, [*cuts[1:], stop], strict=True))


def sum_squares(
    values: Floats, start: int, shape: tuple[int, ...], axes: Collection[Axis], half_weights: Floats | None = None
) -> Sums:
    """Sums of w^2 (or of w^2 F / 2, with F in `half_weights`) of one segment, elements from `start` of the parameter.

    `axes` are the axes above 0 that are wanted; rows come always. float64: squares of float32 are exact there.
    """
    row = _size(shape[1:])
    if row > SEGMENT:
        return _piece_of_a_row(_squares(values, half_weights), start, shape, axes)
    matrix = values.reshape(-1, row)
    factors = None if half_weights is None else half_weights.reshape(-1, row)
    step, first_row = _rows_per_block(row), start // row
    rows = np.empty(len(matrix))
    # Columns are kept per part of axis 0; without grouped convolutions there is one.
    parts = max((axis.groups for axis in axes), default=1)
    per_part = shape[0] // parts if shape else 1
    columns: dict[int, Vector] = {}
    scratch = np.empty((min(step, len(matrix)), row))
    for at in range(0, len(matrix), step):
        block = matrix[at : at + step]
        squares = _squares(block, None if factors is None else factors[at : at + step], scratch[: len(block)])
        np.add.reduce(squares, axis=1, out=rows[at : at + step])
        if axes:
            for part, low, high in _split(first_row + at, len(block), per_part):
                total = np.add.reduce(squares[low:high], axis=0)
                columns[part] = columns[part] + total if part in columns else total
    found: dict[tuple[Axis, int], Vector] = {}
    for axis in axes:
        for part, total in columns.items():
            key = (axis, part * axis.groups // parts)
            along = _along(total, axis.axis, shape)
            found[key] = found[key] + along if key in found else along
    return Sums(rows, found)


def add_segments(
    parts: Iterable[tuple[int, Sums]], start: int, stop: int, shape: tuple[int, ...]
) -> tuple[Vector, dict[tuple[Axis, int], Vector]]:
    """Add (first element, sums) of segments, in order, to sums per row of [start, stop) and per column."""
    row = _size(shape[1:])
    rows = np.zeros((stop - start) // row)
    columns: dict[tuple[Axis, int], Vector] = {}
    for at, sums in parts:
        first = (at - start) // row
        rows[first : first + len(sums.rows)] += sums.rows
        for key, total in sums.columns.items():
            columns[key] = columns[key] + total if key in columns else total
    return rows, columns


def require_finite(values: Floats, sums: Sums, *, parameter: str, start: int) -> None:
    """Malformed, naming the element, if a weight is NaN or infinite (or its square is). Free where all is well."""
    if np.isfinite(sums.rows).all():
        return
    flat = values.reshape(-1)
    with np.errstate(over="ignore"):
        at = int(np.argmin(np.isfinite(np.square(flat, dtype=np.float64))))
    raise Malformed(not_finite(parameter, start + at, float(flat[at])))


def not_finite(parameter: str, element: int, value: float) -> str:
    """The sentence about a weight that no score can be made of."""
    return f"{parameter} holds {value} at element {element}; weights must be finite"


def _squares(values: Floats, factors: Floats | None, out: Vector | None = None) -> Vector:
    out = np.empty(values.shape) if out is None else out
    np.copyto(out, values)
    with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is found by its sum
        np.multiply(out, out, out=out)
        if factors is not None:
            np.multiply(out, factors, out=out)
            np.multiply(out, 0.5, out=out)
    return out


def _piece_of_a_row(squares: Vector, start: int, shape: tuple[int, ...], axes: Collection[Axis]) -> Sums:
    row = _size(shape[1:])
    index, within = divmod(start, row)
    columns = {}
    for axis in axes:
        size, inner = shape[axis.axis], _size(shape[axis.axis + 1 :])
        position = (np.arange(within, within + len(squares)) // inner) % size
        sums = np.bincount(position, weights=squares, minlength=size).astype(np.float64, copy=False)
        columns[axis, index * axis.groups // shape[0]] = sums
    return Sums(np.add.reduce(squares, keepdims=True), columns)


def _along(total: Vector, axis: int, shape: tuple[int, ...]) -> Vector:
    """Sums per element of a row -> per index of one of its axes."""
    view = total.reshape(_size(shape[1:axis]), shape[axis], _size(shape[axis + 1 :]))
    return np.asarray(np.add.reduce(view, axis=(0, 2)))


def _split(first_row: int, count: int, per_part: int) -> Iterable[tuple[int, int, int]]:
    """(part of axis 0, [low, high) within these rows)."""
    at = 0
    while at < count:
        part = (first_row + at) // per_part
        stop = min((part + 1) * per_part - first_row, count)
        yield part, at, stop
        at = stop


def _rows_per_block(row: int) -> int:
    return max(1, BLOCK // row)


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for side in shape:
        size *= side
    return size
