"""`emrakul convert`: a file from before torch 1.6 becomes safetensors, or there is no file."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import stored
from emrakul.cli import main
from emrakul.cli.errors import DONE, INVALID
from leyline import exits


class Canary:
    """Unpickled, it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> object:
        return os.mkdir, (self.path,)


def written(folder: Path, what: object, **how: object) -> tuple[str, str]:
    source, target = folder / "old.pt", folder / "new.safetensors"
    source.write_bytes(stored.saved(what, _use_new_zipfile_serialization=False, **how))
    return str(source), str(target)


def test_the_weights_are_the_same(tmp_path: Path) -> None:
    wide = torch.randn(5, 9)
    weights = {
        "turned": torch.arange(6.0).reshape(2, 3).t(),
        "columns": wide[:, 2:4],
        "half": torch.randn(7).bfloat16(),
        "parameter": torch.nn.Parameter(torch.randn(3)),
        "scalar": torch.tensor(3),
        "empty": torch.zeros(0, 4),
        "codes": torch.arange(5, dtype=torch.int8),
        "tied": wide,
    }
    source, target = written(tmp_path, {"epoch": 3, "state_dict": weights})
    assert main(["convert", source, target]) == DONE
    found = load_file(target)
    assert set(found) == set(weights)
    for name, one in weights.items():
        assert (found[name].dtype, found[name].shape) == (one.dtype, one.shape)
        assert torch.equal(found[name], one), name


@pytest.mark.parametrize(
    ("what", "sentence"),
    [
        (lambda folder: Canary(folder / "canary"), "posix.mkdir"),
        (lambda folder: {"a": torch.ones(2, dtype=torch.complex128)}, "C128, which safetensors cannot hold"),
        (lambda folder: {"a": torch.ones(1).expand(10**12)}, "they are views of the same few values"),
        (lambda folder: dict.fromkeys(map(str, range(100)), torch.ones(10**5)), "views of the same few values"),
    ],
)
def test_what_is_refused_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], what: object, sentence: str
) -> None:
    assert callable(what)
    source, target = written(tmp_path, what(tmp_path))
    assert main(["convert", source, target]) == INVALID
    assert sentence in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["old.pt"]


GREEDY = """
import sys
import kasmina.convert as convert

def greedy(source, target, *, name):
    target.write(b"half")
    {what}
    return 0

convert.convert = greedy
sys.exit(convert.main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("what", "sentence"),
    [("bytearray(1_500_000_000)", "out of memory"), ("[open('/dev/null') for _ in range(20)]", "Too many open files")],
)
def test_the_process_has_no_means(tmp_path: Path, what: str, sentence: str) -> None:
    (tmp_path / "old.pt").write_bytes(b"")
    command = [sys.executable, "-c", GREEDY.format(what=what), str(tmp_path / "old.pt"), str(tmp_path / "new")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == exits.BAD_INPUT
    assert sentence in done.stderr
    assert not (tmp_path / "new").exists()


def test_limits_that_are_lower_already_stay(tmp_path: Path) -> None:
    def low() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (12, 12))

    source, target = written(tmp_path, {"a": torch.ones(2)})
    subprocess.run([sys.executable, "-m", "kasmina.convert", source, target], preexec_fn=low, check=True)
    assert load_file(target)["a"].tolist() == [1, 1]


def test_a_new_file_needs_no_conversion_and_nothing_is_replaced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    new = tmp_path / "new.pt"
    new.write_bytes(stored.saved({"a": torch.ones(2)}))
    assert main(["convert", str(new), str(tmp_path / "target")]) == INVALID
    assert "it is read as it is" in capsys.readouterr().err
    source, target = written(tmp_path, {"a": torch.ones(2)})
    Path(target).write_text("mine")
    assert main(["convert", source, target]) == INVALID
    assert "nothing is ever replaced" in capsys.readouterr().err
    assert Path(target).read_text() == "mine"
