"""`emrakul status RUN`: where a run stands, from its newest record; of its newest cycle also what the workers did."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Any

import click

from emrakul.cli.options import Opened, run_options
from emrakul.cli.output import Output, ago, iso, masked, worked
from leyline import layout
from leyline.fold import PairState, RunState
from leyline.records import End
from leyline.report import newest_report
from leyline.store import NotFound

if TYPE_CHECKING:
    from emrakul.core.snapshot import Phase
    from leyline.work import Work

_LOOK_BACK = 16
"""Records in which the newest cycle is looked for."""

NO_SAVING = "pruned parameters stay as zeroes: masks save neither memory nor time before compaction"


@click.command()
@run_options
def command(run: Opened, out: Output) -> None:
    """Where a run stands: tip, stage, breaker, live cycle, trust."""
    tail = run.log.tail()
    state = tail.state
    written = run.store.head(layout.record(state.n)).modified
    newest, done = _work(run, state)
    document = {
        "uri": run.store.uri,
        "run": state.run_id,
        "model": state.model_id,
        "record": {
            "n": state.n,
            "kind": tail.record.kind.value,
            "time": iso(written),
            "reason": tail.record.reason,
            "message": tail.record.message,
        },
        "term": state.term,
        "tip": _pair(state.tip_pair),
        "last_good": _pair(state.last_good),
        "baseline": _pair(state.pair(state.baseline) if state.baseline is not None else None),
        "pairs": {
            "kept": len(state.pairs),
            "good": sum(pair.good and not pair.condemned for pair in state.pairs),
            "condemned": sum(pair.condemned for pair in state.pairs),
        },
        "stage": state.ladder.stage.value,
        "streak": state.ladder.streak,
        "hold": state.hold,
        "breaker": state.breaker.model_dump(mode="json"),
        "live": state.live.model_dump(mode="json") if state.live else None,
        "newest_cycle": newest,
        "work": {phase.value: one.model_dump(mode="json") for phase, one in done.items()},
        "outcomes": state.counters,
        "report": _report(run, state),
        "rollback": _rollback(run, state),
        "trust": _trust(run),
        "note": NO_SAVING,
    }
    if out.json:
        out.document(document)
    else:
        out.facts(_rows(document, done, written=written, now=run.store.now()))


def _pair(pair: PairState | None) -> dict[str, Any] | None:
    if pair is None:
        return None
    return {
        "record": pair.record,
        "checkpoint": pair.checkpoint,
        "step": pair.step,
        "epoch": pair.epoch,
        "masks": pair.masks.counts if pair.masks else {},
        "candidate": pair.candidate,
        "good": pair.good and not pair.condemned,
        "provisional": pair.provisional,
        "condemned": pair.condemned,
        "accuracy": pair.accuracy,
    }


def _report(run: Opened, state: RunState) -> dict[str, Any] | None:
    """The newest report of this term."""
    packet = newest_report(run.store, state.term)
    if packet is None:
        return None
    return packet.model_dump(mode="json", include={"step", "epoch", "loss", "correct", "n", "state", "source"})


def _rollback(run: Opened, state: RunState) -> dict[str, Any] | None:
    """The newest rollback, and what recovery validation found after it."""
    if state.rolled_back < 0:
        return None
    record, _ = run.log.read(state.rolled_back)
    found = None
    try:
        from emrakul.recovery import Recovery

        key = layout.recovery(record.n)
        found = Recovery.parse(run.store.get(key), name=key)
    except NotFound:
        pass
    return {
        "record": record.n,
        "id": record.id,
        "reason": record.reason,
        "recovery": found.outcome if found else "pending",
        "looks": {look.name: look.message for look in found.looks if look.outcome != "passed"} if found else {},
    }


def _work(run: Opened, state: RunState) -> tuple[str | None, dict[Phase, Work]]:
    """The live cycle, or the newest that ended, if that is not long ago; and what its workers did."""
    from emrakul.work import work

    if state.live is not None:
        return state.live.id, work(run.store, state.live.id, state.live.base)
    for n in range(state.n, max(state.n - _LOOK_BACK, 0), -1):
        record, _ = run.log.read(n)
        if isinstance(record.body, End):
            return record.id, work(run.store, record.id, record.body.base)
    return None, {}


def _trust(run: Opened) -> dict[str, Any]:
    if run.trust is None:
        why = "no trust folder is set (EMRAKUL_TRUST), so no signature is checked"
        return {"state": "Untrusted", "message": why if run.log.signed else f"{why}, and the newest record has none"}
    return {"state": "Trusted", "message": "records and manifests are signed by trusted keys"}


def _rows(doc: dict[str, Any], done: dict[Phase, Work], *, written: datetime, now: datetime) -> list[tuple[str, str]]:
    record = doc["record"]
    rows = [
        ("run", f"{doc['run']} (model {doc['model']})"),
        ("at", doc["uri"]),
        ("newest record", f"{record['n']} {record['kind']}, {ago(written, now)}"),
        ("tip", _said(doc["tip"])),
        ("last good", _said(doc["last_good"])),
        ("baseline", _said(doc["baseline"])),
        ("pairs", "{kept} kept, {good} good, {condemned} condemned".format(**doc["pairs"])),
        ("stage", f"{doc['stage']}, {doc['streak']} good commits in a row"),
    ]
    if doc["hold"]:
        rows.append(("HELD", f"by {doc['hold']}; no masks are committed until `emrakul resume {doc['uri']}`"))
    breaker = doc["breaker"]
    rows.append(("breaker", f"{breaker['state']}, {breaker['failures']} failures in a row"))
    live = doc["live"]
    rows.append(("live cycle", f"{live['id']} on record {live['base']} ({live['runtime']})" if live else "none"))
    if done:
        rows += [("newest cycle", doc["newest_cycle"]), *worked(done)]
    ended = "\n".join(f"{count} x {name}" for name, count in sorted(doc["outcomes"].items()))
    rows.append(("ended cycles", ended or "none"))
    if report := doc["report"]:
        said = f"step {report['step']}, {report['state']}"
        rows.append(("report", said if report["loss"] is None else f"{said}, loss {report['loss']:.4g}"))
    if rollback := doc["rollback"]:
        looks = "".join(f"\n{name}: {message}" for name, message in rollback["looks"].items())
        rows.append(
            ("rollback", f"record {rollback['record']} ({rollback['reason']}), recovery {rollback['recovery']}{looks}")
        )
    rows.append(("trust", f"{doc['trust']['state']}: {doc['trust']['message']}"))
    rows.append(("note", doc["note"]))
    return rows


def _said(pair: dict[str, Any] | None) -> str:
    if pair is None:
        return "none"
    parts = [f"record {pair['record']}: {pair['checkpoint']} (epoch {pair['epoch']})"]
    parts.append(f"masks: {masked(pair['masks'])}")
    if pair["accuracy"] is not None:
        parts.append(f"accuracy {pair['accuracy']:.4f}")
    parts += [word for word in ("good", "provisional", "condemned") if pair[word]]
    return ", ".join(parts)
