"""`emrakul run CYCLE.yaml`: the very manifest that `kubectl apply` takes, carried out on this machine."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import click

from emrakul.api.cycle import PruningCycle
from emrakul.api.manifest import load_manifest, load_policy, run_of
from emrakul.api.policy import PolicySpec
from emrakul.asking import ask_for, base_of
from emrakul.cli.errors import INVALID, Rejected
from emrakul.cli.options import Opened, StoreOptions, output_options, store_options
from emrakul.cli.output import Output, shown
from emrakul.control import Controller, Scale, name_of, next_try
from emrakul.core.plan import Plan
from emrakul.core.snapshot import Ask, Snapshot
from emrakul.invalid import Invalid
from emrakul.runtime.local import LocalRuntime
from emrakul.settings import Settings
from emrakul.timeline import CycleReport, report
from leyline.messages import Decision
from leyline.model import Malformed
from leyline.reasons import Outcome

if TYPE_CHECKING:
    from collections.abc import Iterator

SKIPPED = 6
NOT_PASSED = 7
CODES = {Outcome.SKIPPED: SKIPPED, Outcome.ROLLED_BACK: NOT_PASSED, Outcome.FAILED: INVALID}
"""Exit codes of outcomes that leave the checkpoint as it was though masks were wanted; all others are 0."""


@click.command()
@click.argument("manifest", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--policy", type=click.Path(dir_okay=False, path_type=Path), help="File with the PruningPolicy.")
@click.option(
    "--settings",
    type=click.Path(dir_okay=False, path_type=Path),
    help="File with an `emrakul:` block of settings, instead of the policy's.",
)
@click.option("--workers", type=click.IntRange(1, 1000), help="Analysis workers, instead of the formula's number.")
@click.option(
    "--decision", type=click.Path(dir_okay=False, path_type=Path), help="Force this decision; every check still holds."
)
@click.option("--again", is_flag=True, help="Once more, where this very cycle has ended without a commit.")
@store_options
@output_options
def command(
    manifest: Path,
    out: Output,
    options: StoreOptions,
    *,
    policy: Path | None,
    settings: Path | None,
    workers: int | None,
    decision: Path | None,
    again: bool,
) -> int:
    """Run one pruning cycle to its end. Interrupted, the same command goes on from where it was."""
    given = load_policy(read(policy), name=str(policy)) if policy else None
    cycle, chosen = load_manifest(read(manifest), name=str(manifest), policy=given)
    spec = chosen.spec if chosen else None
    run = opened(run_of(cycle, chosen, name=str(manifest)), spec, options)
    forced = _decision(decision) if decision else None
    ask = _ask(run, cycle, spec, forced)
    if settings is not None:
        ask = replace(ask, settings=Settings.from_yaml(read(settings), name=str(settings)))
    name = _again(run, ask) if again else name_of(ask)
    with interruptible():
        ended = drive(run, ask, workers=workers, name=name, forced=forced)
    return conclude(run, ended, out)


def opened(uri: str, spec: PolicySpec | None, options: StoreOptions) -> Opened:
    """The run of a manifest, over the store that its policy names; options on the command line win."""
    store = spec.store if spec else None
    merged = StoreOptions(
        endpoint=options.endpoint or (store.endpoint if store else None),
        region=options.region or (store.region if store else None),
        ca_bundle=options.ca_bundle,
    )
    return merged.open(uri).for_writing()


def read(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise Invalid(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error


def drive(
    run: Opened,
    ask: Ask,
    *,
    workers: int | None = None,
    name: str | None = None,
    forced: Decision | None = None,
) -> tuple[Snapshot, Plan]:
    """One cycle to its end with workers on this machine, saying on stderr where it stands."""
    controller = Controller(
        run.store,
        run.log,
        ask,
        lambda uri: LocalRuntime(uri, environment=run.options.environment),
        trust=run.trust,
        scale=Scale(cores=os.cpu_count(), override=workers),
        cycle=name,
        forced=forced,
    )
    with _Teller(controller.cycle) as teller:
        return controller.run(watch=teller)


def conclude(run: Opened, ended: tuple[Snapshot, Plan], out: Output) -> int:
    """Show how the cycle ended; the exit code says it too."""
    snapshot, plan = ended
    if plan.refused is not None:
        raise Rejected(plan.refused.sentence, CODES.get(plan.refused.outcome, 0))
    assert snapshot.admitted is not None and snapshot.end is not None
    found = report(run.store, snapshot.admitted, snapshot.end)
    code = CODES.get(Outcome(found.outcome), 0)
    if out.json:
        out.document({"uri": run.store.uri, "untrusted": snapshot.untrusted, **document(found)})
    else:
        out.facts(facts(found, untrusted=snapshot.untrusted, sentence=not code))
    if code:
        click.echo(shown(f"emrakul: {found.outcome}/{found.reason}: {found.message}"), err=True)
    return code


def document(found: CycleReport) -> dict[str, Any]:
    return {**asdict(found), "budgets": [budget.model_dump(mode="json") for budget in found.budgets]}


def facts(found: CycleReport, *, untrusted: bool, sentence: bool) -> list[tuple[str, str]]:
    """What a person wants to know of an ended cycle."""
    rows = [
        ("cycle", found.cycle),
        ("checkpoint", f"{found.checkpoint} (record {found.base})"),
        ("stage", found.stage),
        ("outcome", f"{found.outcome}/{found.reason}"),
    ]
    if sentence:  # else it goes to stderr
        rows.append(("", found.message))
    rows += [
        (
            f"{budget.domain}/{budget.kind.value}s",
            f"{budget.achieved} pruned of {budget.live} live ({budget.original} originally); rate {budget.requested:g} "
            f"allowed {budget.allowed}, {budget.eligible} were eligible; bound by {budget.bound}",
        )
        for budget in found.budgets
    ]
    if found.accuracy_base is not None and found.accuracy_candidate is not None:
        rows.append(("accuracy", f"{found.accuracy_base:.4f} before, {found.accuracy_candidate:.4f} masked"))
    if found.counts:
        rows.append(("masked now", ", ".join(f"{n} {kind}s" for kind, n in found.counts.items())))
    rows.append(("time", ", ".join(f"{name} {seconds:.1f} s" for name, seconds in found.seconds.items())))
    if untrusted:
        rows.append(("trust", "Untrusted: no keys are configured, so nobody's signature was required"))
    return rows


class _Teller:
    """Says on stderr where a cycle stands: one moving line in a terminal, else a line for each new state."""

    def __init__(self, cycle: str) -> None:
        self._cycle = cycle
        self._state = ""
        self._status: Any = None

    def __enter__(self) -> _Teller:
        if sys.stderr.isatty():
            from rich.console import Console

            self._status = Console(stderr=True, highlight=False).status(f"cycle {self._cycle}")
            self._status.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._status is not None:
            self._status.stop()

    def __call__(self, _snapshot: Snapshot, plan: Plan) -> None:
        text = shown(f"cycle {self._cycle}  {plan.state}" + (f": {plan.message}" if plan.message else ""))
        if self._status is not None:
            from rich.text import Text

            self._status.update(Text(text))
        elif plan.state != self._state and plan.state not in set(Outcome):  # an outcome is told by the command itself
            click.echo(text, err=True)
        self._state = plan.state


def _ask(run: Opened, cycle: PruningCycle, spec: PolicySpec | None, forced: Decision | None) -> Ask:
    base = base_of(cycle, run.log.tail().state)
    return ask_for(base, spec, store=run.store, runtime=LocalRuntime.name, forced=forced)


def _again(run: Opened, ask: Ask) -> str:
    name, committed = next_try(run.log, ask)
    if committed:
        raise Rejected(f"cycle {name} was committed; there is nothing to do again", INVALID)
    return name


def _decision(path: Path) -> Decision:
    try:
        return Decision.parse(read(path).encode(), name=str(path))
    except Malformed as error:
        raise Invalid(str(error)) from error


@contextmanager
def interruptible() -> Iterator[None]:
    """SIGTERM ends a command like Ctrl-C does: workers are stopped, and the same command goes on later."""

    def stop(_signal: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
