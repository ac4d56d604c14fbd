"""Analysis workers on small real checkpoints: what they answer, whoever computes it, and what they refuse."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import uuid
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from builders import RUN_ID, Run, make_run, masks_of, safetensors, tensor, toy_topology, toy_weights, write_masks
from elesh.__main__ import main
from elesh.reading import read_ahead
from elesh.worker import Analysis, run
from kasmina.formats import elements
from leyline import answers, exits, layout, tensors
from leyline.crypt import DataKey, KeyRing, encrypt, sealed_size
from leyline.digest import digest_bytes
from leyline.ids import parameter_uuid
from leyline.local import LocalStore
from leyline.masks import Masks
from leyline.messages import (
    ImportanceStats,
    MaskRef,
    Requests,
    Slice,
    StructuralAnalysisRequest,
    StructuralAnalysisResponse,
    Tie,
    WorkLimits,
)
from leyline.partial import add_up, magnitude
from leyline.sketch import cells_of, seeds
from leyline.topology import Group, Kind, Member, Parameter, Topology

CYCLE = "c1-0123456789"
LIMITS = WorkLimits(beat_seconds=0.2)
Arrays = Mapping[str, NDArray]


def slices(topology: Topology, rows: int) -> list[Slice]:
    """Every parameter in slices of this many rows."""
    found = []
    for name, parameter in topology.parameters.items():
        width = parameter.size // (parameter.shape[0] if parameter.shape else 1)
        bounds = range(0, parameter.size, rows * width)
        found += [Slice(parameter=name, start=a, stop=min(a + rows * width, parameter.size)) for a in bounds]
    return found


def request(run_: Run, number: int, **content: object) -> StructuralAnalysisRequest:
    known = {
        "method": "structured",
        "checkpoint": run_.metadata.name,
        "cycle": CYCLE,
        "importance": ("taylor", "michel"),
    }
    known |= {"id": f"0-{number}", "idempotency_key": f"key-{number}"}
    return StructuralAnalysisRequest.model_validate(known | content)


def statistics(topology: Topology, seed: int = 3) -> dict[str, NDArray[np.float64]]:
    """Gate sums of 100 samples in each half for every group."""
    random = np.random.default_rng(seed)
    arrays = {}
    for group in topology.groups:
        for half in ("odd", "even"):
            q = random.normal(size=(100, group.units))
            arrays |= {f"{group.id}/{half}/abs": np.abs(q).sum(0), f"{group.id}/{half}/sq": (q**2).sum(0)}
            arrays[f"{group.id}/{half}/n"] = np.array([100.0, 100.0])
        arrays[f"{group.id}/in"] = random.random(group.units)
        if group.kind is Kind.HEAD:
            outputs = random.normal(size=(group.units, 50))
            arrays[f"{group.id}/gram"] = outputs @ outputs.T
    return arrays


ARRAYS = statistics(toy_topology())


def importance_file(topology: Topology, arrays: Arrays, **changes: object) -> bytes:
    known = {"idempotency_key": "i", "run_id": RUN_ID, "checkpoint": "100-0-00000064", "step": 100, "samples": 200}
    known |= {"source": "tracked", "sampled_steps": 10, "groups": tuple(group.id for group in topology.groups)}
    stats = ImportanceStats.model_validate(known | changes)
    return tensors.pack(arrays, {"importance": stats.canonical().decode()})


def answered(run_: Run, wanted: StructuralAnalysisRequest, limits: WorkLimits = LIMITS, scale: float = 1.0, **keys):
    analysis = Analysis(run_.store, Requests(requests=(wanted,), limits=limits), **keys)
    try:
        return analysis.answer(wanted, scale)
    finally:
        analysis.scoring.close()


def toy_run(path: Path, **changes: object) -> Run:
    topology = toy_topology()
    content = {"topology": topology, "importance": importance_file(topology, statistics(topology))} | changes
    return make_run(LocalStore(path), **content)


def write_requests(run_: Run, requests: Sequence[StructuralAnalysisRequest], limits: WorkLimits = LIMITS) -> None:
    content = Requests(requests=tuple(requests), limits=limits)
    run_.store.put_if_absent(layout.requests(CYCLE, 0), content.canonical())


def work(run_: Run, worker: int = 0, of: int = 1) -> int:
    return run(run_.store, cycle=CYCLE, round_=0, worker=worker, of=of, launch=0, log=print)


def value(run_: Run, name: str) -> NDArray[np.float32]:
    stored = run_.weights[name]
    return np.frombuffer(stored.raw, dtype="<f4").reshape(stored.shape)


# --- structured -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "shards"), [("F32", 1), ("BF16", 1), ("F64", 3), ("F16", 1)])
def test_partial_sums_add_up_to_the_groups_norms(tmp_path: Path, dtype: str, shards: int) -> None:
    run_ = toy_run(tmp_path, dtype=dtype, shards=shards)
    pieces = slices(run_.topology, 3)
    message, arrays = answered(run_, request(run_, 0, slices=pieces, groups=("conv1", "attn")))
    assert (message.status, message.message) == ("answered", "")
    sums = add_up(run_.topology, [(piece, arrays) for piece in pieces])
    plain = Analysis(run_.store, Requests(requests=(request(run_, 0),)))
    refs = plain.weights.refs
    for group in run_.topology.groups:
        for index, member in enumerate(group.members):
            raw = run_.weights[member.parameter].raw
            w = elements(raw, refs[member.parameter].dtype).astype(np.float64)
            squares = w.reshape(run_.topology.parameters[member.parameter].shape) ** 2
            moved = np.moveaxis(squares, member.axis, 0).reshape(group.units, -1)
            np.testing.assert_allclose(sums[group.id, index], moved.sum(1), rtol=1e-12)
        assert (magnitude(group, sums) > 0).all()


def test_grouped_transposed_and_partly_used_parameters(tmp_path: Path) -> None:
    shapes = {"grouped": (6, 4, 3), "transposed": (5, 8, 2), "fused": (30, 4), "c": (8,)}
    parameters = {n: Parameter(uuid=parameter_uuid(n, s, "toy"), shape=s) for n, s in shapes.items()}
    group = Group(
        id="g",
        kind=Kind.CHANNEL,
        units=8,
        gates=("x",),
        members=(
            Member(parameter="transposed", role="producer", axis=1),
            Member(parameter="c", role="norm", axis=0),
            Member(parameter="grouped", role="consumer", axis=1, groups=2),
            Member(parameter="fused", role="producer", axis=0, start=5, block=3),
        ),
    )
    topology = Topology(model_id="toy", parameters=parameters, groups=(group,))
    random = np.random.default_rng(0)
    weights = {n: tensor(random.normal(size=s), "F32") for n, s in shapes.items()}
    run_ = make_run(LocalStore(tmp_path), topology=topology, weights=weights)
    for rows in (1, 2, 4, 100):
        pieces = slices(topology, rows)
        message, arrays = answered(run_, request(run_, 0, slices=pieces, importance=("magnitude",)))
        assert message.status == "answered"
        assert sum(name.startswith("norm/") for name in arrays) == len(arrays)
        sums = add_up(topology, [(piece, arrays) for piece in pieces])
        squares = {n: value(run_, n).astype(np.float64) ** 2 for n in shapes}
        np.testing.assert_allclose(sums["g", 0], squares["transposed"].sum((0, 2)))
        np.testing.assert_allclose(sums["g", 1], squares["c"])
        np.testing.assert_allclose(sums["g", 2], squares["grouped"].reshape(2, 3, 4, 3).sum((1, 3)).reshape(8))
        np.testing.assert_allclose(sums["g", 3], squares["fused"][5:29].reshape(8, 12).sum(1))


def test_gate_scores_come_with_errors_halves_inputs_and_similarity(tmp_path: Path) -> None:
    run_ = toy_run(tmp_path)
    wanted = request(run_, 0, groups=("conv1", "attn"), importance=("taylor", "michel", "wanda", "block_influence"))
    message, arrays = answered(run_, wanted)
    assert message.status == "answered"
    stats = statistics(run_.topology)
    total = stats["conv1/odd/abs"] + stats["conv1/even/abs"]
    np.testing.assert_allclose(arrays["gate/conv1/taylor"], total / 200)
    np.testing.assert_allclose(arrays["gate/conv1/taylor/odd"], stats["conv1/odd/abs"] / 100)
    np.testing.assert_allclose(arrays["gate/conv1/input"], np.sqrt(stats["conv1/in"]))
    assert np.linalg.norm(arrays["gate/attn/michel"]) == pytest.approx(1)
    assert arrays["gate/attn/redundancy"].shape == (4, 4)
    suited = {"gate/conv1/taylor", "gate/conv1/input", "gate/attn/michel", "gate/attn/input", "gate/attn/redundancy"}
    halves = {f"gate/{name}/{end}" for name in ("conv1/taylor", "attn/michel") for end in ("se", "odd", "even")}
    assert set(arrays) == suited | halves


def test_fisher_of_every_weight_is_summed_beside_the_norms(tmp_path: Path) -> None:
    topology = toy_topology()
    random = np.random.default_rng(8)
    known = {f"weight/{n}": random.random(p.shape) for n, p in topology.parameters.items()}
    run_ = make_run(
        LocalStore(tmp_path), topology=topology, importance=importance_file(topology, statistics(topology) | known)
    )
    pieces = slices(topology, 5)
    message, arrays = answered(run_, request(run_, 0, slices=pieces, importance=("fisher",)))
    assert message.status == "answered"
    sums = add_up(topology, [(piece, arrays) for piece in pieces], "fisher")
    w, f = value(run_, "norm1.weight").astype(np.float64), known["weight/norm1.weight"]
    np.testing.assert_allclose(sums["conv1", 2], w**2 * f / 2)
    _, keyed = answered(run_, request(run_, 1, method="histogram", slices=pieces, importance=("taylor", "fisher")))
    w, f = value(run_, "fc.weight").astype(np.float64), known["weight/fc.weight"]
    keys = (w**2 * f / 2).astype(np.float32).reshape(-1).view(np.uint32) >> 16
    expected = np.unique(keys[: 5 * 8], return_counts=True)
    assert keyed["fc.weight@0/bucket"].tolist() == expected[0].tolist()
    assert keyed["fc.weight@0/count"].tolist() == expected[1].tolist()
    _, plain = answered(run_, request(run_, 2, method="histogram", slices=pieces, importance=("magnitude", "fisher")))
    assert plain["fc.weight@0/bucket"].tolist() != keyed["fc.weight@0/bucket"].tolist()


def test_a_sketched_fisher_is_estimated_and_can_only_be_too_high(tmp_path: Path) -> None:
    topology = toy_topology()
    random = np.random.default_rng(8)
    true = random.random((16, 8)).astype(np.float32)
    table = np.zeros((3, 64), dtype=np.float32)
    for row, seed in enumerate(seeds(topology.parameters["fc.weight"].uuid, 3)):
        np.maximum.at(table[row], cells_of(np.arange(128), seed, 64), true.reshape(-1))
    known = {f"weight/{n}": np.ones(p.shape, np.float32) for n, p in topology.parameters.items()}
    known["weight/fc.weight"] = table
    said = {"sketch": "count-min v1"}
    run_ = toy_run(tmp_path / "a", importance=importance_file(topology, ARRAYS | known, **said))
    pieces = slices(topology, 5)
    message, arrays = answered(run_, request(run_, 0, slices=pieces, importance=("fisher",)))
    assert message.status == "answered"
    found = add_up(topology, [(piece, arrays) for piece in pieces], "fisher")["conv1", 4]
    squares = value(run_, "fc.weight").astype(np.float64) ** 2
    assert (found >= (squares * true / 2).sum(0)).all()
    assert (found < (squares * true.max() / 2).sum(0)).all()
    known["weight/fc.weight"] = table[:, :63]
    run_ = toy_run(tmp_path / "b", importance=importance_file(topology, ARRAYS | known, **said))
    message, _ = answered(run_, request(run_, 0, slices=pieces, importance=("fisher",)))
    assert (message.status, message.reason) == ("importance", "ImportanceCorrupt")
    assert "nor a sketch" in message.message


# --- nobody's hardware shows in an answer -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """11 M weights over three chunks, rows that are cut and rows that are not."""
    shapes = {"a": (1500, 3000), "b": (3, 1_300_000), "c": (2500, 1000)}
    parameters = {n: Parameter(uuid=parameter_uuid(n, s, "toy"), shape=s) for n, s in shapes.items()}
    members = (
        Member(parameter="a", role="producer", axis=1, block=3),
        Member(parameter="c", role="consumer", axis=1),
        Member(parameter="b", role="consumer", axis=1, block=1300),
    )
    group = Group(id="g", kind=Kind.CHANNEL, units=1000, members=members, gates=("x",))
    topology = Topology(model_id="toy", parameters=parameters, groups=(group,))
    random = np.random.default_rng(0)
    weights = {n: tensor(random.standard_normal(s, dtype=np.float32), "F32") for n, s in shapes.items()}
    return make_run(LocalStore(tmp_path_factory.mktemp("large")), topology=topology, weights=weights)


def test_threads_and_buffers_leave_no_trace(large: Run) -> None:
    pieces = slices(large.topology, 1200)
    wanted = request(large, 0, slices=pieces, importance=("magnitude",))
    basic = request(large, 1, method="histogram", slices=pieces)
    found = set()
    for threads, memory, scale in (
        (1, 2_000_000_000, 1.0),
        (2, 2_000_000_000, 0.5),
        (5, 1, 1.0),
        (3, 256_000_000, 0.25),
    ):
        limits = WorkLimits(threads=threads, memory_bytes=memory)
        for one in (wanted, basic):
            message, arrays = answered(large, one, limits, scale)
            assert message.status == "answered"
            found.add((one.id, answers.result_digest(arrays)))
    assert len(found) == 2


def test_dead_attempts_and_small_limits_read_less_ahead() -> None:
    assert [read_ahead(2_000_000_000, scale) for scale in (1.0, 0.5, 0.25)] == [2, 2, 2]
    assert [read_ahead(256_000_000, scale) for scale in (1.0, 0.5, 0.25)] == [2, 0, 0]
    assert [read_ahead(256_000_000, 1.0, held) for held in (0, 1, 2, 3, 4)] == [2, 2, 1, 0, 0]
    assert read_ahead(1, 1.0) == 0


def test_a_chunk_that_requests_share_is_read_once(large: Run) -> None:
    pieces = slices(large.topology, 700)
    wanted = [request(large, i, slices=(piece,), importance=("magnitude",)) for i, piece in enumerate(pieces)]
    analysis = Analysis(large.store, Requests(requests=tuple(wanted), limits=LIMITS))
    found = [analysis.answer(one) for one in wanted]
    analysis.scoring.close()
    read = sum(message.bytes_read for message, _ in found)
    assert 0 <= read - large.metadata.num_bytes < 300_000, "all of it once, and what is read of it for its header"
    assert sum(message.parameters for message, _ in found) == large.metadata.num_params
    sums = add_up(large.topology, [(piece, arrays) for piece, (_, arrays) in zip(pieces, found, strict=True)])
    for index, (name, shape) in enumerate({"a": (1500, 1000, 3), "c": (2500, 1000, 1), "b": (3, 1000, 1300)}.items()):
        squares = value(large, name).reshape(shape).astype(np.float64) ** 2
        np.testing.assert_allclose(sums["g", index], squares.sum((0, 2)), rtol=1e-12)


def test_one_two_and_three_workers_answer_the_same(tmp_path: Path) -> None:
    results = {}
    for of in (1, 2, 3):
        run_ = toy_run(tmp_path / str(of))
        pieces = slices(run_.topology, 4)
        wanted = [request(run_, i, slices=pieces[i::5], groups=("conv1",) if i == 2 else ()) for i in range(5)]
        write_requests(run_, wanted)
        with ThreadPoolExecutor(of) as pool:
            codes = list(pool.map(work, [run_] * of, range(of), [of] * of))
        assert codes == [exits.DONE] * of
        found = [answers.majority(answers.read(run_.store, CYCLE, one)[0], 1).answer for one in wanted]
        results[of] = [one.message.result for one in found if one]
        assert len(results[of]) == 5
    assert results[1] == results[2] == results[3]


def test_a_worker_that_lies_is_outvoted(tmp_path: Path) -> None:
    run_ = toy_run(tmp_path)
    wanted = request(run_, 0, groups=("conv1",))
    write_requests(run_, [wanted], LIMITS.model_copy(update={"replicas": 3}))
    truth = answered(run_, wanted)[1]
    lie = {name: array[::-1].copy() for name, array in truth.items()}
    message = StructuralAnalysisResponse(idempotency_key=wanted.idempotency_key, request=wanted.id, worker=1, attempt=0)
    run_.store.put_if_absent(f"{layout.attempts(CYCLE, wanted.id)}0", b"1 liar")
    run_.store.put_if_absent(answers.path(CYCLE, wanted.id, 1, 0), answers.pack(message, lie))
    assert work(run_, 0, 3) == exits.DONE
    assert answers.majority(answers.read(run_.store, CYCLE, wanted)[0], 3).answer is None
    assert work(run_, 2, 3) == exits.DONE
    found, refused = answers.read(run_.store, CYCLE, wanted)
    assert not refused
    verdict = answers.majority(found, 3)
    assert verdict.dissenters == (1,)
    assert verdict.answer is not None
    assert verdict.answer.message.result == answers.result_digest(truth)


# --- basic pruning ----------------------------------------------------------------------------------------------------


def reduce_to_ties(run_: Run, pieces: Sequence[Slice], k: int, inherited: MaskRef | None) -> dict[str, Tie]:
    """A reference reducer: the exact threshold of the k lowest live weights from histogram and refinement."""
    same = {"slices": tuple(pieces), "inherited": inherited, "importance": ("magnitude",)}
    _, upper = answered(run_, request(run_, 0, method="histogram", **same))
    high, less = _find(upper, pieces, k, 0)
    _, lower = answered(run_, request(run_, 1, method="refine", buckets={p.key: high for p in pieces}, **same))
    low, less = _find(lower, pieces, k, less)
    below, ties = (high << 16) | low, {}
    for piece in pieces:
        at = lower[f"{piece.key}/bucket"].tolist()
        have = int(lower[f"{piece.key}/count"][at.index(low)]) if low in at else 0
        take = min(have, k - less)
        less += take
        ties[piece.key] = Tie(below=below, equal=take)
    return ties


def _find(arrays: Arrays, pieces: Sequence[Slice], k: int, less: int) -> tuple[int, int]:
    """(bucket in which the k-th lies, how many lie before it)."""
    total = np.zeros(2**16, dtype=np.int64)
    for piece in pieces:
        total[arrays[f"{piece.key}/bucket"]] += arrays[f"{piece.key}/count"]
    bucket = int(np.searchsorted(np.cumsum(total) + less, k))
    return bucket, less + int(total[:bucket].sum())


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), rows=st.integers(1, 9), levels=st.integers(1, 40))
def test_two_passes_find_what_a_full_sort_finds(tmp_path: Path, data: st.DataObject, rows: int, levels: int) -> None:
    random = np.random.default_rng(data.draw(st.integers(0, 10**6)))
    topology = toy_topology()
    weights = {
        name: tensor(random.integers(-levels, levels + 1, size=p.shape) / 7, "F32")
        for name, p in topology.parameters.items()
    }
    store = LocalStore(tmp_path / uuid.uuid4().hex)
    run_ = make_run(store, topology=topology, weights=weights)
    masks = masks_of(topology, {"conv1": random.choice(8, 2, replace=False)})
    inherited = write_masks(store, "cycles/c0-0/masks", masks)
    pieces = slices(topology, rows)
    flat = np.concatenate([np.abs(value(run_, name)).reshape(-1) for name in topology.parameters])
    dead = np.concatenate([_dead(masks, name, p) for name, p in topology.parameters.items()])
    live = np.flatnonzero(~dead)
    k = data.draw(st.integers(1, len(live)))
    expected = live[np.argsort(flat[live], kind="stable")[:k]]
    ties = reduce_to_ties(run_, pieces, k, inherited)
    _, masked = answered(run_, request(run_, 2, method="select", slices=pieces, ties=ties, inherited=inherited))
    bits = [
        np.unpackbits(masked[f"{p.key}/mask"], count=p.stop - p.start, bitorder="little").astype(bool) for p in pieces
    ]
    assert np.flatnonzero(~np.concatenate(bits)).tolist() == sorted(expected.tolist())


def _dead(masks: Masks, name: str, parameter: Parameter) -> NDArray[np.bool_]:
    found = masks.dead(name)
    return found.range(0, parameter.size) if found else np.zeros(parameter.size, dtype=bool)


def test_a_slice_without_a_tie_loses_nothing(tmp_path: Path) -> None:
    run_ = toy_run(tmp_path)
    piece = Slice(parameter="fc.weight", start=0, stop=24)
    message, arrays = answered(run_, request(run_, 0, method="select", slices=(piece,)))
    assert message.bytes_read < 20_000, "topology and header"
    assert np.unpackbits(arrays["fc.weight@0/mask"])[:24].all()


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("method", ["structured", "histogram", "select"])
def test_a_weight_that_is_not_finite_is_refused_by_name(tmp_path: Path, method: str, bad: float) -> None:
    topology = toy_topology()
    weights = toy_weights(topology)
    values = np.frombuffer(weights["fc.weight"].raw, "<f4").copy()
    values[77] = bad
    weights["fc.weight"] = tensor(values.reshape(16, 8), "F32")
    run_ = make_run(LocalStore(tmp_path), topology=topology, weights=weights)
    pieces = slices(topology, 4)
    ties = {piece.key: Tie(below=1) for piece in pieces}
    write_requests(run_, [request(run_, 0, method=method, slices=pieces, ties=ties, importance=("magnitude",))])
    assert work(run_) == exits.BAD_INPUT
    ((found,), _) = answers.read(run_.store, CYCLE, request(run_, 0))
    assert (found.message.status, found.message.reason) == ("invalid", "InvalidInput")
    assert f"fc.weight holds {bad} at element 77" in found.message.message
    assert not found.arrays


def test_weights_without_a_group_are_looked_at_too(tmp_path: Path) -> None:
    topology = toy_topology()
    weights = toy_weights(topology) | {"fc.bias": tensor(np.full(16, np.nan), "F32")}
    run_ = make_run(LocalStore(tmp_path), topology=topology, weights=weights)
    message, _ = answered(run_, request(run_, 0, slices=slices(topology, 4), importance=("magnitude",)))
    assert "fc.bias holds nan at element 0" in message.message


def broken(run_: Run, path: str, data: bytes) -> Run:
    """The run with one object exchanged behind its back."""
    (Path(run_.store.uri.removeprefix("file://")) / run_.prefix / path).write_bytes(data)
    return run_


def test_damaged_missing_and_lying_weights_are_invalid_in_every_answer(tmp_path: Path) -> None:
    weights = toy_weights(toy_topology())
    good = safetensors(weights)
    flipped = good[:-1] + bytes([good[-1] ^ 1])
    for number, (data, said) in enumerate(
        {flipped: "chunk 0", good[:-3]: "READY.json says", b"": "READY.json"}.items()
    ):
        run_ = broken(toy_run(tmp_path / str(number)), "model.safetensors", data)
        pieces = (Slice(parameter="scale", start=0, stop=1),)
        message, _ = answered(run_, request(run_, 0, slices=pieces, importance=("magnitude",)))
        assert message.status == "invalid"
        assert said in message.message
    run_ = make_run(LocalStore(tmp_path / "shape"), weights={**weights, "fc.weight": tensor(np.ones((8, 16)), "F32")})
    assert "the topology says [16, 8]" in answered(run_, request(run_, 0))[0].message
    run_ = make_run(LocalStore(tmp_path / "dtype"), weights={**weights, "fc.weight": tensor(np.ones((16, 8)), "I64")})
    wanted = request(run_, 0, slices=(Slice(parameter="fc.weight", start=0, stop=8),), importance=("magnitude",))
    assert "dtype I64" in answered(run_, wanted)[0].message


def test_the_mask_file_must_be_the_one_that_is_named(tmp_path: Path) -> None:
    run_ = toy_run(tmp_path)
    ref = write_masks(run_.store, "cycles/c0-0/masks", masks_of(run_.topology, {"conv1": [1]}))
    other = ref.model_copy(update={"digest": "0" * 64})
    assert "not the mask file" in answered(run_, request(run_, 0, inherited=other))[0].message
    foreign = Masks("another", {}, {}, {}, {})
    other = write_masks(run_.store, "cycles/c0-0/foreign", foreign)
    assert "masks of model another" in answered(run_, request(run_, 0, inherited=other))[0].message


@pytest.mark.parametrize(
    ("arrays", "changes", "reason", "said"),
    [
        (ARRAYS, {"checkpoint": "7-0-00000000"}, "ImportanceForeign", "checkpoint 7-0-00000000"),
        (ARRAYS, {"run_id": "another"}, "ImportanceForeign", "run another"),
        (ARRAYS, {"groups": ("conv1", "ghost")}, "ImportanceForeign", "group ghost"),
        ({**ARRAYS, "conv1/odd/abs": np.full(8, np.nan)}, {}, "ImportanceCorrupt", "conv1/odd/abs"),
        ({**ARRAYS, "conv1/odd/sq": np.full(8, -1.0)}, {}, "ImportanceCorrupt", "no count"),
        ({**ARRAYS, "conv1/even/abs": np.ones(7)}, {}, "ImportanceCorrupt", "expected is F64 [8]"),
        ({**ARRAYS, "conv1/even/abs": np.ones(8, np.float32)}, {}, "ImportanceCorrupt", "F32 [8]"),
        ({**ARRAYS, "attn/gram": np.ones((3, 3))}, {}, "ImportanceCorrupt", "attn/gram"),
        ({**ARRAYS, "attn/cos": np.array([9.0, 3.0])}, {}, "ImportanceCorrupt", "9.0"),
    ],
)
def test_statistics_that_are_foreign_or_corrupt(
    tmp_path: Path, arrays: Arrays, changes: dict[str, object], reason: str, said: str
) -> None:
    topology = toy_topology()
    run_ = toy_run(tmp_path, importance=importance_file(topology, arrays, **changes))
    message, found = answered(run_, request(run_, 0, groups=("conv1", "attn")))
    assert (message.status, message.reason) == ("importance", reason)
    assert said in message.message
    assert not found


def test_statistics_that_cannot_be_read_or_are_missing(tmp_path: Path) -> None:
    whole = importance_file(toy_topology(), ARRAYS)
    for number, data in enumerate((whole[:-8], whole[:-8] + b"\0" * 8, tensors.pack(ARRAYS, {}))):
        run_ = toy_run(tmp_path / str(number))
        run_ = broken(run_, "importance.safetensors", data) if number < 2 else toy_run(tmp_path / "x", importance=data)
        message, _ = answered(run_, request(run_, 0, groups=("conv1",)))
        assert (message.status, message.reason) == ("importance", "ImportanceCorrupt")
    run_ = make_run(LocalStore(tmp_path / "none"))
    message, _ = answered(run_, request(run_, 0, groups=("conv1",)))
    assert (message.status, message.reason) == ("importance", "NoImportance")
    message, _ = answered(run_, request(run_, 0, slices=slices(run_.topology, 4), importance=("magnitude",)))
    assert message.status == "answered"


@pytest.mark.parametrize("bad", [-1.0, np.nan])
def test_a_fisher_that_is_no_mean_of_squares_is_the_statistics_fault(tmp_path: Path, bad: float) -> None:
    topology = toy_topology()
    known = {f"weight/{n}": np.ones(p.shape) for n, p in topology.parameters.items()}
    known["weight/fc.weight"][3, 3] = bad
    run_ = toy_run(tmp_path, importance=importance_file(topology, ARRAYS | known))
    for method in ("structured", "histogram"):
        wanted = request(run_, 0, method=method, slices=slices(topology, 4), importance=("fisher",))
        message, _ = answered(run_, wanted)
        assert (message.status, message.reason) == ("importance", "ImportanceCorrupt")
        assert "weight/fc.weight" in message.message


def test_encrypted_statistics_open_with_the_key_and_only_with_it(tmp_path: Path) -> None:
    plain = importance_file(toy_topology(), ARRAYS)
    ring = KeyRing(DataKey(b"k" * 32))
    key = layout.checkpoint("100-0-00000064", "importance.safetensors")
    digest = digest_bytes(plain)
    sealed = b"".join(encrypt([plain], digest=digest, key=key, checkpoint="100-0-00000064", ring=ring))
    assert len(sealed) == sealed_size(len(plain))
    run_ = toy_run(tmp_path, importance=sealed)
    wanted = request(run_, 0, groups=("conv1",))
    _, open_ = answered(toy_run(tmp_path / "open"), wanted)
    _, found = answered(run_, wanted, ring=ring)
    assert answers.result_digest(found) == answers.result_digest(open_)
    write_requests(run_, [wanted])
    command = ["--cycle", f"{tmp_path}/cycles/{CYCLE}"]
    assert main(command) == exits.STORE
    broken(run_, "importance.safetensors", sealed[:-1] + bytes([sealed[-1] ^ 1]))
    assert answered(run_, wanted, ring=ring)[0].reason == "ImportanceCorrupt"


def test_a_scorer_that_is_not_known_fails_with_the_names_that_are(tmp_path: Path) -> None:
    run_ = toy_run(tmp_path)
    message, _ = answered(run_, request(run_, 0, groups=("conv1",), importance=("taylor", "karma")))
    assert message.status == "failed"
    assert "karma is no scorer; known are block_influence" in message.message


# --- the command ------------------------------------------------------------------------------------------------------


def elesh(uri: str, *more: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "elesh", "--cycle", f"{uri}/cycles/{CYCLE}", *more],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_the_command_answers_and_leaves_its_start_mark(tmp_path: Path) -> None:
    run_ = toy_run(tmp_path)
    wanted = request(run_, 0, slices=slices(run_.topology, 4), groups=("conv1", "attn"))
    write_requests(run_, [wanted])
    done = elesh(run_.store.uri, "--launch", "3", "--worker", "1", "--of", "2")
    assert done.returncode == exits.DONE, done.stderr
    run_.store.head(layout.started(CYCLE, "analyse", 3))
    ((found,), _) = answers.read(run_.store, CYCLE, wanted)
    assert (found.message.worker, found.message.status) == (1, "answered")
    assert found.message.peak_rss > 10_000_000
    assert elesh(run_.store.uri).returncode == exits.DONE
    assert len(answers.read(run_.store, CYCLE, wanted)[0]) == 1


def test_the_worker_never_loads_torch() -> None:
    script = (
        "import sys, elesh.__main__; print(sorted(m for m in sys.modules if m.split('.')[0] in ('torch', 'boto3')))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


def test_exit_codes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_ = toy_run(tmp_path)
    command = ["--cycle", f"{tmp_path}/cycles/{CYCLE}"]
    assert main(command) == exits.BAD_INPUT
    assert "requests-0.json does not exist" in capsys.readouterr().err
    write_requests(run_, [request(run_, 0)])
    for n in range(3):
        run_.store.put_if_absent(f"{layout.attempts(CYCLE, '0-0')}{n}", b"7 dead")
    path = tmp_path / "cycles" / CYCLE / "attempts" / "0-0"
    for attempt in path.iterdir():
        os.utime(attempt, (1e9, 1e9))
    os.utime(tmp_path / layout.started(CYCLE, "analyse", 0), (9e8, 9e8))  # they died in this very launch
    assert main(command) == exits.GAVE_UP
    assert "gave up: request 0-0 has 3 dead attempts" in capsys.readouterr().err
    assert main(["--cycle", f"ftp://x/cycles/{CYCLE}"]) == exits.STORE
    for wrong in (["--cycle", str(tmp_path)], [*command, "--worker", "2", "--of", "2"]):
        with pytest.raises(SystemExit) as raised:
            main(wrong)
        assert raised.value.code == 2


def test_requests_of_two_checkpoints_and_no_requests(tmp_path: Path) -> None:
    run_ = toy_run(tmp_path)
    wanted = [request(run_, 0), request(run_, 1, checkpoint="200-0-00000000")]
    analysis = Analysis(run_.store, Requests(requests=tuple(wanted)))
    assert "speak of 2 checkpoints" in analysis.answer(wanted[0])[0].message
    analysis.scoring.close()
    write_requests(run_, [])
    assert work(run_) == exits.DONE
    assert json.loads(run_.store.get(layout.requests(CYCLE, 0)))["requests"] == []


@pytest.mark.slow
def test_a_hundred_million_parameters_in_a_quarter_of_a_gigabyte(tmp_path: Path) -> None:
    """One worker, every weight, structured and basic, with a memory limit of 256 MB."""
    shapes = {f"layer{i}.weight": (5000, 2000) for i in range(10)}
    parameters = {n: Parameter(uuid=parameter_uuid(n, s, "toy"), shape=s) for n, s in shapes.items()}
    members = tuple(Member(parameter=n, role="producer" if i % 2 else "consumer", axis=1) for i, n in enumerate(shapes))
    group = Group(id="g", kind=Kind.CHANNEL, units=2000, members=members, gates=("x",))
    topology = Topology(model_id="toy", parameters=parameters, groups=(group,))
    block = tensor(np.random.default_rng(0).standard_normal((5000, 2000), dtype=np.float32), "F32")
    run_ = make_run(LocalStore(tmp_path), topology=topology, weights=dict.fromkeys(shapes, block))
    pieces = [Slice(parameter=n, start=a, stop=a + 5_000_000) for n in shapes for a in (0, 5_000_000)]
    structured = [request(run_, i, slices=(p,), importance=("magnitude",)) for i, p in enumerate(pieces)]
    basic = [
        request(
            run_, i + 20, method=method, slices=(pieces[3 * i],), importance=("magnitude",), ties=ties, buckets=buckets
        )
        for i, (method, ties, buckets) in enumerate(
            [
                ("histogram", {}, {}),
                ("refine", {}, {pieces[3].key: 0x3E80}),
                ("select", {pieces[6].key: Tie(below=0x3E800000)}, {}),
            ]
        )
    ]
    write_requests(run_, [*structured, *basic], WorkLimits(memory_bytes=256_000_000))
    done = elesh(run_.store.uri)
    assert done.returncode == exits.DONE, done.stderr
    found = [answers.read(run_.store, CYCLE, one)[0][0] for one in (*structured, *basic)]
    assert all(one.message.status == "answered" for one in found)
    assert max(one.message.peak_rss for one in found) <= 256_000_000
    sums = add_up(topology, [(piece, one.arrays) for piece, one in zip(pieces, found, strict=False)])
    expected = (np.frombuffer(block.raw, "<f4").astype(np.float64) ** 2).reshape(5000, 2000).sum(0)
    for index in range(10):
        np.testing.assert_allclose(sums["g", index], expected, rtol=1e-5)
