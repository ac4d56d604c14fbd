"""What is exact: the threshold is a full sort's for every dtype and number of workers, scores are float64's to 1e-5."""

from __future__ import annotations

import os
import uuid
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import builders
from builders import MODEL_ID, Run, Tensor
from elesh.worker import Analysis
from emrakul.settings import Settings
from emrakul.strategy.requests import prunable_parameters
from kasmina.formats import elements
from leyline import tensors
from leyline.ids import parameter_uuid
from leyline.local import LocalStore
from leyline.messages import ImportanceStats, Requests, Slice, StructuralAnalysisRequest
from leyline.partial import add_up, fisher, magnitude, wanda
from leyline.tensors import ITEMSIZE
from leyline.topology import Parameter, Topology
from whole import SINGLE_WEIGHTS, committed, cycle, gone, masks_of_cycle, publish

QUICK = (Phase.explicit, Phase.reuse, Phase.generate)
"""An example is a whole cycle: to make a failing one smaller would take minutes."""
FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
SHAPES = {"a.weight": (7, 9), "b.weight": (1, 40), "c.weight": (12, 2, 3), "d.bias": (11,), "e.weight": (5, 5)}


def topology() -> Topology:
    """No groups: single weights only. The bias is no matrix, so it stays."""
    named = {n: Parameter(uuid=parameter_uuid(n, s, MODEL_ID), shape=s) for n, s in SHAPES.items()}
    return Topology(model_id=MODEL_ID, parameters=named)


def patterns(dtype: str, size: int, levels: int, random: np.random.Generator) -> bytes:
    """`size` finite numbers of any bits at all, of at most `levels` different ones: few make ties."""
    known = random.integers(0, 256, (levels, ITEMSIZE[dtype]), dtype=np.uint8)
    known[~np.isfinite(elements(known.tobytes(), dtype))] = 0
    return known[random.integers(0, levels, size)].tobytes()


def mostly_large(dtype: str, size: int, levels: int, random: np.random.Generator) -> Tensor:
    """The same for two weights in five, below 1; the others are 2, so that the margin lets the small ones go."""
    two = {"F64": 0x4000_0000_0000_0000, "F32": 0x4000_0000, "F16": 0x4000, "BF16": 0x4000, "F8_E4M3": 0x40}
    whole = np.frombuffer(patterns(dtype, size, levels, random), f"<u{ITEMSIZE[dtype]}").copy()
    whole[~(np.abs(elements(whole.tobytes(), dtype)) < 1)] = 0
    whole[random.random(size) < 0.6] = two.get(dtype, 0x40)
    return Tensor(dtype, (size,), whole.tobytes())


def scores(one: Tensor) -> NDArray[np.float32]:
    """|w| as float32, which keys are made of: a float64 is rounded to it."""
    largest = np.finfo(np.float32).max
    return np.minimum(np.abs(elements(one.raw, one.dtype).astype(np.float64)), largest).astype(np.float32)


def by_sorting(run: Run, k: int) -> dict[str, NDArray[np.bool_]]:
    """One stable sort of all prunable weights by score, ties by UUID and place; a parameter at its cap is skipped."""
    prunable = prunable_parameters(run.topology)
    names = sorted(prunable, key=lambda name: prunable[name].uuid)
    owner = np.repeat(np.arange(len(names)), [prunable[name].size for name in names])
    place = np.concatenate([np.arange(prunable[name].size) for name in names])
    order = np.argsort(np.concatenate([scores(run.weights[name]) for name in names]), kind="stable")
    left = [prunable[name].size - -(-prunable[name].size * 8 // 10) for name in names]
    pruned = {name: np.zeros(prunable[name].size, dtype=np.bool_) for name in names}
    for at in order:
        if k and left[owner[at]]:
            pruned[names[owner[at]]][place[at]] = True
            left[owner[at]] -= 1
            k -= 1
    assert k == 0
    return pruned


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], phases=QUICK)
@given(
    dtypes=st.lists(st.sampled_from(FLOATS), min_size=len(SHAPES), max_size=len(SHAPES)),
    workers=st.integers(1, 5),
    levels=st.sampled_from([1, 2, 7, 1000]),
    seed=st.integers(0, 2**31),
)
def test_the_threshold_is_a_full_sorts_for_every_dtype_and_number_of_workers(
    tmp_path: Path, dtypes: list[str], workers: int, levels: int, seed: int
) -> None:
    random = np.random.default_rng(seed)
    weights = {
        name: replace(mostly_large(dtype, int(np.prod(shape)), levels, random), shape=shape)
        for (name, shape), dtype in zip(SHAPES.items(), dtypes, strict=True)
    }
    store = LocalStore(tmp_path / uuid.uuid4().hex)
    with pytest.MonkeyPatch.context() as quick:
        quick.setattr(os, "fsync", lambda _file: None)  # a thousand small objects, and nobody pulls the plug
        run = publish(store, topology=topology(), weights=weights)
        ended = cycle(store, Settings.from_yaml(SINGLE_WEIGHTS), workers=workers)
    committed(ended)
    assert ended.decision is not None
    (budget,) = ended.decision.budgets
    assert 20 <= budget.achieved <= 30, "15 % of the 200 weights that may go, or what the caps leave"
    expected = by_sorting(run, budget.achieved)
    found = gone(masks_of_cycle(store, ended), run.topology)
    for name, bits in expected.items():
        assert np.array_equal(found.get(name, np.zeros(bits.size, np.bool_)), bits), name
    assert found.keys() <= expected.keys()


def importance_of(run: Run, squares: dict[str, NDArray[np.float32]], inputs: NDArray[np.float64]) -> bytes:
    """Diagonal Fisher of every weight, and the inputs of the convolution's consumers."""
    known = {"idempotency_key": "i", "run_id": builders.RUN_ID, "checkpoint": run.metadata.name, "step": 100}
    known |= {"source": "tracked", "samples": 1000, "sampled_steps": 10, "groups": ("conv1",)}
    stats = ImportanceStats.model_validate(known)
    arrays = {f"weight/{name}": values for name, values in squares.items()} | {"conv1/in": inputs}
    return tensors.pack(arrays, {"importance": stats.canonical().decode()})


@pytest.mark.parametrize("dtype", FLOATS)
def test_scores_of_every_dtype_are_those_of_plain_float64(tmp_path: Path, dtype: str) -> None:
    random = np.random.default_rng(5)
    known = builders.toy_topology()
    weights = {
        name: Tensor(dtype, p.shape, patterns(dtype, p.size, 1000, random)) for name, p in known.parameters.items()
    }
    if dtype == "F64":  # a square must be one too
        weights = {n: builders.tensor(random.normal(size=one.shape), dtype) for n, one in weights.items()}
    squares = {name: random.random(p.shape, dtype=np.float32) for name, p in known.parameters.items()}
    inputs = random.random(8)
    draft = builders.make_run(LocalStore(tmp_path / "draft"), topology=known, weights=weights)
    importance = importance_of(draft, squares, inputs)
    run = builders.make_run(LocalStore(tmp_path / "run"), topology=known, weights=weights, importance=importance)
    pieces = tuple(Slice(parameter=name, start=0, stop=p.size) for name, p in known.parameters.items())
    request = StructuralAnalysisRequest(
        idempotency_key="key",
        id="0-0",
        cycle="c1-0123456789",
        method="structured",
        checkpoint=run.metadata.name,
        groups=("conv1",),
        slices=pieces,
        importance=("fisher", "wanda", "magnitude"),
    )
    analysis = Analysis(run.store, Requests(requests=(request,)))
    message, arrays = analysis.answer(request)
    analysis.scoring.close()
    assert message.status == "answered", message.message
    norms, fishers = (add_up(known, [(piece, arrays) for piece in pieces], kind) for kind in ("norm", "fisher"))

    exact = {n: elements(one.raw, dtype).astype(np.float64).reshape(one.shape) for n, one in weights.items()}
    half = {n: exact[n] ** 2 * squares[n].astype(np.float64) / 2 for n in exact}
    conv, attn = known.groups
    heads = {n: exact[f"attn.{n}.weight"].reshape(4, -1) for n in "qkv"}
    want = {
        "norm's magnitude": (magnitude(conv, norms), np.hypot(exact["norm1.weight"], exact["norm1.bias"])),
        "heads' magnitude": (magnitude(attn, norms), np.sqrt(sum((w**2).sum(1) for w in heads.values()))),
        "norm's fisher": (fisher(conv, fishers), half["norm1.weight"] + half["norm1.bias"]),
        "heads' fisher": (
            fisher(attn, fishers), sum(half[f"attn.{n}.weight"].reshape(4, -1).sum(1) for n in "qkv")),
        "wanda": (
            wanda(conv, norms, arrays["gate/conv1/input"]),
            np.linalg.norm(exact["fc.weight"], axis=0) * np.sqrt(inputs)),
    }  # fmt: skip
    for name, (found, expected) in want.items():
        np.testing.assert_allclose(found, expected, rtol=1e-5, err_msg=name)
        assert (expected > 0).any(), name
