"""The decision: from answers to units, whatever the order of the answers, and every decline with its reason."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from numpy.typing import NDArray

import models
from emrakul.settings import Settings
from emrakul.strategy import evidence
from emrakul.strategy.aggregate import aggregate, primary
from emrakul.strategy.basic import refine_buckets, spend_weights, ties
from emrakul.strategy.decide import Answers, Case, decide, decide_basic, explain, score
from emrakul.strategy.requests import basic_requests, slices_of, structured_requests
from leyline.answers import Answer, result_digest
from leyline.messages import ImportanceStats, Stage, StructuralAnalysisRequest, StructuralAnalysisResponse
from leyline.partial import Parts
from leyline.topology import Kind, Topology

Arrays = dict[str, NDArray[np.generic]]


def case(
    topology: Topology, *, rate: str = "0.1", pruned: dict[str, list[int]] | None = None, **changes: object
) -> Case:
    settings = changes.pop("settings", None) or Settings()
    assert isinstance(settings, Settings)
    given = {
        "cycle": "c3-0123456789",
        "base": 3,
        "checkpoint": models.checkpoint(),
        "topology": topology,
        "inherited": models.masks(topology, pruned or {}),
        "inherited_ref": None,
        "stage": Stage.CONSERVATIVE,
        "rate": Fraction(rate),
        "settings": settings,
        "carry": {},
        "policy_state": "p" * 64,
    }
    return Case(**{**given, **changes})  # type: ignore[arg-type]


def weights(topology: Topology) -> dict[str, NDArray[np.float64]]:
    return {
        name: np.random.default_rng(len(name)).random(p.shape) + 0.5 for name, p in sorted(topology.parameters.items())
    }


def answer(request: StructuralAnalysisRequest, arrays: Arrays) -> Answer:
    message = StructuralAnalysisResponse(
        idempotency_key=request.idempotency_key, request=request.id, result=result_digest(arrays)
    )
    return Answer(f"cycles/{request.cycle}/responses/{request.id}/0-1", message, arrays)


def norms(topology: Topology, request: StructuralAnalysisRequest) -> Arrays:
    """Partial sums of squares of the members that lie along axis 0 or 1 of a matrix."""
    found: Arrays = {}
    for piece in request.slices:
        parameter = topology.parameters[piece.parameter]
        width = parameter.size // parameter.shape[0]
        first, last = piece.start // width, piece.stop // width
        values = weights(topology)[piece.parameter].reshape(parameter.shape[0], width)[first:last] ** 2
        for part in Parts(topology).of(piece):
            member = part.group.members[part.member]
            sums = np.zeros(part.group.units)
            for row in range(first, last):
                if member.axis == 0:
                    if 0 <= (unit := (row - member.start) // member.block) < part.group.units:
                        sums[unit] += values[row - first].sum()
                else:
                    sums += values[row - first].reshape(part.group.units, member.block).sum(axis=1)
            found[part.name("norm", piece)] = sums[part.first : part.first + part.units]
    return found


def answers(
    topology: Topology,
    taylor: Sequence[Sequence[float]],
    *,
    scorer: str = "taylor",
    error: float = 0.0,
    noise: float = 0.0,
    settings: Settings | None = None,
) -> Answers:
    """What workers would say: scores of every group, their halves with `noise`, and norms."""
    wanted = {g.id: np.array(taylor[i], dtype=np.float64) for i, g in enumerate(topology.groups)}
    rng = np.random.default_rng(0)
    made = []
    for request in structured_requests(models.subject(topology, settings)):
        arrays = norms(topology, request)
        for id_ in request.groups:
            values = wanted[id_]
            arrays[f"gate/{id_}/{scorer}"] = values
            arrays[f"gate/{id_}/{scorer}/se"] = np.full(len(values), error)
            for half in ("odd", "even"):
                arrays[f"gate/{id_}/{scorer}/{half}"] = values + noise * rng.standard_normal(len(values))
        made.append((request, answer(request, arrays)))
    return made


def ramp(topology: Topology) -> list[list[float]]:
    return [(np.random.default_rng(i).random(g.units) ** 3 + 1e-3).tolist() for i, g in enumerate(topology.groups)]


WIDE = models.chain([20, 30, 10])


def test_the_lowest_tenth_of_all_channels_goes() -> None:
    scores = ramp(WIDE)
    decision = decide(case(WIDE), answers(WIDE, scores))
    lowest = sorted((s, g, u) for g, row in enumerate(scores) for u, s in enumerate(row))[:6]
    assert {(one.group, unit) for one in decision.groups for unit in one.pruned} == {
        (WIDE.groups[g].id, unit) for _, g, unit in lowest
    }
    (budget,) = decision.budgets
    assert (budget.live, budget.allowed, budget.achieved, budget.bound, budget.carry_out) == (60, 6, 6, "rate", "0")
    assert decision.reliability == {"host/channel": pytest.approx(1.0)}
    assert decision.declined == ""
    assert len(decision.used) == len(structured_requests(models.subject(WIDE)))


def test_the_order_of_the_answers_changes_nothing() -> None:
    given = list(answers(WIDE, ramp(WIDE)))
    expected = decide(case(WIDE), given).canonical()
    for seed in range(5):
        random.Random(seed).shuffle(given)
        assert decide(case(WIDE), given).canonical() == expected


def test_how_fast_and_by_whom_it_was_computed_changes_nothing() -> None:
    quick = Settings(analysis_parallel_workers=7, importance_aggregation_threads=8, checkpoint_analysis_timeout=900)
    scores = ramp(WIDE)
    assert decide(case(WIDE, settings=quick), answers(WIDE, scores)) == decide(case(WIDE), answers(WIDE, scores))


def test_masked_units_take_no_part() -> None:
    scores = ramp(WIDE)
    for unit in (0, 1, 2):
        scores[0][unit] = 0.0
    decision = decide(case(WIDE, pruned={"fc0": [0, 1, 2]}), answers(WIDE, scores))
    gone = {one.group: one.pruned for one in decision.groups}
    assert not set(gone.get("fc0", ())) & {0, 1, 2}
    assert len(gone.get("fc0", ())) <= 1, "of twenty channels four may ever go"
    assert decision.budgets[0].live == 57


def test_domains_and_kinds_have_budgets_and_carries_of_their_own() -> None:
    topology = models.join(
        models.chain([20]), models.chain([20], domain="seed", prefix="seed."), models.attention(6, 12)
    )
    scores = [[0.01] * 4 + [1.0] * 16, [0.01] * 4 + [1.0] * 16, *([[0.01] + [1.0] * 11] * 6)]
    given = answers(topology, scores)
    for request, found in given:
        for id_ in request.groups:
            if id_.startswith("layer"):
                for suffix in ("", "/se", "/odd", "/even"):
                    found.arrays[f"gate/{id_}/michel{suffix}"] = found.arrays[f"gate/{id_}/taylor{suffix}"]  # type: ignore[index]
    made = decide(case(topology, rate="0.04", carry={"host/channel": "1/2", "host/head": "1/8"}), given)
    assert [(b.domain, b.kind.value, b.allowed, b.carry_in, b.carry_out) for b in made.budgets] == [
        ("host", "channel", 1, "1/2", "3/10"),
        ("host", "head", 3, "1/8", "1/200"),
        ("seed", "channel", 0, "0", "4/5"),
    ]
    assert {one.group for one in made.groups} == {"fc0", "layer0", "layer1", "layer2"}


# --- declines ---------------------------------------------------------------------------------------------------------


def test_less_than_a_unit_is_carried() -> None:
    decision = decide(case(WIDE, rate="0.01"), answers(WIDE, ramp(WIDE)))
    assert decision.declined == "BelowOneUnit"
    assert decision.budgets[0].carry_out == "3/5"
    assert "host/channel: 0.01 of 60 units with the carry is 0.6 of one" in decision.message


def test_no_unit_below_the_margin() -> None:
    decision = decide(case(WIDE), answers(WIDE, [np.linspace(0.9, 1.1, g.units).tolist() for g in WIDE.groups]))
    assert decision.declined == "NoUnitBelowMargin"
    assert decision.groups == ()
    uncertain = decide(case(WIDE), answers(WIDE, ramp(WIDE), error=10.0))
    assert uncertain.declined == "NoUnitBelowMargin", "a score that nobody knows prunes nothing"


def test_every_group_at_its_floor() -> None:
    pruned = {"fc0": [0, 1, 2, 3], "fc1": [0, 1, 2, 3, 4, 5], "fc2": [0, 1]}
    decision = decide(case(WIDE, pruned=pruned), answers(WIDE, ramp(WIDE)))
    assert decision.declined == "RetentionReached"
    assert "every one of 48 units is kept by retention" in decision.message


def test_halves_that_disagree_decline() -> None:
    decision = decide(case(WIDE), answers(WIDE, ramp(WIDE), noise=5.0))
    assert decision.declined == "UnreliableImportance"
    assert decision.reliability["host/channel"] < 0.6
    assert (decision.budgets[0].bound, decision.budgets[0].achieved) == ("reliability", 0)


def test_an_unreliable_kind_stands_aside_and_the_others_go_on() -> None:
    topology = models.join(models.chain([20]), models.attention(2, 12))
    given = answers(topology, ramp(topology))
    for request, found in given:
        for id_ in request.groups:
            if id_.startswith("layer"):
                values = np.arange(12.0)
                arrays = {"": values, "/odd": values, "/even": values[::-1], "/se": values * 0}
                for suffix, array in arrays.items():
                    found.arrays[f"gate/{id_}/michel{suffix}"] = array  # type: ignore[index]
    decision = decide(case(topology), given)
    assert [(b.kind.value, b.bound) for b in decision.budgets] == [("channel", "rate"), ("head", "reliability")]
    assert {one.group for one in decision.groups} == {"fc0"}
    assert decision.budgets[1].carry_out == decision.budgets[1].carry_in == "0"


def test_no_score_at_all() -> None:
    decision = decide(case(WIDE), answers(WIDE, ramp(WIDE), scorer="contribution"))
    assert decision.declined == "NoImportance"


# --- which scorer decides --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "chosen", "source", "scorer"),
    [
        (Kind.CHANNEL, (), "tracked", "taylor"),
        (Kind.HEAD, (), "refreshed", "michel"),
        (Kind.LAYER, (), "tracked", "block_influence"),
        (Kind.CHANNEL, (), "forward", "contribution"),
        (Kind.HEAD, (), "forward", "contribution"),
        (Kind.LAYER, (), "forward", "block_influence"),
        (Kind.CHANNEL, ("wanda",), "tracked", "wanda"),
        (Kind.HEAD, ("wanda",), "tracked", "michel"),
        (Kind.LAYER, ("magnitude",), "tracked", "magnitude"),
        (Kind.CHANNEL, ("taylor",), "forward", "contribution"),
        (Kind.CHANNEL, ("fisher", "magnitude"), "forward", "magnitude"),
    ],
)
def test_the_first_scorer_that_suits_decides(kind: Kind, chosen: tuple[str, ...], source: str, scorer: str) -> None:
    settings = Settings.model_validate({"importance": chosen})
    assert primary(kind, settings, source) == scorer  # type: ignore[arg-type]


def test_magnitude_adds_partial_sums_and_is_compared_within_its_group() -> None:
    settings = Settings(importance=("magnitude",))
    given = answers(WIDE, ramp(WIDE), settings=settings)
    scores = score(case(WIDE, settings=settings), given)
    for one in scores:
        raw = np.sqrt(weights(WIDE)[f"{one.group.id}.norm"] ** 2)
        assert one.scorer == "magnitude"
        assert np.allclose(one.score, raw / raw.mean())
        assert np.array_equal(one.upper, one.score)
        assert np.array_equal(one.beside["taylor"], ramp(WIDE)[WIDE.groups.index(one.group)])


def test_wanda_multiplies_the_consumers_columns_by_their_input() -> None:
    settings = Settings(importance=("wanda",))
    given = answers(WIDE, ramp(WIDE), settings=settings)
    inputs = np.arange(1.0, 31.0)
    for request, found in given:
        for id_ in request.groups:
            found.arrays[f"gate/{id_}/input"] = inputs[: WIDE.group(id_).units]  # type: ignore[index]
    one = score(case(WIDE, settings=settings), given)[1]
    raw = np.sqrt((weights(WIDE)["fc2.weight"] ** 2).sum(axis=0)) * inputs
    assert np.allclose(one.score, raw / raw.mean())


def test_fisher_is_compared_as_an_amplitude() -> None:
    settings = Settings(importance=("fisher",))
    given = answers(WIDE, ramp(WIDE), settings=settings)
    for _, found in given:
        for name in [name for name in found.arrays if name.startswith("norm/")]:
            found.arrays[name.replace("norm/", "fisher/", 1)] = found.arrays[name]  # type: ignore[index]
    one = score(case(WIDE, settings=settings), given)[0]
    raw = np.abs(weights(WIDE)["fc0.norm"])
    assert np.allclose(one.score, raw / raw.mean())


def test_an_answer_of_the_wrong_shape_is_refused() -> None:
    given = answers(WIDE, [row[:-1] for row in ramp(WIDE)])
    with pytest.raises(ValueError, match=r"gate/fc0/taylor.* has shape \[19\], its group needs \[20\]"):
        decide(case(WIDE), given)


def test_answers_that_leave_a_hole_are_refused() -> None:
    topology = models.chain([20] * 17)
    given = list(answers(topology, ramp(topology)))
    with pytest.raises(ValueError, match="hole"):
        aggregate(
            topology,
            models.masks(topology, {}),
            [(request, found.arrays) for request, found in given if request.id != "0-3"],
            settings=Settings(),
            source="tracked",
        )


# --- evidence ---------------------------------------------------------------------------------------------------------


def admissible(stats: ImportanceStats | None, settings: Settings | None = None, **changes: object) -> str | None:
    given = {
        "checkpoint": "4000-1-00000000",
        "lineage": ("3000-1-00000000", "2000-1-00000000"),
        "step": 4000,
        "interval": 1000,
        "settings": settings or Settings(),
    }
    finding = evidence.admissible(stats, **{**given, **changes})  # type: ignore[arg-type]
    return None if finding is None else f"{finding.reason}: {finding.message}"


def test_fresh_statistics_of_this_lineage_are_admitted() -> None:
    assert admissible(models.statistics()) is None
    assert admissible(models.statistics(lineage=("3000-1-00000000", "1000-1-11111111"))) is None
    assert admissible(models.statistics(checkpoint="3000-1-00000000", step=3000, last_step=3000)) is None
    assert admissible(models.statistics(last_step=2000)) is None, "exactly two intervals old"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"samples": 999}, "TooFewSamples: the statistics of checkpoint 4000-1-00000000 rest on 999 samples"),
        ({"last_step": 1999}, "ImportanceStale: the statistics of checkpoint 4000-1-00000000 are 2001 steps old"),
        ({"checkpoint": "3000-1-ffffffff"}, "ImportanceForeign: the statistics belong to checkpoint 3000-1-ffffffff"),
        ({"lineage": ("3000-1-ffffffff",)}, "ImportanceForeign: the statistics were gathered over"),
        ({"last_step": 4001}, "ImportanceForeign: the statistics were measured at step 4001"),
    ],
)
def test_statistics_that_cannot_be_used_are_refused(changes: dict[str, object], says: str) -> None:
    assert (admissible(models.statistics(**changes)) or "").startswith(says)


def test_short_intervals_still_allow_two_hundred_steps() -> None:
    assert admissible(models.statistics(last_step=3800), interval=10) is None
    assert (admissible(models.statistics(last_step=3799), interval=10) or "").startswith("ImportanceStale")
    assert (admissible(models.statistics(last_step=3799), interval=None) or "").startswith("ImportanceStale")


def test_without_statistics_only_magnitude_can_decide() -> None:
    assert (admissible(None) or "").startswith("NoImportance")
    assert admissible(None, Settings(importance=("magnitude",))) is None


# --- why --------------------------------------------------------------------------------------------------------------


def test_explain_says_why_each_unit_went_or_stayed() -> None:
    scores = [[0.1, 0.11, 0.12, 0.13, 0.14, *([1.0] * 15)], [0.2, *([1.0] * 29)], [0.45, 0.46, *([1.0] * 8)]]
    this = case(WIDE, pruned={"fc1": [29]})
    given = answers(WIDE, scores)
    decision, found = decide(this, given), score(this, given)
    said = {
        (g, u): explain(this, decision, found, g, u)
        for g, u in [("fc0", 0), ("fc0", 4), ("fc0", 9), ("fc1", 29), ("fc2", 0)]
    }
    assert decision.budgets[0].allowed == 5
    assert "went: taylor 0.1 (upper bound 0.1) is the lowest of 59 live" in said["fc0", 0]
    assert "5th lowest of 59 live, eligible, but min_channel_retention keeps the rest" in said["fc0", 4]
    assert "above the limit 0.5 that safety_margin sets" in said["fc0", 9]
    assert said["fc1", 29] == "channel 29 of fc1 was masked by an earlier cycle."
    assert "7th lowest of 59 live, eligible, but 5 could go and others scored lower" in said["fc2", 0]
    with pytest.raises(KeyError, match="units 0 to 19"):
        explain(this, decision, found, "fc0", 20)
    with pytest.raises(KeyError, match="no group fc9; there are fc0, fc1"):
        explain(this, decision, found, "fc9", 0)
    imported = replace(this, topology=Topology(model_id="m", parameters={}))
    with pytest.raises(KeyError, match="no group fc9: of this checkpoint no groups are known"):
        explain(imported, decision, found, "fc9", 0)


# --- basic ------------------------------------------------------------------------------------------------------------


def test_a_basic_decision_names_the_answers_that_hold_its_masks() -> None:
    topology = models.chain([20, 20])
    subject = models.subject(topology)
    values = {n: np.abs(w).astype(np.float32).ravel() for n, w in weights(topology).items() if w.ndim == 2}
    values["fc1.weight"][:10] = np.float32(1e-3)
    histogram = basic_requests(subject, "histogram")

    def count(requests: Sequence[StructuralAnalysisRequest], keys: dict[str, int] | None) -> Arrays:
        found: Arrays = {}
        for piece in (piece for request in requests for piece in request.slices):
            bits = values[piece.parameter][piece.start : piece.stop].view(np.uint32)
            if keys is not None:
                if piece.key not in keys:
                    continue
                bits = bits[bits >> 16 == keys[piece.key]] & 0xFFFF
            else:
                bits = bits >> 16
            bucket, number = np.unique(bits, return_counts=True)
            found |= {f"{piece.key}/bucket": bucket, f"{piece.key}/count": number}
        return found

    coarse = count(histogram, None)
    slices = slices_of(histogram)
    shares = spend_weights(topology, slices, coarse, rate=Fraction(1, 100), carry={}, settings=Settings())
    buckets = refine_buckets(shares, coarse)
    thresholds = ties(shares, coarse, count(histogram, buckets))
    select = basic_requests(subject, "select", ties=thresholds)
    selected = [
        (
            request,
            answer(request, {f"{s.key}/mask": np.zeros(1, np.uint8) for s in request.slices if s.key in request.ties}),
        )
        for request in select
    ]
    decision = decide_basic(
        case(topology, rate="0.01"), shares, selected, used={"1-0": "x"}, fallback="a scorer failed"
    )
    assert (decision.method, decision.fallback, decision.declined) == ("basic", "a scorer failed", "")
    assert decision.budgets[0].achieved == 5
    assert {w.slice.parameter for w in decision.weights} == {"fc1.weight"}
    assert decision == decide_basic(
        case(topology, rate="0.01"), shares, selected[::-1], used={"1-0": "x"}, fallback="a scorer failed"
    )


def test_a_basic_round_that_may_take_nothing_declines() -> None:
    topology = models.chain([4])
    histogram = basic_requests(models.subject(topology), "histogram")
    one = {}
    for request in histogram:
        for piece in request.slices:
            one |= {
                f"{piece.key}/bucket": np.array([5], np.uint32),
                f"{piece.key}/count": np.array([piece.stop - piece.start]),
            }
    shares = spend_weights(topology, slices_of(histogram), one, rate=Fraction(1, 100), carry={}, settings=Settings())
    decision = decide_basic(case(topology), shares, [], used={})
    assert decision.declined == "BelowOneUnit"


def test_a_kind_that_the_settings_leave_out_stays_and_its_carry_waits() -> None:
    topology = models.join(models.chain([20]), models.attention(2, 12))
    only = Settings.from_yaml("structured_pruning: {kinds: [channel]}")
    given = answers(topology, ramp(topology), scorer="contribution", settings=only)
    asked = case(
        topology,
        settings=only,
        checkpoint=models.checkpoint(stats=models.statistics(source="forward")),
        carry={"host/head": "3/4"},
    )
    decision = decide(asked, given)
    assert {budget.kind for budget in decision.budgets} == {Kind.CHANNEL}
    assert decision.groups and all(one.group.startswith("fc") for one in decision.groups)
    assert explain(asked, decision, score(asked, given), "layer0", 0).endswith("kinds leaves out heads.")
    everything = decide(case(topology, checkpoint=models.checkpoint(stats=models.statistics(source="forward"))), given)
    assert {budget.kind for budget in everything.budgets} == {Kind.CHANNEL, Kind.HEAD}


def test_a_model_without_the_kinds_that_may_go_says_so() -> None:
    heads = Settings.from_yaml("structured_pruning: {kinds: [head]}")
    decision = decide(case(WIDE, settings=heads), answers(WIDE, ramp(WIDE), settings=heads))
    assert decision.declined == "NoImportance"
    assert "structured_pruning.kinds allows (head)" in decision.message
