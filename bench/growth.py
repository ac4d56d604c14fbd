"""How time grows with the model, its groups and the log: each line is the cost of one piece, against the smallest."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

from checkpoints import child, published, wide_run
from cycles import human
from drive import SETTINGS
from lines import Line, Sample, one, seconds
from machine import cores
from sizes import Size

import drafts
from emrakul.control import Controller, Scale
from emrakul.core import plan
from emrakul.core.snapshot import Ask
from emrakul.settings import Settings
from inprocess import InProcess
from leyline.local import LocalStore
from leyline.log import Log
from wrapped import Memory, Wrapped


def lines(size: Size, folder: Path) -> Iterator[Line]:
    yield from models(size, folder)
    yield from groups(size, folder)
    yield from records(size)


APART = ("import", "evaluation", "proof")
"""Parts of a validation that grow with the samples, and with torch."""

# --- parameters -------------------------------------------------------------------------------------------------------


def models(size: Size, folder: Path) -> Iterator[Line]:
    """A cycle on the local store, all in all without the gate and the proof: they grow with the samples too."""
    published(size, folder)
    first: Sample | None = None
    for shape in size.models:
        run = folder / wide_run(*shape)
        options = ["--workers", str(cores()), "--data", str(run), "--raw-bytes", str(size.raw_bytes)]
        cycle = child("drive.py", str(run), *options, "--number", "9")  # the largest had others before
        whole = sum(cycle["seconds"].values()) - sum(cycle["validation"][part] for part in APART)
        each = one(whole / cycle["parameters"] * 1e9)
        first = first or each
        yield Line(
            group="growth with parameters: a cycle on the local store, gate and proof apart",
            what=f"{human(cycle['parameters'])} parameters", unit="ns/param", figure=each,
            reference="the smallest", against=first,
        )  # fmt: skip


# --- groups -----------------------------------------------------------------------------------------------------------


def groups(size: Size, folder: Path) -> Iterator[Line]:
    """Everything but the bytes: layers as narrow as can be, all roles in one process, up to the candidate."""
    published(size, folder)
    first: dict[str, Sample] = {}
    for count in size.groups:
        run = folder / f"narrow-{count}"
        for what, took in to_candidate(run).items():
            each = one(took / count * 1e3)
            yield Line(
                group="growth with groups: one process, no validation", what=f"{count:,} groups, {what}",
                unit="ms/group", figure=each, reference="the fewest groups", against=first.setdefault(what, each),
            )  # fmt: skip


def to_candidate(run: Path) -> dict[str, float]:
    """Seconds of looking, of cutting and deciding, and of the workers."""
    store = LocalStore(run)
    log = Log(store)
    settings = Settings.from_yaml(SETTINGS.read_text()).model_copy(update={"enable_safety_validation": False})
    ask = Ask(base=log.tail().state.pairs[0].record, settings=settings, runtime="local")
    controller = Controller(store, log, ask, lambda uri: InProcess(store, uri), scale=Scale(override=1))
    spent = {"looking": 0.0, "cutting and deciding": 0.0, "analysis and apply": 0.0}
    while True:
        began = time.perf_counter()
        seen = controller.look()
        spent["looking"] += time.perf_counter() - began
        if seen.plan.done:
            return spent
        where = "analysis and apply" if isinstance(seen.plan.actions[-1], plan.Launch) else "cutting and deciding"
        began = time.perf_counter()
        controller.act(seen)
        spent[where] += time.perf_counter() - began


# --- records ----------------------------------------------------------------------------------------------------------


def records(size: Size) -> Iterator[Line]:
    """A log in memory, so that only our own part is measured; its requests are counted."""
    memory = Memory()
    store = Wrapped(memory)
    log = Log(store)
    log.create(drafts.genesis())
    first: dict[str, Sample] = {}

    def line(count: int, what: str, unit: str, figure: Sample) -> Line:
        return Line(
            group="growth with the log (in memory)", what=f"{count:,} records: {what}", unit=unit, figure=figure,
            reference="the shortest log", against=first.setdefault(what, figure),
        )  # fmt: skip

    def append() -> None:
        last = log.tail().record.n
        log.append(drafts.opened(str(last)), base=last)

    for count in size.records:
        while log.tail().record.n + 1 < count:
            append()
        store.seen.clear()
        found = repeated(size.repeats, lambda: Log(store).tail())
        yield line(count, "find the end, requests", "requests", one(sum(store.seen.values()) / size.repeats))
        yield line(count, "find the end, time", "ms", found.times(1e3))
        yield line(count, "look again, time", "ms", repeated(size.repeats, log.tail).times(1e3))
        yield line(count, "append, time", "ms", repeated(size.repeats, append).times(1e3))


def repeated(count: int, call: Callable[[], object]) -> Sample:
    return Sample(tuple(seconds(call) for _ in range(count)))
