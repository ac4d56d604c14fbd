"""Masks must fit the model, be what was decided, and keep the hard constraints: one refusal each."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pytest

from builders import masks_of, toy_topology
from leyline import tensors
from leyline.masks import Masks
from leyline.messages import Decision, GroupDecision, PruningValidationRequest, Slice, Stage, WeightDecision
from leyline.model import Malformed
from leyline.topology import Group, Kind, Member, Parameter, Topology
from urabrask.constraints import broken
from urabrask.decided import differences, expected, misfits

TOPOLOGY = toy_topology(width=10)


def request(**limits: float) -> PruningValidationRequest:
    asked = {
        "min_channel_retention": 0.7,
        "min_attention_heads": 2,
        "max_layer_removal": 0.25,
        "accuracy_drop": 0.02,
        "cumulative_drop": 0.04,
        **limits,
    }
    return PruningValidationRequest(
        idempotency_key="k", cycle="c", base=0, checkpoint="100-0-00000000", candidate="0" * 64, **asked
    )


def decision(pruned: Mapping[str, Sequence[int]], weights: tuple[WeightDecision, ...] = ()) -> Decision:
    return Decision(
        cycle="c",
        base=0,
        checkpoint="100-0-00000000",
        stage=Stage.CONSERVATIVE,
        method="forced",
        policy_state="0" * 64,
        settings="0" * 64,
        groups=tuple(GroupDecision(group=id_, pruned=tuple(units)) for id_, units in pruned.items()),
        weights=weights,
    )


def layers(count: int) -> Topology:
    """A model of `count` residual branches."""
    parameters, groups = {}, []
    for index in range(count):
        name = f"layer{index}.weight"
        parameters[name] = Parameter(uuid=name, shape=(4, 4))
        member = Member(parameter=name, role="producer", axis=0, block=4)
        groups.append(Group(id=f"layer{index}", kind=Kind.LAYER, units=1, members=(member,), gates=(f"layer{index}",)))
    return Topology(model_id="toy", parameters=parameters, groups=tuple(groups))


# --- constraints ------------------------------------------------------------------------------------------------------


def test_three_of_ten_channels_may_go_at_seven_tenths_and_four_may_not() -> None:
    assert not list(broken(masks_of(TOPOLOGY, {"conv1": [0, 1, 2]}), TOPOLOGY, request()))
    (fault,) = broken(masks_of(TOPOLOGY, {"conv1": [0, 1, 2, 3]}), TOPOLOGY, request())
    assert fault == "group conv1 keeps 6 of its 10 channels, min_channel_retention 0.7 asks for 7"


def test_heads_keep_their_minimum() -> None:
    assert not list(broken(masks_of(TOPOLOGY, {"attn": [0, 1]}), TOPOLOGY, request()))
    (fault,) = broken(masks_of(TOPOLOGY, {"attn": [0, 1, 2]}), TOPOLOGY, request())
    assert fault == "group attn keeps 1 of its 4 heads, min_attention_heads asks for 2"


def test_a_unit_of_two_query_heads_counts_as_two() -> None:
    heads = TOPOLOGY.group("attn").model_copy(update={"heads_per_unit": 2})
    masks = masks_of(TOPOLOGY.model_copy(update={"groups": (heads,)}), {"attn": [0, 1, 2]})
    assert not list(broken(masks, TOPOLOGY, request()))
    assert "keeps 2 of its 8 heads" in next(broken(masks, TOPOLOGY, request(min_attention_heads=3)))


@pytest.mark.parametrize(("count", "allowed"), [(4, 1), (7, 1), (8, 2)])
def test_a_quarter_of_the_layers_may_go(count: int, allowed: int) -> None:
    topology = layers(count)
    gone = {f"layer{index}": [0] for index in range(allowed)}
    assert not list(broken(masks_of(topology, gone), topology, request()))
    (fault,) = broken(masks_of(topology, {**gone, f"layer{allowed}": [0]}), topology, request())
    assert f"{allowed + 1} of {count} layers are removed" in fault
    assert f"max_layer_removal 0.25 allows {allowed}" in fault


def test_single_weights_keep_their_share_of_each_parameter() -> None:
    active = np.ones(160, np.bool_)
    active[:48] = False
    parameters = {"embed.weight": TOPOLOGY.parameters["embed.weight"]}
    masks = Masks(model_id="toy", parameters=parameters, weights={"embed.weight": active})
    assert not list(broken(masks, TOPOLOGY, request()))
    active[48] = False
    assert list(broken(masks, TOPOLOGY, request())) == [
        "parameter embed.weight keeps 111 of its 160 weights, min_channel_retention 0.7 asks for 112"
    ]


# --- the masks fit the model ------------------------------------------------------------------------------------------


def test_masks_of_the_topology_fit() -> None:
    assert not list(misfits(masks_of(TOPOLOGY, {"conv1": [1], "attn": [0]}), TOPOLOGY))


def spoiled(update: Mapping[str, object], *, parameter: str) -> Masks:
    masks = masks_of(TOPOLOGY, {"conv1": [1]})
    changed = masks.parameters[parameter].model_copy(update=update)
    return replace(masks, parameters={**masks.parameters, parameter: changed})


def test_another_uuid_does_not_fit() -> None:
    (fault,) = misfits(spoiled({"uuid": "alien"}, parameter="fc.weight"), TOPOLOGY)
    assert "under UUID alien" in fault


def test_another_shape_does_not_fit() -> None:
    assert "with shape [16, 11]" in next(misfits(spoiled({"shape": (16, 11)}, parameter="fc.weight"), TOPOLOGY))


def test_a_parameter_of_another_domain_does_not_fit() -> None:
    faults = list(misfits(spoiled({"domain": "seed1"}, parameter="fc.weight"), TOPOLOGY))
    assert "group conv1 of domain host masks fc.weight of domain seed1" in faults


def test_an_unknown_parameter_and_group_do_not_fit() -> None:
    small = Topology(model_id="toy", parameters={"scale": TOPOLOGY.parameters["scale"]})
    faults = " ".join(misfits(masks_of(TOPOLOGY, {"conv1": [1]}), small))
    assert "name fc.weight, which the model does not have" in faults
    assert "name group conv1, which the topology does not have" in faults


def test_a_group_with_other_members_does_not_fit() -> None:
    group = TOPOLOGY.group("conv1")
    less = TOPOLOGY.model_copy(update={"groups": (group.model_copy(update={"members": group.members[:-1]}),)})
    assert "with other members" in next(misfits(masks_of(less, {"conv1": [1]}), TOPOLOGY))


def test_masks_of_another_model_do_not_fit() -> None:
    assert "of model other" in next(misfits(replace(masks_of(TOPOLOGY, {"conv1": [1]}), model_id="other"), TOPOLOGY))


# --- inherited and decided --------------------------------------------------------------------------------------------


def test_inherited_and_decided_units_are_what_is_expected() -> None:
    inherited = masks_of(TOPOLOGY, {"conv1": [1]})
    wanted = expected(decision({"conv1": [2], "attn": [3]}), inherited, TOPOLOGY, {})
    assert not list(differences(masks_of(TOPOLOGY, {"conv1": [1, 2], "attn": [3]}), wanted))


@pytest.mark.parametrize(
    ("found", "fault"),
    [
        ({"conv1": [1, 2, 4], "attn": [3]}, "the masks prune 4 of group conv1, which nobody decided"),
        ({"conv1": [1, 2]}, "the masks leave 3 of group attn active, which the decision or the base prunes"),
        ({"conv1": [2], "attn": [3]}, "the masks leave 1 of group conv1 active"),
    ],
)
def test_any_other_mask_is_refused(found: dict[str, list[int]], fault: str) -> None:
    inherited = masks_of(TOPOLOGY, {"conv1": [1]})
    wanted = expected(decision({"conv1": [2], "attn": [3]}), inherited, TOPOLOGY, {})
    assert fault in next(differences(masks_of(TOPOLOGY, found), wanted))


def test_single_weights_come_from_the_answers_that_the_decision_names() -> None:
    active = np.ones(80, np.bool_)
    active[[3, 79]] = False
    piece = Slice(parameter="embed.weight", start=80, stop=160)
    data = tensors.pack({f"{piece.key}/mask": np.packbits(active, bitorder="little")}, {})
    chosen = decision({}, (WeightDecision(slice=piece, answer="answer", result="r"),))
    wanted = expected(chosen, None, TOPOLOGY, {"answer": data})
    assert np.flatnonzero(~wanted.weights["embed.weight"]).tolist() == [83, 159]
    empty = Masks(model_id="toy")
    assert "leave 83, 159 of parameter embed.weight active" in next(differences(empty, wanted))
    with pytest.raises(Malformed, match="no mask of 80 bits"):
        expected(chosen, None, TOPOLOGY, {"answer": tensors.pack({}, {})})


@pytest.mark.parametrize("pruned", [{"alien": [0]}, {"conv1": [10]}, {"conv1": [-1]}])
def test_a_decision_about_what_the_model_lacks_is_malformed(pruned: dict[str, list[int]]) -> None:
    with pytest.raises(Malformed, match="the decision prunes"):
        expected(decision(pruned), None, TOPOLOGY, {})
