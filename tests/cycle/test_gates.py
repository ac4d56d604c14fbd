"""Decisions that are forced on the digits network: what the gate refuses, what structure refuses, and the breaker."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import trained
from emrakul.analysis import answers, case_of
from emrakul.cli import main
from emrakul.observe import Observer
from emrakul.strategy.decide import score
from leyline import layout
from leyline.local import LocalStore
from leyline.log import Log
from leyline.masks import Masks
from leyline.messages import AnalysisResults, Decision, Stage
from leyline.topology import Group, Kind, Topology
from trained import Trained, Trainer, cycle, outcome, settings, state

pytestmark = pytest.mark.slow


@pytest.fixture
def data(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return trained.trained(tmp_path_factory)


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "run")


@pytest.fixture
def trainer(store: LocalStore, data: Trained) -> Trainer:
    return trained.start(store, data)


def channels(data: Trained) -> list[Group]:
    return [group for group in data.topology.groups if group.kind is Kind.CHANNEL]


def fifth_of_every_group(data: Trained, seed: int) -> Decision:
    """floor(0.2 C) random units of every group: all that retention allows."""
    chance = random.Random(seed)
    return trained.decision({g.id: chance.sample(range(g.units), g.units // 5) for g in channels(data)})


# --- the gate ---------------------------------------------------------------------------------------------------------


def test_what_retention_allows_and_the_model_cannot_bear_opens_the_breaker(
    store: LocalStore, trainer: Trainer, data: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer.publish(refresh=0)
    tip = state(store).tip
    for failures, seed in enumerate(range(3), start=1):
        if seed == 0:
            _forced_by_command(store, fifth_of_every_group(data, seed), tmp_path, capsys)
        else:
            ended = cycle(store, settings(), forced=fifth_of_every_group(data, seed))
            assert outcome(ended) == "RolledBack/AccuracyDrop"
            found = trained.verdict(store, ended)
            # everything else was right with it: the gate refused, not structure
            assert [check.name for check in found.checks if check.passed] == [
                "masks", "constraints", "bytes", "dead units",
            ]  # fmt: skip
            assert found.gates[0].drop > 0.5
        now = state(store)
        assert (now.tip, now.tip_pair and now.tip_pair.masks) == (tip, None)
        assert (now.breaker.state, now.breaker.failures) == ("closed" if failures < 3 else "open", failures)

    # open: nothing is even analysed, a person's decision included, until three more checkpoints are there
    for waited in range(3):
        before = set(_keys(store))
        refused = cycle(store, settings(), forced=trained.decision({"conv1": [waited]}))
        assert outcome(refused) == "Skipped/BreakerOpen"
        assert f"{3 - waited} more checkpoints to wait" in refused.end.message  # type: ignore[union-attr]
        assert not [key for key in set(_keys(store)) - before if "/on-" in key or "/responses/" in key]
        trainer.publish(refresh=trained.SAMPLES if waited == 2 else 0)
    # half-open: one whole cycle, and no masks though it passes
    probe = cycle(store, settings())
    assert (probe.stage, outcome(probe)) == (Stage.VALIDATION_ONLY, "ValidatedOnly/BreakerHalfOpen")
    assert state(store).breaker.state == "closed"
    assert state(store).tip_pair.masks is None  # type: ignore[union-attr]


def _forced_by_command(store: LocalStore, wanted: Decision, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`emrakul run CYCLE.yaml --decision FILE`, its workers processes."""
    (folder / "decision.json").write_bytes(wanted.canonical())
    (folder / "cycle.yaml").write_text(
        f"""
apiVersion: emrakul.dev/v1alpha1
kind: PruningPolicy
metadata: {{name: p}}
spec:
  run: {store.uri}
  settings:
    enableCheckpointPruning: true
    structuredPruning:
      progressiveSchedule: {{phase1Epochs: 0, phase2StartEpoch: 1}}
---
apiVersion: emrakul.dev/v1alpha1
kind: PruningCycle
metadata: {{name: c}}
spec: {{checkpoint: latest, policyRef: {{name: p}}}}
"""
    )
    arguments = ["run", str(folder / "cycle.yaml"), "--decision", str(folder / "decision.json"), "--output", "json"]
    assert main(arguments) == 7  # the candidate was refused
    told = json.loads(capsys.readouterr().out)
    assert (told["outcome"], told["reason"]) == ("RolledBack", "AccuracyDrop")
    assert told["accuracy_candidate"] < 0.5 < told["accuracy_base"]


def _keys(store: LocalStore) -> Iterator[str]:
    return (head.key for head in store.list(""))


@pytest.mark.parametrize("seed", range(2))
def test_a_random_twentieth_ends_in_a_verdict(seed: int, store: LocalStore, trainer: Trainer, data: Trained) -> None:
    trainer.publish(refresh=0)
    chance = random.Random(seed)
    every = [(g.id, unit) for g in channels(data) for unit in range(g.units)]
    chosen: dict[str, list[int]] = {}
    for group, unit in chance.sample(every, len(every) // 20):
        chosen.setdefault(group, []).append(unit)
    ended = cycle(store, settings(), forced=trained.decision(chosen))
    assert ended.end is not None
    assert outcome(ended) in {
        "Committed/Pruned",
        "RolledBack/AccuracyDrop",
        "RolledBack/CumulativeAccuracyDrop",
        "RolledBack/GateInconclusive",
    }
    found = trained.verdict(store, ended)
    assert len(found.gates) == 2
    assert (found.outcome == "PASS") == (outcome(ended) == "Committed/Pruned") == (state(store).tip == ended.end.n)


# --- structure --------------------------------------------------------------------------------------------------------


def test_the_lowest_fifth_of_all_breaks_retention(store: LocalStore, trainer: Trainer) -> None:
    trainer.publish()
    ranked = cycle(store, settings("enable_safety_validation: false\n"))
    assert outcome(ranked) == "ValidatedOnly/SafetyValidationDisabled"
    lowest = _lowest(store, ranked, 67)
    assert sum(map(len, lowest.values())) == 67
    tip = state(store).tip
    # a fifth of all 336, without the caps of the groups that they lie in
    ended = cycle(store, settings(), forced=trained.decision(lowest))
    assert outcome(ended) == "RolledBack/ConstraintBroken"
    assert "min_channel_retention is 0.8" in ended.end.message  # type: ignore[union-attr]
    assert not ended.on  # no candidate was even written
    assert (state(store).tip, state(store).breaker.failures) == (tip, 1)


def _lowest(store: LocalStore, ended: object, count: int) -> dict[str, list[int]]:
    """The lowest units of all groups by the scores that a cycle ranked, whatever their groups have left."""
    observer = Observer(store, Log(store), ended.cycle, trust=None)  # type: ignore[attr-defined]
    case = case_of(ended, observer, method="structured")  # type: ignore[arg-type]
    scores = [one for one in score(case, answers(observer, "structured")) if one.group.kind is Kind.CHANNEL]
    ranked = sorted((one.score[unit], one.group.id, int(unit)) for one in scores for unit in np.flatnonzero(one.live))
    chosen: dict[str, list[int]] = {}
    for _, group, unit in ranked[:count]:
        chosen.setdefault(group, []).append(unit)
    return chosen


# --- the proof --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("left_out", "fill", "said"),
    [
        ("layer1.0.conv2.weight", "A", "a consumer of it is not masked"),
        ("layer1.0.bn1.bias", "B", "a producer or norm of it is not masked"),
    ],
)
def test_a_topology_that_leaves_a_member_out_fails_the_proof(
    left_out: str, fill: str, said: str, store: LocalStore, data: Trained
) -> None:
    name = "layer1.0.conv1"
    trainer = trained.start(store, replace(data, topology=_without(data.topology, name, left_out)))
    trainer.publish(refresh=0)
    tip = state(store).tip
    # unit 3: filled at random, its values are negative on every sample, and a ReLU would hide them
    ended = cycle(
        store, settings(accuracy_drop_threshold=1, cumulative_accuracy_drop=1), forced=trained.decision({name: [3]})
    )
    assert outcome(ended) == "RolledBack/DeadUnitProofFailed"
    assert f"fill {fill}: unit 3 of group {name} is felt" in ended.end.message  # type: ignore[union-attr]
    assert said in ended.end.message  # type: ignore[union-attr]
    # the candidate was what its masks say, byte for byte: only the proof can know better
    assert "bytes" in [check.name for check in trained.verdict(store, ended).checks if check.passed]
    assert (state(store).tip, state(store).breaker.failures) == (tip, 1)


def test_the_same_unit_of_the_whole_group_passes_the_proof(store: LocalStore, trainer: Trainer) -> None:
    trainer.publish(refresh=0)
    chosen = trained.decision({"layer1.0.conv1": [3]})
    ended = cycle(store, settings(accuracy_drop_threshold=1, cumulative_accuracy_drop=1), forced=chosen)
    assert outcome(ended) == "Committed/Pruned"


def _without(topology: Topology, group: str, parameter: str) -> Topology:
    """The topology as somebody would declare it who forgot a member of one group."""
    changed = [
        one.model_copy(update={"members": tuple(m for m in one.members if m.parameter != parameter)})
        if one.id == group
        else one
        for one in topology.groups
    ]
    assert changed != list(topology.groups)
    return topology.model_copy(update={"groups": tuple(changed)})


# --- many small steps -------------------------------------------------------------------------------------------------

STEPS = ((8, 16), (20, 28), (43, 52))
"""Answers of 1,000 lost since the baseline after each cycle: each step is within 4 points, the last sum is not."""


def test_cycles_that_pass_one_by_one_are_refused_together(store: LocalStore, trainer: Trainer, data: Trained) -> None:
    allowed = settings(accuracy_drop_threshold=0.04, cumulative_accuracy_drop=0.04, min_channel_retention=0.5)
    trainer.publish(refresh=0)
    right = trained.right(trainer.model, data.evaluation)
    for number, (low, high) in enumerate(STEPS):
        ended = cycle(store, allowed, forced=_costing(trainer, data, right - high, right - low))
        step, together = trained.verdict(store, ended).gates
        assert step.outcome == "PASS"
        if number < len(STEPS) - 1:
            assert (outcome(ended), together.outcome) == ("Committed/Pruned", "PASS")
            assert trainer.run.sync().masks is not None
            trainer.publish(refresh=0)
    assert outcome(ended) == "RolledBack/CumulativeAccuracyDrop"
    assert (together.against, together.outcome) == ("baseline", "FAIL")
    assert together.drop > 0.04 > step.upper
    assert state(store).tip == ended.ask.base
    key = layout.results(ended.cycle)
    assert AnalysisResults.parse(store.get(key), name=key).reason == "CumulativeAccuracyDrop"


def _costing(trainer: Trainer, data: Trained, low: int, high: int) -> Decision:
    """Random units, one by one, until the network as it stands has between `low` and `high` answers right."""
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    groups = {group.id: group for group in channels(data)}
    every = [(id_, unit) for id_, group in groups.items() for unit in range(group.units)]
    chosen: dict[str, list[int]] = {}
    gone = _gone(trainer, groups)
    for id_, unit in random.Random(trainer.epoch).sample(every, len(every)):
        if unit in gone.get(id_, ()):
            continue
        kept = {name: value.clone() for name, value in trainer.model.state_dict().items()}
        _zero(trainer, groups[id_], unit)
        found = trained.right(trainer.model, data.evaluation)
        if found < low:  # too dear: another one
            trainer.model.load_state_dict(kept)
            continue
        chosen.setdefault(id_, []).append(unit)
        if found <= high:
            trainer.model.load_state_dict(before)
            return trained.decision(chosen)
    raise AssertionError(f"no units leave between {low} and {high} answers right")


def _gone(trainer: Trainer, groups: dict[str, Group]) -> dict[str, list[int]]:
    """Units that earlier cycles masked."""
    position = trainer.run._position.masks
    if position is None:
        return {}
    masks = Masks.from_bytes(trainer.run._store.get(position.path), name=position.path)
    return {id_: np.flatnonzero(found).tolist() for id_ in groups if (found := masks.pruned(id_)) is not None}


def _zero(trainer: Trainer, group: Group, unit: int) -> None:
    """A unit without producers, norms and biases says nothing any more."""
    parameters = dict(trainer.model.named_parameters())
    for member in group.members:
        if member.role != "consumer":
            parameters[member.parameter].data[unit] = 0
