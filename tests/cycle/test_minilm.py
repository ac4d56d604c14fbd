"""A real transformer, untrained by us: MiniLM's heads and MLP channels, judged by retrieving docstrings.

Six layers of 12 heads, so 1 % of the heads is 0.72 of one: the carry decides when one goes.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch

from leyline.local import LocalStore
from leyline.log import Log
from leyline.messages import Decision, GroupDecision, Stage
from leyline.ready import read_ready
from leyline.tensors import unpack
from leyline.topology import Kind

sys.path.append(str(Path(__file__).parents[2] / "examples"))

from minilm import cycle, manifest
from minilm_docstrings import docstrings
from minilm_publish import Minilm, open_minilm
from minilm_retrieval import POOL, evaluation_of

MB = 1_000_000
MODEL_BYTES = 91 * MB
CHANCE = 1 / POOL


@pytest.fixture(scope="module")
def minilm(tmp_path_factory: pytest.TempPathFactory) -> Minilm:
    torch.set_num_threads(1)
    return open_minilm(tmp_path_factory.mktemp("minilm") / "run")


def test_every_head_channel_and_branch_is_found_and_the_residual_stream_declined(minilm: Minilm) -> None:
    topology = minilm.topology
    units = {kind: sum(g.units for g in topology.groups if g.kind is kind) for kind in Kind}
    assert units == {Kind.HEAD: 72, Kind.CHANNEL: 9216, Kind.LAYER: 12, Kind.WEIGHT: 0}
    stream = next(d for d in topology.declined if d.name == "encoder.layer.0.attention.output.dense")
    assert "LayerNorm over the masked axis" in stream.reason


def test_a_pool_that_is_not_whole_is_refused() -> None:
    with pytest.raises(ValueError, match="no whole pools of 200"):
        evaluation_of(docstrings(2000)[:150])


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_cycles_of_heads_and_channels(minilm: Minilm) -> None:
    first = minilm.publish(0)
    run = Run(minilm.folder)
    check_statistics(run, first.record.id)

    # 0.72 of a head: nothing, and it is kept
    below = run.cycle("head")
    assert (below["outcome"], below["reason"]) == ("NothingToPrune", "BelowOneUnit")
    assert run.carry == {"host/head": Fraction(18, 25)}

    # a layer keeps two heads whoever decides; and two are too few for the gate
    heads = [group.id for group in minilm.topology.groups if group.kind is Kind.HEAD]
    one_left = run.cycle(forced=removing({heads[0]: range(11)}))
    assert (one_left["outcome"], one_left["reason"]) == ("RolledBack", "ConstraintBroken")
    assert "min_attention_heads is 2" in one_left["message"]
    two_left = run.cycle(forced=removing({id_: range(10) for id_ in heads}))
    assert (two_left["outcome"], two_left["reason"]) == ("RolledBack", "AccuracyDrop")
    assert run.tip == first.record.n and run.carry == {"host/head": Fraction(18, 25)}

    # 0.72 + 0.72: one head, and with it one channel in a hundred
    done = run.cycle()
    assert done["outcome"] == "Committed", done["message"]
    budgets = {budget["kind"]: budget for budget in done["budgets"]}
    assert [budgets[kind]["achieved"] for kind in ("channel", "head", "layer")] == [92, 1, 0]
    assert run.carry == {
        "host/channel": Fraction(4, 25), "host/head": Fraction(11, 25), "host/layer": Fraction(3, 25)
    }  # fmt: skip
    assert done["accuracy_base"] > 50 * CHANCE
    assert done["accuracy_candidate"] > done["accuracy_base"] - 0.02
    check_memory(done["peaks"])

    # the next checkpoint carries the masks in its weights, and the next cycle goes on with the carry
    second = minilm.take_masks(1)
    assert read_ready(run.store, second.record.id, trust=None).baked is not None
    check_zero(minilm)
    again = run.cycle("head")
    assert again["outcome"] == "Committed", again["message"]
    assert (again["budgets"][0]["live"], again["budgets"][0]["achieved"]) == (71, 1)
    assert run.carry["host/head"] == Fraction(3, 20)
    assert run.carry["host/channel"] == Fraction(4, 25), "the kind that stood aside keeps its own"
    assert again["counts"] == {"channel": 92, "head": 2}


class Run:
    """The run, and cycles on its newest checkpoint as a person would start them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.store = folder, LocalStore(folder)

    def cycle(self, kind: str | None = None, *, forced: Decision | None = None) -> dict[str, Any]:
        # the other tests take their share of the cores
        text = manifest(self.folder, kind=kind).replace("validationTimeout: 300", "validationTimeout: 900")
        found, peaks = cycle(self.folder, text, forced=forced)
        return {**found, "peaks": peaks}

    @property
    def carry(self) -> Mapping[str, Fraction]:
        return {key: Fraction(value) for key, value in Log(self.store).tail().state.carry.items()}

    @property
    def tip(self) -> int | None:
        return Log(self.store).tail().state.tip


def removing(groups: Mapping[str, range]) -> Decision:
    return Decision(
        cycle="-", base=0, checkpoint="-", stage=Stage.CONSERVATIVE, method="forced", policy_state="", settings="",
        groups=tuple(GroupDecision(group=id_, pruned=tuple(units)) for id_, units in groups.items()),
    )  # fmt: skip


def check_statistics(run: Run, name: str) -> None:
    """Forward passes over 1,000 sentences, no optimizer, and an evaluation of 1,000 queries."""
    metadata = read_ready(run.store, name, trust=None)
    assert metadata.statistics is not None and metadata.evaluation is not None
    assert (metadata.statistics.source, metadata.statistics.samples) == ("forward", 1000)
    assert metadata.optimizer is None
    data = f"checkpoints/{name}/{metadata.evaluation.data}"
    assert unpack(run.store.get(data), name=data)[0]["target"].shape == (1000,)


def check_memory(peaks: Mapping[str, int]) -> None:
    assert set(peaks) == {"elesh", "kasmina.apply", "urabrask"}
    assert peaks["elesh"] < 256 * MB
    assert peaks["kasmina.apply"] < 256 * MB
    assert peaks["urabrask"] < MODEL_BYTES + 1000 * MB


def check_zero(minilm: Minilm) -> None:
    """One head and 92 channels are zero in the live model."""
    weights = minilm.model.state_dict()
    zero = {Kind.HEAD: 0, Kind.CHANNEL: 0}
    for group in minilm.topology.groups:
        if group.kind in zero:
            for member in (member for member in group.members if member.parameter.endswith("dense.weight")):
                if member.role == "consumer":
                    columns = weights[member.parameter].reshape(-1, group.units, member.block)
                    zero[group.kind] += int((columns == 0).all(2).all(0).sum())
    assert zero == {Kind.HEAD: 1, Kind.CHANNEL: 92}
