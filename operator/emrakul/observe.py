"""Gathers the snapshot of a cycle: the one place where the control plane reads the store. Nothing is written here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import lru_cache

import numpy as np

from emrakul.core.snapshot import Ask, Job, OnBase, Phase, Round, Snapshot
from emrakul.finding import Finding
from emrakul.settings import Settings
from emrakul.strategy.requests import ROUND
from leyline import answers, layout
from leyline.claims import Task, attempt_states
from leyline.digest import sha256_hex, verified_range
from leyline.envelope import Trust, Untrusted, is_signed
from leyline.fold import PairState, RunState
from leyline.log import Entry, Log
from leyline.messages import (
    CheckpointMetadata,
    Decision,
    Requests,
    StructuralAnalysisRequest,
    Verdict,
)
from leyline.model import Malformed
from leyline.ready import read_ready
from leyline.reasons import Reason
from leyline.records import Admit, Kind, Record
from leyline.report import newest_report
from leyline.store import Damaged, Head, NotFound, NotLent, ObjectStore
from leyline.topology import Topology, coverage
from leyline.verdict import open_verdict

TOPOLOGY_BYTES = 64 * 1024 * 1024
_NO_ARRAY = np.zeros(0)


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What READY and topology say of a checkpoint, or why it cannot be used."""

    metadata: CheckpointMetadata | None = None
    groups: int = 0
    coverage: float | None = None
    unusable: Finding | None = None


class Observer:
    """Reads one cycle. Objects never change, so each is read once; a look costs two listings and a GET of the log."""

    def __init__(self, store: ObjectStore, log: Log, cycle: str, *, trust: Trust | None) -> None:
        self.store = store
        self.log = log
        self.cycle = cycle
        self._trust = trust
        self._records: list[Record] = []
        self._looked = -1
        self._digests: dict[str, str] = {}
        self._unsigned = False
        self._read = lru_cache(maxsize=None)(self._read_once)
        self._answers: dict[str, answers.Answer | None] = {}

    def look(self, ask: Ask, *, jobs: Sequence[Job] = ()) -> tuple[Snapshot, datetime]:
        """The snapshot now, and the store's time of it."""
        tail = self.log.tail()
        self._follow(tail, ask.base)
        admitted = next((r for r in self._records if r.kind is Kind.ADMIT and r.id == self.cycle), None)
        end = next((r for r in self._records if r.kind in (Kind.PRUNE, Kind.OUTCOME) and r.id == self.cycle), None)
        heads = {head.key: head for head in self.store.list(f"cycles/{self.cycle}/")}
        now = self.store.now()
        pair = self._base(ask.base) if ask.base <= tail.record.n else None
        current = tail.state.pair(ask.base)
        if pair is not None and current is not None:
            pair = current
        other = self._other(tail.state)
        base = self.checkpoint(pair.checkpoint) if pair else Checkpoint()
        unusable = base.unusable
        ancestors = tail.state.ancestors(pair.record) if pair else ()
        steps = [other.step for other in ancestors if other.step < (pair.step if pair else 0)]
        rounds: tuple[Round, ...] = ()
        decision: Decision | None = None
        try:
            rounds = self._rounds(heads, now)
            decision = self.decision() if layout.decision(self.cycle) in heads else None
        except Malformed as error:  # somebody else wrote there: the cycle ends, it is not left live
            unusable = unusable or Finding(Reason.INVALID_INPUT, str(error))
        on = self._bases(heads)
        here = tail.state.pair(on[-1].base) if on else None
        if here is not None:
            self.checkpoint(here.checkpoint)
        return (
            Snapshot(
                cycle=self.cycle,
                ask=ask,
                state=tail.state,
                admitted=admitted,
                end=end,
                told=end is not None and self._exists(layout.results(self.cycle)),
                pair=pair,
                live_quiet_since=self._quiet_since(tail.state),
                live_settings=Settings.model_validate(other.settings) if other else None,
                ready=base.metadata,
                groups=base.groups,
                coverage=base.coverage,
                input=unusable,
                rounds=rounds,
                decision=decision,
                on=on,
                marks=_marks(self.cycle, heads),
                jobs=tuple(jobs),
                report=newest_report(self.store, tail.state.term) if end is None else None,
                untrusted=self._trust is None and (self._unsigned or not self.log.signed),
                publishes=self._publishes(ask.base),
                evidence=self._evidence({known.checkpoint for known in (pair, here) if known is not None}),
                lineage=tuple(dict.fromkeys(other.checkpoint for other in ancestors)),
                interval=pair.step - steps[0] if pair and steps else None,
            ),
            now,
        )

    # --- what else the edges need, read the same way ---

    def checkpoint(self, name: str) -> Checkpoint:
        return self._read(("checkpoint", name))  # type: ignore[return-value]

    def topology(self, metadata: CheckpointMetadata) -> Topology:
        stored = metadata.object(metadata.topology)
        key = layout.checkpoint(metadata.name, stored.path)
        if stored.digest.size > TOPOLOGY_BYTES:
            raise Malformed(f"{key} is {stored.digest.size:,} bytes; more than {TOPOLOGY_BYTES:,} is no topology")
        return Topology.parse(verified_range(self.store, key, stored.digest, 0, stored.digest.size), name=key)

    def requests(self, round_: int) -> Requests:
        return self._read(("requests", round_))  # type: ignore[return-value]

    def decision(self) -> Decision:
        return self._read(("decision",))  # type: ignore[return-value]

    def counted(self, round_: int, *, arrays: bool = True) -> tuple[answers.Answer, ...]:
        """The answer that counts for every request of a round, in the requests' order.

        Without `arrays` only their names are kept: the masks of a large model are read one answer at a time.
        """
        found = []
        wanted = self.requests(round_)
        for request in wanted.requests:
            valid, _ = answers.read(self.store, self.cycle, request)
            chosen = answers.majority(valid, wanted.limits.replicas).answer
            if chosen is None:
                raise Malformed(f"request {request.id} of cycle {self.cycle} has no answer that counts")
            found.append(chosen if arrays else replace(chosen, arrays=dict.fromkeys(chosen.arrays, _NO_ARRAY)))
        return tuple(found)

    def digest(self, key: str) -> str:
        """SHA-256 of a small object that was read before."""
        if key not in self._digests:
            self._digests[key] = sha256_hex(self.store.get(key))
        return self._digests[key]

    # --- details ---

    def _exists(self, key: str) -> bool:
        try:
            self.store.head(key)
        except NotFound:
            return False
        return True

    def _follow(self, tail: Entry, base: int) -> None:
        """Records since the base, each read once."""
        self._looked = max(self._looked, base)
        while self._looked < tail.record.n:
            self._looked += 1
            self._records.append(self.log.read(self._looked)[0])

    def _base(self, record: int) -> PairState | None:
        """The pair as it was when it was made."""
        return self._read(("pair", record))  # type: ignore[return-value]

    def _get(self, key: str) -> bytes:
        data = self.store.get(key)
        self._digests[key] = sha256_hex(data)
        return data

    def _read_once(self, what: tuple[object, ...]) -> object:
        match what:
            case ("pair", int(record)):
                return self.log.state_at(record).pair(record)
            case ("checkpoint", str(name)):
                return self._checkpoint(name)
            case ("requests", int(round_)):
                key = layout.requests(self.cycle, round_)
                return Requests.parse(self._get(key), name=key)
            case ("decision",):
                key = layout.decision(self.cycle)
                return Decision.parse(self._get(key), name=key)
            case ("verdict", int(base)):
                key = layout.verdict(self.cycle, base)
                return open_verdict(self._get(key), self._trust, name=key)
        raise AssertionError(what)

    def _checkpoint(self, name: str) -> Checkpoint:
        key = layout.checkpoint(name, layout.READY)
        try:
            metadata = read_ready(self.store, name, trust=self._trust)
            self._unsigned = self._unsigned or not is_signed(self._get(key), name=key)
            topology = self.topology(metadata)
            for stored in metadata.objects:
                if stored.path == metadata.importance:
                    continue  # without its statistics a checkpoint is whole: who needs them says what is wrong
                _check_size(self.store, name, stored.path, stored.digest.size)
        except Untrusted as error:
            return Checkpoint(unusable=Finding(Reason.UNTRUSTED, str(error)))
        except NotLent as error:
            return Checkpoint(unusable=Finding(Reason.RUN_NOT_ALLOWED, str(error)))
        except (Malformed, Damaged, NotFound) as error:
            return Checkpoint(unusable=Finding(Reason.INVALID_INPUT, str(error)))
        return Checkpoint(metadata=metadata, groups=len(topology.groups), coverage=coverage(topology))

    def _rounds(self, heads: dict[str, Head], now: datetime) -> tuple[Round, ...]:
        rounds: list[Round] = []
        marks = _marks(self.cycle, heads)
        since = max((at for (phase, _), at in marks.items() if phase is Phase.ANALYSE), default=None)
        for number in sorted(ROUND.values()):
            if layout.requests(self.cycle, number) not in heads:
                continue
            wanted = self.requests(number)
            tasks = [Task(id=request.id) for request in wanted.requests]
            states = attempt_states(
                heads.values(), cycle=self.cycle, tasks=tasks, limits=wanted.limits, now=now, since=since
            )
            answered, given_up, disputed, finding, failed = 0, [], [], None, ""
            dissenters: set[int] = set()
            for request in wanted.requests:
                prefix = layout.responses(self.cycle, request.id)
                valid = [a for key in heads if key.startswith(prefix) and (a := self._answer(key, request)) is not None]
                counted = answers.majority(valid, wanted.limits.replicas)
                dissenters.update(counted.dissenters)
                if counted.answer is None:
                    if len({answer.message.worker for answer in valid}) >= wanted.limits.replicas:
                        disputed.append(request.id)
                    elif states[request.id].given_up(wanted.limits):
                        given_up.append(request.id)
                    continue
                answered += 1
                message = counted.answer.message
                if message.status in ("invalid", "importance"):
                    known = message.reason in set(Reason)
                    reason = Reason(message.reason) if known else Reason.INVALID_INPUT
                    finding = finding or Finding(reason, message.message)
                elif message.status == "failed":
                    failed = failed or message.message
            rounds.append(
                Round(
                    number=number,
                    method=wanted.requests[0].method if wanted.requests else "structured",
                    requests=len(wanted.requests),
                    answered=answered,
                    given_up=tuple(given_up),
                    disputed=tuple(disputed),
                    finding=finding,
                    failed=failed,
                    dissenters=tuple(sorted(dissenters)),
                )
            )
        return tuple(rounds)

    def _answer(self, key: str, request: StructuralAnalysisRequest) -> answers.Answer | None:
        """A valid answer without its arrays, or None: what is not valid does not count."""
        if key not in self._answers:
            try:
                answer = answers.unpack(self.store.get(key), request, path=key)
                self._answers[key] = answers.Answer(answer.path, answer.message, {})
            except Malformed:
                self._answers[key] = None
        return self._answers[key]

    def _evidence(self, checkpoints: set[str]) -> dict[str, str]:
        """Digests of the cycle's own objects and of its bases' READY.json.

        Not of everything that was read: a process that took the cycle over halfway has read less, and its record must
        be the same.
        """
        ready = {layout.checkpoint(name, layout.READY) for name in checkpoints}
        own = f"cycles/{self.cycle}/"
        return {key: digest for key, digest in self._digests.items() if key in ready or key.startswith(own)}

    def _bases(self, heads: dict[str, Head]) -> tuple[OnBase, ...]:
        """In the order in which the cycle came to them: records grow."""
        prefix = f"cycles/{self.cycle}/on-"
        named = {key.removeprefix(prefix).partition("/")[0] for key in heads if key.startswith(prefix)}
        bases = sorted(int(name) for name in named if name.isdecimal())
        found = []
        for base in bases:
            manifest = layout.manifest(self.cycle, base)
            verdict, refused = self._verdict(base) if layout.verdict(self.cycle, base) in heads else (None, None)
            found.append(
                OnBase(
                    base=base,
                    updated=layout.update(self.cycle, base) in heads,
                    candidate=self.digest(manifest) if manifest in heads else None,
                    asked=layout.validation_request(self.cycle, base) in heads,
                    verdict=verdict,
                    refused=refused,
                )
            )
        return tuple(on for on in found if on.updated)

    def _verdict(self, base: int) -> tuple[Verdict | None, Finding | None]:
        """The verdict that stands, or why it does not count."""
        try:
            return self._read(("verdict", base)), None  # type: ignore[return-value]
        except Untrusted as error:
            return None, Finding(Reason.UNTRUSTED, str(error))
        except (Malformed, Damaged) as error:
            return None, Finding(Reason.INVALID_INPUT, str(error))

    def _quiet_since(self, state: RunState) -> datetime | None:
        """When another live cycle last wrote anything."""
        live = state.live
        if live is None or live.id == self.cycle:
            return None
        moved = [head.modified for head in self.store.list(f"cycles/{live.id}/")]
        return max([self.store.head(layout.record(live.admitted)).modified, *moved])

    def _other(self, state: RunState) -> Admit | None:
        """What another live cycle was admitted with."""
        if state.live is None or state.live.id == self.cycle:
            return None
        body = self.log.read(state.live.admitted)[0].body
        return body if isinstance(body, Admit) else None

    def _publishes(self, base: int) -> tuple[datetime, ...]:
        moved = [record.n for record in self._records if record.kind is Kind.PUBLISH]
        return tuple(self.store.head(layout.record(n)).modified for n in (base, *moved)) if moved else ()


def _check_size(store: ObjectStore, checkpoint: str, path: str, size: int) -> None:
    try:
        found = store.head(layout.checkpoint(checkpoint, path)).size
    except NotFound as error:
        raise Malformed(f"checkpoint {checkpoint}: {path} does not exist; publish it again") from error
    if found != size:
        raise Malformed(
            f"checkpoint {checkpoint}: {path} is {found:,} bytes, READY.json says {size:,}; publish it again"
        )


def _marks(cycle: str, heads: dict[str, Head]) -> dict[tuple[Phase, int], datetime]:
    prefix = f"cycles/{cycle}/started/"
    found = {}
    for key, head in heads.items():
        phase, _, launch = key.removeprefix(prefix).rpartition("-")
        if key.startswith(prefix) and phase in set(Phase) and launch.isdecimal():
            found[Phase(phase), int(launch)] = head.modified
    return found
