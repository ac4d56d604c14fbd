"""Between the store and the pure strategy: hands it the answers of earlier rounds, takes requests and decisions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from numpy.typing import NDArray

from emrakul.core.snapshot import Snapshot
from emrakul.finding import Finding
from emrakul.observe import Observer
from emrakul.strategy import basic
from emrakul.strategy.budget import check_constraints
from emrakul.strategy.decide import Answers, Case, decide, decide_basic
from emrakul.strategy.requests import ROUND, Method, Subject, basic_requests, slices_of, structured_requests
from leyline import layout
from leyline.masks import Masks
from leyline.messages import Decision, StructuralAnalysisRequest
from leyline.model import Malformed, key_of
from leyline.records import Admit
from leyline.topology import Topology


def case_of(s: Snapshot, observer: Observer, *, method: str) -> Case:
    """Everything that a decision of this cycle is made from, answers apart."""
    assert s.ready is not None and s.pair is not None and s.admitted is not None
    assert isinstance(s.admitted.body, Admit)
    settings = s.ask.settings
    state = observer.log.state_at(s.admitted.n)
    rate = settings.conservative_threshold if method == "basic" else settings.rate(s.stage)
    topology = observer.topology(s.ready)
    policy = {
        "ladder": state.ladder.model_dump(mode="json"),
        "breaker": state.breaker.model_dump(mode="json"),
        "carry": state.carry,
        "hold": state.hold,
    }
    return Case(
        cycle=s.cycle,
        base=s.ask.base,
        checkpoint=s.ready,
        topology=topology,
        inherited=inherited(s, observer, topology),
        inherited_ref=s.pair.masks,
        stage=s.stage,
        rate=rate * s.ask.guidance.rate_factor,
        settings=settings,
        carry=state.carry,
        # not the digest of the whole state: that names the runtime, and decisions are the same in each
        policy_state=key_of(**policy),
    )


def inherited(s: Snapshot, observer: Observer, topology: Topology) -> Masks:
    """Masks of the base pair."""
    assert s.pair is not None
    if s.pair.masks is None:
        return Masks(topology.model_id)
    if observer.digest(s.pair.masks.path) != s.pair.masks.digest:
        raise Malformed(f"{s.pair.masks.path} is not what record {s.pair.record} names; `emrakul verify` says more")
    return Masks.from_bytes(observer.store.get(s.pair.masks.path), name=s.pair.masks.path)


def cut(s: Snapshot, observer: Observer, method: Method) -> tuple[StructuralAnalysisRequest, ...]:
    """The requests of a method's round; those of refine and select depend on the rounds before."""
    case = case_of(s, observer, method="structured" if method == "structured" else "basic")
    subject = Subject(
        cycle=s.cycle,
        checkpoint=case.checkpoint,
        topology=case.topology,
        inherited=case.inherited_ref,
        settings=case.settings,
    )
    if method == "structured":
        return structured_requests(subject)
    if method == "histogram":
        return basic_requests(subject, method)
    coarse = _arrays(observer, "histogram")
    shares = _shares(case, observer, coarse)
    if method == "refine":
        return basic_requests(subject, method, buckets=basic.refine_buckets(shares, coarse))
    return basic_requests(subject, method, ties=basic.ties(shares, coarse, _arrays(observer, "refine")))


def conclude(s: Snapshot, observer: Observer, *, method: str, fallback: str = "") -> Decision:
    """The decision of a cycle whose rounds are answered, or that a person forces."""
    if method == "forced":
        return forced(s, observer)
    if method == "structured":
        return decide(case_of(s, observer, method=method), answers(observer, "structured"))
    case = case_of(s, observer, method="basic")
    shares = _shares(case, observer, _arrays(observer, "histogram"))
    used = {
        request.id: answer.message.result
        for earlier in ("histogram", "refine")
        for request, answer in answers(observer, earlier, arrays=False)
    }
    return decide_basic(case, shares, answers(observer, "select", arrays=False), used=used, fallback=fallback)


def forced(s: Snapshot, observer: Observer) -> Decision:
    """A person's choice of units and weights, held to the same constraints as everybody's.

    What else their file says (budgets with their carry, a reason to decline) speaks of the cycle that it came from.
    """
    key = layout.forced(s.cycle)
    if observer.digest(key) != s.ask.forced:
        raise Malformed(f"{key} is not the decision that was admitted; it was exchanged, start a new cycle")
    wanted = Decision.parse(observer.store.get(key), name=key)
    case = case_of(s, observer, method="structured")
    decision = Decision(
        cycle=s.cycle,
        base=s.ask.base,
        checkpoint=case.checkpoint.name,
        stage=s.stage,
        method="forced",
        policy_state=case.policy_state,
        settings=case.settings.digest(),
        inherited=case.inherited_ref,
        groups=wanted.groups,
        weights=wanted.weights,
    )
    finding: Finding | None = check_constraints(
        case.topology, case.inherited, decision.groups, case.settings.constraints
    )
    if finding is not None:
        return decision.model_copy(update={"declined": finding.reason.value, "message": finding.message})
    return decision


def answers(observer: Observer, method: str, *, arrays: bool = True) -> Answers:
    """Every request of a round with the answer that counts; without `arrays` with their names alone."""
    number = ROUND[method]  # type: ignore[index]
    return tuple(zip(observer.requests(number).requests, observer.counted(number, arrays=arrays), strict=True))


def _arrays(observer: Observer, method: str) -> Mapping[str, NDArray[Any]]:
    return {name: array for _, answer in answers(observer, method) for name, array in answer.arrays.items()}


def _shares(case: Case, observer: Observer, coarse: Mapping[str, NDArray[Any]]) -> tuple[basic.WeightShare, ...]:
    slices = slices_of(observer.requests(ROUND["histogram"]).requests)
    return basic.spend_weights(case.topology, slices, coarse, rate=case.rate, carry=case.carry, settings=case.settings)
