"""Records before they have their place, in the fewest words."""

from __future__ import annotations

from leyline import layout
from leyline.ids import cycle_name
from leyline.messages import MaskRef, Stage, SystemStatePacket
from leyline.policy import Breaker, Ladder
from leyline.records import Admit, Draft, Genesis, Open, Outcome, Prune, Publish, Resume, Retire, Rollback

SETTINGS = "ab" * 32


def genesis(run: str = "run", model: str = "model") -> Draft:
    return Draft(id="genesis", body=Genesis(run_id=run, model_id=model))


def opened(trainer: str) -> Draft:
    return Draft(id=f"open-{trainer}", body=Open())


def published(
    name: str,
    *,
    term: int,
    step: int = 1,
    masks: MaskRef | None = None,
    baked: MaskRef | None = None,
    report: SystemStatePacket | None = None,
) -> Draft:
    body = Publish(step=step, epoch=1, term=term, report=report)
    return Draft(id=name, checkpoint=name, masks=masks, baked=baked, body=body)


def report(correct: int = 95, *, state: str = "stable") -> SystemStatePacket:
    known = {"idempotency_key": "r", "step": 1, "epoch": 1, "correct": correct, "n": 100, "state": state}
    return SystemStatePacket.model_validate(known)


def cycle(base: int) -> str:
    return cycle_name(base, SETTINGS)


def admitted(base: int, *, protocol: int = 1) -> Draft:
    body = Admit(
        base=base,
        stage=Stage.CONSERVATIVE,
        settings={},
        settings_digest=SETTINGS,
        accuracy_drop=0.02,
        runtime="local",
        images={},
        protocol=protocol,
    )
    return Draft(id=cycle(base), body=body)


def masks_of(base: int, *, on: int | None = None, digest: str = "cd" * 32) -> MaskRef:
    """The masks that the cycle of `base` makes (on a base that it was rebased to)."""
    return MaskRef(path=layout.masks(cycle(base), base if on is None else on), digest=digest, counts={"channel": 1})


def pruned(base: int, *, on: int | None = None, masks: MaskRef | None = None) -> Draft:
    last = base if on is None else on
    body = Prune(
        base=last,
        outcome="Committed",
        ladder=Ladder(streak=1),
        breaker=Breaker(),
        candidate=layout.candidate(cycle(base), last),
        accuracy=0.95,
    )
    return Draft(
        id=cycle(base),
        masks=masks or masks_of(base, on=last),
        body=body,
        evidence={layout.verdict(cycle(base), last): "ef" * 32},
        reason="Pruned",
    )


def ended(base: int, *, reason: str = "Superseded") -> Draft:
    body = Outcome(base=base, outcome="Skipped", ladder=Ladder(), breaker=Breaker())
    return Draft(id=cycle(base), body=body, reason=reason)


def rolled_back(to: int, *, by: str = "person", name: str = "") -> Draft:
    body = Rollback.model_validate({"to": to, "by": by, "strategy": "named"})
    return Draft(id=name or f"back-to-{to}", body=body)


def resumed(rollback: str) -> Draft:
    return Draft(id=f"resume-{rollback}", body=Resume(rollback=rollback))


def retired(*pairs: int) -> Draft:
    return Draft(id=f"retire-{'-'.join(map(str, pairs))}", body=Retire(pairs=pairs))
