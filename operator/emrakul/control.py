"""Drives one cycle: look, decide what is next, do it, until nothing is left. All I/O of the control plane is here.

Every step may be done twice (two operators, a restart): what is written is deterministic and put-if-absent.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from typing import Protocol

from emrakul import analysis, schedule
from emrakul.core import ending, plan
from emrakul.core.plan import Plan, next_actions
from emrakul.core.snapshot import Ask, Job, Phase, Snapshot
from emrakul.finding import Finding
from emrakul.guidance import Guidance
from emrakul.invalid import Invalid
from emrakul.observe import Observer
from emrakul.scaling import DEFAULT_RATE, workers
from emrakul.settings import Settings
from emrakul.strategy.requests import ROUND, Method
from emrakul.work import calculation_rate
from leyline import layout
from leyline.envelope import Trust
from leyline.fold import RunState
from leyline.ids import cycle_name
from leyline.log import Log, NotAllowed
from leyline.messages import (
    Candidate,
    CheckpointUpdate,
    Decision,
    PruningValidationRequest,
    Requests,
    WorkLimits,
)
from leyline.model import Malformed, key_of
from leyline.reasons import Reason
from leyline.records import PROTOCOL, Admit, Draft, Kind, Record
from leyline.store import Damaged, Exists, NotFound, ObjectStore

LOOK_SECONDS = (0.05, 1.0)
LOOK_GROWTH = 1.2
"""Between two looks, while workers run: from the first to the second, by this factor, so that the end of a phase is
seen at most a fifth of its time late. A look costs two listings."""


class Runtime(Protocol):
    """Who starts the workers."""

    @property
    def name(self) -> str: ...

    def start(
        self, phase: Phase, *, launch: int, step: int, workers: int, memory_bytes: int, now: datetime
    ) -> None: ...

    def jobs(self) -> tuple[Job, ...]: ...

    def stop(self, phase: Phase | None = None) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Scale:
    """What bounds the number of workers beside the settings."""

    cores: int | None = None
    """On one machine: never more workers than cores."""
    override: int | None = None
    """A person's number."""


@dataclass(frozen=True, kw_only=True)
class Seen:
    """One look at a cycle."""

    snapshot: Snapshot
    plan: Plan
    now: datetime
    """The store's clock."""


class Controller:
    """One cycle, driven from wherever it stands to its end."""

    def __init__(
        self,
        store: ObjectStore,
        log: Log,
        ask: Ask,
        runtime: Callable[[str], Runtime],
        *,
        trust: Trust | None = None,
        scale: Scale = Scale(),
        cycle: str | None = None,
        forced: Decision | None = None,
    ) -> None:
        """`runtime` makes the runtime for a cycle URI. `cycle` is only given to try an ended one again."""
        self.cycle = cycle or name_of(ask)
        self._store = store
        self._log = log
        self._ask = ask
        self._forced = forced
        self._scale = scale
        self._observer = Observer(store, log, self.cycle, trust=trust)
        self._runtime = runtime(f"{store.uri}/cycles/{self.cycle}")

    @property
    def ask(self) -> Ask:
        """What is asked; once it is admitted, what was frozen then."""
        return self._ask

    def step(self) -> tuple[Snapshot, Plan]:
        """One look, and everything that it asks for. The plan says whether there is more to do, and when."""
        seen = self.look()
        self.act(seen)
        return seen.snapshot, seen.plan

    def look(self, ask: Ask | None = None) -> Seen:
        """What is, and what is next; nothing is changed. `ask`: what is asked now, which may change until admission."""
        if ask is not None:
            self._ask = ask
        snapshot, now = self._observer.look(self._ask, jobs=self._runtime.jobs())
        if snapshot.admitted is not None:
            if snapshot.end is None:
                _is_known(snapshot.admitted)
            settled = frozen(self._ask, snapshot.admitted.body)
            if settled != self._ask:  # somebody admitted it before: their settings count
                self._ask = settled
                snapshot = replace(snapshot, ask=settled)
        return Seen(snapshot=snapshot, plan=next_actions(snapshot, now), now=now)

    def act(self, seen: Seen) -> None:
        """Everything that a look asked for; what has become of it, the next look says."""
        snapshot = seen.snapshot
        for action in seen.plan.actions:
            try:
                self._do(action, snapshot, seen.now)
            except NotAllowed:
                if self._log.tail().record.n == snapshot.state.n:
                    raise  # nothing moved: looking again would give the same plan for ever
                break  # the log moved on; look again
            except (Malformed, Damaged, NotFound) as error:
                if not isinstance(action, plan.Cut | plan.Decide | plan.Commit):
                    raise
                # what this driver cannot read no other will: left live, the cycle would stand in the way of all others
                self._append(ending.outcome(snapshot, Finding(Reason.INVALID_INPUT, str(error))), snapshot)
                break

    def give_up(self, seen: Seen, finding: Finding) -> None:
        """End the cycle for a reason that only the edge knows."""
        self._append(ending.outcome(seen.snapshot, finding), seen.snapshot)

    def run(self, *, watch: Callable[[Snapshot, Plan], None] = lambda _s, _p: None) -> tuple[Snapshot, Plan]:
        """Until the cycle has ended. `watch` sees every look. Workers are stopped however this ends."""
        shortest, longest = LOOK_SECONDS
        pause = shortest
        try:
            while True:
                snapshot, todo = self.step()
                watch(snapshot, todo)
                if todo.done:
                    return snapshot, todo
                if todo.actions:
                    pause = shortest
                    continue
                self.wait(snapshot, min(pause, todo.wait.total_seconds() if todo.wait else pause))
                pause = min(LOOK_GROWTH * pause, longest)
        finally:
            self._runtime.stop()

    def wait(self, snapshot: Snapshot, seconds: float) -> None:
        """So long, or until a worker has ended: the runtime is asked more often than the store, which costs more."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0 and self._runtime.jobs() == snapshot.jobs:
            time.sleep(min(left, LOOK_SECONDS[0]))

    # --- actions ---

    def _do(self, action: plan.Action, s: Snapshot, now: datetime) -> None:
        match action:
            case plan.Admit():
                self._admit(s)
            case plan.Cut(method=method):
                self._cut(s, method)
            case plan.Decide(method=method, fallback=fallback):
                self._decide(s, method, fallback)
            case plan.Update(base=base):
                self._update(s, base)
            case plan.AskValidation(base=base):
                self._ask_validation(s, base)
            case plan.Launch(phase=phase, launch=launch, step=step):
                self._launch(s, phase, launch, step, now)
            case plan.Stop(phase=phase):
                self._runtime.stop(phase)
            case plan.Commit(base=base):
                self._append(ending.prune(s, self._candidate(base)), s)
            case plan.End(finding=finding):
                self._append(ending.outcome(s, finding), s)
            case plan.Abandon(finding=finding):
                self._abandon(s, finding)
            case plan.Tell():
                assert s.end is not None
                told = ending.results(s, s.end, run=s.state.run_id)
                with suppress(Exists):  # another driver told first, of a verdict that came after the end
                    self._store.put_if_absent(layout.results(s.cycle), told.canonical())

    def _admit(self, s: Snapshot) -> None:
        assert s.pair is not None
        stage = schedule.stage_for(
            epoch=s.pair.epoch,
            ladder=s.state.ladder,
            breaker=s.state.breaker,
            hold=s.state.hold,
            cap=s.ask.guidance.cap,
            settings=s.ask.settings,
        )
        if self._forced is not None:
            self._store.put_if_absent(layout.forced(s.cycle), self._forced.canonical())
        self._log.append(ending.admit(s.cycle, s.ask, stage=stage, checkpoint=s.pair.checkpoint), base=s.ask.base)

    def _cut(self, s: Snapshot, method: Method) -> None:
        requests = analysis.cut(s, self._observer, method)
        content = Requests(requests=requests, limits=limits(s.ask.settings))
        self._store.put_if_absent(layout.requests(s.cycle, ROUND[method]), content.canonical())

    def _decide(self, s: Snapshot, method: str, fallback: str) -> None:
        decision = analysis.conclude(s, self._observer, method=method, fallback=fallback)
        self._store.put_if_absent(layout.decision(s.cycle), decision.canonical())

    def _update(self, s: Snapshot, base: int) -> None:
        pair = s.state.pair(base)
        assert pair is not None
        update = CheckpointUpdate(
            idempotency_key=key_of(cycle=s.cycle, base=base, decision=self._observer.digest(layout.decision(s.cycle))),
            cycle=s.cycle,
            base=base,
            checkpoint=pair.checkpoint,
            decision=self._observer.digest(layout.decision(s.cycle)),
            inherited=pair.masks,
            # consensus is about answers; a part that is written twice would only be the same bytes twice
            limits=limits(s.ask.settings).model_copy(update={"replicas": 1}),
        )
        self._store.put_if_absent(layout.update(s.cycle, base), update.canonical())

    def _ask_validation(self, s: Snapshot, base: int) -> None:
        pair = s.state.pair(base)
        assert pair is not None
        constraints = s.ask.settings.constraints
        baseline = s.state.pair(s.state.baseline) if s.state.baseline is not None else None
        metadata = self._observer.checkpoint(pair.checkpoint).metadata
        unmasked = metadata is not None and metadata.baked is None
        candidate = self._observer.digest(layout.manifest(s.cycle, base))
        request = PruningValidationRequest(
            idempotency_key=key_of(cycle=s.cycle, base=base, candidate=candidate),
            cycle=s.cycle,
            base=base,
            checkpoint=pair.checkpoint,
            inherited=pair.masks,
            candidate=candidate,
            # weights that never carried a mask are their own unmasked reference
            reference=pair.checkpoint if unmasked else None,
            baseline=baseline.checkpoint if baseline else None,
            accuracy_drop=float(constraints.accuracy_drop_threshold),
            cumulative_drop=float(constraints.cumulative_accuracy_drop),
            min_channel_retention=float(constraints.min_channel_retention),
            min_attention_heads=constraints.min_attention_heads,
            max_layer_removal=float(constraints.max_layer_removal),
        )
        self._store.put_if_absent(layout.validation_request(s.cycle, base), request.canonical())

    def _launch(self, s: Snapshot, phase: Phase, launch: int, step: int, now: datetime) -> None:
        settings = s.ask.settings
        pieces = 1
        if phase is Phase.ANALYSE:
            pieces = len(self._observer.requests(step).requests)
        elif phase is Phase.APPLY and s.ready is not None:
            pieces = max(1, sum(len(stored.digest.chunks) for stored in s.ready.objects))
        count = 1
        if phase is not Phase.VALIDATE:
            count = workers(
                settings,
                num_params=s.ready.num_params if s.ready else 0,
                requests=pieces,
                cores=self._scale.cores,
                override=self._scale.override,
                measured=self._measured(s),
            )
        memory = settings.validation_memory_limit if phase is Phase.VALIDATE else settings.analysis_memory_limit
        self._runtime.start(phase, launch=launch, step=step, workers=count, memory_bytes=memory, now=now)

    def _measured(self, s: Snapshot) -> int:
        """What worker_calculation_rate stands for in this cycle, where it is auto."""
        if s.ask.settings.worker_calculation_rate != "auto" or s.admitted is None:
            return DEFAULT_RATE
        return calculation_rate(self._store, self._log, cycle=s.cycle, admitted=s.admitted.n, default=DEFAULT_RATE)

    def _abandon(self, s: Snapshot, finding: Finding) -> None:
        live = s.state.live
        if live is not None:
            draft = ending.abandoned(s.state, finding)
            self._log.append(draft, base=live.admitted, unless=partial(_overtaken, before=s.state))

    def _append(self, draft: Draft, s: Snapshot) -> None:
        self._log.append(draft, base=s.ask.base, unless=partial(_overtaken, before=s.state))

    def _candidate(self, base: int) -> Candidate:
        key = layout.manifest(self.cycle, base)
        return Candidate.parse(self._store.get(key), name=key)


def _overtaken(now: RunState, *, before: RunState) -> str | None:
    """An end carries stage and breaker: made from older ones, it would undo what came since."""
    if (now.ladder, now.breaker) != (before.ladder, before.breaker):
        return f"stage or breaker changed between record {before.n} and record {now.n}"
    return None


def name_of(ask: Ask) -> str:
    """The cycle's name: base, the settings that can change which units go, and the decision that is forced."""
    digest = ask.settings.digest()
    return cycle_name(ask.base, key_of(settings=digest, forced=ask.forced) if ask.forced else digest)


def next_try(log: Log, ask: Ask) -> tuple[str, bool]:
    """The name to try a cycle again by: its own with -2, -3, ... after those that ended without a commit.

    Of one that did commit, its name and True: there is nothing to do again.
    """
    stem = name_of(ask)
    ended = [r for r in log.since(ask.base) if r.kind in (Kind.PRUNE, Kind.OUTCOME) and _is_try(r.id, stem)]
    committed = next((r.id for r in ended if r.kind is Kind.PRUNE), None)
    if committed is not None:
        return committed, True
    return (f"{stem}-{len(ended) + 1}" if ended else stem), False


def _is_try(id_: str, stem: str) -> bool:
    return id_ == stem or (id_.startswith(f"{stem}-") and id_.removeprefix(f"{stem}-").isdecimal())


def _is_known(admitted: Record) -> None:
    """Invalid if a newer version admitted the cycle: what it agreed with its workers is not known here."""
    assert isinstance(admitted.body, Admit)
    if admitted.body.protocol > PROTOCOL:
        raise Invalid(
            f"cycle {admitted.id} was admitted with protocol {admitted.body.protocol}, and this version knows none "
            f"above {PROTOCOL}; it is left alone until that version takes it up again, or upgrade this one"
        )


def frozen(ask: Ask, admitted: object) -> Ask:
    """What was admitted, whatever this process was asked for."""
    assert isinstance(admitted, Admit)
    return replace(
        ask,
        base=admitted.base,
        settings=Settings.model_validate(admitted.settings),
        guidance=Guidance.model_validate(admitted.guidance),
        baseline=admitted.baseline,
        forced=admitted.forced,
        images=admitted.images,
    )


def limits(settings: Settings) -> WorkLimits:
    """What workers need to know of the settings."""
    return WorkLimits(
        threads=settings.importance_aggregation_threads,
        memory_bytes=settings.analysis_memory_limit,
        replicas=settings.replicas,
    )
