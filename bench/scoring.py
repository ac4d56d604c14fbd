"""Scoring a core, weights in memory: our passes against numpy's row norms and the pruning libraries' own scores."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch_pruning
from lines import Line, Sample, alternating
from model import Chain
from numpy.typing import NDArray
from sizes import Size
from torch import nn
from torch.nn.utils import prune

from elesh import single, squares
from elesh.squares import Axis
from leyline.messages import Tie

GROUP = "scoring, one core, in memory"
RATE = "M params/s"
LAYERS = 2
"""Of the model that the libraries score: one of its layers would be its output, which they keep."""


def lines(size: Size, _folder: Path) -> Iterator[Line]:
    torch.set_num_threads(1)
    n = size.scored
    weights = np.random.default_rng(0).standard_normal((n, n), dtype=np.float32)
    yield from structured(weights, size.repeats)
    yield from basic(weights, size.repeats)


def structured(weights: NDArray[np.float32], repeats: int) -> Iterator[Line]:
    def ours(axes: tuple[Axis, ...]) -> None:
        for start, stop in squares.segments(0, weights.size, weights.shape):
            values = weights.reshape(-1)[start:stop]
            sums = squares.sum_squares(values, start, weights.shape, axes)
            squares.require_finite(values, sums, parameter="w", start=start)

    rows, our_rows = alternating(repeats, lambda: np.linalg.norm(weights, axis=1), lambda: ours(()))
    yield _line("structured, rows", our_rows, "numpy's row norms (float32)", rows, weights.size, goal=1000)
    both, our_both = alternating(
        repeats,
        lambda: (np.linalg.norm(weights, axis=1), np.linalg.norm(weights, axis=0)),
        lambda: ours((Axis(1),)),
    )
    said = "numpy's row and column norms (float32)"
    yield _line("structured, rows and columns", our_both, said, both, weights.size, goal=1000)

    model = Chain(LAYERS, len(weights))
    importance = torch_pruning.importance.GroupMagnitudeImportance(p=2)
    graph = torch_pruning.DependencyGraph().build_dependency(model, torch.zeros(1, len(weights)))
    group = graph.get_pruning_group(
        model.layers[0], torch_pruning.prune_linear_out_channels, idxs=list(range(len(weights)))
    )
    theirs, mine = alternating(repeats, lambda: importance(group), lambda: (ours(()), ours((Axis(1),))))
    said = "torch-pruning's GroupMagnitudeImportance"
    yield _line("structured, one group: rows, then columns", mine, said, theirs, LAYERS * weights.size)


def basic(weights: NDArray[np.float32], repeats: int) -> Iterator[Line]:
    """All three rounds, on the threshold of one weight in a hundred."""
    flat = weights.reshape(-1)
    wanted = flat.size // 100

    def pieces() -> Iterator[NDArray[np.uint32]]:
        for at in range(0, flat.size, squares.SEGMENT):
            yield single.magnitude_keys(flat[at : at + squares.SEGMENT], parameter="w", start=at)

    def ours() -> None:
        bucket, before = reached(single.added([single.histogram(keys) for keys in pieces()]), wanted)
        low, fewer = reached(single.added([single.refine(keys, bucket) for keys in pieces()]), wanted - before)
        tie = Tie(below=bucket << 16 | low, equal=wanted - before - fewer)
        taken = 0
        for keys in pieces():
            _, taken = single.select(keys, np.ones(len(keys), dtype=np.bool_), tie, taken)

    layer = nn.Linear(len(weights), len(weights), bias=False)

    def whole() -> None:
        if prune.is_pruned(layer):
            prune.remove(layer, "weight")
        with torch.no_grad():
            layer.weight.copy_(torch.from_numpy(weights))

    def theirs() -> None:
        prune.global_unstructured([(layer, "weight")], pruning_method=prune.L1Unstructured, amount=wanted)

    torchs, mine = alternating(repeats, theirs, ours, before=whole)
    yield _line("basic, three rounds", mine, "torch.nn.utils.prune.global_unstructured", torchs, flat.size)
    norms, first = alternating(
        repeats,
        lambda: np.linalg.norm(weights, axis=1),
        lambda: single.added([single.histogram(keys) for keys in pieces()]),
    )
    yield _line("basic, one round (histogram)", first, "numpy's row norms (float32)", norms, flat.size)


def _line(what: str, ours: Sample, reference: str, theirs: Sample, params: int, goal: float | None = None) -> Line:
    figure = ours.per(params / 1e6)
    return Line(
        group=GROUP,
        what=what,
        unit=RATE,
        figure=figure,
        reference=reference,
        against=theirs.per(params / 1e6),
        target="" if goal is None else f"at least {goal:,.0f} {RATE}",
        reached=None if goal is None else figure.median >= goal,
    )


def reached(histogram: single.Sparse, wanted: int) -> tuple[int, int]:
    """The bucket that holds the wanted-th smallest, and how many lie before it."""
    up_to = np.cumsum(histogram.counts)
    at = int(np.searchsorted(up_to, wanted))
    return int(histogram.buckets[at]), int(up_to[at] - histogram.counts[at])
