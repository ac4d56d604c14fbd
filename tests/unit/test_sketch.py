"""Count-Min: never below the truth, sized by epsilon and delta, dense where dense is not bigger, the same anywhere."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kasmina import sketch
from kasmina.fisher import WeightSums
from leyline.topology import Parameter, Topology

torch.set_num_threads(1)


def filled(values: list[torch.Tensor], shape: tuple[int, int], *, decay: float, uuid: str = "u") -> np.ndarray:
    table = torch.zeros(shape)
    index = torch.arange(len(values[0]))
    for value in values:
        sketch.update(table, value, index, uuid, decay=decay)
    return table.numpy()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 3000), st.sampled_from([16, 64, 256]), st.integers(1, 5))
def test_an_estimate_is_never_below_the_truth(seed: int, n: int, cells: int, rows: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    steps = [torch.rand(n, generator=generator) ** 8 for _ in range(3)]
    truth = torch.zeros(n)
    for value in steps:
        truth = truth * 0.5 + value
    table = filled(steps, (rows, cells), decay=0.5)
    estimated = sketch.estimate(table, 0, n, "u")
    assert (estimated >= truth.numpy() - 1e-6).all()
    assert estimated.max() <= 2 * max(float(v.max()) for v in steps)  # and never above what the largest could give


def test_with_room_enough_it_is_exact_and_ranges_fit_together() -> None:
    values = torch.rand(100, generator=torch.Generator().manual_seed(0))
    table = filled([values], (5, 1 << 14), decay=1.0)
    np.testing.assert_array_equal(sketch.estimate(table, 0, 100, "u"), values.numpy())
    np.testing.assert_array_equal(sketch.estimate(table, 40, 60, "u"), values.numpy()[40:60])
    assert not np.array_equal(sketch.estimate(table, 0, 100, "another parameter"), values.numpy())


def test_the_error_bound_holds() -> None:
    """At most epsilon * ||F||_1 too high, but for a share of delta (the conservative update is far below it)."""
    n, epsilon, delta = 200_000, 1e-3, 0.01
    shape = sketch.size(n, epsilon=epsilon, delta=delta)
    assert shape == (5, 4096)
    values = torch.rand(n, generator=torch.Generator().manual_seed(0)) ** 16
    error = sketch.estimate(filled([values], shape, decay=1.0), 0, n, "u") - values.numpy()
    assert (error > epsilon * float(values.sum())).mean() <= delta
    assert error.max() > 0  # it is a sketch


def test_size_is_a_power_of_two_and_dense_where_that_is_not_bigger() -> None:
    rows, cells = sketch.size(10**9) or (0, 0)
    assert rows == 5
    assert cells >= np.e / sketch.EPSILON > cells / 2
    assert cells & (cells - 1) == 0
    assert sketch.size(rows * cells) is None
    assert sketch.size(rows * cells + 1) == (rows, cells)
    with pytest.raises(ValueError, match="must lie between 0 and 1"):
        sketch.size(10, epsilon=0)


def test_the_hash_is_the_same_in_every_process_and_in_numpy_and_torch() -> None:
    index = np.arange(10**6, 10**6 + 64, dtype=np.int64)
    seed = sketch.seeds("u", 2)[1]
    cells = sketch.cells_of(index, seed, 1024)
    assert np.array_equal(cells, sketch.cells_of(torch.from_numpy(index), seed, 1024).numpy())
    assert cells.min() >= 0
    assert cells.max() < 1024
    code = (
        "import numpy as np; from kasmina import sketch; i = np.arange(10**6, 10**6 + 64, dtype=np.int64);"
        "print(sketch.cells_of(i, sketch.seeds('u', 2)[1], 1024).tolist())"
    )
    for hash_seed in ("1", "2"):
        out = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": hash_seed}
        )
        assert out.stdout.strip() == str(cells.tolist())


def test_a_big_parameter_is_sketched_and_a_small_one_beside_it_is_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sketch, "EPSILON", 0.01)
    parameters = {
        "big": Parameter(uuid="b", shape=(200, 50)),
        "small": Parameter(uuid="s", shape=(10,)),
    }
    topology = Topology(model_id="m", parameters=parameters)
    monkeypatch.setattr(sketch.size, "__kwdefaults__", {"epsilon": 0.01, "delta": 0.01})
    sums, exact = WeightSums(topology, "count-min", 0.9), WeightSums(topology, "dense", 0.9)
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        new = {"big": torch.rand(200, 50, generator=generator), "small": torch.rand(10, generator=generator)}
        sums.add(new)
        exact.add(new)
    arrays, truth = sums.arrays(), exact.arrays()
    assert arrays["weight/big"].shape == (5, 512)
    np.testing.assert_array_equal(arrays["weight/small"], truth["weight/small"])
    estimated = sketch.estimate(arrays["weight/big"], 0, 10_000, "b")
    assert (estimated >= truth["weight/big"].ravel() - 1e-6).all()
    said = sums.said()
    assert said is not None
    assert "1 parameters in 10,240 bytes" in said
    assert "10 weights of smaller parameters dense" in said
    again = WeightSums(topology, "count-min", 0.9)
    again.load_state(sums.state(), {name: torch.device("cpu") for name in parameters})
    for both in (sums, again):
        both.add({"big": torch.ones(200, 50)})
    np.testing.assert_array_equal(again.arrays()["weight/big"], sums.arrays()["weight/big"])
