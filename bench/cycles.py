"""The full cycle of a large model on SeaweedFS and on the local store, phase by phase, with everybody's peak memory."""

from __future__ import annotations

import os
import shutil
import statistics
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

from checkpoints import child, copied, published, wide_run
from lines import Line, Sample, one
from machine import cores
from raw import RawS3
from sizes import Size

from emrakul.scaling import formula_workers
from emrakul.settings import Settings
from leyline.local import LocalStore
from leyline.open import open_store
from servers import S3Server, seaweedfs

MB = 1e6


def lines(size: Size, folder: Path) -> Iterator[Line]:
    source = folder / wide_run(size.layers, size.width)
    told = published(size, folder)[source.name]
    with served(folder / "cycles") as server:
        run = f"s3://{server.bucket}/large"
        copied(LocalStore(source), open_store(run))
        yield from on_store(size, run, folder / "cycles", "SeaweedFS", 60.0, told)
    yield from on_store(size, str(source), source, "local store", 40.0, told)


@contextmanager
def served(folder: Path) -> Iterator[S3Server]:
    """SeaweedFS for this process and its children; nothing is left of it."""
    try:
        with seaweedfs(folder) as server, patch.dict(os.environ, server.environment):
            yield server
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def on_store(size: Size, run: str, data: Path, kind: str, limit: float, published: Mapping[str, Any]) -> Iterator[Line]:
    parameters = size.layers * size.width**2
    group = f"a cycle over {human(parameters)} parameters, {kind}"
    formula = max(formula_workers(Settings(), parameters), Settings().analysis_parallel_workers)
    told: dict[int, list[dict[str, Any]]] = {formula: [], cores(): []} if size.formula else {cores(): []}
    order = [workers for _ in range(size.cycles) for workers in told]
    if size.formula and kind == "SeaweedFS":  # what is deleted there does not become free at once
        order = order[1:]
    for number, workers in enumerate(order, 1):
        options = ["--workers", str(workers), "--data", str(data), "--raw-bytes", str(size.raw_bytes)]
        options += ["--commit"] if number == len(order) else ["--number", str(number)]
        told[workers].append(child("drive.py", run, *options))
    for workers, cycles in told.items():
        yield from phases(group, workers, cycles, published, limit if size.judged and workers == cores() else None)
    yield from memory(group, [cycle for cycles in told.values() for cycle in cycles], published)
    yield moving(group, told[order[-1]][-1])


@cache
def floor(role: str) -> dict[str, float]:
    """Memory and time of a process that imports what a role imports."""
    found: dict[str, float] = child("floor.py", role)
    return found


def phases(
    group: str, workers: int, cycles: list[dict[str, Any]], published: Mapping[str, Any], limit: float | None
) -> Iterator[Line]:
    """Each phase against the same bytes in the plainest way; `limit`: seconds that all of it may take."""
    size = cycles[0]["bytes"]
    named = f"{workers} workers, "

    def raw(cycle: dict[str, Any], first: int, **amounts: float) -> float:
        """Seconds to read, write or hash so many bytes at the rates measured before and after a phase."""
        around = cycle["raw"][first : first + 2]
        taken = {kind: sum(one[kind] for one in around) / len(around) for kind in amounts}
        return sum(amount * taken[kind] / cycle["raw_bytes"] for kind, amount in amounts.items())

    def line(
        what: str, figure: Sample, reference: str, against: Sample, target: str = "", reached: bool | None = None
    ) -> Line:
        return Line(
            group=group, what=named + what, unit="s", figure=figure, reference=reference, against=against,
            target=target, reached=reached,
        )  # fmt: skip

    def each(name: str) -> Sample:
        return Sample(tuple(cycle["seconds"][name] for cycle in cycles))

    checks = Sample(tuple(cycle["validation"]["structure"] for cycle in cycles))
    plainly = cycles[0]["raw_name"]
    on_server = plainly == RawS3.name
    analysis_raw = Sample(tuple(raw(cycle, 0, read=size) for cycle in cycles))
    apply_raw = Sample(tuple(raw(cycle, 1, read=size, write=size) for cycle in cycles))
    checks_raw = Sample(tuple(raw(cycle, 2, read=size + cycle["changed"]) for cycle in cycles))
    hashing = Sample(tuple(raw(cycle, 1, hash=3 * size + 2 * cycle["changed"]) for cycle in cycles))
    analysis = each("analyse")
    rate = analysis.per(cycles[0]["parameters"] / 1e6)
    yield line("analysis", analysis, f"reading it: {plainly}", analysis_raw)
    yield Line(
        group=group, what=named + "analysis, I/O included", unit="M params/s", figure=rate,
        reference=f"reading it: {plainly}", against=analysis_raw.per(cycles[0]["parameters"] / 1e6),
        target="at least 100 M params/s" if limit else "", reached=rate.median >= 100 if limit else None,
    )  # fmt: skip
    amplification = Sample(tuple(cycle["analysis"]["bytes"] / MB for cycle in cycles))
    yield Line(
        group=group, what=named + "analysis, bytes read", unit="MB", figure=amplification,
        reference="the weights", against=one(size / MB),
    )  # fmt: skip
    yield line("apply", each("apply"), f"reading and writing it: {plainly}", apply_raw)
    yield line("validate: byte checks", checks, f"reading candidate and base: {plainly}", checks_raw)
    forward = Sample(tuple(published["forward"]))
    torch = floor("validator")["seconds"]
    gate = Sample(tuple(c["validation"]["import"] + c["validation"]["evaluation"] for c in cycles))
    gate_raw = Sample(tuple(torch + raw(cycle, 2, read=2 * size) + 2 * forward.median for cycle in cycles))
    yield line("validate: gate", gate, "import torch, read candidate and base, two plain forward passes", gate_raw)
    proof = Sample(tuple(cycle["validation"]["proof"] for cycle in cycles))
    yield line("validate: dead-unit proof", proof, "four plain forward passes", forward.times(4))
    between = Sample(tuple(sum(v for k, v in c["seconds"].items() if k not in PHASES) for c in cycles))
    yield line("decision, records and requests", between, f"reading it: {plainly}", analysis_raw)
    storage = summed(analysis, each("apply"), checks)
    raw_all = summed(analysis_raw, apply_raw, checks_raw)
    ratio = storage.median / raw_all.median
    yield line(
        "storage phases together", storage, f"the same bytes: {plainly}", raw_all,
        "at most 1.2 x" if limit and on_server else "", ratio <= 1.2 if limit and on_server else None,
    )  # fmt: skip
    yield line(
        "storage phases, hashing counted", storage, f"the same bytes, then their SHA-256: {plainly}",
        summed(raw_all, hashing),
    )  # fmt: skip
    at_work = Sample(tuple(statistics.mean(cycle["busy"][phase] for phase in PHASES[:2]) for cycle in cycles))
    plain_work = Sample(tuple(statistics.mean(raw["busy"] for raw in cycle["raw"]) for cycle in cycles))
    if min(plain_work.values) > 0:  # the system counts in hundredths of a second, and the small bench is faster
        yield Line(
            group=group, what=named + "cores at work in analysis and apply", unit="%", figure=at_work,
            reference=plainly, against=plain_work,
        )  # fmt: skip
    whole = Sample(tuple(sum(cycle["seconds"].values()) for cycle in cycles))
    without = summed(whole, gate.times(-1), proof.times(-1))
    yield line(
        "full cycle, gate and proof apart", without, f"the same bytes: {plainly}", raw_all,
        f"under {limit:.0f} s" if limit else "", without.median < limit if limit else None,
    )  # fmt: skip
    everything = summed(raw_all, gate_raw, one(4 * forward.median).again(len(cycles)))
    yield line("full cycle", whole, "the same bytes and forward passes", everything)


PHASES = ("analyse", "apply", "validate")


def summed(*parts: Sample) -> Sample:
    """Of each cycle, the parts together."""
    return Sample(tuple(sum(values) for values in zip(*(part.values for part in parts), strict=True)))


def memory(group: str, cycles: list[dict[str, Any]], published: Mapping[str, Any]) -> Iterator[Line]:
    """Peak RSS of every process."""
    model = cycles[0]["bytes"]
    for role, what, bare, most in (
        ("analyse", "elesh", "worker", 256 * MB),
        ("apply", "kasmina.apply", "worker", 256 * MB),
        ("checks", "urabrask, byte checks", "worker", 256 * MB),
        ("validate", "urabrask, gate and proof", "validator", model + 1000 * MB),
        ("emrakul", "emrakul, one cycle", "emrakul", 300 * MB),
    ):
        figure = Sample(tuple(cycle["peaks"][role] / MB for cycle in cycles if role in cycle["peaks"]))
        if not figure.values:
            continue
        held = model if role == "validate" else 0
        imports = {"worker": "numpy and boto3", "validator": "torch, and one model", "emrakul": "emrakul.cli"}[bare]
        yield Line(
            group=group, what=f"peak RSS, {what}", unit="MB", figure=figure,
            reference=f"a process that imports {imports}", against=one((floor(bare)["rss"] + held) / MB),
            target=f"at most {most / MB:,.0f} MB", reached=max(figure.values) <= most / MB,
        )  # fmt: skip
    yield Line(
        group=group, what="peak RSS, the trainer that publishes", unit="MB", figure=one(published["peak"] / MB),
        reference="before it publishes", against=one(published["before"] / MB),
    )  # fmt: skip


def moving(group: str, cycle: Mapping[str, Any]) -> Line:
    return Line(
        group=group, what="moving the tip back", unit="ms", figure=one(cycle["moved"] * 1e3),
        reference="writing one small object plainly", against=one(cycle["moved_raw"] * 1e3),
        target="under 1,000 ms", reached=cycle["moved"] < 1,
    )  # fmt: skip


def human(count: int) -> str:
    for unit, value in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= value:
            return f"{count / value:.3g} {unit}"
    return str(count)
