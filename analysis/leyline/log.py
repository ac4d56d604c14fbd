"""The run's one log: the one place that appends, and the one that reads.

Dense, hash-chained, put-if-absent; record n is `log/<n div 1000>/<n>.json`, a signed envelope. `append` follows the
newest record it knows; if somebody else was faster it reads on, asks the rules again and takes the next number.
The state after each record lies beside it by digest, so nobody has to read the whole log to know where the run is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from leyline import layout
from leyline.digest import sha256_hex
from leyline.envelope import SigningKey, Trust, is_signed, open_envelope, seal
from leyline.fold import RunState, fold
from leyline.model import Malformed
from leyline.records import WRITERS, Admit, Draft, Genesis, Record, writers
from leyline.rules import Refusal, refusal
from leyline.store import Exists, NotFound, ObjectStore, StoreError

PAYLOAD = "application/vnd.emrakul.record+json"
ATTEMPTS = 100
"""Appends that may be overtaken in a row before giving up; each one means another record was written."""


class NotAllowed(Exception):
    """The rules forbid this record after what has happened; the sentence says why."""


class StoreReverted(StoreError):
    """The log is shorter, or other, than what was seen before: somebody restored an older copy. Stop."""


class NoRun(StoreError):
    """There is no log here."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A record with the digest of its bytes and the state after it."""

    record: Record
    digest: str
    state: RunState


class Log:
    """One run's log. Not for several threads at once."""

    def __init__(
        self,
        store: ObjectStore,
        *,
        keys: Sequence[SigningKey] = (),
        trust: Trust | None = None,
        seen: tuple[int, str] | None = None,
    ) -> None:
        """`seen` is a record number and digest known from before (a CR's status): another log there is refused."""
        self._store = store
        self._keys = keys
        self._trust = trust
        self._seen = seen
        self._tail: Entry | None = None
        self.signed = True
        """False once a record without signature was read: status says Untrusted."""

    # --- reading ----------------------------------------------------------------------------------------------------

    def read(self, n: int) -> tuple[Record, str]:
        """Record n and the digest of its bytes; NotFound if the log is shorter, StoreReverted if it was not before."""
        key = layout.record(n)
        try:
            data = self._store.get(key)
        except NotFound as error:
            if n > self._known:
                raise
            raise self._gone(n) from error
        # the kind is inside, so any writer's key is tried first and the record's own roles right after
        roles = tuple(sorted({role for some in WRITERS.values() for role in some}))
        payload = open_envelope(data, PAYLOAD, self._trust, roles=roles, name=key)
        record = Record.parse(payload, name=key)
        if self._trust is not None:
            open_envelope(data, PAYLOAD, self._trust, roles=writers(record.body), name=key)
        self.signed = self.signed and is_signed(data, name=key)
        if record.n != n:
            raise Malformed(f"{key} says it is record {record.n}; the log was tampered with")
        return record, sha256_hex(data)

    def tail(self) -> Entry:
        """The newest record. NoRun where there is none; StoreReverted where the log went back."""
        if self._tail is None:
            self._tail = self._find_tail()
        while (entry := self._next(self._tail)) is not None:
            self._tail = entry
        return self._tail

    def expect(self, n: int, digest: str) -> None:
        """StoreReverted unless record n, known from before, still stands there."""
        self._still_there(n, digest)

    def check(self) -> None:
        """StoreReverted unless the newest record still stands: a tail that does not grow does not tell that."""
        tail = self.tail()
        self._still_there(tail.record.n, tail.digest)

    def since(self, n: int) -> Iterator[Record]:
        """Records n+1 and on, oldest first."""
        while True:
            n += 1
            try:
                yield self.read(n)[0]
            except NotFound:
                return

    def state_at(self, n: int) -> RunState:
        """The state after record n."""
        record, _ = self.read(n)
        return self._state(record)

    def _find_tail(self) -> Entry:
        """Doubling, then bisection, from the highest record known: listings lag and grow, a HEAD does not."""
        low = 0
        if self._seen is not None:
            low = self._seen[0]
            self._still_there(*self._seen)
        elif not self._exists(0):
            raise NoRun(f"{self._store.uri} holds no run (no {layout.GENESIS}); a trainer's first publish makes one")
        step = 1
        while self._exists(low + step):
            low, step = low + step, step * 2
        high = low + step
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self._exists(middle) else (low, middle)
        record, digest = self.read(low)
        entry = Entry(record=record, digest=digest, state=self._state(record))
        self._check_ours(entry)
        return entry

    def _check_ours(self, tail: Entry) -> None:
        """A signed record of another run, put behind our newest one, must not be taken for our tail."""
        if tail.record.n == 0:
            return
        before, digest = self.read(tail.record.n - 1)
        genesis = self.read(0)[0].body
        if tail.record.prev != digest or not isinstance(genesis, Genesis) or tail.state.run_id != genesis.run_id:
            raise Malformed(
                f"record {tail.record.n} does not follow record {before.n} of this run; it was put there, remove it"
            )

    def _exists(self, n: int) -> bool:
        try:
            self._store.head(layout.record(n))
        except NotFound:
            return False
        return True

    def _next(self, entry: Entry) -> Entry | None:
        try:
            record, digest = self.read(entry.record.n + 1)
        except NotFound:
            return None
        if record.prev != entry.digest:
            self._still_there(entry.record.n, entry.digest)
        return _follow(entry, record, digest)

    def _still_there(self, n: int, digest: str) -> None:
        """A restored older copy must never be written on: the records that are gone would be lost for good."""
        try:
            _, found = self.read(n)
        except NotFound as error:
            raise self._gone(n) from error
        if found != digest:
            raise StoreReverted(f"{self._store.uri}: record {n} is another one than was seen before; stop")

    def _gone(self, n: int) -> StoreReverted:
        return StoreReverted(f"{self._store.uri}: record {n} was seen before and is gone; restore the log, never go on")

    @property
    def _known(self) -> int:
        """The highest record that is known to have been there; -1 is none."""
        return max(self._tail.record.n if self._tail else -1, self._seen[0] if self._seen else -1)

    def _state(self, record: Record) -> RunState:
        key = layout.state(record.state)
        try:
            data = self._store.get(key)
        except NotFound as error:
            raise Malformed(f"{key}, the state after record {record.n}, is missing; restore it from a copy") from error
        if sha256_hex(data) != record.state:
            raise Malformed(f"{key} is not what record {record.n} rests on; `emrakul verify` says what still holds")
        return RunState.parse(data, name=key)

    # --- writing ----------------------------------------------------------------------------------------------------

    def create(self, draft: Draft) -> Entry:
        """Record 0. The run that is there already, if it is the same one; NotAllowed if it is another."""
        assert isinstance(draft.body, Genesis)
        try:
            entry = self.tail()
        except NoRun:
            try:
                entry = self._write(None, draft)
            except Exists:
                entry = self.tail()
        if (entry.state.run_id, entry.state.model_id) != (draft.body.run_id, draft.body.model_id):
            raise NotAllowed(
                f"{self._store.uri} is run {entry.state.run_id} of model {entry.state.model_id}, not "
                f"{draft.body.run_id} of {draft.body.model_id}; name this run and its model (run_id, model_id), or use "
                "another run URI"
            )
        self._tail = entry
        return entry

    def append(self, draft: Draft, *, base: int, unless: Callable[[RunState], Refusal] | None = None) -> Entry:
        """Write `draft` after the newest record, if the rules still allow it there.

        Looks for `draft`'s id since record `base` first and returns that record if it is there: a restarted writer
        finds its own work. NotAllowed says why not; the caller decides again from what the log says now. `unless`
        is a rule of the caller's own, asked beside the log's.
        """
        # a cycle's name may never be admitted twice, wherever the caller started to look
        looked = min(base, draft.body.base) if isinstance(draft.body, Admit) else base
        for _ in range(ATTEMPTS):
            tail = self.tail()
            for record in self._between(looked, tail.record.n):
                if record.slot == draft.slot:
                    return self._entry(record.n)
            looked = tail.record.n
            if why := refusal(tail.state, draft) or (unless and unless(tail.state)):
                raise NotAllowed(why)
            try:
                self._tail = self._write(tail, draft)
            except Exists:
                continue
            return self._tail
        raise NotAllowed(f"{ATTEMPTS} other records came first; something writes this log without end")

    def find(self, slot: tuple[str, str], *, base: int) -> Record | None:
        """The record of this slot (see Draft.slot) after record `base`, or None."""
        return next((record for record in self.since(base) if record.slot == slot), None)

    def _between(self, after: int, last: int) -> Iterator[Record]:
        for n in range(after + 1, last + 1):
            yield self.read(n)[0]

    def _entry(self, n: int) -> Entry:
        record, digest = self.read(n)
        return Entry(record=record, digest=digest, state=self._state(record))

    def _write(self, tail: Entry | None, draft: Draft) -> Entry:
        n = tail.record.n + 1 if tail else 0
        state = fold(tail.state if tail else None, n, draft)
        record = place(draft, n=n, prev=tail.digest if tail else "", state=state)
        data = seal(record.canonical(), PAYLOAD, self._keys)
        if self._trust is not None:  # or every reader would refuse the log from here on
            open_envelope(data, PAYLOAD, self._trust, roles=writers(draft.body), name=f"this {draft.kind} record")
        if tail is not None:
            self._still_there(tail.record.n, tail.digest)
        # the state first: a record is never without it, and a state without its record is no harm
        self._store.put_if_absent(layout.state(record.state), state.canonical())
        self._store.put_if_absent(layout.record(n), data)
        return Entry(record=record, digest=sha256_hex(data), state=state)


def place(draft: Draft, *, n: int, prev: str, state: RunState) -> Record:
    """The record that `draft` is at place n."""
    tip = state.tip_pair
    fields = draft.model_dump()
    pair = {"record", "checkpoint", "masks", "candidate"}
    return Record.model_validate(
        {
            **fields,
            "n": n,
            "prev": prev,
            "term": state.term,
            "tip": tip.model_dump(include=pair) if tip else None,
            "state": state.sha256(),
        }
    )


def _follow(entry: Entry, record: Record, digest: str) -> Entry:
    """The next entry, checked: chained to the one before, and its state is what the fold says."""
    if record.prev != entry.digest:
        raise Malformed(f"record {record.n} does not follow record {entry.record.n}: the chain is broken; stop")
    draft = Draft.model_validate(record.model_dump(include=set(Draft.model_fields)))
    state = fold(entry.state, record.n, draft)
    if state.sha256() != record.state:
        raise Malformed(f"record {record.n} claims a state that its log does not add up to; stop")
    return Entry(record=record, digest=digest, state=state)


def verify(log: Log) -> Iterator[Entry]:
    """Every entry from the genesis on, each checked against the one before; Malformed at the first that does not."""
    record, digest = log.read(0)
    draft = Draft.model_validate(record.model_dump(include=set(Draft.model_fields)))
    state = fold(None, 0, draft)
    if record.prev or state.sha256() != record.state:
        raise Malformed("record 0 is no genesis")
    entry = Entry(record=record, digest=digest, state=state)
    yield entry
    n = 0
    while True:
        n += 1
        try:
            record, digest = log.read(n)
        except NotFound:
            return
        entry = _follow(entry, record, digest)
        yield entry
