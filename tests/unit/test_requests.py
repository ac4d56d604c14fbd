"""Requests: cut by topology alone, bounded, complete, and keyed by what determines the answer."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import models
from emrakul.settings import Settings
from emrakul.strategy import requests
from emrakul.strategy.requests import (
    MAX_PARAMETERS,
    basic_requests,
    cut,
    prunable_parameters,
    slices_of,
    structured_requests,
)
from leyline.messages import MaskRef, Tie
from leyline.topology import Declined, Kind, Parameter


def covered(pieces: list[tuple[requests.Slice, ...]], parameters: dict[str, Parameter]) -> bool:
    """Every weight of every parameter in exactly one slice, in order."""
    position = dict.fromkeys(parameters, 0)
    for piece in pieces:
        for part in piece:
            if part.start != position[part.parameter] or part.stop <= part.start:
                return False
            position[part.parameter] = part.stop
    return position == {name: p.size for name, p in parameters.items()}


def test_a_small_model_makes_at_least_sixteen_requests_where_there_are_sixteen_groups() -> None:
    made = structured_requests(models.subject(models.chain([8] * 17)))
    assert len(made) >= 16
    assert [request.id for request in made] == [f"0-{index}" for index in range(len(made))]


def test_a_model_of_few_groups_makes_few_requests() -> None:
    assert 1 <= len(structured_requests(models.subject(models.chain([8, 8])))) <= 4


def test_every_gate_is_scored_once_and_every_parameter_of_a_group_is_sliced_once() -> None:
    topology = models.join(models.chain([8, 12, 20]), models.attention(3, 4))
    made = structured_requests(models.subject(topology))
    assert sorted(g for request in made for g in request.groups) == sorted(g.id for g in topology.groups)
    assert covered([request.slices for request in made], topology.parameters)


def test_a_large_model_has_no_request_above_five_million() -> None:
    parameters = {f"w{i:02}": models.parameter(f"w{i:02}", 4096, 4096) for i in range(6)}
    pieces = cut(parameters, at_least=16)
    assert max(sum(s.stop - s.start for s in piece) for piece in pieces) <= MAX_PARAMETERS
    assert covered(pieces, parameters)


def test_a_row_longer_than_a_request_stands_alone() -> None:
    parameters = {"wide": models.parameter("wide", 2, MAX_PARAMETERS + 1)}
    assert [len(piece) for piece in cut(parameters, at_least=1)] == [1, 1]


shapes = st.lists(st.lists(st.integers(1, 30), max_size=3), min_size=1, max_size=8)


@settings(deadline=None)
@given(shapes, st.integers(1, 20))
def test_slices_are_whole_rows_and_cover_everything_once(shapes: list[list[int]], at_least: int) -> None:
    parameters = {f"p{i}": models.parameter(f"p{i}", *shape) for i, shape in enumerate(shapes)}
    pieces = cut(parameters, at_least=at_least)
    assert len(pieces) >= at_least
    assert covered(pieces, parameters)
    for piece in pieces:
        for part in piece:
            parameter = parameters[part.parameter]
            width = parameter.size // (parameter.shape[0] if parameter.shape else 1)
            assert part.start % width == 0
            assert part.stop % width == 0
    assert cut(dict(reversed(parameters.items())), at_least=at_least) == pieces


def test_the_key_covers_what_determines_the_answer_and_nothing_else() -> None:
    topology = models.chain([8, 8])
    base = models.subject(topology)
    key = structured_requests(base)[0].idempotency_key
    other = type(base)(**{**vars(base), "cycle": "c9-9999999999"})
    assert structured_requests(other)[0].idempotency_key == key
    faster = models.subject(topology, Settings(analysis_parallel_workers=9))
    assert structured_requests(faster)[0].idempotency_key == key

    masked = type(base)(**{**vars(base), "inherited": MaskRef(path="m", digest="d")})
    different = [
        structured_requests(models.subject(topology, weights=b"trained on"))[0],
        structured_requests(models.subject(topology, Settings(importance=("magnitude",))))[0],
        structured_requests(masked)[0],
        structured_requests(base)[1],
        basic_requests(base, "histogram")[0],
    ]
    assert len({key, *(request.idempotency_key for request in different)}) == 6


def test_basic_pruning_leaves_norms_embeddings_and_tied_weights_alone() -> None:
    topology = models.join(models.chain([8]))
    extra = {
        "embed.weight": models.parameter("embed.weight", 50, 8),
        "transformer.wte.weight": models.parameter("transformer.wte.weight", 50, 8),
        "head.weight": models.parameter("head.weight", 50, 8, aliases=("tied.weight",)),
        "odd.weight": models.parameter("odd.weight", 50, 8),
        "bias": models.parameter("bias", 8),
        "wetter.weight": models.parameter("wetter.weight", 3, 3),
        "member.weight": models.parameter("member.weight", 3, 3),
        "tokens.fc.weight": models.parameter("tokens.fc.weight", 3, 3),
        **{
            name: models.parameter(name, 3, 3)
            for name in (
                "tok_emb.weight", "shared.weight", "cls_token", "mask_token", "relative_position_bias_table",
                "fc.weight_scale", "fc.weight_scale_inv", "fc.scales", "fc.zero_point", "attn.causal_mask",
            )
        },
        "h.0.attn.bias": models.parameter("h.0.attn.bias", 1, 1, 8, 8),
    }  # fmt: skip
    declined = (Declined(name="odd.weight", kind=Kind.WEIGHT, reason="an embedding"),)
    topology = topology.model_copy(update={"parameters": topology.parameters | extra, "declined": declined})
    kept = {"fc0.weight", "fc1.weight", "wetter.weight", "member.weight", "tokens.fc.weight"}
    assert set(prunable_parameters(topology)) == kept


def test_the_three_basic_rounds_cut_the_same_slices_and_carry_their_thresholds() -> None:
    subject = models.subject(models.chain([8, 8, 8]))
    histogram = basic_requests(subject, "histogram")
    keys = [s.key for request in histogram for s in request.slices]
    refine = basic_requests(subject, "refine", buckets={keys[0]: 7})
    select = basic_requests(subject, "select", ties={keys[1]: Tie(below=9, equal=1)})
    assert slices_of(histogram) == slices_of(refine) == slices_of(select)
    assert [b for request in refine for b in request.buckets.items()] == [(keys[0], 7)]
    assert [t for request in select for t in request.ties.items()] == [(keys[1], Tie(below=9, equal=1))]
    assert [r[0].id for r in (histogram, refine, select)] == ["1-0", "2-0", "3-0"]


@pytest.mark.parametrize("method", ["histogram", "refine", "select"])
def test_a_model_without_matrices_makes_no_basic_request(method: str) -> None:
    topology = models.chain([8])
    only = {name: p for name, p in topology.parameters.items() if len(p.shape) == 1}
    topology = topology.model_copy(update={"parameters": only, "groups": ()})
    assert basic_requests(models.subject(topology), method) == ()  # type: ignore[arg-type]
