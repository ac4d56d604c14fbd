"""Whole layers of the digits network: one of its four branches may go, and no second one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import trained
from leyline.local import LocalStore
from leyline.masks import Masks
from leyline.topology import Kind
from trained import cycle, outcome, settings, state

pytestmark = pytest.mark.slow


def test_one_layer_goes_and_a_second_does_not(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    store = LocalStore(tmp_path / "run")
    data = trained.trained(tmp_path_factory)
    layers = [group.id for group in data.topology.groups if group.kind is Kind.LAYER]
    assert layers == [f"layer:layer{at}.conv2" for at in ("1.0", "1.1", "2.1", "3.1")]
    spare = f"layer:{trained.SPARE.replace('bn2', 'conv2')}"
    trainer = trained.start(store, data)
    trainer.publish(refresh=0)

    # two at once are more than a quarter of four: structure refuses, and no candidate is written
    both = cycle(store, settings(), forced=trained.decision({spare: [0], layers[0]: [0]}))
    assert outcome(both) == "RolledBack/ConstraintBroken"
    assert "domain host may give 1 more of its 4 layers" in both.end.message  # type: ignore[union-attr]
    assert not both.on

    # one that the network needs: everything is right with it but what it costs
    needed = cycle(store, settings(), forced=trained.decision({layers[0]: [0]}))
    assert outcome(needed) == "RolledBack/AccuracyDrop"
    assert "dead units" in [check.name for check in trained.verdict(store, needed).checks if check.passed]

    # the one that it learned to do without
    ended = cycle(store, settings(), forced=trained.decision({spare: [0]}))
    assert outcome(ended) == "Committed/Pruned"
    found = trained.verdict(store, ended)
    assert [check.name for check in found.checks if check.passed][:4] == ["masks", "constraints", "bytes", "dead units"]
    assert ended.end is not None
    assert ended.end.masks is not None
    assert ended.end.masks.counts == {"layer": 1}
    masks = Masks.from_bytes(store.get(ended.end.masks.path), name="masks")
    assert np.flatnonzero(masks.pruned(spare)).tolist() == [0]  # type: ignore[arg-type]

    # the trainer takes it: the branch says nothing any more, whatever it is given
    assert trainer.run.sync().masks is not None
    branch = trainer.model.get_submodule(trained.SPARE.removesuffix(".bn2"))
    for member in data.topology.group(spare).members:
        assert not trainer.model.get_parameter(member.parameter).any()
    x = torch.rand(4, 64, 7, 7)
    trainer.model.eval()
    assert torch.equal(branch(x), x)
    assert trained.right(trainer.model, data.evaluation) == found.gates[0].right_candidate

    trainer.publish(refresh=0)
    tip = state(store).tip
    second = cycle(store, settings(), forced=trained.decision({layers[0]: [0]}))
    assert outcome(second) == "RolledBack/ConstraintBroken"
    assert "may give 0 more of its 4 layers (1 are masked, max_layer_removal is 0.25)" in second.end.message  # type: ignore[union-attr]
    assert state(store).tip == tip
