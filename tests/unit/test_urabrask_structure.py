"""Only the mask changed: every way in which a candidate may differ from its base is refused, naming the place."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from builders import Tensor, masks_of, tensor, toy_slots, toy_topology, toy_weights
from candidates import OPTIMIZER, WEIGHTS, Staged, masked, publish, stage
from leyline import layout
from leyline.ids import parameter_uuid
from leyline.model import Malformed
from leyline.open import open_store
from leyline.store import Damaged, ObjectStore
from leyline.tensors import ITEMSIZE
from leyline.topology import Group, Kind, Member, Parameter, Topology
from urabrask.structure import NotTheBase, check_bytes

PRUNED = {"conv1": [1, 5], "attn": [2]}


@pytest.fixture
def store(tmp_path: Path) -> ObjectStore:
    return open_store(str(tmp_path / "run"))


def candidate(
    store: ObjectStore,
    *,
    change: Mapping[str, Tensor | None] | None = None,
    slot: Mapping[str, Tensor] | None = None,
    dtype: str = "F32",
    pad: int = 8,
) -> Staged:
    """The toy model with PRUNED masked; `change` replaces tensors of the copy, None leaves one out."""
    topology = toy_topology()
    weights, slots = toy_weights(topology, dtype), toy_slots(topology)
    masks = masks_of(topology, PRUNED)
    copy = {**masked(weights, masks), **(change or {})}
    metadata = publish(store, topology, weights, slots=slots, pad=pad)
    return stage(
        store,
        metadata,
        topology,
        weights,
        PRUNED,
        slots=slots,
        copy={name: one for name, one in copy.items() if one is not None},
        slots_copy={**masked(slots, masks, slots=True), **(slot or {})},
        pad=pad,
    )


def check(staged: Staged) -> str:
    return check_bytes(staged.store, staged.metadata, staged.candidate, staged.masks, toy_topology())


def copied(name: str) -> Tensor:
    """A tensor of the toy model as it should be in the candidate."""
    return masked(toy_weights(toy_topology()), masks_of(toy_topology(), PRUNED))[name]


def with_value(name: str, index: tuple[int, ...], value: float) -> Tensor:
    values = np.frombuffer(copied(name).raw, "<f4").reshape(copied(name).shape).copy()
    values[index] = value
    return tensor(values, "F32")


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16", "F64"])
@pytest.mark.parametrize("pad", [8, 1])
def test_a_masked_copy_is_its_base(store: ObjectStore, dtype: str, pad: int) -> None:
    assert "zero where pruned" in check(candidate(store, dtype=dtype, pad=pad))


def test_one_flipped_bit_outside_the_masks_is_found(store: ObjectStore) -> None:
    one = copied("attn.q.weight")
    raw = bytearray(one.raw)
    raw[3] ^= 1
    with pytest.raises(NotTheBase, match="where no mask prunes anything"):
        check(candidate(store, change={"attn.q.weight": replace(one, raw=bytes(raw))}))


def test_one_flipped_bit_in_a_buffer_is_found(store: ObjectStore) -> None:
    one = copied("norm1.running_mean")
    with pytest.raises(NotTheBase, match="where no mask prunes anything"):
        check(candidate(store, change={"norm1.running_mean": replace(one, raw=one.raw[:-1] + b"\x7e")}))


@pytest.mark.parametrize("value", [0.5, -0.0, float("nan")])
@pytest.mark.parametrize(
    ("name", "index"),
    [("conv1.weight", (5, 0, 0, 0)), ("conv1.bias", (1,)), ("norm1.bias", (5,)), ("fc.weight", (3, 1))],
)
def test_an_unmasked_element_inside_is_found(
    store: ObjectStore, name: str, index: tuple[int, ...], value: float
) -> None:
    found = rf"element \[{', '.join(map(str, index))}\] of {name} is pruned but not zero"
    with pytest.raises(NotTheBase, match=found):
        check(candidate(store, change={name: with_value(name, index, value)}))


def test_a_candidate_that_nobody_masked_is_found_although_its_digests_are_the_bases(store: ObjectStore) -> None:
    weights = toy_weights(toy_topology())
    with pytest.raises(NotTheBase, match="is pruned but not zero"):
        check(candidate(store, change=weights))


def test_an_unmasked_slot_is_found(store: ObjectStore) -> None:
    name = "fc.weight/exp_avg"
    with pytest.raises(NotTheBase, match=r"fc.weight/exp_avg is pruned but not zero"):
        check(candidate(store, slot={name: toy_slots(toy_topology())[name]}))


def test_the_step_counter_must_stay(store: ObjectStore) -> None:
    with pytest.raises(NotTheBase, match="where no mask prunes anything"):
        check(candidate(store, slot={"conv1.bias/step": tensor(np.array(0.0), "F32")}))


def test_sizes_are_compared(store: ObjectStore) -> None:
    with pytest.raises(NotTheBase, match=r"bytes, its base"):
        check(candidate(store, change={"scale": None}))


def test_another_dtype_of_the_same_size_is_found(store: ObjectStore) -> None:
    one = copied("scale")
    with pytest.raises(NotTheBase, match=r"tensor scale is I32 \[\] at byte .*in the base F32"):
        check(candidate(store, change={"scale": replace(one, dtype="I32")}))


def test_another_shape_of_the_same_size_is_found(store: ObjectStore) -> None:
    one = copied("fc.weight")
    with pytest.raises(NotTheBase, match=r"tensor fc.weight is F32 \[8, 16\]"):
        check(candidate(store, change={"fc.weight": replace(one, shape=(8, 16))}))


def test_a_missing_and_an_extra_tensor_are_found(store: ObjectStore) -> None:
    one = copied("scale")
    with pytest.raises(NotTheBase, match="holds tensor alien, which its base does not have"):
        check(candidate(store, change={"scale": None, "alien": one}))


def test_a_missing_object_is_found(store: ObjectStore) -> None:
    staged = candidate(store)
    objects = tuple(each for each in staged.candidate.objects if each.path != OPTIMIZER)
    short = replace(staged, candidate=staged.candidate.model_copy(update={"objects": objects}))
    with pytest.raises(NotTheBase, match=r"lacks optimizer.safetensors"):
        check(short)


def test_an_extra_object_is_found(store: ObjectStore) -> None:
    staged = candidate(store)
    extra = staged.candidate.objects[0].model_copy(update={"path": "more.safetensors"})
    objects = (*staged.candidate.objects, extra)
    with pytest.raises(NotTheBase, match=r"more.safetensors, which is no weights or optimizer object"):
        check(replace(staged, candidate=staged.candidate.model_copy(update={"objects": objects})))


def test_bytes_that_are_not_the_manifests_are_found(store: ObjectStore, tmp_path: Path) -> None:
    staged = candidate(store)
    path = tmp_path / "run" / layout.candidate(staged.candidate.cycle, staged.candidate.base, WEIGHTS)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.chmod(0o644)
    path.write_bytes(data)
    with pytest.raises(NotTheBase, match="is not what its SHA-256 says"):
        check(staged)


def test_a_damaged_base_is_not_the_candidates_fault(store: ObjectStore, tmp_path: Path) -> None:
    staged = candidate(store)
    path = tmp_path / "run" / layout.checkpoint(staged.metadata.name, WEIGHTS)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.chmod(0o644)
    path.write_bytes(data)
    with pytest.raises(Damaged):
        check(staged)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_the_bases_fault(store: ObjectStore, value: float) -> None:
    topology = toy_topology()
    weights = toy_weights(topology)
    values = np.frombuffer(weights["embed.weight"].raw, "<f4").reshape(10, 16).copy()
    values[4, 2] = value
    weights["embed.weight"] = tensor(values, "F32")
    staged = stage(store, publish(store, topology, weights), topology, weights, PRUNED)
    with pytest.raises(Malformed, match=f"element 66 of embed.weight is {value}; weights must be finite"):
        check(staged)


def large() -> tuple[Topology, dict[str, Tensor]]:
    """One parameter of 2,100,000 x 2 float32: 16.8 MB, so that it lies across two chunks."""
    shape = (2_100_000, 2)
    name = "fc.weight"
    group = Group(
        id="fc",
        kind=Kind.CHANNEL,
        units=shape[0],
        members=(Member(parameter=name, role="producer", axis=0),),
        gates=("fc",),
    )
    parameter = Parameter(uuid=parameter_uuid(name, shape, "toy"), shape=shape)
    values = np.arange(1, 1 + shape[0] * 2, dtype="<f4").reshape(shape)
    return Topology(model_id="toy", parameters={name: parameter}, groups=(group,)), {name: tensor(values, "F32")}


def test_an_element_across_two_chunks_is_checked_in_both(store: ObjectStore) -> None:
    topology, weights = large()
    first = 16 * 1024 * 1024
    # A header of odd length: some element has bytes on both sides of the first chunk's end.
    weights = {"x": Tensor("U8", (2,), b"ab"), **weights}
    metadata = publish(store, topology, weights, pad=1)
    header = metadata.num_bytes - 2 - topology.parameters["fc.weight"].size * ITEMSIZE["F32"]
    across = (first - header - 2) // 4
    assert (first - header - 2) % 4, "the test needs an element that is cut"
    row = across // 2
    pruned = {"fc": [row, 7, 2_099_999]}
    masks = masks_of(topology, pruned)
    good = stage(store, metadata, topology, weights, pruned, pad=1)
    assert check_bytes(store, metadata, good.candidate, masks, topology)
    second = open_store(f"{store.uri}-spoiled")
    publish(second, topology, weights, pad=1)
    values = np.frombuffer(masked(weights, masks)["fc.weight"].raw, "<f4").copy()
    bits = values.view("<u4")
    bits[across] = 0xFF000000  # only its last byte, which lies in the second chunk, is not zero
    spoiled = {**weights, "fc.weight": Tensor("F32", weights["fc.weight"].shape, values.tobytes())}
    bad = stage(second, metadata, topology, weights, pruned, copy=spoiled, pad=1)
    with pytest.raises(NotTheBase, match=rf"element \[{row}, {across % 2}\] of fc.weight is pruned but not zero"):
        check_bytes(second, metadata, bad.candidate, masks, topology)
