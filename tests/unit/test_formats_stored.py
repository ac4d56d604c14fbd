"""Every format, written by torch: read without it, written back with zeroes, and taken by the format's own loader."""

from __future__ import annotations

import io
import pickle
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import builders
import stored
from elesh.reading import Reader
from elesh.weights import Weights
from kasmina.formats import bind, gather, read_index, read_recognised, recognise
from kasmina.into import IntoTensors
from kasmina.pair import _load_tensors
from kasmina.rewrite import copy_masked, zeroes_of
from leyline import layout
from leyline.bits import Packed
from leyline.digest import digest_bytes
from leyline.local import LocalStore
from leyline.masks import Masks
from leyline.messages import Candidate, Slice, StoredObject
from leyline.model import Malformed
from leyline.store import CHUNK, ObjectStore
from leyline.topology import Parameter, Topology
from urabrask.structure import NotTheBase, check_bytes
from urabrask.weights import load_weights
from wrapped import Wrapped

PRUNED = {"conv1": (1, 6), "attn": (2,)}
FORMATS = list(stored.FORMATS)
CYCLE, BASE = "c1-0123456789", 1


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "run")


def toy_weights(dtype: str) -> dict[str, builders.Tensor]:
    """The toy model in this dtype, with an int8 buffer; floats of 8 bits are any bytes that are no NaN."""
    made = builders.toy_weights(builders.toy_topology(), "F32" if dtype.startswith("F8") else dtype)
    if dtype.startswith("F8"):
        random = np.random.default_rng(5)
        made = {
            name: builders.Tensor(
                dtype, one.shape, random.integers(1, 0x78, int(np.prod(one.shape)), np.uint8).tobytes()
            )
            if one.dtype == "F32"
            else one
            for name, one in made.items()
        }
    return {**made, "codes": builders.Tensor("I8", (4, 2), bytes(range(120, 128)))}


def run_of(store: ObjectStore, form: str, weights: Mapping[str, builders.Tensor], folder: Path) -> builders.Run:
    return builders.make_run(store, weights=weights, stored=stored.stored(form, weights, folder))


def write_back(run: builders.Run, masks: Masks) -> Candidate:
    """The candidate's objects, as the apply worker writes them."""
    index = read_index(run.store, run.prefix, run.metadata)
    bind(index, run.topology)
    zeroes = zeroes_of(index, masks, slots=False)
    target = layout.candidate(CYCLE, BASE)
    copies = [
        copy_masked(
            run.store, source=run.prefix, target=target, stored=run.metadata.object(path), zeroes=zeroes, ahead=1
        )
        for path in run.metadata.weights
    ]
    return Candidate(
        cycle=CYCLE,
        base=BASE,
        checkpoint=run.metadata.name,
        decision="0" * 64,
        masks=builders.write_masks(run.store, layout.masks(CYCLE, BASE), masks),
        objects=tuple(copies),
    )


def candidate_objects(run: builders.Run) -> dict[str, bytes]:
    folder = layout.candidate(CYCLE, BASE)
    return {path: run.store.get(folder + path) for path in run.metadata.weights}


def expected(one: torch.Tensor, masks: Masks, name: str) -> torch.Tensor:
    """The oracle: a boolean index over the bytes of the whole tensor."""
    dead = masks.dead(name)
    if dead is None:
        return one
    bytes_ = one.contiguous().reshape(-1).view(torch.uint8).reshape(*one.shape, one.element_size()).clone()
    bytes_[torch.from_numpy(dead.full())] = 0
    return bytes_.reshape(-1).view(one.dtype).reshape(one.shape)


def single(topology: Topology, share: float = 0.3) -> Masks:
    """Single weights of every matrix and of the bias."""
    random = np.random.default_rng(9)
    weights = {
        name: np.packbits(random.random(parameter.size) > share, bitorder="little")
        for name, parameter in topology.parameters.items()
        if parameter.shape
    }
    sizes = {name: topology.parameters[name].size for name in weights}
    parameters = {name: topology.parameters[name] for name in weights}
    return Masks(model_id=topology.model_id, parameters=parameters, weights=Packed(weights, sizes))


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"])
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("method", ["structured", "single"])
def test_what_is_written_back_is_the_base_with_zeroes(
    store: LocalStore, tmp_path: Path, form: str, dtype: str, method: str
) -> None:
    weights = toy_weights(dtype)
    run = run_of(store, form, weights, tmp_path / "scratch")
    masks = builders.masks_of(run.topology, PRUNED) if method == "structured" else single(run.topology)
    candidate = write_back(run, masks)
    written = candidate_objects(run)
    base = {path: store.get(run.prefix + path) for path in run.metadata.weights}
    assert {path: len(data) for path, data in written.items()} == {path: len(data) for path, data in base.items()}
    found = stored.loaded(run.metadata.format, written, stored.torch_tensors(weights), tmp_path / "loaded")
    assert set(found) == set(weights)
    for name, one in stored.torch_tensors(weights).items():
        want = expected(one, masks, name)
        assert (found[name].dtype, found[name].shape) == (one.dtype, one.shape), name
        assert stored.raw(found[name]) == stored.raw(want), name
    assert "zero where pruned, elsewhere the base's bytes" in check_bytes(
        store, run.metadata, candidate, masks, run.topology
    )


@pytest.mark.parametrize("form", FORMATS)
def test_readers_of_every_kind_see_the_same_tensors(store: LocalStore, tmp_path: Path, form: str) -> None:
    weights = toy_weights("F32")
    run = run_of(store, form, weights, tmp_path / "scratch")
    index = read_index(store, run.prefix, run.metadata)
    for name, one in weights.items():
        ref = index[name]
        assert (ref.dtype, ref.shape, ref.nbytes) == (one.dtype, one.shape, len(one.raw)), name
        read = gather(ref, 0, ref.size, lambda path, a, b: store.get_range(run.prefix + path, a, b))
        assert read == one.raw, name
    # analysis, in pieces
    opened, reader = Weights.open(store, run.metadata), Reader()
    for name, parameter in run.topology.parameters.items():
        row = parameter.size // (parameter.shape[0] if parameter.shape else 1)
        whole = Slice(parameter=name, start=0, stop=parameter.size)
        tail = Slice(parameter=name, start=row * (parameter.size // row // 2), stop=parameter.size)
        for piece in (whole, tail):
            got = b"".join(bytes(view) for view in reader.stream([s.extent for s in opened.segments(piece)]))
            assert got == weights[name].raw[4 * piece.start : 4 * piece.stop], name
    reader.close()
    # validation and training
    evaluated = load_weights(store, run.metadata, run.topology, names=None)
    into = IntoTensors()
    _load_tensors(store, run.prefix, run.metadata, into)
    for name, one in weights.items():
        assert stored.raw(evaluated[name]) == stored.raw(into.tensors[name]) == one.raw, name


@pytest.mark.parametrize("form", FORMATS)
def test_a_folder_is_recognised_by_what_is_in_it(store: LocalStore, tmp_path: Path, form: str) -> None:
    weights = toy_weights("F32")
    kind, objects = stored.stored(form, weights, tmp_path / "scratch")
    for path, data in objects.items():
        store.put_if_absent(f"import/{path}", data)
    for other in ("optimizer.pt", "training_args.bin"):  # as a trainer of transformers leaves them
        if "pytorch_model" in str(objects) or form in ("safetensors", "safetensors-sharded"):
            store.put_if_absent(f"import/{other}", b"\x80\x02}.")
    found = recognise(store, "import/")
    assert found.format == kind
    assert set(found.objects) == set(objects)
    assert set(read_recognised(store, "import/", found)) == set(weights)


def test_what_cannot_be_recognised_is_said(store: LocalStore) -> None:
    with pytest.raises(Malformed, match="holds no checkpoint"):
        recognise(store, "import/")
    store.put_if_absent("import/a.pt", stored.saved({}))
    store.put_if_absent("import/b.pt", stored.saved({}))
    with pytest.raises(Malformed, match=r"holds 2 checkpoints \(import/a.pt|holds 2 checkpoints \(a.pt, b.pt"):
        recognise(store, "import/")
    store.put_if_absent("old/a.pt", stored.saved({"a": torch.ones(2)}, _use_new_zipfile_serialization=False))
    with pytest.raises(Malformed, match="emrakul convert SOURCE TARGET"):
        recognise(store, "old/")


def changed(run: builders.Run, candidate: Candidate, path: str, at: int) -> Candidate:
    """The candidate with one byte of an object other than it was, and a manifest that agrees."""
    key = layout.candidate(CYCLE, BASE, path)
    data = bytearray(run.store.get(key))
    data[at] ^= 1
    run.store.delete(key)
    run.store.put_if_absent(key, bytes(data))
    objects = [StoredObject(path=path, digest=digest_bytes(data)) if o.path == path else o for o in candidate.objects]
    return candidate.model_copy(update={"objects": tuple(objects)})


@pytest.mark.parametrize("form", ["torch-zip", "lightning", "repacked", "dcp", "dcp-grid"])
def test_any_other_byte_is_found(store: LocalStore, tmp_path: Path, form: str) -> None:
    run = run_of(store, form, toy_weights("F32"), tmp_path / "scratch")
    masks = builders.masks_of(run.topology, PRUNED)
    candidate = write_back(run, masks)
    path = max(run.metadata.weights, key=lambda path: store.head(run.prefix + path).size)
    index = read_index(store, run.prefix, run.metadata)
    box = next(box for box in index["attn.q.weight"].boxes if box.object == path)
    assert box.record is not None
    size = store.head(run.prefix + path).size
    for at, sentence in {
        box.offset: "differs from its base at byte",
        box.record.crcs[0]: "is no checksum of what is stored",
        box.record.crcs[-1] + 3: "is no checksum of what is stored",
        size - 4: "differs from its base at byte",
    }.items():
        wrong = changed(run, candidate, path, at)
        with pytest.raises(NotTheBase, match=sentence):
            check_bytes(store, run.metadata, wrong, masks, run.topology)
        changed(run, wrong, path, at)
    dead = next(box for box in index["conv1.bias"].boxes if box.object == path or form == "dcp-grid")
    wrong = changed(run, candidate, dead.object, dead.offset + 4 * (1 - dead.origin[0]))
    with pytest.raises(NotTheBase, match=r"element \[1\] of conv1.bias is pruned but not zero"):
        check_bytes(store, run.metadata, wrong, masks, run.topology)


def test_ties_and_views_of_one_storage_are_written_once(store: LocalStore, tmp_path: Path) -> None:
    weights = stored.torch_tensors(toy_weights("F32"))
    weights["lm.weight"] = weights["embed.weight"]
    qkv = torch.cat([weights[f"attn.{name}.weight"] for name in "qkv"])
    columns = torch.cat([weights["attn.out.weight"], weights["fc.weight"]], dim=1)
    weights |= {f"attn.{name}.weight": qkv[16 * n : 16 * n + 16] for n, name in enumerate("qkv")}
    weights |= {"attn.out.weight": columns[:, :16], "fc.weight": columns[:, 16:]}
    run = builders.make_run(store, weights={}, stored=("torch-zip", {"m.pt": stored.saved(weights)}))
    masks = single(run.topology)
    candidate = write_back(run, masks)
    found = torch.load(io.BytesIO(candidate_objects(run)["m.pt"]), weights_only=True)
    for name, one in weights.items():
        owner = "embed.weight" if name == "lm.weight" else name
        assert stored.raw(found[name]) == stored.raw(expected(one, masks, owner)), name
    assert found["lm.weight"].data_ptr() == found["embed.weight"].data_ptr()
    check_bytes(store, run.metadata, candidate, masks, run.topology)


@pytest.mark.parametrize(
    ("name", "view", "sentence"),
    [
        ("fc.weight", lambda w: w["attn.q.weight"][:, :8], "shares some of its bytes with attn.q.weight"),
        ("fc.bias", lambda w: torch.ones(1).expand(16), "shares some of its bytes with fc.bias"),
        ("fc.bias", lambda w: torch.zeros(16, dtype=torch.float8_e8m0fnu), "F8_E8M0, whose zero is not the zero byte"),
    ],
)
def test_a_parameter_that_cannot_be_masked_alone_is_refused(
    store: LocalStore, name: str, view: Any, sentence: str
) -> None:
    weights = stored.torch_tensors(toy_weights("F32"))
    weights[name] = view(weights)
    run = builders.make_run(store, weights={}, stored=("torch-zip", {"m.pt": stored.saved(weights)}))
    with pytest.raises(Malformed, match=sentence):
        bind(read_index(store, run.prefix, run.metadata), run.topology)


NAMES = [
    "",
    " ",
    "a.b",
    "a/b",
    "../x",
    "module.module.y",
    "ü\u4e2d\U0001f600",
    "\n\t",
    "'\"\\",
    "\x00",
    "__metadata__",
    "0",
]


def test_an_enum_as_python_3_11_0_pickles_it(store: LocalStore, tmp_path: Path) -> None:
    """Debian 12 has such a Python; later and earlier ones name the class and the value."""

    class Older(pickle.Pickler):
        def reducer_override(self, thing: object) -> Any:
            return (getattr, (type(thing), thing.name)) if isinstance(thing, Enum) else NotImplemented

    weights = {"w": builders.tensor(np.arange(6.0).reshape(2, 3), "F32")}
    kind, objects = stored.stored("dcp", weights, tmp_path / "scratch")
    data = io.BytesIO()
    Older(data).dump(pickle.loads(objects[".metadata"]))
    assert b"getattr" in data.getvalue()
    run = builders.make_run(store, weights={}, stored=(kind, {**objects, ".metadata": data.getvalue()}))
    assert read_index(store, run.prefix, run.metadata)["w"].shape == (2, 3)


@pytest.mark.parametrize("form", ["torch-zip", "dcp", "dcp-grid"])
def test_names_may_be_anything(store: LocalStore, tmp_path: Path, form: str) -> None:
    names = [name for name in NAMES if form != "dcp" or "." not in name]  # torch itself joins and splits at dots
    weights = {name: builders.tensor(np.full((2, 3), n), "F32") for n, name in enumerate(names)}
    kind, objects = stored.stored(form, weights, tmp_path / "scratch")
    called = {name: "y" if name == "module.module.y" else name for name in names}
    shapes = {known: Parameter(uuid=f"u{n}", shape=(2, 3)) for n, known in enumerate(called.values())}
    topology = Topology(model_id="odd", parameters=shapes, groups=())
    run = builders.make_run(store, topology=topology, weights=weights, stored=(kind, objects))
    assert set(read_index(store, run.prefix, run.metadata)) == set(shapes)
    active = np.array([True, False, True, False, True, True])
    masks = Masks(model_id="odd", parameters=shapes, weights=dict.fromkeys(shapes, active))
    masks = Masks.from_bytes(masks.to_bytes(), name="masks")
    check_bytes(store, run.metadata, write_back(run, masks), masks, topology)
    like = stored.torch_tensors(weights)
    found = stored.loaded(kind, candidate_objects(run), like, tmp_path / "loaded")
    assert found.keys() == like.keys()
    for name, one in like.items():
        assert torch.equal(found[name], one * torch.from_numpy(active.reshape(2, 3))), name


@pytest.mark.parametrize("form", ["safetensors", "torch-zip", "dcp-grid"])
def test_ten_thousand_tiny_tensors(store: LocalStore, tmp_path: Path, form: str) -> None:
    count = 10_000
    weights = {f"p{n:05d}": builders.tensor(np.arange(2.0) + n, "F32") for n in range(count)}
    if form == "dcp-grid":  # two pieces each
        weights = dict(list(weights.items())[: count // 2])
    shapes = {name: Parameter(uuid=name, shape=(2,)) for name in weights}
    topology = Topology(model_id="tiny", parameters=shapes, groups=())
    kind, objects = stored.stored(form, weights, tmp_path / "scratch")
    run = builders.make_run(store, topology=topology, weights=weights, stored=(kind, objects))
    masks = Masks(
        model_id="tiny",
        parameters=shapes,
        weights={name: np.array([n % 2 == 0, True]) for n, name in enumerate(weights)},
    )
    candidate = write_back(run, masks)
    index = read_index(store, run.prefix, run.metadata)
    written = candidate_objects(run)
    for n, (name, one) in enumerate(weights.items()):
        read = gather(index[name], 0, 2, lambda path, a, b: written[path][a:b])
        assert read == (one.raw if n % 2 == 0 else bytes(4) + one.raw[4:]), name
    check_bytes(store, run.metadata, candidate, masks, topology)


def test_elements_that_two_chunks_share_are_zeroed_and_checked(store: LocalStore, tmp_path: Path) -> None:
    """A piece of a distributed checkpoint begins at any byte, so an element may lie across the border of two chunks."""
    shapes = {"big": Parameter(uuid="big", shape=(1200, 4000))}
    topology = Topology(model_id="big", parameters=shapes, groups=())
    random = np.random.default_rng(0)
    weights = {"big": builders.tensor(random.normal(size=(1200, 4000)), "F32")}
    whole = stored.one_tensor(weights["big"])
    kind, objects = stored.distributed({"big": weights["big"]}, tmp_path / "scratch")
    one = objects["__0_0.distcp"]
    run = builders.make_run(store, topology=topology, weights=weights, stored=(kind, objects))
    box = read_index(store, run.prefix, run.metadata)["big"].boxes[0]
    assert box.strides == (1, 1200), "torch keeps a transposed tensor as it is"
    assert (CHUNK - box.offset) % 4, "an element lies across the border"
    assert len(one) > CHUNK
    active = random.random(whole.numel()) > 0.5
    masks = Masks(model_id="big", parameters=shapes, weights={"big": active})
    candidate = write_back(run, masks)
    found = stored.loaded("dcp", candidate_objects(run), {"big": whole}, tmp_path / "loaded")["big"]
    assert torch.equal(found, torch.where(torch.from_numpy(active).reshape(whole.shape), whole, 0))
    check_bytes(store, run.metadata, candidate, masks, topology)
    segments = Weights.open(store, run.metadata).segments(Slice(parameter="big", start=0, stop=whole.numel()))
    reader = Reader()
    assert b"".join(bytes(view) for view in reader.stream([s.extent for s in segments])) == weights["big"].raw
    reader.close()


def test_the_pieces_of_many_ranks_are_read_once(tmp_path: Path) -> None:
    """Sixteen ranks, each with a row of every matrix: neighbouring matrices lie in the same sixteen chunks."""
    shapes = {f"m{number}": Parameter(uuid=f"m{number}", shape=(16, 40_000)) for number in range(6)}
    topology = Topology(model_id="big", parameters=shapes, groups=())
    weights = {name: builders.tensor(np.ones((16, 40_000)), "F32") for name in shapes}
    store = Reads(LocalStore(tmp_path / "run"))
    run = builders.make_run(store, topology=topology, weights=weights, stored=stored.distributed_grid(weights, 16, 1))
    opened = Weights.open(store, run.metadata, chunks=16)
    store.ranges.clear()
    reader = Reader()
    for name, parameter in shapes.items():
        extents = [s.extent for s in opened.segments(Slice(parameter=name, start=0, stop=parameter.size))]
        assert b"".join(bytes(view) for view in reader.stream(extents)) == weights[name].raw
    reader.close()
    assert len(store.ranges) == len(set(store.ranges)) == 16
    evaluated = load_weights(store, run.metadata, topology, names=None)
    assert all(stored.raw(evaluated[name]) == weights[name].raw for name in shapes)
    data = [one for one in store.ranges[16:] if one[2] - one[1] > 500_000]
    assert len(data) == 16


class Reads(Wrapped):
    """Remembers the ranges."""

    def __init__(self, inner: ObjectStore) -> None:
        super().__init__(inner)
        self.ranges: list[tuple[str, int, int]] = []

    def get_range(self, key: str, start: int, stop: int, *, pin: str | None = None) -> bytes:
        self.ranges.append((key, start, stop))
        return super().get_range(key, start, stop, pin=pin)


def test_a_checksum_before_its_data_is_that_of_all_of_it(store: LocalStore) -> None:
    """Loaders look at the directory's; the other one is only right if the object passed by once before."""
    shapes = {"big": Parameter(uuid="big", shape=(1200, 4000))}
    topology = Topology(model_id="big", parameters=shapes, groups=())
    weights = {"big": builders.tensor(np.ones((1200, 4000)), "F32")}
    run = builders.make_run(store, topology=topology, weights=weights, stored=stored.repacked(weights))
    active = np.arange(4_800_000) % 3 > 0
    candidate = write_back(run, Masks(model_id="big", parameters=shapes, weights={"big": active}))
    record = read_index(store, run.prefix, run.metadata)["big"].boxes[0].record
    assert record is not None and record.crcs[0] < record.start and record.stop - record.start > CHUNK
    data = candidate_objects(run)["model.pt"]
    right = zlib.crc32(data[record.start : record.stop]).to_bytes(4, "little")
    assert [data[at : at + 4] for at in record.crcs] == [right, right]
    check_bytes(store, run.metadata, candidate, Masks("big", parameters=shapes, weights={"big": active}), topology)


DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int8, torch.int64, torch.bool,
          torch.uint16, torch.complex64]  # fmt: skip


@st.composite
def _tensors(draw: st.DrawFn) -> torch.Tensor:
    """A tensor of any dtype, which may be a view of a larger one in any way that torch has."""
    shape = draw(st.lists(st.integers(0, 4), max_size=4))
    dtype = draw(st.sampled_from(DTYPES))
    count = int(np.prod(shape)) * dtype.itemsize
    flat = (
        torch.frombuffer(bytearray(draw(st.binary(min_size=count, max_size=count))), dtype=torch.uint8)
        if count
        else None
    )
    if dtype == torch.bool and flat is not None:
        flat &= 1
    one = torch.empty(shape, dtype=dtype) if flat is None else flat.view(dtype).reshape(shape)
    for step in draw(st.lists(st.sampled_from(["turn", "cut", "skip", "expand"]), max_size=3)):
        if step == "turn" and one.dim() > 1:
            one = one.transpose(0, draw(st.integers(1, one.dim() - 1)))
        elif step == "cut" and one.dim() and one.shape[-1]:
            one = one[..., draw(st.integers(0, one.shape[-1] - 1)) :]
        elif step == "skip" and one.dim():
            one = one[::2]
        elif step == "expand" and one.dim() < 5:
            one = one.expand(2, *one.shape)
    return torch.nn.Parameter(one) if one.is_floating_point() and draw(st.booleans()) else one


_KEYS = st.text(st.characters(exclude_characters=".", codec="utf-8"), max_size=5)
_PLAIN = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=9), st.binary(min_size=1, max_size=9)
)
_TREES = st.dictionaries(
    _KEYS,
    st.recursive(
        _tensors() | _PLAIN,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_KEYS, inner, max_size=3),
        max_leaves=8,
    ),
    max_size=5,
)


def tensors_in(tree: Any, path: tuple[str, ...] = ()) -> Iterable[tuple[tuple[str, ...], torch.Tensor]]:
    if isinstance(tree, torch.Tensor):
        yield path, tree
    elif isinstance(tree, dict | list):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from tensors_in(value, (*path, str(key)))


@given(tree=_TREES, tie=st.booleans())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
def test_our_reader_gives_what_torch_load_gives(tmp_path_factory: pytest.TempPathFactory, tree: Any, tie: bool) -> None:
    if tie and (first := next((one for _, one in tensors_in(tree)), None)) is not None:
        tree["tie to the first"] = first
    data = stored.saved(tree)
    known = dict(tensors_in(torch.load(io.BytesIO(data), weights_only=True)))
    roots = [root for root in ("state_dict", "model_state_dict", "model") if any(p[0] == root and p[1:] for p in known)]
    known = {p[1:] if roots else p: one for p, one in known.items() if not roots or p[0] == roots[0]}
    store = LocalStore(tmp_path_factory.mktemp("run"))
    store.put_if_absent("m.pt", data)
    found = read_recognised(store, "", recognise(store, ""))
    assert set(found) == {".".join(path) for path in known}
    for path, one in known.items():
        ref = found[".".join(path)]
        assert ref.shape == tuple(one.shape)
        assert ref.boxes[0].strides == tuple(one.stride())
        assert ref.boxes[0].itemsize == one.element_size()
        assert ref.size == 0 or gather(ref, 0, ref.size, lambda _, a, b: data[a:b]) == stored.raw(one), path
        assert ref.dtype == {torch.complex64: "C64"}.get(one.dtype) or stored.TORCH[ref.dtype] == one.dtype


def test_formats_are_read_without_torch_or_pickle() -> None:
    code = "import sys, kasmina.formats; print([m for m in ('torch', 'pickle') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() in ("[]", "['pickle']"), "numpy itself imports pickle"


def test_zip_entries_of_what_was_not_masked_are_as_they_were(store: LocalStore, tmp_path: Path) -> None:
    run = run_of(store, "lightning", toy_weights("BF16"), tmp_path / "scratch")
    masks = builders.masks_of(run.topology, {"conv1": (0,)})
    write_back(run, masks)
    old = zipfile.ZipFile(io.BytesIO(store.get(run.prefix + "last.ckpt")))
    new = zipfile.ZipFile(io.BytesIO(candidate_objects(run)["last.ckpt"]))
    other = [entry.filename for entry in old.infolist() if old.read(entry) != new.read(entry.filename)]
    assert len(other) == 5, "conv1's weight and bias, its norm's two, and fc's columns"
    assert [e.filename for e in old.infolist() if e.CRC != new.getinfo(e.filename).CRC] == other
