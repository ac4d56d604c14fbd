"""Checkpoints of odd make through all workers of whole cycles: tiny, empty, scalar and huge tensors, odd names."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from safetensors import SafetensorError
from safetensors.torch import load

import builders
from builders import MODEL_ID, Run, Tensor
from emrakul.core.snapshot import Snapshot
from emrakul.settings import Settings
from leyline import layout
from leyline.ids import parameter_uuid
from leyline.local import LocalStore
from leyline.store import ObjectStore
from leyline.tensors import ITEMSIZE, parse_header
from leyline.topology import Group, Kind, Member, Parameter, Topology
from whole import BY_MAGNITUDE, SINGLE_WEIGHTS, committed, cycle, gone, masks_of_cycle, publish

METHODS = pytest.mark.parametrize("text", [BY_MAGNITUDE, SINGLE_WEIGHTS], ids=["structured", "basic"])

ODD = [
    "", " ", "a b", "a/b", "/", "a//b", "..", "../../etc/passwd", "a@0", "@", "a@0/mask", "weight/a", "group/g",
    "norm/a@0", "a\\b", "a\"b'c", "{}", "a.b[0]", "tab\there", "line\nbreak", "nul\0byte", "\x7f\x1b[31m", "ümläut",
    "e\u0301", "é", "日本語", "🙂", "\u202eright", "a" * 4000, "None", "true", "1", "-1", "a,b;c", "%2e%2e", "$HOME",
    "`id`", "x.exp_avg", "step", "x/step", "__proto__", "a\u2028b", "-", "--help", "*", "?", "~", "#",
]  # fmt: skip
"""Names that somebody's parser, path, shell or key would trip over."""


def parameters(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Parameter]:
    return {name: Parameter(uuid=parameter_uuid(name, s, MODEL_ID), shape=s) for name, s in shapes.items()}


def rows_of(names: list[str], units: int) -> Group:
    """All these as the producers of one group of `units` rows."""
    members = tuple(Member(parameter=name, role="producer", axis=0) for name in names)
    return Group(id="rows", kind=Kind.CHANNEL, units=units, members=members, gates=("x",))


def normal(shapes: Mapping[str, tuple[int, ...]], dtype: str = "F32") -> dict[str, Tensor]:
    random = np.random.default_rng(1)
    return {name: builders.tensor(random.normal(size=shape), dtype) for name, shape in shapes.items()}


def raw_of(store: ObjectStore, key: str) -> dict[str, bytes]:
    data = store.get(key)
    return {name: data[e.start : e.stop] for name, e in parse_header(data, len(data), name=key)[0].items()}


def check(store: ObjectStore, run: Run, ended: Snapshot) -> int:
    """The candidate is the base with zeroes where the cycle's masks say; how many elements they are."""
    base = committed(ended)
    dead = gone(masks_of_cycle(store, ended), run.topology)
    assert dead
    for path in run.metadata.weights:
        if path.endswith(".json"):
            continue
        copied = raw_of(store, layout.candidate(ended.cycle, base, path))
        for name, raw in raw_of(store, run.prefix + path).items():
            values = np.frombuffer(raw, f"<u{ITEMSIZE[run.weights[name].dtype]}").copy()
            if name in dead:
                values[dead[name]] = 0
            assert copied[name] == values.tobytes(), name
    return sum(int(bits.sum()) for bits in dead.values())


@pytest.mark.slow
@METHODS
@pytest.mark.parametrize("shards", [1, 3])
def test_ten_thousand_tiny_tensors(tmp_path: Path, text: str, shards: int) -> None:
    shapes = {f"layers.{number}.weight": (4, 1 + number % 3) for number in range(10_000)}
    topology = Topology(model_id=MODEL_ID, parameters=parameters(shapes), groups=(rows_of(list(shapes), 4),))
    store = LocalStore(tmp_path)
    run = publish(store, topology=topology, weights=normal(shapes), shards=shards)
    wider = text.replace("0.15", "0.25")  # one of four rows, and one of four weights of the smallest tensor
    loose = wider + "  safety_constraints: {min_channel_retention: 0.5}\n"
    ended = cycle(store, Settings.from_yaml(loose), workers=2)
    assert check(store, run, ended) == sum(width for _, width in shapes.values())


@METHODS
def test_names_of_every_odd_character(tmp_path: Path, text: str) -> None:
    names = [f"{number}{name}" if number % 2 else name for number, name in enumerate(ODD)] + ODD
    shapes = dict.fromkeys(names, (10, 3))
    topology = Topology(model_id=MODEL_ID, parameters=parameters(shapes), groups=(rows_of(list(shapes), 10),))
    store = LocalStore(tmp_path)
    slots = {f"{name}/{slot}": one for name, one in normal(shapes).items() for slot in ("exp_avg", "m")}
    run = publish(store, topology=topology, weights=normal(shapes, "BF16"), slots=slots)
    ended = cycle(store, Settings.from_yaml(text), workers=2)
    pruned = check(store, run, ended)
    assert pruned == (3 * len(shapes) if text is BY_MAGNITUDE else len(shapes) * 30 * 15 // 100)
    moments = raw_of(store, layout.candidate(ended.cycle, committed(ended), "optimizer.safetensors"))
    dead = gone(masks_of_cycle(store, ended), topology)
    for name, slot in itertools.product(dead, ("exp_avg", "m")):
        assert (np.frombuffer(moments[f"{name}/{slot}"], "<f4")[dead[name]] == 0).all(), (name, slot)


@METHODS
def test_an_empty_and_a_zero_dimensional_tensor(tmp_path: Path, text: str) -> None:
    shapes: dict[str, tuple[int, ...]] = {
        "a": (20, 4), "empty.first": (0, 4), "empty.last": (20, 0), "nothing": (0,), "scalar": (), "one": (1,),
        "cube": (1, 1, 1),
    }  # fmt: skip
    topology = Topology(model_id=MODEL_ID, parameters=parameters(shapes), groups=(rows_of(["a", "empty.last"], 20),))
    store = LocalStore(tmp_path)
    run = publish(store, topology=topology, weights=normal(shapes))
    assert check(store, run, cycle(store, Settings.from_yaml(text), workers=2)) == 12


@METHODS
def test_half_a_surrogate_in_a_name_is_refused_as_its_own_loader_does(tmp_path: Path, text: str) -> None:
    """JSON can write what UTF-8 cannot."""
    weights = builders.toy_weights(builders.toy_topology())
    weights["lone\ud800surrogate"] = weights["scale"]
    with pytest.raises(SafetensorError, match="invalid JSON in header"):
        load(builders.safetensors(weights))
    store = LocalStore(tmp_path)
    publish(store, weights=weights)
    ended = cycle(store, Settings.from_yaml(text)).end
    assert ended is not None and ended.reason == "InvalidInput"
    assert "model.safetensors: the header holds text that is no Unicode (half a surrogate pair)" in ended.message
