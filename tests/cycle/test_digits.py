"""The digits network through the whole schedule, by real worker processes, and what each stage takes of it."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import pytest

import runs
import trained
from emrakul.core.snapshot import Snapshot
from emrakul.settings import Settings
from leyline import layout
from leyline.local import LocalStore
from leyline.messages import AnalysisResults, Budget, Stage
from leyline.topology import Kind
from trained import Trainer, cycle, outcome, state

SETTINGS = Settings.from_yaml(
    """
enable_checkpoint_pruning: true
structured_pruning:
  progressive_schedule: {phase_1_epochs: 1, phase_2_start_epoch: 2}
# a tenth instead of a half, so that the rate binds and not the margin
safety_margin: 0.1
"""
)
"""The product's own rates, 1, 3 and 5 %, and gates, 2 and 4 points."""


@pytest.mark.slow
def test_the_whole_schedule_takes_what_each_stage_may(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    store = LocalStore(tmp_path / "run")
    trainer = trained.start(store, trained.trained(tmp_path_factory))
    ended = [_epoch(store, trainer, processes=epoch in (1, 2, 8)) for epoch in range(1, 9)]

    assert [one.stage for one in ended] == [
        Stage.VALIDATION_ONLY,
        *[Stage.CONSERVATIVE] * 3,
        *[Stage.MODERATE] * 3,
        Stage.AGGRESSIVE,
    ]
    assert [outcome(one) for one in ended] == ["ValidatedOnly/ValidationOnlyStage", *["Committed/Pruned"] * 7]
    first = [_channels(one) for one in ended]
    # the epoch that only validates wrote and judged a whole candidate, and left nothing behind
    assert first[0].achieved == 3
    assert trained.verdict(store, ended[0]).outcome == "PASS"
    assert ended[1].pair is not None
    assert ended[1].pair.masks is None

    assert {budget.original for budget in first} == {336}
    _reaches(first[1:4], Fraction(1, 100))
    _reaches(first[4:7], Fraction(3, 100))
    # by now the groups that have anything to give are at their floor
    assert first[7].bound == "retention"
    assert 0 < first[7].achieved < first[7].allowed
    # what is gone is gone, and is counted
    gone = sum(budget.achieved for budget in first[1:])
    tip = state(store).tip_pair
    assert tip is not None
    assert tip.masks is not None
    assert tip.masks.counts == {"channel": gone}
    assert [b.live for b in first[1:]] == [336 - sum(b.achieved for b in first[1:at]) for at in range(1, 8)]
    _gates_let_it_through(store, ended)


def _epoch(store: LocalStore, trainer: Trainer, *, processes: bool) -> Snapshot:
    """A checkpoint, its cycle, and the masks taken by the trainer."""
    trainer.publish()
    ended = cycle(store, SETTINGS, processes=processes)
    news = trainer.run.sync()
    assert not news.error
    assert (news.masks is None) == (ended.stage is Stage.VALIDATION_ONLY)
    return ended


def _channels(ended: Snapshot) -> Budget:
    assert ended.decision is not None
    return next(budget for budget in ended.decision.budgets if budget.kind is Kind.CHANNEL)


def _reaches(cycles: list[Budget], rate: Fraction) -> None:
    """Over these cycles together, within one unit of the rate of what was live, and bound by nothing else."""
    wanted = sum(rate * budget.live for budget in cycles) + Fraction(cycles[0].carry_in)
    achieved = sum(budget.achieved for budget in cycles)
    assert 0 <= wanted - achieved < 1, (wanted, achieved)
    assert {budget.bound for budget in cycles} == {"rate"}
    for before, after in pairwise(cycles):
        assert before.carry_out == after.carry_in


def _gates_let_it_through(store: LocalStore, ended: list[Snapshot]) -> None:
    for one in ended:
        gates = trained.verdict(store, one).gates
        assert [gate.outcome for gate in gates] == ["PASS", "PASS"]
        assert all(gate.n == 1000 for gate in gates)
        key = layout.results(one.cycle)
        told = AnalysisResults.parse(store.get(key), name=key)
        assert told.accuracy_base == gates[0].right_reference / 1000
        assert told.accuracy_candidate == gates[0].right_candidate / 1000


SLOWLY = Settings.from_yaml(
    """
enable_checkpoint_pruning: true
min_importance_samples: 200
structured_pruning:
  progressive_schedule: {phase_1_epochs: 1, phase_2_start_epoch: 2, conservative_threshold: 0.02}
"""
)


def test_only_a_stable_training_is_promoted(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "run")
    trainer = runs.trainer(store)
    seen = []
    for epoch, report in enumerate(("stable", "unknown", "unstable", "stable", "stable", "stable"), start=1):
        trainer.run.report(step=100 * epoch, epoch=2, loss=0.1, state=report)
        trainer.publish(100 * epoch)
        ended = runs.drive(store, runs.asked(store, SLOWLY))
        assert outcome(ended) == "Committed/Pruned"
        assert trainer.run.sync().masks is not None
        ladder = state(store).ladder
        seen.append((ladder.stage, ladder.streak))
    # unknown neither counts nor breaks the streak, unstable begins it again, and the third calm commit promotes
    low = Stage.CONSERVATIVE
    assert seen == [(low, 1), (low, 1), (low, 0), (low, 1), (low, 2), (Stage.MODERATE, 0)]
