"""The records that a cycle appends, from its snapshot: admit, prune, outcome. Pure."""

from __future__ import annotations

from emrakul import schedule
from emrakul.core.snapshot import Ask, Snapshot
from emrakul.finding import Finding
from leyline import layout
from leyline.fold import RunState
from leyline.messages import AnalysisResults, Candidate, Decision, GateResult, Stage, Verdict
from leyline.model import Malformed
from leyline.policy import Ladder
from leyline.reasons import OUTCOME_OF, Outcome, Reason
from leyline.records import Admit, Draft, Prune
from leyline.records import Outcome as OutcomeBody


def admit(cycle: str, ask: Ask, *, stage: Stage, checkpoint: str) -> Draft:
    """The live cycle, with everything frozen that it will use."""
    settings = ask.settings
    return Draft(
        id=cycle,
        checkpoint=checkpoint,
        body=Admit(
            base=ask.base,
            stage=stage,
            settings=settings.frozen(),
            settings_digest=settings.sha256(),
            accuracy_drop=float(settings.constraints.accuracy_drop_threshold),
            runtime=ask.runtime,
            operator_class=ask.operator_class,
            resource=ask.resource,
            images=dict(ask.images),
            guidance=ask.guidance.model_dump(mode="json"),
            baseline=ask.baseline,
            forced=ask.forced,
        ),
    )


def prune(s: Snapshot, candidate: Candidate) -> Draft:
    """The candidate becomes the tip."""
    here = s.here
    assert here is not None and here.verdict is not None and s.decision is not None
    check_verdict(here.verdict, s, candidate)
    finding = Finding(Reason.PRUNED, _what_was_pruned(s.decision))
    return Draft(
        id=s.cycle,
        checkpoint=candidate.checkpoint,
        masks=candidate.masks,
        evidence=dict(s.evidence),
        reason=finding.reason.value,
        message=finding.sentence + _instead(s),
        body=Prune(
            base=here.base,
            outcome=Outcome.COMMITTED.value,
            candidate=layout.candidate(s.cycle, here.base),
            ladder=_ladder(s, finding),
            breaker=schedule.breaker_after(s.state.breaker, finding.reason, s.ask.settings),
            carry=_carry(s.state, s.decision),
            accuracy=accuracy(here.verdict)[1],
        ),
    )


def outcome(s: Snapshot, finding: Finding) -> Draft:
    """The cycle ends without masks; the training has lost nothing."""
    here = s.here
    verdict = here.verdict if here else None
    kept = finding.outcome is Outcome.NOTHING_TO_PRUNE and s.decision is not None
    return Draft(
        id=s.cycle,
        checkpoint=s.pair.checkpoint if s.pair else None,
        evidence=dict(s.evidence),
        reason=finding.reason.value,
        message=finding.sentence + _instead(s),
        body=OutcomeBody(
            base=s.base,
            outcome=finding.outcome.value,
            ladder=_ladder(s, finding),
            breaker=schedule.breaker_after(s.state.breaker, finding.reason, s.ask.settings),
            carry=_carry(s.state, s.decision) if kept and s.decision else None,
            accuracy=accuracy(verdict)[1] if verdict else None,
        ),
    )


def abandoned(state: RunState, finding: Finding) -> Draft:
    """The end of somebody else's cycle that nobody drives."""
    live = state.live
    assert live is not None
    return Draft(
        id=live.id,
        reason=finding.reason.value,
        message=finding.sentence,
        body=OutcomeBody(
            base=live.base, outcome=OUTCOME_OF[finding.reason].value, ladder=state.ladder, breaker=state.breaker
        ),
    )


def results(s: Snapshot, end: Draft, *, run: str) -> AnalysisResults:
    """What Tamiyo hears of the outcome."""
    body = end.body
    assert isinstance(body, Prune | OutcomeBody)
    verdict = s.here.verdict if s.here else None
    base, candidate = accuracy(verdict) if verdict else (None, None)
    return AnalysisResults(
        idempotency_key=s.cycle,
        run=run,
        cycle=s.cycle,
        checkpoint=end.checkpoint or "",
        outcome=body.outcome,
        reason=end.reason,
        message=end.message,
        stage=s.stage,
        next_stage=body.ladder.stage,
        streak=body.ladder.streak,
        counts=end.masks.counts if end.masks else {},
        budgets=s.decision.budgets if s.decision else (),
        accuracy_base=base,
        accuracy_candidate=candidate,
        breaker=body.breaker.state,
    )


def accuracy(verdict: Verdict) -> tuple[float | None, float | None]:
    """Accuracy of base and candidate on the evaluation set, from the gate against the base."""
    gate = next((gate for gate in verdict.gates if gate.against == "base"), None)
    if gate is None or not gate.n:
        return None, None
    return gate.right_reference / gate.n, gate.right_candidate / gate.n


def check_verdict(verdict: Verdict, s: Snapshot, candidate: Candidate) -> None:
    """The last look before the commit: this verdict speaks of this very candidate on this very base."""
    here = s.here
    assert here is not None
    expected = (s.cycle, here.base, candidate.checkpoint, here.candidate, candidate.masks.digest, "PASS")
    found = (verdict.cycle, verdict.base, verdict.checkpoint, verdict.candidate, verdict.masks, verdict.outcome)
    if expected != found:
        raise Malformed(f"the verdict speaks of {found}, the candidate is {expected}; nothing is committed")


def _ladder(s: Snapshot, finding: Finding) -> Ladder:
    gate: GateResult | None = None
    if s.here and s.here.verdict:
        gate = next((gate for gate in s.here.verdict.gates if gate.against == "base"), None)
    return schedule.ladder_after(
        s.state.ladder, finding.outcome, gate=gate, packet=s.report, stage=s.stage, settings=s.ask.settings
    )


def _carry(state: RunState, decision: Decision) -> dict[str, str]:
    new = {f"{budget.domain}/{budget.kind.value}": budget.carry_out for budget in decision.budgets}
    return {**state.carry, **new}


def _what_was_pruned(decision: Decision) -> str:
    parts = [f"{b.achieved} of {b.live} {b.kind.value}s" + (f" in {b.domain}" if b.domain != "host" else "")
             for b in decision.budgets if b.achieved]  # fmt: skip
    return "pruned " + (", ".join(parts) or f"{sum(len(g.pruned) for g in decision.groups)} units")


def _instead(s: Snapshot) -> str:
    """Said beside the end where this cycle did not do what was asked for, but the next best."""
    if s.decision is None or not s.decision.fallback:
        return ""
    return f" Single weights were scored, because structured analysis failed: {s.decision.fallback}."
