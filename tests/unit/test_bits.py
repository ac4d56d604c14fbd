"""Packed bits behave like the booleans that they stand for."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import builders
from leyline import tensors
from leyline.bits import Packed, clear, ones, window
from leyline.masks import Masks
from leyline.model import Malformed


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
