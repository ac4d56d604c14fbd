"""Packed bits behave like the booleans that they stand for, wherever they are read from."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from math import prod
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import builders
from leyline import tensors
from leyline.bits import Packed, Slices, StoredFile, clear, ones, window
from leyline.digest import sha256_hex
from leyline.local import LocalStore
from leyline.masks import MaskFile, Masks
from leyline.model import Malformed
from leyline.store import CHUNK, Damaged
from leyline.topology import Parameter


def random_bits(size: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).random(size) < 0.6


def packed(bits: np.ndarray) -> np.ndarray:
    return np.packbits(bits, bitorder="little")


@given(size=st.integers(1, 90), cuts=st.lists(st.integers(0, 90), max_size=5), seed=st.integers(0, 999))
@settings(deadline=None)
def test_slices_cleared_one_by_one_are_the_whole(size: int, cuts: list[int], seed: int) -> None:
    bits, found = random_bits(size, seed), ones(size)
    np.testing.assert_array_equal(found, packed(np.ones(size, dtype=np.bool_)))
    edges = sorted({0, size, *(cut for cut in cuts if cut < size)})
    for start, stop in pairwise(edges):
        clear(found, start, bits[start:stop])
        np.testing.assert_array_equal(window(packed(bits), start, stop), bits[start:stop])
    np.testing.assert_array_equal(found, packed(bits))
    asked = Slices(size, [(a, b, partial(packed, bits[a:b])) for a, b in pairwise(edges)])
    for start, stop in pairwise(edges):
        np.testing.assert_array_equal(window(asked, start, stop), bits[start:stop])
    np.testing.assert_array_equal(asked[:], found)


def test_packed_is_a_mapping_of_booleans() -> None:
    a = Packed.of({"x": random_bits(13, 1), "y": random_bits(8, 2)})
    b = Packed.of({"y": random_bits(8, 3), "z": random_bits(20, 4)})
    assert Packed.of(a) is a
    assert list(a) == ["x", "y"]
    both = a.both(b)
    assert list(both) == ["x", "y", "z"]
    np.testing.assert_array_equal(both["y"], random_bits(8, 2) & random_bits(8, 3))
    np.testing.assert_array_equal(both["z"], random_bits(20, 4))
    assert both.pruned() == sum(int((~bits).sum()) for bits in both.values())


def weight_masks(bits: np.ndarray) -> Masks:
    parameters = {"fc.bias": builders.toy_topology().parameters["fc.bias"]}
    return Masks(model_id=builders.MODEL_ID, parameters=parameters, weights={"fc.bias": bits})


def test_weight_masks_survive_file_and_union() -> None:
    first, second = weight_masks(random_bits(16, 5)), weight_masks(random_bits(16, 6))
    read = Masks.from_bytes(first.to_bytes(), name="masks")
    np.testing.assert_array_equal(read.weights["fc.bias"], random_bits(16, 5))
    assert read.to_bytes() == first.to_bytes()
    joined = read.union(second)
    np.testing.assert_array_equal(joined.weights["fc.bias"], random_bits(16, 5) & random_bits(16, 6))
    assert joined.exceeds(read)
    assert not read.exceeds(joined)
    dead = joined.dead("fc.bias")
    assert dead is not None
    np.testing.assert_array_equal(dead.full(), ~joined.weights["fc.bias"])
    assert joined.counts() == {"weight": int((~joined.weights["fc.bias"]).sum())}


def test_bits_behind_the_end_are_refused() -> None:
    topology = builders.toy_topology(width=6)
    arrays, metadata = tensors.unpack(builders.masks_of(topology, {"conv1": (0,)}).to_bytes(), name="masks")
    spoiled = tensors.pack({name: array | 0xC0 for name, array in arrays.items()}, metadata)
    with pytest.raises(Malformed, match="group/conv1 sets bits behind its 6"):
        Masks.from_bytes(spoiled, name="masks")


@st.composite
def boxes(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """(shape, origin, shape of a rectangle in it, order of its axes)."""
    shape = tuple(draw(st.lists(st.integers(1, 7), min_size=1, max_size=3)))
    origin = tuple(draw(st.integers(0, side - 1)) for side in shape)
    sides = tuple(draw(st.integers(1, side - at)) for side, at in zip(shape, origin, strict=True))
    return shape, origin, sides, tuple(draw(st.permutations(range(len(shape)))))


@given(box=boxes(), cuts=st.lists(st.integers(0, 300), max_size=4), seed=st.integers(0, 999))
@settings(deadline=None)
def test_a_rectangle_in_any_order_is_read_as_it_lies(
    tmp_path_factory: pytest.TempPathFactory, box: tuple[tuple[int, ...], ...], cuts: list[int], seed: int
) -> None:
    shape, origin, sides, order = box
    active = random_bits(prod(shape), seed)
    masks = Masks("odd", parameters={"w": Parameter(uuid="u", shape=shape)}, weights={"w": active})
    store = LocalStore(tmp_path_factory.mktemp("store"))
    store.put_if_absent("masks", masks.to_bytes())
    expected = ~active.reshape(shape)[tuple(slice(a, a + n) for a, n in zip(origin, sides, strict=True))]
    expected = expected.transpose(order).reshape(-1)
    dead = Masks.read(StoredFile.read(store, "masks"), name="masks").dead("w")
    assert dead is not None
    edges = sorted({0, expected.size, *(cut for cut in cuts if cut < expected.size)})
    with patch("leyline.bits._LOOKED_UP", 16), patch("leyline.bits._SPAN", 3):
        for start, stop in pairwise(edges):
            found = dead.within(origin, sides, order).range(start, stop)
            np.testing.assert_array_equal(found, expected[start:stop])


def test_a_stored_file_is_read_across_its_chunks_and_checked(tmp_path: Path) -> None:
    store, data = LocalStore(tmp_path), np.random.default_rng(0).integers(0, 256, 3 * CHUNK + 5, np.uint8)
    store.put_if_absent("file", data.tobytes())
    file = StoredFile.read(store, "file")
    for start in (0, 3 * CHUNK + 1, CHUNK - 1, 2 * CHUNK - 7):
        np.testing.assert_array_equal(file[start : start + CHUNK + 9], data[start : start + CHUNK + 9])
    data[0] ^= 1
    (tmp_path / "file").write_bytes(data.tobytes())
    with pytest.raises(Damaged, match="chunk 0 of 4 is not what its SHA-256 says"):
        file[:1]


def test_the_file_of_large_masks_comes_in_chunks_and_is_what_pack_makes() -> None:
    sizes = {"b": 8 * CHUNK + 3, "a": 8 * CHUNK - 1, "c": 5}
    weights = {name: ones(size) for name, size in sizes.items()}
    weights["a"][-9], weights["b"][77] = 0, 1
    parameters = {name: Parameter(uuid=name, shape=(size,)) for name, size in sizes.items()}
    file = MaskFile(Masks("odd", parameters=parameters, weights=Packed(weights, sizes)))
    chunks = list(file)
    assert [len(chunk) for chunk in chunks] == [CHUNK, CHUNK, file.size - 2 * CHUNK]
    data = b"".join(chunks)
    assert file.sha256 == sha256_hex(data)
    arrays, metadata = tensors.unpack(data, name="masks")
    assert all(np.array_equal(arrays[f"weight/{name}"], bits) for name, bits in weights.items())
    assert tensors.pack(arrays, metadata) == data
