"""A process of its own: publishes Chains as a trainer would, and says what it took, and what the forward pass costs.

    python bench/publish.py RUN:LAYERS:WIDTH [RUN:LAYERS:WIDTH ...]

Those of width NARROW have no evaluation: exporting thousands of layers takes minutes.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from checkpoints import NARROW
from lines import seconds
from model import MODEL_ID, Chain, samples, topology
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from elesh.worker import peak_rss
from kasmina import ImportanceTracker, TrainingRun


def main() -> None:
    wanted = (argument.rsplit(":", 2) for argument in sys.argv[1:])
    print(json.dumps([publish(run, int(layers), int(width)) for run, layers, width in wanted]))


def publish(uri: str, layers: int, width: int) -> dict[str, Any]:
    model = Chain(layers, width).eval()
    x = samples(width)
    tracker = ImportanceTracker(model, topology(layers, width))
    run = TrainingRun.start(uri, model=model, model_id=MODEL_ID, tracker=tracker)
    before = peak_rss()
    evaluation = None if width == NARROW else (x, None)
    data = (_loss, x.split(64))
    took = seconds(lambda: run.publish(step=1000, epoch=2, refresh=len(x), data=data, evaluation=evaluation))
    with torch.no_grad():
        forward = [seconds(lambda: model(x)) for _ in range(3)]
    return {"seconds": took, "forward": forward, "before": before, "peak": peak_rss()}


def _loss(model: nn.Module, batch: Tensor) -> Tensor:
    return cross_entropy(model(batch), batch.argmax(1))


if __name__ == "__main__":
    main()
