"""Follows a run's log and drives what it asks for: rollbacks first, then a live cycle, then the newest checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from emrakul.api.policy import PolicySpec
from emrakul.asking import ask_for
from emrakul.core.snapshot import Ask, Snapshot
from emrakul.finding import Finding
from emrakul.recovery import recover
from emrakul.rollback import NoLoadableTarget, Request, Validate, probation_finding, resume, roll_back
from emrakul.settings import Settings
from leyline import layout
from leyline.envelope import Trust
from leyline.fold import PairState, RunState
from leyline.log import Log, NotAllowed
from leyline.reasons import Reason
from leyline.records import Admit, Kind, Record
from leyline.report import newest_report
from leyline.store import NotFound, ObjectStore


@dataclass(frozen=True)
class Due:
    """The pair whose cycle is due."""

    base: int
    checkpoint: str


def due(state: RunState, admitted: Iterable[Record], *, every: int = 1) -> Due | None:
    """The newest checkpoint, if it is fit for a cycle and no cycle has worked on it yet. Pure.

    `admitted` are the run's admit records. Of several that came meanwhile only the newest counts: a cycle on an
    older one would be superseded. With `every` = n, n checkpoints must have come since the last cycle's.
    """
    pair = state.tip_pair
    if state.live is not None or pair is None or not _fit(pair):
        return None
    bases = [record.body.base for record in admitted if isinstance(record.body, Admit)]
    if pair.record in bases:
        return None
    last = max((base for base in bases if base < pair.record), default=-1)
    came = [other for other in state.pairs if other.candidate is None and last < other.record <= pair.record]
    return Due(pair.record, pair.checkpoint) if len(came) >= every or last < 0 else None


def _fit(pair: PairState) -> bool:
    """A pair that a cycle wrote is waiting for the trainer; a provisional or condemned one is no base."""
    return pair.candidate is None and not pair.provisional and not pair.condemned


def admits(records: Iterable[Record]) -> tuple[Record, ...]:
    return tuple(record for record in records if record.kind is Kind.ADMIT)


class Watcher:
    """One policy's eyes on its run. Everything it does is found again in the log after a restart."""

    def __init__(
        self,
        store: ObjectStore,
        log: Log,
        policy: PolicySpec,
        *,
        trust: Trust | None,
        validate: Validate,
        drive: Callable[[Ask, str | None], Snapshot],
        runtime: str = "local",
    ) -> None:
        """`drive` carries one cycle, by name if it has one, to its end; `validate` loads and checks a pair."""
        self._store, self._log, self._policy = store, log, policy
        self._trust, self._validate, self._drive, self._runtime = trust, validate, drive, runtime
        self._records: list[Record] = []
        self._seen = -1
        self._recovered = -1
        self._told = -1
        self._looked = -1
        self._impossible = ""

    def step(self) -> Snapshot | str | None:
        """Do one thing: a sentence of what was done, the end of a cycle, or None if there is nothing to do now."""
        state = self._log.tail().state
        for record in self._log.since(self._seen):
            self._records.append(record)
            self._seen = record.n
        steps = (self._asked_rollback, self._asked_resume, self._probation, self._recovery, self._untold, self._cycle)
        return next((done for step in steps if (done := step(state)) is not None), None)

    def _asked_rollback(self, _state: RunState) -> str | None:
        """A person's rollback, once for each id."""
        asked = self._policy.rollback
        if asked is None or any(r.kind is Kind.ROLLBACK and r.id == asked.id for r in self._records):
            return None
        if asked.to == "last-good":
            request = Request(id=asked.id, strategy="immediate", finding=_ASKED)
        elif asked.to == "baseline":
            request = Request(id=asked.id, strategy="baseline", finding=_ASKED)
        else:
            request = Request(id=asked.id, strategy="named", finding=_ASKED, to=int(asked.to))
        try:
            return self._roll_back(request)
        except (NotAllowed, NoLoadableTarget) as error:
            if self._impossible == str(error):
                return None
            self._impossible = str(error)  # told once; cycles go on
            return f"rollback {asked.id} of the policy is not possible: {error}"

    def _asked_resume(self, state: RunState) -> str | None:
        if state.hold is None or self._policy.resume_after_rollback != state.hold:
            return None
        return resume(self._log).record.message

    def _probation(self, state: RunState) -> str | None:
        """Masks that made the training worse go back by themselves."""
        found = probation_finding(state, self._records, newest_report(self._store, state.term))
        if found is None:
            return None
        pruned, finding = found
        try:
            return self._roll_back(
                Request(
                    # a person may have brought the pair back since: then it is another probation
                    id=f"probation-{pruned.record}-{max(pruned.record, state.rolled_back)}",
                    strategy="immediate",
                    finding=finding,
                    by="operator",
                    before=pruned.record,
                )
            )
        except (NotAllowed, NoLoadableTarget):
            return None

    def _roll_back(self, request: Request) -> str:
        rolled = roll_back(
            self._store,
            self._log,
            request,
            trust=self._trust,
            depth=self._policy.settings.rollback.depth,
            validate=self._validate,
        )
        return rolled.record.message

    def _recovery(self, state: RunState) -> str | None:
        """Whether the run stands after its newest rollback: looked at, whenever the log grows, until all is known."""
        if state.rolled_back <= self._recovered or state.n == self._looked:
            return None
        self._looked = state.n
        record = self._records[state.rolled_back]
        found = recover(self._store, self._log, record, validate=self._validate)
        if found.outcome == "pending":
            return None
        self._recovered = record.n
        return f"recovery after record {record.n}: {found.outcome}"

    def _untold(self, state: RunState) -> Snapshot | None:
        """The newest end whose results nobody told: whoever ended it stopped right then."""
        if state.live is not None:
            return None
        ends = (record for record in reversed(self._records) if record.kind in (Kind.PRUNE, Kind.OUTCOME))
        end = next(ends, None)
        if end is None or end.n <= self._told:
            return None
        self._told = end.n
        admitted = next(r for r in self._records if r.kind is Kind.ADMIT and r.id == end.id)
        try:
            self._store.head(layout.results(end.id))
        except NotFound:
            return self._drive(_admitted(admitted, self._runtime), end.id)
        return None

    def _cycle(self, state: RunState) -> Snapshot | None:
        """The live cycle is finished first, on its own frozen settings; then the newest checkpoint's turn comes."""
        if state.live is not None:
            admitted = next(record for record in self._records if record.n == state.live.admitted)
            return self._drive(_admitted(admitted, self._runtime), admitted.id)
        found = due(state, admits(self._records), every=self._policy.every)
        if found is None:
            return None
        return self._drive(ask_for(found.base, self._policy, store=self._store, runtime=self._runtime), None)


def _admitted(record: Record, runtime: str) -> Ask:
    """What an admitted cycle asks; the controller takes the rest from the admit record itself."""
    assert isinstance(record.body, Admit)
    settings = Settings.model_validate(record.body.settings)
    return Ask(base=record.body.base, settings=settings, runtime=runtime)


_ASKED = Finding(Reason.ASKED, "asked for in the policy")
