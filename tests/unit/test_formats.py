"""Checkpoints as byte extents, bytes as numbers, and streams that check what passes."""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path

import numpy as np
import pytest
import safetensors
import torch
from safetensors import safe_open
from torch import nn

import builders
import stored
from kasmina import TrainingRun, load_tip, trace_topology
from kasmina.foreign import adopt
from kasmina.formats import bind, elements, read_index, read_slots, recognise, stream, zero_is_zero_byte
from kasmina.formats.torch_zip import DTYPES
from kasmina.rewrite import copy_masked, zeroes_of
from kasmina.tensor_files import TORCH, TensorFile, read_tensor
from leyline.digest import ObjectDigest, digest_bytes, verified_range
from leyline.local import LocalStore
from leyline.messages import StoredObject
from leyline.model import Malformed
from leyline.store import CHUNK, Changed, Damaged
from leyline.tensors import BITS, ITEMSIZE


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "run")


def damaged(run: builders.Run, path: str, data: bytes, *, listed: bytes | None = None) -> builders.Run:
    """The run with other bytes under `path`; READY.json lists `listed` (left out: the bytes that are there)."""
    (Path(run.store.uri.removeprefix("file://")) / run.prefix / path).write_bytes(data)
    objects = tuple(
        StoredObject(path=path, digest=digest_bytes(data if listed is None else listed)) if o.path == path else o
        for o in run.metadata.objects
    )
    metadata = run.metadata.model_copy(update={"objects": objects})
    return builders.Run(run.store, metadata, run.topology, run.weights)


def index_of(run: builders.Run) -> dict[str, object]:
    return dict(read_index(run.store, run.prefix, run.metadata))


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16", "F64"])
def test_the_extents_of_a_checkpoint_hold_its_tensors(store: LocalStore, shards: int, dtype: str) -> None:
    run = builders.make_run(store, shards=shards, dtype=dtype)
    index = read_index(store, run.prefix, run.metadata)
    assert set(index) == set(run.weights)
    for name, ref in index.items():
        digest = run.metadata.object(ref.object).digest
        box = ref.whole
        assert box is not None
        raw = verified_range(store, run.prefix + ref.object, digest, box.offset, box.offset + ref.nbytes, box.pin)
        expected = run.weights[name]
        assert (ref.dtype, ref.shape, raw) == (expected.dtype, expected.shape, expected.raw)
        assert ref.size * ITEMSIZE[ref.dtype] == len(raw)
    assert index["conv1.weight"].boxes[0].strides == (27, 9, 3, 1)
    assert index["scale"].boxes[0].strides == ()
    assert index["empty"].nbytes == 0


def test_a_long_header_is_read_whole(store: LocalStore) -> None:
    weights = builders.toy_weights(builders.toy_topology())
    weights |= {f"buffer.{i:05d}": builders.tensor(np.zeros(1), "F32") for i in range(5000)}
    run = builders.make_run(store, weights=weights)
    assert len(index_of(run)) == len(weights)


def test_a_header_of_any_length_is_recognised(store: LocalStore) -> None:
    """Of 128 bytes, say: then the file begins with the byte that a pickle begins with."""
    header = json.dumps({"w": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}}).encode().ljust(128)
    store.put_if_absent("from/model.safetensors", struct.pack("<Q", len(header)) + header + bytes(16))
    assert recognise(store, "from/") == ("safetensors", ("model.safetensors",))


def test_names_are_canonical_and_two_of_one_name_are_refused(store: LocalStore) -> None:
    weights = builders.toy_weights(builders.toy_topology())
    wrapped = {f"module._orig_mod.{name}": one for name, one in weights.items()}
    run = builders.make_run(store, weights=wrapped)
    assert set(index_of(run)) == set(weights)
    twice = builders.make_run(store, weights={**weights, "module.fc.bias": weights["fc.bias"]}, step=200)
    with pytest.raises(Malformed, match=r"module\.fc\.bias is fc\.bias"):
        index_of(twice)


def test_ties_are_found_under_any_of_their_names(store: LocalStore) -> None:
    weights = builders.toy_weights(builders.toy_topology())
    weights["lm.weight"] = weights["embed.weight"]
    both = builders.make_run(store, weights=weights)
    bound = bind(read_index(store, both.prefix, both.metadata), both.topology)
    assert len(bound["embed.weight"]) == 2
    del weights["embed.weight"]
    alias = builders.make_run(store, weights=weights, step=200)
    bound = bind(read_index(store, alias.prefix, alias.metadata), alias.topology)
    assert len(bound["embed.weight"]) == 1
    del weights["lm.weight"]
    neither = builders.make_run(store, weights=weights, step=300)
    with pytest.raises(Malformed, match=r"hold no embed\.weight"):
        bind(read_index(store, neither.prefix, neither.metadata), neither.topology)


def test_a_parameter_of_another_shape_is_refused(store: LocalStore) -> None:
    weights = builders.toy_weights(builders.toy_topology())
    weights["fc.bias"] = builders.tensor(np.zeros(17), "F32")
    run = builders.make_run(store, weights=weights)
    with pytest.raises(Malformed, match=r"fc\.bias has shape \[17\], the topology says \[16\]"):
        bind(read_index(store, run.prefix, run.metadata), run.topology)


def test_the_optimizers_slots_have_an_index_of_their_own(store: LocalStore) -> None:
    slots = builders.toy_slots(builders.toy_topology())
    run = builders.make_run(store, slots={f"module.{name}": one for name, one in slots.items()})
    assert set(read_slots(store, run.prefix, run.metadata)) == set(slots)
    assert read_slots(store, run.prefix, run.metadata.model_copy(update={"optimizer": None})) == {}


def test_a_truncated_shard_is_one_sentence(store: LocalStore) -> None:
    run = builders.make_run(store, shards=2)
    path = run.metadata.weights[1]
    whole = store.get(run.prefix + path)
    short = damaged(run, path, whole[:-4], listed=whole)
    sizes = rf"{len(whole) - 4:,} bytes, READY.json says {len(whole):,}; publish it again"
    with pytest.raises(Changed, match=rf"^checkpoint {run.metadata.name}: {path} is {sizes}$"):
        index_of(short)


def test_an_object_that_is_gone_is_named(store: LocalStore) -> None:
    run = builders.make_run(store, importance=b"statistics")
    store.delete(run.prefix + "importance.safetensors")
    with pytest.raises(Malformed, match=r"importance\.safetensors does not exist, READY\.json lists it"):
        index_of(run)


def header_of(data: bytes) -> dict[str, dict[str, object]]:
    (length,) = struct.unpack("<Q", data[:8])
    return dict(json.loads(data[8 : 8 + length]))


def with_header(data: bytes, header: object, *, length: int | None = None) -> bytes:
    (old,) = struct.unpack("<Q", data[:8])
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data[8 + old :]


@pytest.mark.parametrize(
    ("lie", "sentence"),
    [
        ({"shape": [17]}, "needs 68 bytes, its offsets span 64"),
        ({"dtype": "F128"}, "dtype 'F128'; known are"),
        ({"dtype": "F8_E8M0"}, "needs 16 bytes, its offsets span 64"),
        ({"data_offsets": [0, 64]}, "overlaps the one before|leaves a hole"),
        ({"data_offsets": [2**61, 2**61 + 64]}, "leaves a hole before it|speaks of"),
        ({"shape": [-16]}, "must be naturals"),
    ],
)
def test_a_header_that_lies_is_refused(store: LocalStore, lie: dict[str, object], sentence: str) -> None:
    run = builders.make_run(store)
    data = store.get(run.prefix + "model.safetensors")
    header = header_of(data)
    header["fc.bias"] |= lie
    with pytest.raises(Malformed, match=sentence):
        index_of(damaged(run, "model.safetensors", with_header(data, header)))


@pytest.mark.parametrize("length", [2**63, 17_000_000, 100_000])
def test_a_header_length_that_lies_is_refused(store: LocalStore, length: int) -> None:
    run = builders.make_run(store)
    data = store.get(run.prefix + "model.safetensors")
    with pytest.raises(Malformed, match=r"more than .* is refused|it is truncated"):
        index_of(damaged(run, "model.safetensors", with_header(data, header_of(data), length=length)))


def index_document(run: builders.Run) -> dict[str, dict[str, str]]:
    return dict(json.loads(run.store.get(run.prefix + "model.safetensors.index.json")))


@pytest.mark.parametrize(
    ("name", "shard", "sentence"),
    [
        ("ghost", "model-00001-of-00002.safetensors", "puts ghost into .*, which does not hold it"),
        ("fc.bias", "model-00001-of-00002.safetensors", "puts fc.bias into .*, which does not hold it"),
        (
            "fc.bias",
            "../secret.safetensors",
            "names '../secret.safetensors', which does not stand beside it; name each shard",
        ),
        ("fc.bias", "", "names '', which does not stand beside it; name each shard"),
        ("fc.bias", "model-00003-of-00002.safetensors", "is no shard of this checkpoint; save all of it again"),
        ("fc.bias", None, "holds tensor fc.bias, which model.safetensors.index.json does not list"),
    ],
)
def test_an_index_that_contradicts_its_shards_is_refused(
    store: LocalStore, name: str, shard: str | None, sentence: str
) -> None:
    run = builders.make_run(store, shards=2)
    document = index_document(run)
    assert document["weight_map"]["fc.bias"] == "model-00002-of-00002.safetensors"
    document["weight_map"].pop(name, None)
    if shard is not None:
        document["weight_map"][name] = shard
    with pytest.raises(Malformed, match=sentence):
        index_of(damaged(run, "model.safetensors.index.json", json.dumps(document).encode()))


@pytest.mark.parametrize("text", [b"{", b"[]", b'{"weight_map": {"a": 1}}', b'{"a": 1, "a": 2}'])
def test_an_index_that_is_none_is_refused(store: LocalStore, text: bytes) -> None:
    run = builders.make_run(store, shards=2)
    with pytest.raises(Malformed, match=r"model\.safetensors\.index\.json"):
        index_of(damaged(run, "model.safetensors.index.json", text))


def test_a_format_that_does_not_fit_its_objects_is_refused(store: LocalStore) -> None:
    run = builders.make_run(store, shards=2)
    for update in ({"format": "safetensors"}, {"weights": run.metadata.weights[:1]}):
        wrong = builders.Run(store, run.metadata.model_copy(update=update), run.topology, run.weights)
        with pytest.raises(Malformed, match="expected is one object, or one index with its shards"):
            index_of(wrong)


def test_elements_are_exact_in_every_float_dtype() -> None:
    bits16 = np.arange(65536, dtype="<u2")
    bits8 = np.arange(256, dtype=np.uint8)
    for dtype, bits, kind in (
        ("BF16", bits16, torch.bfloat16),
        ("F16", bits16, torch.float16),
        ("F8_E4M3", bits8, torch.float8_e4m3fn),
        ("F8_E5M2", bits8, torch.float8_e5m2),
    ):
        expected = torch.frombuffer(bytearray(bits.tobytes()), dtype=kind).float().numpy()
        found = elements(bits.tobytes(), dtype)
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, expected)
        assert found[0] == 0
    assert elements(np.array([0.1, 2]).tobytes(), "F64").tolist() == [0.1, 2.0]
    assert elements(np.array([0.5, -2], "<f4").tobytes(), "F32").tolist() == [0.5, -2.0]
    with pytest.raises(Malformed, match="I64 holds no floats"):
        elements(b"", "I64")


def test_only_known_dtypes_have_a_zero_of_zero_bytes() -> None:
    assert all(zero_is_zero_byte(dtype) for dtype in ITEMSIZE)
    assert not zero_is_zero_byte("F8_E8M0")


def every_dtype() -> dict[str, builders.Tensor]:
    """Four rows of eight in each dtype that safetensors knows, of bytes that all differ."""
    return {dtype: builders.Tensor(dtype, (4, 8), bytes(range(4 * bits))) for dtype, bits in BITS.items()}


def test_every_dtype_that_safetensors_knows_is_read_and_no_other() -> None:
    known = safetensors.deserialize(builders.safetensors(every_dtype()))
    assert {name: (one["dtype"], bytes(one["data"])) for name, one in known} == {
        name: (name, one.raw) for name, one in every_dtype().items()
    }
    with pytest.raises(safetensors.SafetensorError, match="expected one of") as refused:
        safetensors.deserialize(builders.safetensors({"a": builders.Tensor("F128", (1,), bytes(16))}))
    assert set(re.findall(r"`(\w+)`", str(refused.value))) == {"F128", *BITS}


def test_what_no_mask_can_touch_passes_through_untouched(store: LocalStore) -> None:
    """Scales of MX models, complex tables, packed numbers: beside weights that are masked."""
    topology = builders.toy_topology()
    weights = {**every_dtype(), **builders.toy_weights(topology)}
    run = builders.make_run(store, topology=topology, weights=weights)
    index = read_index(store, run.prefix, run.metadata)
    bind(index, topology)
    masks = builders.masks_of(topology, {"conv1": (1, 6)})
    source = run.metadata.object("model.safetensors")
    zeroes = zeroes_of(index, masks, slots=False)
    copy_masked(store, source=run.prefix, target="copy/", stored=source, zeroes=zeroes, ahead=1)
    written = dict(safetensors.deserialize(store.get("copy/model.safetensors")))
    assert written["conv1.weight"]["data"] != weights["conv1.weight"].raw
    for name, one in every_dtype().items():
        assert (written[name]["dtype"], bytes(written[name]["data"])) == (name, one.raw)
        assert index[name].nbytes == len(one.raw)


@pytest.mark.parametrize("dtype", ["F8_E8M0", "F4"])
def test_a_parameter_that_no_mask_can_zero_is_refused_by_name(store: LocalStore, dtype: str) -> None:
    weights = builders.toy_weights(builders.toy_topology())
    weights["fc.bias"] = builders.Tensor(dtype, (16 * 8 // BITS[dtype],), bytes(16))
    run = builders.make_run(store, weights=weights)
    with pytest.raises(
        Malformed, match=rf"fc\.bias has dtype {dtype}, whose zero is not the zero byte or whose elements"
    ):
        bind(read_index(store, run.prefix, run.metadata), run.topology)


class Scaled(nn.Module):
    """Weights, and buffers of dtypes that pass through; `more`: of these as well."""

    BUFFERS = ("complex64", "float8_e8m0fnu", "float8_e4m3fnuz", "float8_e5m2fnuz")

    def __init__(self, *more: str) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        for name in (*self.BUFFERS, *more):
            self.register_buffer(name, torch.zeros(64, dtype=torch.uint8).view(getattr(torch, name)).reshape(2, -1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x)


def filled(model: Scaled) -> dict[str, torch.Tensor]:
    """Its state with other bytes in the buffers."""
    return {
        name: one if name.startswith("fc.")
        else torch.arange(100, 164, dtype=torch.uint8).view(one.dtype).reshape(one.shape)
        for name, one in model.state_dict().items()
    }  # fmt: skip


def raw(tensor: torch.Tensor) -> list[int]:
    return tensor.reshape(-1).view(torch.uint8).tolist()


@pytest.mark.parametrize(("file", "more"), [("m.pt", "complex128"), ("model.safetensors", "float4_e2m1fn_x2")])
def test_buffers_of_every_dtype_are_imported_and_loaded(
    store: LocalStore, tmp_path: Path, file: str, more: str
) -> None:
    model = Scaled(more)
    state = filled(model)
    path = tmp_path / "from" / file
    path.parent.mkdir()
    path.write_bytes(stored.saved(state) if file == "m.pt" else b"".join(TensorFile(state)))
    adopt(store, str(path))
    topology = trace_topology(model, torch.ones(1, 4), model_id="run")
    TrainingRun.start(store, model=model, model_id="run", topology=topology).close()
    wanted = {name: raw(one) for name, one in state.items()}
    assert {name: raw(one) for name, one in model.state_dict().items()} == wanted
    assert {name: raw(one) for name, one in load_tip(store).items()} == wanted


def test_what_is_published_is_what_safetensors_would_write(tmp_path: Path) -> None:
    state = filled(Scaled("float4_e2m1fn_x2"))
    state["view"] = state["complex64"].conj()
    state["negated"] = state["view"].imag
    (tmp_path / "x").write_bytes(b"".join(TensorFile(state)))
    with safe_open(tmp_path / "x", "pt") as file:
        for name, one in state.items():
            found = file.get_tensor(name)
            assert (found.dtype, found.shape) == (one.dtype, one.shape)
            assert raw(found) == raw(one.resolve_conj().resolve_neg().contiguous())


def test_torch_has_a_dtype_for_whatever_a_format_names_or_the_load_says_so() -> None:
    assert {word for word, _ in DTYPES.values()} <= set(TORCH)
    assert set(BITS) - set(TORCH) == {"F6_E2M3", "F6_E3M2"}
    with pytest.raises(Malformed, match=r"a tensor of shape \[3\] has dtype F6_E2M3, which torch lacks.*; convert it"):
        read_tensor(bytearray(3), "F6_E2M3", (3,))


@pytest.mark.parametrize("ahead", [0, 1, 2])
def test_a_stream_gives_the_object_and_checks_each_chunk(store: LocalStore, ahead: int) -> None:
    data = np.random.default_rng(0).bytes(2 * CHUNK + 5)
    store.put_stream("big", iter([data[:CHUNK], data[CHUNK : 2 * CHUNK], data[2 * CHUNK :]]), size=len(data))
    digest = digest_bytes(data)
    chunks = list(stream(store, "big", digest, pin=store.head("big").pin, ahead=ahead))
    assert [len(chunk) for chunk in chunks] == [CHUNK, CHUNK, 5]
    assert b"".join(chunks) == data
    other = digest_bytes(data[: CHUNK + 1] + b"?" + data[CHUNK + 2 :])
    passing = stream(store, "big", other, ahead=ahead)
    assert next(passing) == data[:CHUNK]
    with pytest.raises(Damaged, match=r"big in .*: chunk 1 of 3"):
        next(passing)
    with pytest.raises(Changed, match="not the file that was pinned"):
        list(stream(store, "big", digest, pin="another", ahead=ahead))


def test_a_stream_of_nothing_is_empty(store: LocalStore) -> None:
    store.put_if_absent("none", b"")
    empty: ObjectDigest = digest_bytes(b"")
    assert list(stream(store, "none", empty)) == []


def test_a_stream_that_is_left_early_reads_no_further(store: LocalStore) -> None:
    store.put_if_absent("big", bytes(6 * CHUNK))
    reads: list[int] = []

    class Counting(LocalStore):
        def get_range(self, key: str, start: int, stop: int, *, pin: str | None = None) -> bytes:
            reads.append(start)
            return super().get_range(key, start, stop, pin=pin)

    passing = stream(Counting(store.uri), "big", digest_bytes(bytes(6 * CHUNK)), ahead=2)
    next(passing)
    passing.close()  # type: ignore[attr-defined]
    assert len(reads) <= 3
