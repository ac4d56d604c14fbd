"""What to do next for one cycle. Pure and total: the same snapshot and time give the same plan.

`STEPS` reads like a table: the first step that has something to do or to wait for decides. Whatever the operator
remembers is in the snapshot, so one that is restarted anywhere goes on from where the store says it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta

from emrakul.core import admission
from emrakul.core.snapshot import Job, OnBase, Phase, Round, Snapshot
from emrakul.finding import Finding
from emrakul.strategy.requests import Method
from leyline import exits
from leyline.reasons import Reason

MAX_REBASES = 3
FOLLOWING: dict[str, Method] = {"histogram": "refine", "refine": "select"}
"""Basic pruning's rounds, one after the other."""
GRACE = timedelta(seconds=60)
"""On top of every limit before somebody else's cycle is called abandoned."""
TICK = timedelta(milliseconds=100)
"""Behind a limit, so that the look there finds it passed."""
IDLE = timedelta(hours=1)
"""Nothing of the cycle's own will change: only an event matters."""


# --- actions: what the edges are asked to do --------------------------------------------------------------------------


@dataclass(frozen=True)
class Admit:
    """Append the admit record."""


@dataclass(frozen=True)
class Cut:
    """Write the requests of a method's round."""

    method: Method


@dataclass(frozen=True)
class Decide:
    """Read the answers and write decision.json, for the structured or the basic method."""

    method: str
    fallback: str = ""


@dataclass(frozen=True)
class Update:
    """Write the update request for a base."""

    base: int


@dataclass(frozen=True)
class AskValidation:
    """Write the validation request for a base."""

    base: int


@dataclass(frozen=True)
class Launch:
    """Start the workers of a phase."""

    phase: Phase
    launch: int
    step: int
    """The round or the base."""


@dataclass(frozen=True)
class Stop:
    """Stop a phase's workers and wait until they are gone."""

    phase: Phase


@dataclass(frozen=True)
class Commit:
    """Append the prune record: the candidate on this base becomes the tip."""

    base: int


@dataclass(frozen=True)
class End:
    """Append the outcome record."""

    finding: Finding


@dataclass(frozen=True)
class Abandon:
    """End another cycle that nobody drives any more."""

    cycle: str
    finding: Finding


@dataclass(frozen=True)
class Tell:
    """Write the AnalysisResults of the end record."""


Action = Admit | Cut | Decide | Update | AskValidation | Launch | Stop | Commit | End | Abandon | Tell


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Actions to take now, or nothing and a time to look again."""

    state: str
    """One word for the printer column: Waiting, Admitting, Analyzing, Applying, Validating, Committing, an outcome."""
    actions: tuple[Action, ...] = ()
    wait: timedelta | None = None
    """How long nothing can change but by an event; None: look again at once. Done: no actions and no wait."""
    message: str = ""
    refused: Finding | None = None
    """Why this cycle is not even admitted; nothing is written then."""

    @property
    def done(self) -> bool:
        return not self.actions and self.wait is None


Step = Callable[[Snapshot, datetime], Plan | None]


def next_actions(snapshot: Snapshot, now: datetime) -> Plan:
    """What to do next; `now` is the store's clock."""
    for step in STEPS:
        if (plan := step(snapshot, now)) is not None:
            return plan
    raise AssertionError("the last step always answers")


# --- steps ------------------------------------------------------------------------------------------------------------


def _ended(s: Snapshot, _now: datetime) -> Plan | None:
    """An ended cycle needs its workers stopped and its results told, and nothing else."""
    if s.end is None:
        return None
    outcome = s.end.body.outcome if hasattr(s.end.body, "outcome") else ""
    left: tuple[Action, ...] = _stops(s) if s.told else (*_stops(s), Tell())
    return Plan(state=outcome, actions=left, message=s.end.message)


def _withdrawn(s: Snapshot, _now: datetime) -> Plan | None:
    """A cycle that has not begun and that nobody wants any more."""
    if s.admitted is not None or s.ask.withdrawn is None:
        return None
    finding = s.ask.withdrawn
    return Plan(state=finding.outcome.value, message=finding.sentence, refused=finding)


def _another_is_live(s: Snapshot, now: datetime) -> Plan | None:
    """One live cycle a run: wait for it, or end it once nobody drives it any more."""
    live = s.state.live
    if s.admitted is not None or live is None:
        return None
    quiet = now - (s.live_quiet_since or now)
    its = s.live_settings or s.ask.settings
    longest = max(its.checkpoint_analysis_timeout, its.validation_timeout)
    limit = timedelta(seconds=its.startup_timeout + longest) + GRACE
    if quiet > limit and not s.ask.live_is_driven:
        why = f"cycle {live.id} has not moved for {quiet.total_seconds():.0f} s; no process drives it any more"
        return Plan(state="Waiting", actions=(Abandon(live.id, Finding(Reason.ABANDONED, why)),))
    return Plan(
        state="Waiting",
        wait=IDLE if s.ask.live_is_driven else limit - quiet + TICK,
        message=f"cycle {live.id} is live (runtime {live.runtime}); this one starts after it",
    )


def _suspended_before(s: Snapshot, _now: datetime) -> Plan | None:
    """Not even admitted: a live cycle would stand in the way of all others of its run."""
    if s.admitted is not None or not s.ask.suspend:
        return None
    return Plan(state="Suspended", wait=IDLE, message="suspend is true; the cycle begins once it is false")


def _unfit_base(s: Snapshot, _now: datetime) -> Plan | None:
    """A base that the log does not have, has condemned, or whose weights lack its masks: no cycle begins there."""
    if s.admitted is not None:
        return None
    if s.pair is None or s.state.pair(s.ask.base) is None:
        finding = Finding(Reason.SUPERSEDED, f"record {s.ask.base} is no pair of this run, or is retired")
    elif s.pair.condemned:
        finding = Finding(Reason.ROLLED_BACK_MEANWHILE, f"checkpoint {s.pair.checkpoint} was condemned by a rollback")
    elif s.pair.provisional:
        finding = Finding(Reason.PROVISIONAL, f"checkpoint {s.pair.checkpoint} does not carry the run's masks yet")
    else:
        return None
    return Plan(state=finding.outcome.value, message=finding.sentence, refused=finding)


def _not_admitted(s: Snapshot, _now: datetime) -> Plan | None:
    return Plan(state="Admitting", actions=(Admit(),)) if s.admitted is None else None


def _base_is_gone(s: Snapshot, _now: datetime) -> Plan | None:
    """A rollback since the base condemned what this cycle works on."""
    assert s.admitted is not None
    pair = s.state.pair(s.ask.base)
    if pair is None or pair.condemned or s.state.rolled_back > s.admitted.n:
        return _end(
            Finding(
                Reason.ROLLED_BACK_MEANWHILE,
                f"the run was rolled back (record {s.state.rolled_back}) after base record {s.ask.base}",
            ),
        )
    return None


def _suspended(s: Snapshot, _now: datetime) -> Plan | None:
    if not s.ask.suspend:
        return None
    stops = tuple(Stop(job.phase) for job in s.jobs if job.running)
    return Plan(state="Suspended", actions=stops, wait=None if stops else IDLE, message="suspended by its spec")


def _not_admissible(s: Snapshot, _now: datetime) -> Plan | None:
    """The admission table; asked until analysis has begun."""
    if s.decision is not None:
        return None
    finding = next((found for check in admission.CHECKS if (found := check(s)) is not None), None)
    return _end(finding) if finding else None


def _analyse(s: Snapshot, now: datetime) -> Plan | None:
    """Rounds of requests, until the last one of its method is answered and the decision is written."""
    if s.decision is not None:
        return _end(declined) if (declined := _declined(s)) else None
    if s.ask.forced:
        return Plan(state="Deciding", actions=(Decide("forced"),))
    if not s.rounds:
        return Plan(state="Analyzing", actions=(Cut(_first_method(s)),))
    newest = s.rounds[-1]
    if newest.finding:
        return _end(newest.finding)
    if newest.failed and newest.complete and newest.method == "structured":
        # A scorer that cannot do this model's structure: single weights, in the time that is left. All have
        # answered by now, so the failure that is told is the same whoever was faster.
        return Plan(state="Analyzing", actions=(Cut("histogram"),), message=newest.failed)
    if newest.complete:
        if newest.method in FOLLOWING:
            return Plan(state="Analyzing", actions=(Cut(FOLLOWING[newest.method]),))
        fallback = next((r.failed for r in s.rounds if r.failed), "")
        method = "structured" if newest.method == "structured" else "basic"
        return Plan(state="Deciding", actions=(Decide(method, fallback),))
    if newest.disputed:
        why = f"no majority among {s.ask.settings.replicas} workers that answered request {newest.disputed[0]}"
        return _end(Finding(Reason.WORKERS_FAILED, why))
    if newest.given_up:
        return _end(_gave_up(s, newest))
    limit = timedelta(seconds=s.ask.settings.checkpoint_analysis_timeout)
    progress = f"{newest.answered}/{newest.requests} requests answered ({newest.method})"
    if newest.dissenters:
        progress += f"; outvoted: worker {', '.join(map(str, newest.dissenters))}"
    return _work(s, now, Phase.ANALYSE, newest.number, limit, progress)


def _choose_base(s: Snapshot, _now: datetime) -> Plan | None:
    """Before apply, and again before the commit: the tip may have moved."""
    here = s.here
    if here is None:
        return Plan(state="Applying", actions=(*_stops(s, Phase.ANALYSE), Update(_newest_base(s) or s.ask.base)))
    if not _commits(s) or here.verdict is None or here.verdict.outcome != "PASS" or s.state.tip == here.base:
        return None
    newest = _newest_base(s)
    if newest is None:
        return _end(_superseded(s, here.base))
    if len(s.on) > MAX_REBASES:
        return _end(_too_frequent(s))
    return Plan(state="Applying", actions=(Update(newest),), message=f"rebased on record {newest}")


def _apply(s: Snapshot, now: datetime) -> Plan | None:
    here = _here(s)
    if here.candidate is not None:
        return None
    limit = timedelta(seconds=s.ask.settings.checkpoint_analysis_timeout)
    return _work(s, now, Phase.APPLY, here.base, limit, f"writing the candidate on record {here.base}")


def _validate(s: Snapshot, now: datetime) -> Plan | None:
    here = _here(s)
    if here.refused is not None:
        return _end(here.refused)
    if here.verdict is not None:
        return None
    if not s.ask.settings.enable_safety_validation:
        return _end(Finding(Reason.VALIDATION_DISABLED, "the candidate was written and nobody validated it"))
    if not here.asked:
        return Plan(state="Validating", actions=(*_stops(s, Phase.APPLY), AskValidation(here.base)))
    limit = timedelta(seconds=s.ask.settings.validation_timeout)
    return _work(s, now, Phase.VALIDATE, here.base, limit, f"checking the candidate on record {here.base}")


def _conclude(s: Snapshot, _now: datetime) -> Plan:
    """The verdict is there: commit, or say why not."""
    here = _here(s)
    verdict = here.verdict
    assert verdict is not None
    if verdict.outcome != "PASS":
        reason = Reason(verdict.reason) if verdict.reason in set(Reason) else Reason.STRUCTURE
        return _end(Finding(reason, verdict.message))
    if not _commits(s):
        return _end(admission.why_no_masks(s))
    return Plan(state="Committing", actions=(*_stops(s), Commit(here.base)))


STEPS: tuple[Step, ...] = (
    _ended,  # nothing left but to stop workers
    _withdrawn,  # waited, and was overtaken
    _suspended_before,  # a person said wait, before it began
    _another_is_live,  # one live cycle a run
    _unfit_base,  # nothing to work on: not even admitted
    _not_admitted,  # freeze base, settings, images
    _base_is_gone,  # a rollback took the base away
    _suspended,  # a person said wait
    _not_admissible,  # the table of admission checks
    _analyse,  # rounds of requests, then the decision
    _choose_base,  # rebase if the trainer published meanwhile
    _apply,  # the candidate
    _validate,  # the verdict
    _conclude,  # prune or outcome
)


# --- what the steps share ---------------------------------------------------------------------------------------------


def _work(s: Snapshot, now: datetime, phase: Phase, step: int, limit: timedelta, message: str) -> Plan:
    """Keep a phase's workers running inside their limit, or say what became of them."""
    state = {Phase.ANALYSE: "Analyzing", Phase.APPLY: "Applying", Phase.VALIDATE: "Validating"}[phase]
    jobs = [job for job in s.jobs if job.phase == phase]
    mine = [job for job in jobs if job.step == step]
    if not mine:
        if running := tuple(Stop(phase) for job in jobs if job.running):
            return Plan(state=state, actions=running, message=message)
        # rounds of one launch share its limit; a process that finds older marks begins a launch of its own
        marked = [launch for known, launch in s.marks if known == phase]
        same = phase is Phase.ANALYSE and jobs
        launch = jobs[-1].launch if same else max(marked, default=-1) + 1
        return Plan(state=state, actions=(Launch(phase, launch, step),), message=message)
    job = mine[-1]
    mark = s.marks.get((phase, job.launch))
    if mark is not None and job.queued:
        mark = max(mark, job.created)
    if mark is not None and not job.suspended and now - mark > limit:
        return _end(_over_time(phase, limit, message))
    if not job.running:
        return _end(_ended_badly(phase, job, message))
    startup = s.ask.settings.startup_timeout
    if mark is None and not job.suspended and now - job.created > timedelta(seconds=startup):
        why = f"{phase.value}: no worker started within {startup} s"
        return _end(Finding(Reason.NOT_SCHEDULED, f"{why}: {job.message}" if job.message else why))
    if job.message and (mark is None or job.suspended):
        message += f"; {job.message}"
    # a mark that is written right now is the earliest that the phase's own limit can run from
    ends = [mark + limit if mark is not None else now + limit]
    if mark is None and not job.suspended:
        ends.append(job.created + timedelta(seconds=startup))
    return Plan(state=state, wait=min(ends) - now + TICK, message=message)


def _over_time(phase: Phase, limit: timedelta, message: str) -> Finding:
    reason = {
        Phase.ANALYSE: Reason.ANALYSIS_TIMEOUT,
        Phase.APPLY: Reason.APPLY_TIMEOUT,
        Phase.VALIDATE: Reason.VALIDATION_TIMEOUT,
    }[phase]
    return Finding(reason, f"{phase.value} took more than {limit.total_seconds():.0f} s ({message})")


def _ended_badly(phase: Phase, job: Job, message: str) -> Finding:
    """Workers ended, and the store lacks what they were to write."""
    said = f": {job.message}" if job.message else ""
    if job.out_of_memory:
        return Finding(Reason.OUT_OF_MEMORY, f"{phase.value}: {job.out_of_memory} ({message})")
    if exits.BAD_INPUT in job.exits:
        return Finding(Reason.INVALID_INPUT, job.message or f"{phase.value} found bad input ({message})")
    if exits.KEY in job.exits:
        return Finding(Reason.WRONG_KEY, job.message or f"{phase.value} lacks the data key ({message})")
    if exits.STORE in job.exits:
        return Finding(Reason.STORE_UNREACHABLE, f"{phase.value} could not use the store{said}")
    ends = [f"killed by signal {-code}" if code < 0 else f"exit code {code}" for code in job.exits] or ["no error"]
    how = ", ".join(dict.fromkeys(ends))
    return Finding(Reason.WORKERS_FAILED, f"{phase.value}: workers ended, {how} ({message}){said}")


def _gave_up(s: Snapshot, newest: Round) -> Finding:
    job = s.job(Phase.ANALYSE)
    if job is not None and job.out_of_memory:
        return Finding(Reason.OUT_OF_MEMORY, f"request {newest.given_up[0]}: {job.out_of_memory}")
    said = f": {job.message}" if job is not None and job.message else ""
    return Finding(Reason.WORKERS_FAILED, f"request {newest.given_up[0]} died in every attempt{said}")


def _first_method(s: Snapshot) -> Method:
    """Basic pruning where it was asked for, or where no structure is known."""
    return "structured" if s.ask.settings.structured_pruning.enabled and s.groups else "histogram"


def _declined(s: Snapshot) -> Finding | None:
    if s.decision is not None and s.decision.declined:
        return Finding(Reason(s.decision.declined), s.decision.message)
    return None


def _commits(s: Snapshot) -> bool:
    """Whether a PASS leads to masks in the log."""
    return admission.commits(s)


def _superseded(s: Snapshot, base: int) -> Finding:
    tip = s.state.tip_pair
    same = tip is not None and s.pair is not None and tip.masks == s.pair.masks
    how = "not by a publish" if same else "with other masks"
    return Finding(Reason.SUPERSEDED, f"the tip moved to record {s.state.tip}, {how}, since base {base}")


def _newest_base(s: Snapshot) -> int | None:
    """The tip, if only publishes with the same masks moved it since the cycle's base; else None."""
    tip = s.state.tip_pair
    if tip is None or s.pair is None:
        return None
    chain = (tip, *s.state.ancestors(tip.record))
    between = []
    for pair in chain:
        if pair.record == s.ask.base:
            break
        between.append(pair)
    else:
        return None
    if any(pair.masks != s.pair.masks or pair.candidate or pair.provisional or pair.condemned for pair in between):
        return None
    return tip.record


def _too_frequent(s: Snapshot) -> Finding:
    """The measured cycle time, and the `every: n` that would fit."""
    came = sorted(s.publishes)
    apart = (came[-1] - came[0]).total_seconds() / (len(came) - 1) if len(came) > 1 else 0.0
    started = min(s.marks.values(), default=came[0] if came else None)
    took = (came[-1] - started).total_seconds() if came and started else 0.0
    each = took / len(s.on)
    every = max(2, int(each / apart) + 1) if apart > 0 else 2
    return Finding(
        Reason.TOO_FREQUENT,
        f"a checkpoint came every {apart:.1f} s while apply and validation take {each:.1f} s, "
        f"{MAX_REBASES} rebases in a row; every: {every} would fit",
    )


def _here(s: Snapshot) -> OnBase:
    assert s.here is not None
    return s.here


def _stops(s: Snapshot, phase: Phase | None = None) -> tuple[Action, ...]:
    return tuple(Stop(job.phase) for job in s.jobs if job.running and phase in (None, job.phase))


def _end(finding: Finding) -> Plan:
    """Outcome first into the log; the workers are stopped once it is there (they could only write what is ignored)."""
    return Plan(state=finding.outcome.value, actions=(End(finding),), message=finding.sentence)
