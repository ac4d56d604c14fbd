"""What the training side costs: the tracker on a training loop, and `sync()` where there is nothing new."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch
from botocore.exceptions import ClientError
from cycles import served
from digits_model import ResNet
from lines import Line, Sample, alternating, one, seconds
from machine import cores
from raw import RawS3
from sizes import Size
from torch import nn
from torch.nn.functional import cross_entropy

from kasmina import ImportanceTracker, TrainingRun, trace_topology
from kasmina.cost import error_of_median
from leyline.open import open_store
from wrapped import Wrapped

GROUP = "the trainer"
BATCH = 64


def lines(size: Size, folder: Path) -> Iterator[Line]:
    yield from tracker(size)
    here = folder / "training"
    with served(here) as server:
        yield from sync(size, f"s3://{server.bucket}/training", here)


def tracker(size: Size) -> Iterator[Line]:
    """Pairs of a step with and one without, the first of a pair in turn. The model is `make demo`'s.

    The tracker finds by itself every how many steps it may sample. Medians of the steps that are sampled and of those
    between are taken apart, then added up: what the machine does besides moves longer stretches by several percent.
    """
    torch.manual_seed(0)
    torch.set_num_threads(min(cores(), size.threads))
    model = ResNet()
    x, y = torch.randn(BATCH, 1, 28, 28), torch.randint(0, 10, (BATCH,))
    topology = trace_topology(model, x[:2], model_id="digits")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

    def plain() -> None:
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()

    def tracked(found: ImportanceTracker) -> None:
        optimizer.zero_grad()
        with found.step(BATCH):
            cross_entropy(model(x), y).backward()
        optimizer.step()

    finding = ImportanceTracker(model, topology)
    for _ in range(size.steps):
        tracked(finding)
    every = finding.stride
    found = ImportanceTracker(model, topology, sample_every=every)
    without: list[list[float]] = []
    tracking: list[list[float]] = []
    for _ in range(size.pairs):
        without.append([])
        tracking.append([])
        for number in range(every):
            for call, values in ((plain, without), (lambda: tracked(found), tracking))[:: 1 if number % 2 else -1]:
                values[-1].append(seconds(call) * 1e3)
    more = [[100 * (b / a - 1) for a, b in zip(*pair, strict=True)] for pair in zip(without, tracking, strict=True)]
    between, sampled = [one for some in more for one in some[:-1]], [some[-1] for some in more]
    extra = (statistics.median(between) * (every - 1) + statistics.median(sampled)) / every
    error = math.hypot(error_of_median(between) * (every - 1), error_of_median(sampled)) / every
    said = f"every {every}th sampled: median {extra:+.2f} %, standard error {error:.2f}"
    figure, against = (Sample(tuple(statistics.fmean(some) for some in of)) for of in (tracking, without))
    yield Line(
        group=GROUP, what=f"one step with the tracker ({said})", unit="ms", figure=figure,
        reference="the same step without it", against=against, target="at most 1 % more", reached=extra <= 1,
    )  # fmt: skip


def sync(size: Size, uri: str, folder: Path) -> Iterator[Line]:
    """Requests and time, against one plain GET of what is not there."""
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    topology = trace_topology(model, torch.zeros(2, 8), model_id="tiny")
    store = Wrapped(open_store(uri))
    run = TrainingRun.start(store, model=model, model_id="tiny", topology=topology)  # type: ignore[arg-type]
    run.publish(step=1, epoch=1)
    run.sync()
    plain = RawS3(*uri.removeprefix("s3://").split("/"), folder)

    def get() -> None:
        with suppress(ClientError):
            plain.client.get_object(Bucket=plain.bucket, Key=f"{plain.prefix}/nothing")

    store.seen.clear()
    run.sync()
    asked = sum(store.seen.values())
    yield Line(
        group=GROUP, what="sync() without news, requests", unit="requests", figure=one(asked), reference="one GET",
        against=one(1), target="one GET", reached=dict(store.seen) == {"get": 1},
    )  # fmt: skip
    gets, syncs = alternating(20 * size.repeats, get, run.sync)
    yield Line(
        group=GROUP, what="sync() without news, time", unit="ms", figure=syncs.times(1e3),
        reference="a plain GET of what is not there", against=gets.times(1e3),
    )  # fmt: skip
