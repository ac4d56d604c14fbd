"""What drives a cycle: that no input, and nobody who writes at the same moment, leaves it standing or undone."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from emrakul.api.policy import PolicySpec
from emrakul.control import Controller
from emrakul.core import ending, plan
from emrakul.core.plan import next_actions
from emrakul.core.snapshot import Ask, Job, Phase, Snapshot
from emrakul.finding import Finding
from emrakul.invalid import Invalid
from emrakul.observe import Observer
from emrakul.rollback import Request, roll_back
from emrakul.settings import Settings
from emrakul.watch import Watcher
from histories import History, packet
from leyline import layout
from leyline.digest import sha256_hex
from leyline.envelope import Role, SigningKey, Trust, generate_key, seal
from leyline.local import LocalStore
from leyline.log import Entry, Log
from leyline.messages import Budget, Candidate, Decision, GroupDecision, MaskRef, Stage, Verdict
from leyline.policy import Breaker, Ladder
from leyline.ready import PAYLOAD, read_ready, seal_ready
from leyline.reasons import Reason
from leyline.records import Draft, End, Outcome, Retire, Rollback
from leyline.topology import Kind
from leyline.verdict import seal_verdict

ON = Settings.from_yaml("{enable_checkpoint_pruning: true}")
BASIC = Settings.from_yaml("{enable_checkpoint_pruning: true, structured_pruning: {enabled: false}}")


class Idle:
    """Starts nobody: what the controller itself writes is looked at here."""

    name = "local"

    def start(self, phase: Phase, *, launch: int, step: int, workers: int, memory_bytes: int, now: datetime) -> None:
        pass

    def jobs(self) -> tuple[Job, ...]:
        return ()

    def stop(self, phase: Phase | None = None) -> None:
        pass


@pytest.fixture
def run(tmp_path: Path) -> History:
    return History(LocalStore(tmp_path))


def controller(run: History, base: int, settings: Settings = ON, **options: Any) -> Controller:
    forced = options.get("forced")
    ask = Ask(base=base, settings=settings, runtime="local", forced=forced.sha256() if forced else None)
    return Controller(run.store, Log(run.store), ask, lambda _uri: Idle(), **options)


def end(run: History) -> tuple[str, End]:
    """Reason and body of the newest record, which must be a cycle's end."""
    record = run.log.tail().record
    assert isinstance(record.body, End)
    return record.reason, record.body


def test_a_driver_that_waits_sees_at_once_that_a_worker_has_ended(run: History) -> None:
    run.publish(100)
    looking = controller(run, run.publish(200))
    snapshot = replace(looking.look().snapshot, jobs=(job(running=True),))

    class Ending(Idle):
        """Its worker ends after a fifth of a second."""

        began = time.monotonic()

        def jobs(self) -> tuple[Job, ...]:
            return (job(running=time.monotonic() < self.began + 0.2),)

    looking._runtime = Ending()
    looking.wait(snapshot, 30)
    assert 0.2 <= time.monotonic() - Ending.began < 5
    began = time.monotonic()
    looking.wait(replace(snapshot, jobs=(job(running=False),)), 0.3)
    assert time.monotonic() - began >= 0.3, "nothing has changed since the look"


def job(*, running: bool) -> Job:
    return Job(phase=Phase.ANALYSE, launch=0, step=0, created=datetime(2000, 1, 1, tzinfo=UTC), running=running)


def test_a_cycle_on_a_retired_base_is_refused_and_not_tried_for_ever(run: History) -> None:
    run.publish(100)
    old = run.publish(200)
    for step in range(300, 1000, 100):
        run.publish(step)
    run.log.append(Draft(id="retire", body=Retire(pairs=(old,))), base=-1)
    _, found = controller(run, old).step()
    assert found.done
    assert found.refused is not None and found.refused.reason is Reason.SUPERSEDED


def test_a_cycle_of_a_newer_version_is_left_alone(run: History, monkeypatch: pytest.MonkeyPatch) -> None:
    base = run.publish(100)
    driver = controller(run, base)
    ask = Ask(base=base, settings=ON, runtime="local")
    admit = ending.admit(driver.cycle, ask, stage=Stage.CONSERVATIVE, checkpoint=None)
    newer = admit.model_copy(update={"body": admit.body.model_copy(update={"protocol": 2})})
    with monkeypatch.context() as newer_version:
        newer_version.setattr("leyline.rules.PROTOCOL", 2)
        admitted = run.log.append(newer, base=-1).record.n
    with pytest.raises(Invalid, match="was admitted with protocol 2, and this version knows none above 1"):
        driver.step()
    assert run.log.tail().record.n == admitted
    ended = Outcome(base=base, outcome="Skipped", ladder=Ladder(), breaker=Breaker())
    run.log.append(Draft(id=driver.cycle, reason=Reason.ABANDONED, body=ended), base=-1)
    assert driver.step()[1].state == "Skipped", "how it ended everybody may read"


def test_an_end_does_not_undo_the_demotion_of_a_rollback_that_came_first(
    run: History, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run.publish(100, report=packet(100, correct=90, n=100))
    base = run.publish(200, report=packet(200, correct=90, n=100))
    high = Outcome(base=base, outcome="Skipped", ladder=Ladder(stage=Stage.MODERATE, streak=2), breaker=Breaker())
    run.log.append(Draft(id=run.admit(), reason="x", body=high), base=-1)
    driver = controller(run, base)
    driver.step()
    whole = Log.append

    def overtaken(log: Log, draft: Draft, **options: Any) -> Entry:
        if isinstance(draft.body, Outcome):
            monkeypatch.undo()
            back = Rollback(to=first, by="trainer", strategy="immediate")
            run.log.append(Draft(id="load", body=back), base=-1)
        return whole(log, draft, **options)

    monkeypatch.setattr(Log, "append", overtaken)
    driver.step()
    driver.step()
    reason, body = end(run)
    assert reason == Reason.ROLLED_BACK_MEANWHILE
    assert body.ladder == Ladder(stage=Stage.CONSERVATIVE)


def test_damaged_inherited_masks_end_the_cycle_and_do_not_leave_it_live(run: History) -> None:
    run.publish(100, epoch=40)
    run.prune({run.topology.groups[0].id: [0]})
    base = run.publish(200, epoch=40, baked=True, report=packet(200, correct=90, n=100))
    masks = run.log.tail().state.tip_pair
    assert masks is not None and masks.masks is not None
    _overwrite(run, masks.masks.path, b"damaged")
    driver = controller(run, base, BASIC)
    driver.step()
    driver.step()
    assert run.log.tail().state.live is None
    assert end(run)[0] == Reason.INVALID_INPUT


class TestAForcedDecision:
    def wanted(self, run: History, **changes: object) -> Decision:
        tip = run.log.tail().state.tip_pair
        assert tip is not None
        budget = Budget(
            domain="host",
            kind=Kind.CHANNEL,
            live=8,
            original=8,
            requested=0.5,
            allowed=1,
            eligible=1,
            achieved=1,
            carry_out="7",
            bound="rate",
        )
        values = {
            "cycle": "another",
            "base": 0,
            "checkpoint": tip.checkpoint,
            "stage": Stage.CONSERVATIVE,
            "method": "structured",
            "policy_state": "p",
            "settings": "s",
            "groups": (GroupDecision(group=run.topology.groups[0].id, pruned=(0,)),),
            "budgets": (budget,),
        }
        return Decision.model_validate({**values, **changes})

    @pytest.mark.parametrize("changes", [{}, {"declined": "NoSuchReason"}])
    def test_only_its_units_count(self, run: History, changes: dict[str, object]) -> None:
        base = run.publish(100, epoch=40)
        wanted = self.wanted(run, **changes)
        driver = controller(run, base, forced=wanted)
        driver.step()
        driver.step()
        written = Decision.parse(run.store.get(layout.decision(driver.cycle)), name="decision")
        assert written.groups == wanted.groups
        assert (written.budgets, written.declined) == ((), "")  # a carry of 7 would end every later cycle
        assert driver.step()[1].actions == (plan.Update(base),)

    def test_another_than_the_admitted_one_is_refused(self, run: History) -> None:
        base = run.publish(100, epoch=40)
        driver = controller(run, base, forced=self.wanted(run))
        driver.step()
        _overwrite(run, layout.forced(driver.cycle), self.wanted(run, groups=()).canonical())
        driver.step()
        assert end(run)[0] == Reason.INVALID_INPUT


def test_a_manifest_that_leads_out_of_its_checkpoint_fails_the_cycle(run: History) -> None:
    base = run.publish(100, epoch=40)
    tip = run.log.tail().state.tip_pair
    assert tip is not None
    key = layout.checkpoint(tip.checkpoint, layout.READY)
    content = json.loads(base64.b64decode(json.loads(run.store.get(key))["payload"]))
    content["objects"][0]["path"] = "../../log/0/0.json"
    _overwrite(run, key, seal(json.dumps(content).encode(), PAYLOAD, ()))
    driver = controller(run, base)
    driver.step()
    driver.step()
    reason, body = end(run)
    assert (reason, body.outcome) == (Reason.INVALID_INPUT, "Failed")
    assert "leads out of the checkpoint" in run.log.tail().record.message


def test_a_live_cycle_is_quiet_for_as_long_as_its_own_settings_allow(run: History) -> None:
    base = run.publish(100)
    slow = Settings.from_yaml("{validation_timeout: 3600}")
    controller(run, base, slow).step()
    ask = Ask(base=base, settings=ON, runtime="local")
    other, now = Observer(run.store, Log(run.store), "c-other", trust=None).look(ask)
    assert next_actions(other, now + timedelta(seconds=1000)).actions == ()
    assert isinstance(next_actions(other, now + timedelta(seconds=5000)).actions[0], plan.Abandon)


def test_a_pair_that_a_person_brought_back_is_on_probation_again(run: History) -> None:
    good = run.publish(100, report=packet(100, correct=90, n=100))
    pruned = run.prune({run.topology.groups[0].id: [0]})

    def drive(_ask: Ask, _name: str | None) -> Snapshot:
        raise AssertionError("no cycle is due")

    policy = PolicySpec.model_validate({"run": run.store.uri})
    watcher = Watcher(run.store, run.log, policy, trust=None, validate=lambda _n: None, drive=drive)

    def unstable() -> None:
        state = run.log.tail().state
        said = packet(150, state="unstable", record=state.n)
        run.store.put_if_absent(layout.report(state.term, 150), said.canonical())

    unstable()
    watcher.step()
    assert run.log.tail().state.tip == good
    back = Request(id="p", strategy="named", to=pruned, finding=Finding(Reason.ASKED, "again"))
    roll_back(run.store, run.log, back, trust=None)
    assert run.log.tail().state.tip == pruned
    unstable()
    watcher.step()
    assert run.log.tail().state.tip == good


@pytest.mark.parametrize("key", ["reports/1-000000000999.json", "cycles/{cycle}/on-nowhere/stray"])
def test_a_stray_object_stops_no_cycle(run: History, key: str) -> None:
    driver = controller(run, run.publish(100, epoch=40), BASIC)
    run.store.put_if_absent(key.format(cycle=driver.cycle), b"{}")
    driver.step()
    assert driver.step()[1].state == "Analyzing"


@pytest.mark.parametrize("place", [layout.decision, lambda cycle: layout.requests(cycle, 1)])
def test_what_somebody_else_wrote_there_ends_the_cycle(run: History, place: Callable[[str], str]) -> None:
    driver = controller(run, run.publish(100, epoch=40), BASIC)
    driver.step()
    run.store.put_if_absent(place(driver.cycle), b"not what belongs here")
    driver.step()
    reason, _ = end(run)
    assert reason == Reason.INVALID_INPUT
    assert place(driver.cycle) in run.log.tail().record.message


class TestTrust:
    """Whoever can write into the bucket can write a decision, a candidate and a verdict; only a signature counts."""

    @pytest.fixture
    def keys(self, tmp_path: Path) -> dict[Role, SigningKey]:
        return {role: generate_key(tmp_path / f"{role}.pem") for role in ("trainer", "operator", "validator", "worker")}

    def committed(self, folder: Path, keys: dict[Role, SigningKey], by: tuple[SigningKey, ...]) -> History:
        """A run after its cycle, whose candidate and verdict somebody put there."""
        trust = Trust({role: (key.private.public_key(),) for role, key in keys.items()})
        run = History(LocalStore(folder / "run"), keys=(keys["trainer"], keys["operator"]), trust=trust)
        base = run.publish(100, epoch=40)
        tip = run.log.tail().state.tip_pair
        assert tip is not None
        metadata = read_ready(run.store, tip.checkpoint, None)
        _overwrite(run, layout.checkpoint(tip.checkpoint, layout.READY), seal_ready(metadata, (keys["trainer"],)))
        ask = Ask(base=base, settings=BASIC, runtime="local")
        driver = Controller(run.store, run.log, ask, lambda _uri: Idle(), trust=trust)
        driver.step()
        decision = Decision(
            cycle=driver.cycle,
            base=base,
            checkpoint=tip.checkpoint,
            stage=Stage.CONSERVATIVE,
            method="structured",
            policy_state="p",
            settings="s",
            groups=(GroupDecision(group=run.topology.groups[0].id, pruned=(0, 1, 2, 3, 4, 5)),),
        )
        masks = MaskRef(path=layout.masks(driver.cycle, base), digest=sha256_hex(b"masks"))
        candidate = Candidate(
            cycle=driver.cycle,
            base=base,
            checkpoint=tip.checkpoint,
            decision=decision.sha256(),
            masks=masks,
            objects=(),
        )
        verdict = Verdict(
            cycle=driver.cycle,
            base=base,
            checkpoint=tip.checkpoint,
            candidate=candidate.sha256(),
            masks=masks.digest,
            outcome="PASS",
        )
        run.store.put_if_absent(layout.decision(driver.cycle), decision.canonical())
        run.store.put_if_absent(layout.manifest(driver.cycle, base), candidate.canonical())
        run.store.put_if_absent(layout.verdict(driver.cycle, base), seal_verdict(verdict, by))
        for _ in range(3):
            driver.step()
        return run

    def test_a_verdict_that_nobody_signed_commits_nothing(self, tmp_path: Path, keys: dict[Role, SigningKey]) -> None:
        run = self.committed(tmp_path, keys, by=())
        reason, body = end(run)
        assert (reason, body.outcome) == (Reason.UNTRUSTED, "Failed")
        assert run.log.tail().state.tip == body.base

    def test_nor_does_one_that_a_worker_signed(self, tmp_path: Path, keys: dict[Role, SigningKey]) -> None:
        assert end(self.committed(tmp_path, keys, by=(keys["worker"],)))[0] == Reason.UNTRUSTED

    @pytest.mark.parametrize("role", ["validator", "operator"])
    def test_the_validators_does(self, tmp_path: Path, keys: dict[Role, SigningKey], role: Role) -> None:
        assert end(self.committed(tmp_path, keys, by=(keys[role],)))[0] == Reason.PRUNED


def _overwrite(run: History, key: str, data: bytes) -> None:
    (Path(urlsplit(run.store.uri).path) / key).write_bytes(data)
