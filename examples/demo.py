"""The whole of Emrakul in a few minutes on one machine: train, prune at every checkpoint, refuse, roll back.

A small network learns real handwritten digits; `emrakul watch` runs beside it as its own process and does a cycle for
each checkpoint through every stage of the schedule. Then a decision that is too greedy is forced, and refused; the
tip is damaged on purpose, and the trainer's next start rolls it back.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from digits_train import train
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from kasmina import SyncResult
from leyline import layout
from leyline.local import LocalStore
from leyline.log import Log
from leyline.masks import Masks
from leyline.messages import Decision, GroupDecision, Stage
from leyline.records import Record
from leyline.topology import Group, Kind, Topology

HERE = Path(__file__).parent
RUN = Path("demo-run").resolve()
EPOCHS = 9
STEPS = 63

console = Console(highlight=False)


def main() -> int:
    began = time.monotonic()
    torch.set_num_threads(max(1, (os.cpu_count() or 2) - 1))  # the workers need a core
    shutil.rmtree(RUN, ignore_errors=True)
    console.rule("[bold]1. Train, and prune at every checkpoint")
    watcher = emrakul_process("watch", str(HERE / "policy.yaml"))
    try:
        train_with_bars()
    finally:
        watcher.terminate()
        watcher.wait()
    emrakul("history", str(RUN), "--cycles")
    console.rule("[bold]2. A greedy decision is refused")
    refuse()
    console.rule("[bold]3. The tip is damaged, and the trainer rolls it back")
    roll_back()
    emrakul("status", str(RUN))
    console.print(f"\nThe run lies in {RUN.name}/; look around with [bold].venv/bin/emrakul history {RUN.name}[/].")
    console.print(f"{time.monotonic() - began:.0f} s in all. Masks save neither memory nor time before compaction.")
    return 0


def train_with_bars() -> None:
    with Progress(
        TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"), TimeElapsedColumn(),
        console=console,
    ) as bars:  # fmt: skip
        bar = bars.add_task("training", total=EPOCHS * STEPS)

        def told(epoch: int, accuracy: float, ended: Record | None, news: SyncResult) -> None:
            what = f"{ended.body.outcome}/{ended.reason}" if ended else "no cycle ended in time"  # type: ignore[union-attr]
            masked = f", masks taken: {news.masks.counts}" if news.masks else ""
            bars.console.print(f"epoch {epoch}: accuracy {accuracy:.3f}; {what}{masked}")

        train(str(RUN), epochs=EPOCHS, on_step=lambda: bars.advance(bar), on_epoch=told)


def refuse() -> None:
    """Force random units out of every group up to its floor: within every constraint, and too much for the model."""
    store = LocalStore(RUN)
    state = Log(store).tail().state
    newest = state.tip_pair
    assert newest is not None
    name = layout.checkpoint(newest.checkpoint, "topology.json")
    topology = Topology.parse(store.get(name), name=name)
    ref = newest.masks
    masks = Masks.from_bytes(store.get(ref.path), name=ref.path) if ref else Masks(topology.model_id)
    chance = random.Random(0)
    wanted = Decision(
        cycle="-", base=0, checkpoint="-", stage=Stage.CONSERVATIVE, method="forced", policy_state="", settings="",
        groups=tuple(
            GroupDecision(group=g.id, pruned=random_units(g, masks, chance))
            for g in topology.groups if g.kind is Kind.CHANNEL
        ),
    )  # fmt: skip
    path = RUN.with_name("demo-decision.json")
    path.write_text(json.dumps(wanted.model_dump(mode="json")))
    emrakul("run", str(HERE / "cycle.yaml"), "--policy", str(HERE / "policy.yaml"), "--decision", str(path), code=7)
    path.unlink()


def random_units(group: Group, masks: Masks, chance: random.Random) -> tuple[int, ...]:
    """As many as leave four fifths of the group's original units."""
    pruned = masks.pruned(group.id)
    live = [unit for unit in range(group.units) if pruned is None or not pruned[unit]]
    return tuple(sorted(chance.sample(live, max(0, group.units // 5 - (group.units - len(live))))))


def roll_back() -> None:
    """Damage the tip's weights: a start that loads it appends one record and takes the good pair before."""
    tip = Log(LocalStore(RUN)).tail().record.tip
    assert tip is not None
    folders = [layout.checkpoint(tip.checkpoint), *([tip.candidate] if tip.candidate else [])]
    for folder in folders:  # with one of the two left, loading would just take that
        victim = RUN / folder / "model.safetensors"
        data = bytearray(victim.read_bytes())
        data[-100] ^= 0xFF
        victim.chmod(0o644)
        victim.write_bytes(data)
        console.print(f"One byte of {victim.relative_to(RUN.parent)} is flipped.")
    console.print("A trainer starts:")
    train(str(RUN), epochs=0)
    emrakul("history", str(RUN), "--last", "2")


def emrakul_process(*arguments: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "emrakul", *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


def emrakul(*arguments: str, code: int = 0) -> None:
    """Run a command as a person would, and show it."""
    shown = " ".join(str(Path(a).relative_to(Path.cwd())) if a.startswith("/") else a for a in arguments)
    console.print(f"[bold]$ emrakul {shown}")
    sys.stdout.flush()
    done = subprocess.run([sys.executable, "-m", "emrakul", *arguments], check=False)
    if done.returncode != code:
        raise SystemExit(f"emrakul {arguments[0]} ended with {done.returncode}, {code} was expected")


if __name__ == "__main__":
    raise SystemExit(main())
