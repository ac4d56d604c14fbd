"""Follows a run's log: rollbacks that are asked for or needed, recovery after them, and which cycle is due.

`Follower` is every runtime's; `Watcher` adds the driving of cycles, one after the other, on this machine.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from emrakul.api.policy import PolicySpec
from emrakul.asking import ask_for
from emrakul.core.snapshot import Ask, Snapshot
from emrakul.finding import Finding
from emrakul.recovery import Recovery, recover
from emrakul.rollback import NoLoadableTarget, Request, Validate, on_probation, probation_finding, resume, roll_back
from emrakul.settings import Settings
from leyline import layout
from leyline.envelope import Trust
from leyline.fold import PairState, RunState
from leyline.log import Log, NotAllowed
from leyline.reasons import Reason
from leyline.records import Admit, Kind, Record
from leyline.report import newest_report
from leyline.store import NotFound, ObjectStore

VALIDATOR_SECONDS = 10.0
"""Between two looks at whether recovery's validator has answered: each reads the whole log."""


@dataclass(frozen=True)
class Due:
    """The pair whose cycle is due."""

    base: int
    checkpoint: str


def due(state: RunState, *, every: int = 1) -> Due | None:
    """The newest checkpoint, if it is fit for a cycle and no cycle has worked on it yet. Pure.

    Of several that came meanwhile only the newest counts: a cycle on an older one would be superseded. With `every`
    = n, n checkpoints must have come since the last cycle's.
    """
    pair = state.tip_pair
    if state.live is not None or pair is None or not _fit(pair) or pair.record <= state.cycled:
        return None
    came = [other for other in state.pairs if other.candidate is None and state.cycled < other.record <= pair.record]
    return Due(pair.record, pair.checkpoint) if len(came) >= every or state.cycled < 0 else None


def _fit(pair: PairState) -> bool:
    """A pair that a cycle wrote is waiting for the trainer; a provisional or condemned one is no base."""
    return pair.candidate is None and not pair.provisional and not pair.condemned


class Follower:
    """One policy's eyes on its run. Everything it does is found again in the log after a restart."""

    def __init__(
        self, store: ObjectStore, log: Log, policy: PolicySpec, *, trust: Trust | None, validate: Validate
    ) -> None:
        """`validate` loads and checks a pair."""
        self._store, self._log, self.policy = store, log, policy
        self._trust, self._validate = trust, validate
        self._asked: Record | None = None
        self._searched = ("", -1)
        """The id, and up to which record its rollback was looked for."""
        self.impossible = ""
        """Why the policy's rollback cannot be done."""
        self._probed: tuple[int, list[Record]] = (-1, [])
        self.recovery: Recovery | None = None
        """What was found after the newest rollback."""
        self._looked, self._looked_at = -1, 0.0
        self._ended = -1

    def follow(self, state: RunState) -> str | None:
        """Do one thing that the policy or the training asks for: a sentence of it, or None if there is nothing."""
        steps = (self._asked_rollback, self._asked_resume, self._probation, self._recovery)
        return next((done for step in steps if (done := step(state)) is not None), None)

    def new_end(self, state: RunState) -> Record | None:
        """The newest end of a cycle, the first time that it is asked for."""
        if state.live is not None or not state.counters:
            return None
        end = next(r for n in range(state.n, -1, -1) if (r := self._log.read(n)[0]).kind in _ENDS or n <= self._ended)
        if end.kind not in _ENDS or end.n <= self._ended:
            return None
        self._ended = end.n
        return end

    def asked_rollback(self) -> Record | None:
        """The record of the rollback that the policy asks for, if it was done."""
        asked = self.policy.rollback
        if asked is None:
            return None
        if self._searched[0] != asked.id:
            self._asked, self._searched = None, (asked.id, -1)
        if self._asked is None:
            for record in self._log.since(self._searched[1]):
                self._searched = (asked.id, record.n)
                if record.slot == (Kind.ROLLBACK.value, asked.id):
                    self._asked = record
                    break
        return self._asked

    def _asked_rollback(self, _state: RunState) -> str | None:
        """A person's rollback, once for each id."""
        asked = self.policy.rollback
        if asked is None or self.asked_rollback() is not None:
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
            told, self.impossible = self.impossible, str(error)
            # told once; cycles go on
            return None if told == str(error) else f"rollback {asked.id} of the policy is not possible: {error}"

    def _asked_resume(self, state: RunState) -> str | None:
        if state.hold is None or self.policy.resume_after_rollback != state.hold:
            return None
        return resume(self._log).record.message

    def _probation(self, state: RunState) -> str | None:
        """Masks that made the training worse go back by themselves."""
        watched = on_probation(state)
        if watched is None:
            return None
        if self._probed[0] != watched.record:
            self._probed = (watched.record, [])
        since, records = self._probed
        records += self._log.since(records[-1].n if records else since)
        found = probation_finding(state, records, newest_report(self._store, state.term))
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
            depth=self.policy.settings.rollback.depth,
            validate=self._validate,
        )
        self.impossible = ""
        return rolled.record.message

    def _recovery(self, state: RunState) -> str | None:
        """Whether the run stands after its newest rollback: looked at, whenever the log grows, until all is known."""
        known = self.recovery
        if state.rolled_back < 0 or (known and known.rollback == state.rolled_back and known.outcome != "pending"):
            return None
        soon = time.monotonic() - self._looked_at < VALIDATOR_SECONDS
        if state.n == self._looked and (soon or not self._waits_for_validator()):
            return None
        self._looked, self._looked_at = state.n, time.monotonic()
        record, _ = self._log.read(state.rolled_back)
        self.recovery = recover(self._store, self._log, record, validate=self._validate)
        if self.recovery.outcome == "pending":
            return None
        return f"recovery after record {record.n}: {self.recovery.outcome}"

    def _waits_for_validator(self) -> bool:
        """Whether recovery validation waits for its validator, and not for the trainer."""
        looks = self.recovery.looks if self.recovery else ()
        return any(look.name == "model" and look.outcome == "pending" for look in looks)


class Watcher(Follower):
    """Drives what is due on this machine."""

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
        """`drive` carries one cycle, by name if it has one, to its end."""
        super().__init__(store, log, policy, trust=trust, validate=validate)
        self._drive, self._runtime = drive, runtime

    def step(self) -> Snapshot | str | None:
        """Do one thing: a sentence of what was done, the end of a cycle, or None if there is nothing to do now."""
        state = self._log.tail().state
        if (done := self.follow(state)) is not None:
            return done
        return self._untold(state) or self._cycle(state)

    def _untold(self, state: RunState) -> Snapshot | None:
        """The newest end whose results nobody told: whoever ended it stopped right then."""
        end = self.new_end(state)
        if end is None:
            return None
        try:
            self._store.head(layout.results(end.id))
        except NotFound:
            admitted = self._log.find((Kind.ADMIT.value, end.id), base=-1)
            assert admitted is not None
            return self._drive(admitted_ask(admitted, self._runtime), end.id)
        return None

    def _cycle(self, state: RunState) -> Snapshot | None:
        """The live cycle is finished first, on its own frozen settings; then the newest checkpoint's turn comes."""
        if state.live is not None:
            admitted, _ = self._log.read(state.live.admitted)
            return self._drive(admitted_ask(admitted, self._runtime), admitted.id)
        found = due(state, every=self.policy.every)
        if found is None:
            return None
        return self._drive(ask_for(found.base, self.policy, store=self._store, runtime=self._runtime), None)


def admitted_ask(record: Record, runtime: str) -> Ask:
    """What an admitted cycle asks; the controller takes the rest from the admit record itself."""
    assert isinstance(record.body, Admit)
    settings = Settings.model_validate(record.body.settings)
    return Ask(base=record.body.base, settings=settings, runtime=runtime)


_ENDS = (Kind.PRUNE, Kind.OUTCOME)
_ASKED = Finding(Reason.ASKED, "asked for in the policy")
