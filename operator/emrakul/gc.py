"""Deletion: which pairs are retired (a record), and which objects go once a grace time has passed since.

The record comes first, so nobody can roll back to, or work on, a pair whose objects may be gone. What to do is
computed anew each time from the log and a listing: a run of gc that was killed is finished by the next one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta

from leyline import layout
from leyline.fold import RunState, fold
from leyline.ids import checkpoint_term
from leyline.log import Log
from leyline.model import key_of
from leyline.open import PROBES
from leyline.records import Draft, Kind, Prune, Publish, Record, Retire
from leyline.rules import ROLLBACK_DEPTH, Kept, kept, protected
from leyline.store import Head, ObjectStore

_LEFTOVERS = ("attempts/", "responses/", "started/")
"""What workers leave behind in a cycle: of no use once it has ended."""


@dataclass(frozen=True, kw_only=True)
class Policy:
    """What is kept, and for how long."""

    keep: int = 10
    """The newest pairs, whatever their age."""
    age: timedelta = timedelta(days=1)
    """Younger pairs are never retired."""
    grace: timedelta = timedelta(days=1)
    """Between the record (or a cycle's end, or a stray object's last write) and the deletion of objects."""
    depth: int = ROLLBACK_DEPTH
    """settings.rollback.depth: older good pairs that a progressive rollback may need."""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What the records say, by the store's clock."""

    written: Mapping[int, datetime]
    """When each record was."""
    checkpoints: Mapping[str, int | None]
    """Checkpoint name -> the newest retire record of its pairs; None: no pair of it was retired."""
    candidates: Mapping[str, int | None]
    """The same for candidate folders that entered the log."""
    ended: Mapping[str, int]
    """Cycle -> its end record."""
    admitted: frozenset[str]
    """Cycles that were ever let in."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What would be done now. In the order of deletion: what says that a checkpoint exists goes before its objects."""

    retire: tuple[int, ...]
    delete: tuple[Head, ...]
    later: tuple[Head, ...]
    """Nothing needs these any more, but their grace time is not over."""


@dataclass(frozen=True, kw_only=True)
class Collected:
    """What was done."""

    retired: tuple[int, ...]
    deleted: int
    freed: int
    """Bytes."""
    uploads: int
    """Unfinished uploads that were thrown away."""
    later: tuple[Head, ...]


# --- what to do: pure -------------------------------------------------------------------------------------------------


def retirable(state: RunState, written: Mapping[int, datetime], policy: Policy, now: datetime) -> tuple[int, ...]:
    """Pairs that nothing protects, older than policy.age and not among the newest policy.keep."""
    needed = protected(state, depth=max(policy.depth, ROLLBACK_DEPTH))
    old = state.pairs[: max(0, len(state.pairs) - policy.keep)]
    return tuple(pair.record for pair in old if pair.record not in needed and now - written[pair.record] >= policy.age)


def plan(
    state: RunState, facts: Facts, heads: Iterable[Head], policy: Policy, now: datetime, *, retire: tuple[int, ...] = ()
) -> Plan:
    """What goes now and what goes later. `retire` are pairs that still stand: their grace time has not begun."""
    after = fold(state, state.n + 1, _retire(retire)) if retire else state
    by_folder: dict[str, list[Head]] = {}
    for head in heads:
        if folder := _folder(head.key):
            by_folder.setdefault(folder, []).append(head)
    keep = kept(after)
    delete: list[Head] = []
    later: list[Head] = []
    for folder, inside in by_folder.items():
        since = _unneeded_since(folder, inside, after, keep, facts, standing=kept(state), now=now)
        if since is None:
            continue
        going = [head for head in inside if head.key not in keep.masks]
        # a folder without READY.json or MANIFEST.json does not exist for any reader: no half of it is ever seen
        going.sort(key=lambda head: not head.key.endswith(("/READY.json", "/MANIFEST.json")))
        (delete if now - since >= policy.grace else later).extend(going)
    return Plan(retire=retire, delete=tuple(delete), later=tuple(later))


def _unneeded_since(
    folder: str,
    inside: list[Head],
    state: RunState,
    keep: Kept,
    facts: Facts,
    *,
    standing: Kept,
    now: datetime,
) -> datetime | None:
    """When the folder's objects became useless; None while something needs them, or may.

    `standing` is what is kept while the pairs that are to be retired still stand: its grace time begins now.
    """
    touched = max(head.modified for head in inside)
    kind, _, rest = folder.partition("/")
    if kind == PROBES:
        return touched
    if kind == "checkpoints":
        name = rest.rstrip("/")
        if name in keep.checkpoints:
            return None
        if name in standing.checkpoints:
            return now
        if (record := facts.checkpoints.get(name)) is not None:
            return facts.written[record]
        # in no record: whole ones may still be published by their trainer, unless the term has fenced it
        whole = any(head.key == layout.checkpoint(name, layout.READY) for head in inside)
        return None if whole and not _fenced(name, state) else touched
    cycle = rest.partition("/")[0]
    if folder in keep.candidates:
        return None
    if folder in standing.candidates:
        return now
    if (record := facts.candidates.get(folder)) is not None:
        return facts.written[record]
    if cycle in facts.ended:
        return facts.written[facts.ended[cycle]]
    return None if cycle in facts.admitted else touched  # the live one is admitted and has no end


def _fenced(checkpoint: str, state: RunState) -> bool:
    """Whether no trainer may publish this checkpoint any more."""
    try:
        return checkpoint_term(checkpoint) < state.term
    except ValueError:  # not our name, not our folder
        return False


def _folder(key: str) -> str:
    """What is kept or deleted as one: a checkpoint, a candidate, a cycle's leftovers; "" for what always stays."""
    parts = key.split("/")
    if parts[0] == PROBES:
        return f"{PROBES}/"
    if parts[0] == "checkpoints" and len(parts) > 2:
        return f"checkpoints/{parts[1]}/"
    if parts[0] == "cycles" and len(parts) > 3:
        if f"{parts[2]}/" in _LEFTOVERS:
            return f"cycles/{parts[1]}/{parts[2]}/"
        if parts[3] == "candidate":
            return "/".join(parts[:4]) + "/"
    return ""


# --- doing it ---------------------------------------------------------------------------------------------------------


def survey(store: ObjectStore, log: Log) -> tuple[RunState, Facts]:
    """Read the whole log once."""
    state = log.tail().state
    written = {}
    for head in store.list("log/"):
        number = head.key.rpartition("/")[2].removesuffix(".json")
        if number.isdecimal():
            written[int(number)] = head.modified
    records = [log.read(0)[0], *log.since(0)]
    for record in records:  # a listing may lag behind
        if record.n not in written:
            written[record.n] = store.head(layout.record(record.n)).modified
    return state, _facts(records, written)


def collect(
    store: ObjectStore, log: Log, policy: Policy, *, progress: Callable[[Head], None] = lambda _: None
) -> Collected:
    """Retire, throw away unfinished uploads, delete. `progress` sees every object before it goes."""
    state, facts = survey(store, log)
    retired = retirable(state, facts.written, policy, store.now())
    if retired:
        log.append(_retire(retired), base=state.n)
        state, facts = survey(store, log)
    now = store.now()
    uploads = store.abort_stale(now - policy.grace)
    todo = plan(state, facts, _heads(store), policy, now)
    for head in todo.delete:
        progress(head)
        store.delete(head.key)
    return Collected(
        retired=retired,
        deleted=len(todo.delete),
        freed=sum(head.size for head in todo.delete),
        uploads=uploads,
        later=todo.later,
    )


def preview(store: ObjectStore, log: Log, policy: Policy) -> Plan:
    """What `collect` would do now; nothing is written."""
    state, facts = survey(store, log)
    now = store.now()
    retire = retirable(state, facts.written, policy, now)
    return plan(state, facts, _heads(store), policy, now, retire=retire)


def _heads(store: ObjectStore) -> Iterator[Head]:
    for prefix in ("checkpoints/", "cycles/", f"{PROBES}/"):
        yield from store.list(prefix)


def _retire(pairs: tuple[int, ...]) -> Draft:
    return Draft(
        id=f"retire-{key_of(pairs=list(pairs))[:16]}",
        body=Retire(pairs=pairs),
        message=f"pairs {', '.join(map(str, pairs))} are no longer needed; their objects go after the grace time",
    )


def _facts(records: Iterable[Record], written: Mapping[int, datetime]) -> Facts:
    checkpoints: dict[str, int | None] = {}
    candidates: dict[str, int | None] = {}
    made: dict[int, tuple[str, str | None]] = {}
    ended: dict[str, int] = {}
    admitted: set[str] = set()
    for record in records:
        body = record.body
        if isinstance(body, Publish):
            made[record.n] = record.checkpoint or record.id, None
            checkpoints.setdefault(record.checkpoint or record.id, None)
        elif isinstance(body, Prune):
            made[record.n] = record.checkpoint or "", body.candidate
            candidates.setdefault(body.candidate, None)
        elif isinstance(body, Retire):
            for pair in body.pairs:
                name, folder = made[pair]
                checkpoints[name] = record.n
                if folder is not None:
                    candidates[folder] = record.n
        if record.kind in (Kind.PRUNE, Kind.OUTCOME):
            ended[record.id] = record.n
        elif record.kind is Kind.ADMIT:
            admitted.add(record.id)
    return Facts(
        written=written,
        checkpoints=checkpoints,
        candidates=candidates,
        ended=ended,
        admitted=frozenset(admitted),
    )
