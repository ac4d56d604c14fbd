"""A thousand cycles for a thousand runs at once: all finish, and the operator stays small.

The runs are copies of one, so their workers would write the same bytes a thousand times: one cycle is computed, and the
Jobs of all others write what its Jobs wrote.
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import pytest

from api.apiclient import CYCLES, JOBS, Body, Refused
from api.jobs import complete, run_of, run_workers
from api.operators import wait_for
from api.stage import SETTINGS, Stage
from leyline.local import LocalStore
from leyline.store import ObjectStore
from runs import published_run

MANY = int(os.environ.get("EMRAKUL_MANY", "1000"))
"""A thousand, unless somebody has less time."""
PEAK_RSS = 300e6
SECONDS = 1100.0
"""From the start of the operator to the last outcome, beside whatever else runs; alone it takes a third of that."""


@dataclass
class Golden:
    """What the Jobs of one phase wrote, by phase: of whichever cycle came first."""

    objects: dict[str, dict[str, bytes]] = field(default_factory=dict)
    _first: threading.Lock = field(default_factory=threading.Lock)

    def work(self, job: Body, store: ObjectStore) -> None:
        phase = job["metadata"]["labels"]["emrakul.dev/phase"]
        with self._first:
            if phase not in self.objects:
                before = keys(store)
                run_workers(job, store)
                self.objects[phase] = {key: store.get(key) for key in sorted(keys(store) - before)}
                return
        for key, data in self.objects[phase].items():
            store.put_if_absent(key, data)


def keys(store: ObjectStore) -> set[str]:
    return {head.key for head in store.list("cycles/")}


@pytest.mark.timeout(1300)
def test_a_thousand_cycles_at_once(stage: Stage) -> None:
    runs = [f"s3://{stage.s3.bucket}/{stage.namespace}/many-{number:04}" for number in range(MANY)]
    with ThreadPoolExecutor(16) as threads:
        copied = time.monotonic()
        template = published_run(LocalStore(stage.folder / "template"))
        objects = {head.key: template.get(head.key) for head in template.list("")}
        list(threads.map(lambda run: copy(objects, stage.open(run)), runs))
        checkpoint = stage.checkpoint.rpartition("/")[2]
        list(threads.map(lambda run: ask(stage, run, checkpoint), runs))
        print(f"{MANY} runs of {len(objects)} objects were made in {time.monotonic() - copied:.0f} s")

        stage.configure(defaults={"store": stage.store_spec, "settings": SETTINGS})
        began = time.monotonic()
        stage.operator.start()
        golden = Golden()
        threading.Thread(target=lambda: play(stage, golden, threads), daemon=True).start()
        ended = wait_for(lambda: all_ended(stage), seconds=SECONDS, every=5.0, told=lambda: states(stage))
        took = time.monotonic() - began
        wait_for(lambda: not stage.api.list(JOBS, stage.namespace), seconds=60, every=1.0)
    peak = stage.operator.peak_rss()
    asked = requests(stage.operator.health("metrics"))
    print(f"{MANY} cycles in {took:.0f} s; the operator's peak RSS is {peak / 1e6:.0f} MB")
    each = ", ".join(f"{verb} {count / MANY:.1f}" for verb, count in sorted(asked.items()))
    print(f"API calls per cycle: {sum(asked.values()) / MANY:.1f} ({each})")
    assert ended == {"Committed": MANY}
    assert peak < PEAK_RSS
    assert stage.errors() == []


def copy(objects: dict[str, bytes], store: ObjectStore) -> None:
    for key, data in objects.items():
        store.put_if_absent(key, data)


def ask(stage: Stage, run: str, checkpoint: str) -> None:
    stage.cycle(run.rpartition("/")[2], checkpoint=f"{run}/checkpoints/{checkpoint}")


def play(stage: Stage, golden: Golden, threads: ThreadPoolExecutor) -> None:
    """The Job controller, by the watch: so many Jobs cannot be listed again and again."""

    def carry_out(job: Body) -> None:
        golden.work(job, stage.open(run_of(job)))
        try:
            complete(stage.api, job)
        except Refused as refused:  # the operator saw the last answer first, and deleted it
            if refused.code != 404:
                raise

    for event in stage.api.watch(JOBS, stage.namespace):
        if event["type"] == "ADDED":
            threads.submit(carry_out, event["object"])


def statuses(stage: Stage) -> Iterator[Body]:
    for one in stage.api.list(CYCLES, stage.namespace):
        yield one.get("status") or {}


def all_ended(stage: Stage) -> dict[str, int] | None:
    found = states(stage, "outcome")
    return None if None in found else found


def states(stage: Stage, name: str = "state") -> dict[str | None, int]:
    found: dict[str | None, int] = {}
    for status in statuses(stage):
        found[status.get(name)] = found.get(status.get(name), 0) + 1
    return found


def requests(metrics: str) -> dict[str, float]:
    """API requests of the operator by verb."""
    found: dict[str, float] = {}
    for labels, value in re.findall(r"^emrakul_api_requests_total\{(.*)\} (\S+)$", metrics, re.MULTILINE):
        verb = re.search(r'verb="(\w+)"', labels)
        assert verb is not None
        found[verb[1]] = found.get(verb[1], 0) + float(value)
    return found
