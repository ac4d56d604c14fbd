"""Runs with a history: a real log over real checkpoints and candidates, written record by record."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from builders import MODEL_ID, RUN_ID, make_run, masks_of, safetensors, toy_topology, toy_weights
from candidates import masked
from emrakul.settings import Settings
from leyline import layout
from leyline.digest import digest_bytes, sha256_hex
from leyline.envelope import SigningKey, Trust
from leyline.ids import cycle_name
from leyline.log import Log
from leyline.masks import Masks
from leyline.messages import (
    Candidate,
    Decision,
    GroupDecision,
    MaskRef,
    Stage,
    StoredObject,
    SystemStatePacket,
    Verdict,
)
from leyline.records import Admit, Draft, Genesis, Open, Outcome, Prune, Publish
from leyline.store import ObjectStore
from leyline.verdict import seal_verdict

WEIGHTS = "model.safetensors"


class History:
    """A run that grows by one call a record; each answers with the record's number."""

    def __init__(self, store: ObjectStore, *, keys: Sequence[SigningKey] = (), trust: Trust | None = None) -> None:
        self.store = store
        self.log = Log(store, keys=keys, trust=trust)
        self.topology = toy_topology()
        self.masks = Masks(model_id=MODEL_ID)
        self.log.create(Draft(id="genesis", body=Genesis(run_id=RUN_ID, model_id=MODEL_ID)))
        self._append(Draft(id="trainer-1", body=Open()))

    def _append(self, draft: Draft) -> int:
        return self.log.append(draft, base=-1).record.n

    def publish(
        self, step: int, *, baked: bool = False, report: SystemStatePacket | None = None, epoch: int = 1
    ) -> int:
        """A checkpoint of the tip's line; `baked`: the tip's masks are in its weights."""
        weights = toy_weights(self.topology, seed=step)
        run = make_run(self.store, weights=masked(weights, self.masks) if baked else weights, step=step)
        tail = self.log.tail().state
        ref = tail.tip_pair.masks if tail.tip_pair else None
        name = run.metadata.name
        ready = layout.checkpoint(name, layout.READY)
        return self._append(
            Draft(
                id=name,
                checkpoint=name,
                masks=ref,
                baked=ref if baked else None,
                evidence={ready: sha256_hex(self.store.get(ready))},
                body=Publish(step=step, epoch=epoch, term=tail.term, report=report),
            )
        )

    def admit(self, settings: Settings = Settings()) -> str:  # noqa: B008
        """A live cycle on the tip."""
        tip = self.log.tail().state.tip_pair
        assert tip is not None
        cycle = cycle_name(tip.record, settings.digest())
        body = Admit(
            base=tip.record,
            stage=Stage.CONSERVATIVE,
            settings=settings.frozen(),
            settings_digest=settings.sha256(),
            accuracy_drop=0.02,
            runtime="local",
        )
        self._append(Draft(id=cycle, checkpoint=tip.checkpoint, body=body))
        return cycle

    def prune(
        self,
        pruned: Mapping[str, Iterable[int]],
        *,
        accuracy: float = 0.9,
        settings: Settings = Settings(),  # noqa: B008
    ) -> int:
        """A whole cycle on the tip that prunes these units as well."""
        cycle = self.admit(settings)
        state = self.log.tail().state
        base = state.tip_pair
        assert base is not None
        self.masks = self.masks.union(masks_of(self.topology, pruned))
        data = self.masks.to_bytes()
        ref = MaskRef(path=layout.masks(cycle, base.record), digest=sha256_hex(data), counts=self.masks.counts())
        weights = safetensors(masked(toy_weights(self.topology, seed=base.step), self.masks))
        candidate = Candidate(
            cycle=cycle,
            base=base.record,
            checkpoint=base.checkpoint,
            decision="0" * 64,
            masks=ref,
            objects=(StoredObject(path=WEIGHTS, digest=digest_bytes(weights)),),
        )
        found = Verdict(
            cycle=cycle,
            base=base.record,
            checkpoint=base.checkpoint,
            candidate=candidate.sha256(),
            masks=ref.digest,
            outcome="PASS",
        )
        verdict = seal_verdict(found, ())
        decision = Decision(
            cycle=cycle,
            base=base.record,
            checkpoint=base.checkpoint,
            stage=Stage.CONSERVATIVE,
            method="forced",
            policy_state="0" * 64,
            settings=settings.digest(),
            groups=tuple(GroupDecision(group=group, pruned=tuple(units)) for group, units in pruned.items()),
        )
        for key, content in (
            (layout.decision(cycle), decision.canonical()),
            (ref.path, data),
            (layout.candidate(cycle, base.record, WEIGHTS), weights),
            (layout.manifest(cycle, base.record), candidate.canonical()),
            (layout.verdict(cycle, base.record), verdict),
            (f"{layout.attempts(cycle, '0-0')}0", b"attempt"),
            (f"{layout.responses(cycle, '0-0')}0-0", b"answer"),
        ):
            self.store.put_if_absent(key, content)
        return self._append(
            Draft(
                id=cycle,
                checkpoint=base.checkpoint,
                masks=ref,
                evidence={
                    layout.manifest(cycle, base.record): candidate.sha256(),
                    layout.verdict(cycle, base.record): sha256_hex(verdict),
                },
                reason="Pruned",
                message="pruned some units. The trainer applies the masks at its next checkpoint boundary.",
                body=Prune(
                    base=base.record,
                    outcome="Committed",
                    candidate=layout.candidate(cycle, base.record),
                    ladder=state.ladder,
                    breaker=state.breaker,
                    accuracy=accuracy,
                ),
            )
        )

    def end(self, cycle: str, reason: str = "AccuracyDrop", outcome: str = "RolledBack") -> int:
        """The live cycle ends without masks."""
        state = self.log.tail().state
        assert state.live is not None
        body = Outcome(base=state.live.base, outcome=outcome, ladder=state.ladder, breaker=state.breaker)
        return self._append(Draft(id=cycle, reason=reason, message="the candidate lost 3 points", body=body))


def packet(step: int, **said: object) -> SystemStatePacket:
    """A report of the training."""
    whole = {"idempotency_key": f"report-{step}", "step": step, "epoch": 1, "state": "stable", **said}
    return SystemStatePacket.model_validate(whole)
