"""What the training side costs: the tracker on a training loop, and `sync()` where there is nothing new."""

from __future__ import annotations

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
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from kasmina import ImportanceTracker, TrainingRun, trace_topology
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
    """Pairs of equally many steps, with and without, the first of a pair in turn. The model is `make demo`'s."""
    torch.manual_seed(0)
    torch.set_num_threads(min(cores(), size.threads))
    model = ResNet()
    x, y = torch.randn(BATCH, 1, 28, 28), torch.randint(0, 10, (BATCH,))
    found = ImportanceTracker(model, trace_topology(model, x[:2], model_id="digits"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

    def plain() -> None:
        for _ in range(size.steps):
            step(model, optimizer, x, y)

    def tracked() -> None:
        for _ in range(size.steps):
            optimizer.zero_grad()
            with found.step(BATCH):
                cross_entropy(model(x), y).backward()
            optimizer.step()

    for _ in range(2):  # the tracker finds its stride first
        plain()
        tracked()
    without, tracking = [], []
    for number in range(size.pairs):
        for call, values in ((plain, without), (tracked, tracking))[:: 1 if number % 2 else -1]:
            values.append(seconds(call) / size.steps * 1e3)
    extra = [100 * (b / a - 1) for a, b in zip(without, tracking, strict=True)]
    middle = statistics.median(extra)
    error = 1.253 * statistics.stdev(extra) / len(extra) ** 0.5
    yield Line(
        group=GROUP, what=f"one step with the tracker (median of pairs {middle:+.2f} %, standard error {error:.2f})",
        unit="ms", figure=Sample(tuple(tracking)), reference="the same step without it", against=Sample(tuple(without)),
        target="at most 1 % more", reached=middle <= 1,
    )  # fmt: skip


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
    optimizer.zero_grad()
    cross_entropy(model(x), y).backward()
    optimizer.step()


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
