"""The candidate: the base with everything zero that is pruned and nothing else changed, whoever wrote it."""

from __future__ import annotations

import json
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import builders
from kasmina import apply
from kasmina.rewrite import Extent, _zero
from leyline import exits, layout, tensors
from leyline.answers import result_digest
from leyline.digest import Digester, digest_bytes, sha256_hex
from leyline.envelope import generate_key
from leyline.local import LocalStore
from leyline.masks import Dead, Masks
from leyline.messages import Candidate, MaskRef, Slice, WeightDecision, WorkLimits
from leyline.store import CHUNK, ObjectStore
from leyline.tensors import parse_header
from leyline.topology import Parameter, Topology

CYCLE = "c1-0123456789"
BASE = 1
PRUNED = {"conv1": (1, 6), "attn": (2,)}


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "run")


def command(store: ObjectStore, *, worker: int, of: int, launch: int = 0) -> list[str]:
    cycle = f"{store.uri}/cycles/{CYCLE}"
    place = ["--cycle", cycle, "--base", str(BASE), "--worker", str(worker), "--of", str(of), "--launch", str(launch)]
    return [sys.executable, "-m", "kasmina.apply", *place]


def run_workers(store: ObjectStore, of: int) -> list[int]:
    workers = [subprocess.Popen(command(store, worker=i, of=of)) for i in range(of)]
    return [worker.wait(timeout=60) for worker in workers]


def run_here(store: ObjectStore) -> int:
    return apply.main(command(store, worker=0, of=1)[3:])


def candidate_of(store: ObjectStore) -> dict[str, bytes]:
    folder = layout.candidate(CYCLE, BASE)
    return {head.key.removeprefix(folder): store.get(head.key) for head in store.list(folder)}


def split(data: bytes) -> dict[str, bytes]:
    """Raw bytes by tensor name, and the header under ""."""
    entries, _ = parse_header(data, len(data), name="test")
    first = min(entry.start for entry in entries.values())
    return {"": data[:first], **{name: data[entry.start : entry.stop] for name, entry in entries.items()}}


def expected_raw(one: builders.Tensor, dead: Dead | None) -> bytes:
    """The oracle: a boolean index over the whole tensor."""
    if dead is None:
        return one.raw
    itemsize = len(one.raw) // max(1, int(np.prod(one.shape)))
    values = np.frombuffer(bytearray(one.raw), dtype=f"u{itemsize}").reshape(one.shape)
    values[dead.full()] = 0
    return values.tobytes()


def test_the_candidate_is_the_base_with_zeroes(store: LocalStore) -> None:
    slots = builders.toy_slots(builders.toy_topology())
    run = builders.make_run(store, slots=slots)
    update = builders.decide(run, PRUNED)
    assert run_here(store) == exits.DONE
    masks = builders.masks_of(run.topology, PRUNED)
    written = candidate_of(store)
    assert sorted(written) == ["MANIFEST.json", "masks.safetensors", "model.safetensors", "optimizer.safetensors"]
    assert written["masks.safetensors"] == masks.to_bytes()
    weights, base = split(written["model.safetensors"]), split(store.get(run.prefix + "model.safetensors"))
    assert weights[""] == base[""]
    for name, one in run.weights.items():
        assert weights[name] == expected_raw(one, masks.dead(name)), name
    moments = split(written["optimizer.safetensors"])
    for name, one in run.slots.items():
        owner, slot = name.rsplit("/", 1)
        assert moments[name] == (one.raw if slot == "step" else expected_raw(one, masks.dead(owner))), name
    conv = np.frombuffer(weights["conv1.weight"], "<f4").reshape(8, -1)
    assert [bool(row.any()) for row in conv] == [True, False, True, True, True, True, False, True]
    manifest = Candidate.parse(written["MANIFEST.json"], name="manifest")
    assert manifest.decision == update.decision
    assert manifest.masks == MaskRef(
        path=layout.masks(CYCLE, BASE), digest=sha256_hex(masks.to_bytes()), counts={"channel": 2, "head": 1}
    )
    assert {o.path: o.digest for o in manifest.objects} == {
        path: digest_bytes(written[path]) for path in ("model.safetensors", "optimizer.safetensors")
    }
    # rows of conv1, its bias, norm; columns of fc; rows of q, k, v; columns of out
    assert manifest.weights_zeroed == 2 * (27 + 1 + 2 + 16) + 4 * 16 * 4
    assert store.get(layout.started(CYCLE, "apply", 0)) == b"started"


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16", "F64"])
def test_every_byte_outside_the_masks_stays_whatever_it_means(store: LocalStore, dtype: str) -> None:
    weights = builders.toy_weights(builders.toy_topology(), dtype)
    odd = np.array([np.nan, -0.0, np.inf, -np.inf, 1e-45, -1.0, np.nan, -0.0])
    weights["conv1.bias"] = builders.tensor(odd, dtype)
    run = builders.make_run(store, weights=weights)
    builders.decide(run, {"conv1": (0, 1, 5)})
    assert run_here(store) == exits.DONE
    found = split(candidate_of(store)["model.safetensors"])["conv1.bias"]
    size = len(found) // 8
    kept = [found[i * size : (i + 1) * size] for i in range(8)]
    was = [weights["conv1.bias"].raw[i * size : (i + 1) * size] for i in range(8)]
    assert kept == [bytes(size) if i in (0, 1, 5) else was[i] for i in range(8)]


def objects_of(store: ObjectStore) -> dict[str, bytes]:
    """Everything but what says who did it."""
    passing = tuple(f"cycles/{CYCLE}/{folder}/" for folder in ("attempts", "responses", "started"))
    return {head.key: store.get(head.key) for head in store.list("") if not head.key.startswith(passing)}


def test_one_three_and_seven_workers_write_the_same_bytes(tmp_path: Path) -> None:
    results = []
    for of, dtype in ((1, "BF16"), (3, "BF16"), (7, "BF16")):
        store = LocalStore(tmp_path / str(of))
        topology = builders.toy_topology()
        weights = builders.toy_weights(topology, dtype)
        weights["lm.weight"] = weights["embed.weight"]
        run = builders.make_run(store, weights=weights, shards=4, slots=builders.toy_slots(topology))
        builders.decide(run, PRUNED)
        assert run_workers(store, of) == [exits.DONE] * of
        results.append(objects_of(store))
    assert results[0] == results[1] == results[2]


KILLED = """
import os, signal, sys
from kasmina import apply, rewrite
whole = rewrite.in_order
def until_the_second_chunk(*args, **kwargs):
    for number, chunk in enumerate(whole(*args, **kwargs)):
        if number == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        yield chunk
rewrite.in_order = until_the_second_chunk
apply.main(sys.argv[1:])
"""


def test_a_worker_killed_in_the_middle_changes_nothing(tmp_path: Path) -> None:
    results = []
    for name in ("whole", "killed"):
        store = LocalStore(tmp_path / name)
        topology = big_topology(rows=9000, columns=1000)
        run = builders.make_run(store, topology=topology, weights=big_weights(topology))
        builders.decide(run, {"rows": (3, 70)}, limits=WorkLimits(beat_seconds=0.2))
        if name == "killed":
            victim = [sys.executable, "-c", KILLED, *command(store, worker=0, of=2)[3:]]
            assert subprocess.run(victim, check=False, timeout=60).returncode == -signal.SIGKILL
            assert any(path.stat().st_size >= CHUNK for path in (tmp_path / name / ".tmp").iterdir())
            assert layout.manifest(CYCLE, BASE) not in objects_of(store)
            assert list(store.list(layout.responses(CYCLE))) == []
            assert next(head.key for head in store.list(layout.attempts(CYCLE))).endswith("/0")
            assert subprocess.run(command(store, worker=1, of=2), check=False, timeout=60).returncode == exits.DONE
        assert run_workers(store, 1) == [exits.DONE]
        results.append(objects_of(store))
    assert results[0] == results[1]


def big_topology(*, rows: int, columns: int) -> Topology:
    group = builders.Group(
        id="rows",
        kind=builders.Kind.CHANNEL,
        units=rows,
        members=(builders.Member(parameter="big.weight", role="producer", axis=0),),
        gates=("big",),
    )
    parameter = Parameter(uuid="00000000-0000-5000-8000-000000000000", shape=(rows, columns))
    return Topology(model_id="big", parameters={"big.weight": parameter}, groups=(group,))


def big_weights(topology: Topology) -> dict[str, builders.Tensor]:
    shape = topology.parameters["big.weight"].shape
    return {"big.weight": builders.tensor(np.random.default_rng(0).random(shape, dtype=np.float32), "F32")}


def test_masks_are_inherited_and_joined(store: LocalStore) -> None:
    run = builders.make_run(store)
    before = builders.masks_of(run.topology, {"conv1": (0,), "attn": (3,)})
    inherited = builders.write_masks(store, "cycles/c0-0/on-0/candidate/masks.safetensors", before)
    builders.decide(run, {"conv1": (7,)}, inherited=inherited)
    assert run_here(store) == exits.DONE
    joined = builders.masks_of(run.topology, {"conv1": (0, 7), "attn": (3,)})
    written = candidate_of(store)
    assert written["masks.safetensors"] == joined.to_bytes()
    weights = split(written["model.safetensors"])
    assert all(weights[name] == expected_raw(one, joined.dead(name)) for name, one in run.weights.items())


def basic(
    store: ObjectStore, topology: Topology, pruned: Mapping[str, Iterable[int]], *, cut: int
) -> tuple[WeightDecision, ...]:
    """Answers of basic pruning, as analysis writes them: slices of `cut` elements."""
    decisions = []
    for number, (name, gone) in enumerate(pruned.items()):
        size = topology.parameters[name].size
        active = np.ones(size, dtype=np.bool_)
        active[np.asarray(gone)] = False
        for start in range(0, size, cut):
            stop = min(start + cut, size)
            piece = Slice(parameter=name, start=start, stop=stop)
            arrays = {f"{piece.key}/mask": np.packbits(active[start:stop], bitorder="little")}
            path = f"{layout.responses(CYCLE, f'2-{number}')}{start}-0"
            store.put_if_absent(path, tensors.pack(arrays, {}))
            decisions.append(WeightDecision(slice=piece, answer=path, result=result_digest(arrays)))
    return tuple(decisions)


def test_single_weights_are_masked_from_the_bits_in_the_answers(store: LocalStore) -> None:
    run = builders.make_run(store)
    gone = {"fc.weight": (0, 9, 31, 127), "attn.q.weight": (255,)}
    builders.decide(run, {}, weights=basic(store, run.topology, gone, cut=13))
    assert run_here(store) == exits.DONE
    written = candidate_of(store)
    masks = Masks.from_bytes(written["masks.safetensors"], name="masks")
    assert masks.counts() == {"weight": 5}
    weights = split(written["model.safetensors"])
    for name, one in run.weights.items():
        values = np.frombuffer(bytearray(one.raw), "u1" if name == "empty" else "<u4" if one.dtype == "F32" else "<u8")
        values[list(gone.get(name, ()))] = 0
        assert weights[name] == values.tobytes(), name
    assert Candidate.parse(written["MANIFEST.json"], name="manifest").weights_zeroed == 5


def test_single_weights_are_inherited_and_joined(store: LocalStore) -> None:
    run = builders.make_run(store)

    def masks(gone: Mapping[str, Iterable[int]]) -> Masks:
        parameters = {name: run.topology.parameters[name] for name in gone}
        weights = {name: ~np.isin(np.arange(one.size), list(gone[name])) for name, one in parameters.items()}
        return Masks(run.topology.model_id, parameters=parameters, weights=weights)

    before = masks({"fc.weight": (3, 9), "fc.bias": (0,)})
    inherited = builders.write_masks(store, "cycles/c0-0/on-0/candidate/masks.safetensors", before)
    decided = basic(store, run.topology, {"fc.weight": (9, 127), "attn.q.weight": (255,)}, cut=13)
    builders.decide(run, {}, weights=decided, inherited=inherited)
    assert run_here(store) == exits.DONE
    joined = masks({"fc.weight": (3, 9, 127), "fc.bias": (0,), "attn.q.weight": (255,)})
    written = candidate_of(store)
    assert written["masks.safetensors"] == joined.to_bytes()
    manifest = Candidate.parse(written["MANIFEST.json"], name="manifest")
    assert (manifest.masks.counts, manifest.masks.digest) == ({"weight": 5}, sha256_hex(joined.to_bytes()))
    weights = split(written["model.safetensors"])
    assert all(weights[name] == expected_raw(one, joined.dead(name)) for name, one in run.weights.items())


def test_tied_names_that_are_stored_as_copies_are_masked_alike(store: LocalStore) -> None:
    weights = builders.toy_weights(builders.toy_topology())
    weights["module.lm.weight"] = weights["embed.weight"]
    run = builders.make_run(store, weights=weights)
    builders.decide(run, {}, weights=basic(store, run.topology, {"embed.weight": (0, 159)}, cut=100))
    assert run_here(store) == exits.DONE
    written = split(candidate_of(store)["model.safetensors"])
    raw = weights["embed.weight"].raw
    assert written["embed.weight"] == written["module.lm.weight"] == bytes(4) + raw[4:-4] + bytes(4)


def test_a_step_count_is_no_moment_of_a_scalar_parameter(store: LocalStore) -> None:
    run = builders.make_run(store, slots=builders.toy_slots(builders.toy_topology()))
    builders.decide(run, {}, weights=basic(store, run.topology, {"scale": (0,)}, cut=1))
    assert run_here(store) == exits.DONE
    slots = split(candidate_of(store)["optimizer.safetensors"])
    assert slots["scale/exp_avg"] == bytes(4)
    assert slots["scale/step"] == run.slots["scale/step"].raw != bytes(4)


def test_an_answer_that_is_not_the_one_decided_on_is_refused(
    store: LocalStore, capsys: pytest.CaptureFixture[str]
) -> None:
    run = builders.make_run(store)
    decided = basic(store, run.topology, {"fc.weight": (0,)}, cut=16)
    other = tuple(item.model_copy(update={"result": "0" * 64}) for item in decided)
    builders.decide(run, {}, weights=other)
    assert run_here(store) == exits.BAD_INPUT
    assert "responses/2-0/0-0 has result" in capsys.readouterr().err


def refused(store: ObjectStore, capsys: pytest.CaptureFixture[str]) -> str:
    """The one sentence of a worker that must refuse; nothing but it may have been written."""
    assert run_here(store) == exits.BAD_INPUT
    sentence = capsys.readouterr().err.strip()
    assert "\n" not in sentence
    assert json.loads(store.get(layout.apply_error(CYCLE, BASE))) == {"message": sentence}
    assert layout.manifest(CYCLE, BASE) not in objects_of(store)
    return sentence


def spoil(store: ObjectStore, key: str, change: Mapping[int, int] | int) -> None:
    """Overwrite single bytes, or cut the object to a length."""
    path = Path(store.uri.removeprefix("file://")) / key
    data = bytearray(path.read_bytes())
    if isinstance(change, int):
        data = data[:change]
    else:
        for at, value in change.items():
            data[at] = value
    path.write_bytes(data)


def test_a_corrupt_chunk_of_the_base_is_refused_by_name(store: LocalStore, capsys: pytest.CaptureFixture[str]) -> None:
    run = builders.make_run(store, shards=2)
    builders.decide(run, PRUNED)
    path = run.prefix + run.metadata.weights[1]
    size = store.head(path).size
    spoil(store, path, {size - 1: store.get(path)[-1] ^ 1})
    sentence = refused(store, capsys)
    assert sentence.startswith(f"{path} in {store.uri}: chunk 0 of 1 is not what its SHA-256 says")
    assert run.metadata.weights[1] not in candidate_of(store)


def test_a_truncated_shard_is_refused(store: LocalStore, capsys: pytest.CaptureFixture[str]) -> None:
    run = builders.make_run(store, shards=2)
    builders.decide(run, PRUNED)
    path = run.prefix + run.metadata.weights[1]
    spoil(store, path, store.head(path).size - 4)
    assert "READY.json says" in refused(store, capsys)


def test_a_header_that_lies_is_refused(store: LocalStore, capsys: pytest.CaptureFixture[str]) -> None:
    run = builders.make_run(store)
    path = run.prefix + "model.safetensors"
    at = store.get(path).index(b"3, 3, 3]")
    spoil(store, path, {at + 3: ord("9"), at + 6: ord("9")})
    builders.decide(run, PRUNED)
    assert "conv1.weight of shape [8, 3, 9, 9] and F32 needs" in refused(store, capsys)


def test_masks_of_another_model_or_shape_are_refused(store: LocalStore, capsys: pytest.CaptureFixture[str]) -> None:
    run = builders.make_run(store)
    foreign = builders.masks_of(builders.toy_topology(width=6), {"conv1": (0,)})
    builders.decide(run, {}, inherited=builders.write_masks(store, "cycles/c0-0/masks.safetensors", foreign))
    assert refused(store, capsys) == "the masks prune conv1.bias of shape [6], which this model lacks"


def test_inherited_masks_must_be_the_tips(store: LocalStore, capsys: pytest.CaptureFixture[str]) -> None:
    run = builders.make_run(store)
    masks = builders.masks_of(run.topology, {"conv1": (0,)})
    ref = builders.write_masks(store, "cycles/c0-0/masks.safetensors", masks)
    builders.decide(run, {}, inherited=ref.model_copy(update={"digest": "0" * 64}))
    assert "cycles/c0-0/masks.safetensors has SHA-256" in refused(store, capsys)


@pytest.mark.parametrize(
    ("pruned", "sentence"),
    [
        ({"conv9": (0,)}, "prunes group conv9, which the checkpoint's topology lacks"),
        ({"conv1": (8,)}, "prunes unit 8 of group conv1, which has 8"),
        ({"conv1": (-1,)}, "prunes unit -1 of group conv1, which has 8"),
    ],
)
def test_a_decision_that_does_not_fit_the_topology_is_refused(
    store: LocalStore, capsys: pytest.CaptureFixture[str], pruned: Mapping[str, Iterable[int]], sentence: str
) -> None:
    builders.decide(builders.make_run(store), pruned)
    assert sentence in refused(store, capsys)


def test_another_decision_than_the_updates_is_refused(store: LocalStore, capsys: pytest.CaptureFixture[str]) -> None:
    builders.decide(builders.make_run(store), PRUNED)
    path = layout.decision(CYCLE)
    spoil(store, path, {store.get(path).index(b"forced"): ord("F")})
    assert f"{path} has SHA-256" in refused(store, capsys)


def test_a_checkpoint_without_ready_is_refused(store: LocalStore, capsys: pytest.CaptureFixture[str]) -> None:
    run = builders.make_run(store)
    builders.decide(run, PRUNED)
    store.delete(run.prefix + layout.READY)
    assert "READY.json" in refused(store, capsys)


def test_an_unsigned_checkpoint_is_refused_where_trust_is_configured(
    store: LocalStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "trust").mkdir()
    generate_key(tmp_path / "key.pem")
    (tmp_path / "key.pub.pem").rename(tmp_path / "trust" / "trainer.pem")
    monkeypatch.setenv("EMRAKUL_TRUST", str(tmp_path / "trust"))
    builders.decide(builders.make_run(store), PRUNED)
    assert "is not signed by a key trusted for trainer" in refused(store, capsys)


def test_other_content_in_the_candidates_place_is_refused(
    store: LocalStore, capsys: pytest.CaptureFixture[str]
) -> None:
    builders.decide(builders.make_run(store), PRUNED)
    store.put_if_absent(layout.candidate(CYCLE, BASE, "model.safetensors"), b"something else")
    assert "exists with other content" in refused(store, capsys)


def test_what_is_missing_or_misspelled_is_a_sentence(store: LocalStore, capsys: pytest.CaptureFixture[str]) -> None:
    builders.make_run(store)
    assert "on-1/update.json" in refused(store, capsys)
    with pytest.raises(SystemExit):
        apply.main(["--cycle", store.uri, "--base", "1", "--worker", "0", "--of", "1", "--launch", "0"])
    assert "write <run URI>/cycles/<id>" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        apply.main(command(store, worker=3, of=3)[3:])
    with pytest.raises(SystemExit):
        apply.main(["--help"])
    assert "43" in capsys.readouterr().out


def test_a_store_that_refuses_is_another_exit_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_bytes(b"a file, not a folder")
    assert run_here(LocalStore(tmp_path / "file")) == exits.STORE
    assert "is a file, not a folder" in capsys.readouterr().err


def test_three_dead_attempts_end_it(store: LocalStore, capsys: pytest.CaptureFixture[str]) -> None:
    run = builders.make_run(store)
    builders.decide(run, PRUNED, limits=WorkLimits(beat_seconds=0.01))
    store.put_if_absent(layout.started(CYCLE, "apply", 0), b"started")  # they died in this very launch
    for n in range(3):
        store.put_if_absent(f"{layout.attempts(CYCLE, f'apply-{BASE}-0')}{n}", b"5 token-of-the-dead")
    time.sleep(0.05)
    assert run_here(store) == exits.GAVE_UP
    assert capsys.readouterr().err.startswith(f"gave up on apply-{BASE}-0: three attempts died")
    assert sorted(candidate_of(store)) == ["masks.safetensors"]


def test_a_worker_that_comes_late_has_nothing_to_do(store: LocalStore) -> None:
    builders.decide(builders.make_run(store), PRUNED)
    assert run_here(store) == exits.DONE
    before = list(store.list(""))
    assert run_here(store) == exits.DONE
    assert list(store.list("")) == before


@st.composite
def _dead(draw: st.DrawFn) -> Dead:
    shape = tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=4)))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    parts = []
    for _ in range(draw(st.integers(1, 3))):
        if draw(st.booleans()):
            axis = draw(st.integers(0, len(shape) - 1))
            bits = random.random(shape[axis]) < 0.4
            parts.append((shape, bits.reshape([-1 if i == axis else 1 for i in range(len(shape))])))
        else:
            size = int(np.prod(shape))
            parts.append(((size,), random.random(size) < 0.4))
    single = np.packbits(random.random(int(np.prod(shape))) < 0.7, bitorder="little") if draw(st.booleans()) else None
    return Dead(shape, tuple(parts), single)


def oracle(dead: Dead) -> np.ndarray:
    found = np.zeros(dead.shape, dtype=np.bool_)
    for view, bits in dead.parts:
        found |= np.broadcast_to(bits, view).reshape(dead.shape)
    if dead.single is not None:
        found |= ~np.unpackbits(dead.single, count=found.size, bitorder="little").view(np.bool_).reshape(dead.shape)
    return found.reshape(-1)


@given(dead=_dead(), cuts=st.lists(st.integers(0, 700), max_size=4))
@settings(max_examples=150, deadline=None)
def test_zeroing_in_pieces_is_a_boolean_index_over_the_whole(dead: Dead, cuts: list[int]) -> None:
    size = int(np.prod(dead.shape))
    expected = np.where(oracle(dead), 0, np.arange(1, size + 1))
    found = np.arange(1, size + 1)
    edges = sorted({0, size, *(cut for cut in cuts if cut < size)})
    for start, stop in pairwise(edges):
        dead.zero(found[start:stop], start)
        assert dead.touches(start, stop) == oracle(dead)[start:stop].any()
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(dead.full().reshape(-1), oracle(dead))


@given(
    dead=_dead(), itemsize=st.sampled_from([1, 2, 4, 8]), offset=st.integers(0, 20), cuts=st.lists(st.integers(1, 5000))
)
@settings(max_examples=150, deadline=None)
def test_bytes_are_zeroed_alike_wherever_chunks_cut_them(
    dead: Dead, itemsize: int, offset: int, cuts: list[int]
) -> None:
    size = int(np.prod(dead.shape))
    data = b"\xff" * (offset + size * itemsize + 3)
    expected = bytearray(data)
    for index in np.flatnonzero(oracle(dead)):
        at = offset + int(index) * itemsize
        expected[at : at + itemsize] = bytes(itemsize)
    extent = Extent(start=offset, stop=offset + size * itemsize, itemsize=itemsize, dead=dead)
    edges = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
    found = b""
    for start, stop in pairwise(edges):
        piece = bytearray(data[start:stop])
        if extent.start < stop and start < extent.stop:
            _zero(piece, start, extent)
        found += piece
    assert found == expected


def test_an_element_that_two_chunks_share_is_zero(store: LocalStore) -> None:
    topology = big_topology(rows=CHUNK // 4096 + 2, columns=1024)
    weights, start = {}, 0
    while start % 4 != 1:  # a name as long as it takes to leave the tensor unaligned
        weights = {"x" * (len(next(iter(weights), "")) + 1): builders.Tensor("U8", (1,), b"1"), **big_weights(topology)}
        data = builders.safetensors(weights, pad=1)
        start = len(data) - len(weights["big.weight"].raw)
    run = builders.make_run(store, topology=topology, weights=weights, pad=1)
    assert store.get(run.prefix + "model.safetensors") == data
    shared = (CHUNK - start) // 4096
    builders.decide(run, {"rows": (0, shared)})
    assert run_here(store) == exits.DONE
    expected = bytearray(data)
    for row in (0, shared):
        expected[start + row * 4096 : start + (row + 1) * 4096] = bytes(4096)
    assert candidate_of(store)["model.safetensors"] == expected


def big_run(store: ObjectStore, topology: Topology) -> builders.Run:
    """A checkpoint of one large float32 parameter, written without ever being whole in memory."""
    size = topology.parameters["big.weight"].size
    block = np.random.default_rng(0).random(1 << 20, dtype=np.float32).tobytes()
    text = json.dumps({"big.weight": {"dtype": "F32", "shape": topology.parameters["big.weight"].shape,
                                      "data_offsets": [0, 4 * size]}}).encode()  # fmt: skip
    head = struct.pack("<Q", len(text)) + text

    def chunks() -> Iterator[bytes]:
        pending, left = head, 4 * size
        while pending or left:
            while left and len(pending) < CHUNK:
                pending += block[:left]
                left -= min(left, len(block))
            yield pending[:CHUNK]
            pending = pending[CHUNK:]

    digester = Digester()
    for chunk in chunks():
        digester.update(chunk)
    return builders.make_run(store, topology=topology, written={"model.safetensors": (chunks(), digester.finish())})


@pytest.mark.slow
@pytest.mark.parametrize("method", ["structured", "basic"])
def test_a_checkpoint_of_100_m_parameters_needs_256_mb(store: LocalStore, method: str) -> None:
    topology = big_topology(rows=25_000, columns=4_000)
    run = big_run(store, topology)
    if method == "structured":
        builders.decide(run, {"rows": range(0, 25_000, 50)})
    else:
        gone = {"big.weight": np.arange(0, 100_000_000, 7)}
        builders.decide(run, {}, weights=basic(store, topology, gone, cut=4_000_012))
    code = "import sys; from kasmina import apply; code = apply.main(sys.argv[1:]); "
    code += "print(code, *(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    worker = [sys.executable, "-c", code, *command(store, worker=0, of=1)[3:]]
    done = subprocess.run(worker, check=True, capture_output=True, text=True, timeout=60)
    exit_code, kilobytes = map(int, done.stdout.split())
    assert exit_code == exits.DONE, done.stderr
    # Not ru_maxrss: that of a child begins with what its parent had.
    assert kilobytes * 1024 <= 256e6
    manifest = Candidate.parse(store.get(layout.manifest(CYCLE, BASE)), name="manifest")
    assert manifest.weights_zeroed == {"structured": 500 * 4000, "basic": 14_285_715}[method]
