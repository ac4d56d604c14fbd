"""The command line on real runs: what it prints, and one sentence and an exit code for whatever goes wrong."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from emrakul.cli import COMMANDS, main
from emrakul.settings import Settings
from histories import History, packet
from leyline import layout
from leyline.envelope import SIGNING_KEY, TRUST, generate_key
from leyline.ids import cycle_name
from leyline.local import LocalStore
from leyline.store import Refused
from servers import free_ports

CYCLE = cycle_name(3, Settings().digest())


@pytest.fixture(autouse=True)
def _no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("EMRAKUL_", "AWS_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("COLUMNS", "80")


@pytest.fixture
def run(tmp_path: Path) -> History:
    """Records 2 and 3 published, 5 a commit on 3, 6 a baked checkpoint: the tip."""
    history = History(LocalStore(tmp_path / "run"))
    history.publish(100, report=packet(100, correct=90, n=100))
    history.publish(200)
    history.prune({"conv1": [1, 2]})
    history.publish(300, baked=True, report=packet(300, correct=90, n=100))
    return history


class Shell:
    """Calls the command line in this process."""

    def __init__(self, run: History, capture: pytest.CaptureFixture[str]) -> None:
        self.uri = run.store.uri
        self._capture = capture
        self.error = ""

    def __call__(self, name: str, *arguments: str, code: int = 0) -> str:
        found = main([name, self.uri, *arguments])
        out, self.error = self._capture.readouterr()
        assert found == code, (found, out, self.error)
        return out

    def json(self, name: str, *arguments: str, code: int = 0) -> dict[str, Any]:
        found = json.loads(self(name, *arguments, "--output", "json", code=code))
        assert isinstance(found, dict)
        return found


@pytest.fixture
def shell(run: History, capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(run, capsys)


# --- status, history, explain -----------------------------------------------------------------------------------------


def test_status_says_where_the_run_stands(shell: Shell) -> None:
    found = shell.json("status")
    assert (found["record"]["n"], found["tip"]["record"], found["tip"]["masks"]) == (6, 6, {"channel": 2})
    assert found["tip"]["good"]
    assert found["baseline"]["record"] == 2
    assert found["outcomes"] == {"Committed/Pruned": 1}
    assert found["trust"]["state"] == "Untrusted"
    assert "neither memory nor time" in found["note"]


def test_status_is_readable_on_eighty_columns(shell: Shell) -> None:
    text = shell("status")
    assert max(map(len, text.splitlines())) <= 80
    words = " ".join(text.split())
    assert "Untrusted" in words
    assert "masks save neither memory nor time" in words
    assert "record 6" in words


def test_status_is_trusted_only_where_signatures_are_checked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "trust"
    folder.mkdir()
    key = generate_key(tmp_path / "all.pem")
    for role in ("trainer", "operator"):
        (folder / f"{role}.pem").write_bytes((tmp_path / "all.pub.pem").read_bytes())
    signed = History(LocalStore(tmp_path / "signed"), keys=(key,))
    monkeypatch.setenv(TRUST, str(folder))
    assert Shell(signed, capsys).json("status")["trust"]["state"] == "Trusted"
    unsigned = Shell(History(LocalStore(tmp_path / "unsigned")), capsys)
    assert unsigned("status", code=5) == ""
    assert "not signed" in unsigned.error


def test_history_is_every_record_with_its_sentence(shell: Shell) -> None:
    found = shell.json("history")["records"]
    assert [row["kind"] for row in found] == ["genesis", "open", "publish", "publish", "admit", "prune", "publish"]
    assert found[5]["reason"] == "Pruned"
    assert found[5]["outcome"] == "Committed"
    assert all(row["time"].endswith("+00:00") for row in found)
    assert [row["n"] for row in shell.json("history", "--last", "2")["records"]] == [5, 6]
    text = shell("history")
    assert max(map(len, text.splitlines())) <= 80
    assert "The trainer applies the masks" in " ".join(text.split())


def test_explain_tells_why_a_unit_went(shell: Shell) -> None:
    assert shell.json("explain", CYCLE)["outcome"] == "Committed"
    assert "went" in shell("explain", CYCLE, "conv1:1")
    assert "stayed" in shell("explain", CYCLE, "conv1:3")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("c9-0000000000",), "has no cycle c9-0000000000"),
        ((CYCLE, "conv1"), "write GROUP:NUMBER"),
        ((CYCLE, "conv9:1"), "no group conv9"),
        ((CYCLE, "conv1:99"), "units 0 to 7"),
    ],
)
def test_explain_refuses_what_is_not_there(shell: Shell, arguments: tuple[str, ...], said: str) -> None:
    assert shell("explain", *arguments, code=2) == ""
    assert said in shell.error


# --- verify -----------------------------------------------------------------------------------------------------------


def test_verify_reads_everything(shell: Shell) -> None:
    found = shell.json("verify")
    assert found["ok"]
    assert (found["records"], found["pairs"], found["faults"]) == (7, 4, [])


@pytest.mark.parametrize(
    "key",
    [
        layout.checkpoint("200-0-000000c8", "model.safetensors"),
        layout.checkpoint("300-0-0000012c", layout.READY),
        layout.candidate(CYCLE, 3, "model.safetensors"),
        layout.masks(CYCLE, 3),
        layout.manifest(CYCLE, 3),
        layout.verdict(CYCLE, 3),
    ],
)
@pytest.mark.parametrize("change", ["flipped", "missing"])
def test_verify_finds_each_object_that_is_damaged(run: History, shell: Shell, key: str, change: str) -> None:
    data = run.store.get(key)
    run.store.delete(key)
    if change == "flipped":
        run.store.put_if_absent(key, data[:-1] + bytes([data[-1] ^ 1]))
    elif key == layout.verdict(CYCLE, 3):
        assert shell.json("verify")["gone"] == 1  # gc may have deleted it: nothing is loaded from it
        return
    found = shell.json("verify", code=5)
    assert not found["ok"]
    assert found["faults"]
    assert shell.error.count("\n") == 1


def test_verify_finds_a_state_that_is_not_the_logs(run: History, shell: Shell) -> None:
    key = layout.state(run.log.read(3)[0].state)
    run.store.delete(key)
    run.store.put_if_absent(key, run.store.get(layout.state(run.log.read(2)[0].state)))
    assert [fault["object"] for fault in shell.json("verify", code=5)["faults"]] == [key]


def test_verify_finds_a_record_that_was_exchanged(run: History, shell: Shell) -> None:
    key = layout.record(3)
    run.store.delete(key)
    run.store.put_if_absent(key, run.store.get(layout.record(2)))
    found = shell.json("verify", code=5)
    assert found["faults"][0]["object"] == key


# --- rollback, resume, gc ---------------------------------------------------------------------------------------------


def test_a_rollback_with_its_recovery_and_the_resume_after_it(run: History, shell: Shell) -> None:
    found = shell.json("rollback", "--to", "3", "--id", "fix-1", "--why", "the loss rose")
    assert (found["to"], found["record"], found["again"]) == (3, 7, False)
    assert "the loss rose" in found["message"]
    looks = {look["name"]: look["outcome"] for look in found["recovery"]["looks"]}
    assert looks == {"state": "passed", "model": "passed", "training": "pending", "telemetry": "passed"}
    held = shell.json("status")
    assert (held["hold"], held["tip"]["record"], held["rollback"]["recovery"]) == ("fix-1", 3, "pending")
    run.publish(400)
    resumed = shell.json("resume")
    assert {look["outcome"] for look in resumed["recovery"]["looks"]} == {"passed"}
    after = shell.json("status")
    assert (after["hold"], after["rollback"]["recovery"]) == (None, "passed")
    assert shell.json("rollback", "--to", "3", "--id", "fix-1")["again"]
    assert shell.json("status")["tip"]["record"] == 8


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("--to", "4"), 3, "record 4 is no pair"),
        (("--to", "99"), 3, "record 99 is no pair"),
        (("--to", "3", "--baseline"), 2, "exclude each other"),
        (("--to", "three"), 2, "three"),
        (("--strategy", "best"), 2, "best"),
    ],
)
def test_a_rollback_that_is_refused_moves_nothing(
    run: History, shell: Shell, arguments: tuple[str, ...], code: int, said: str
) -> None:
    assert shell("rollback", *arguments, code=code) == ""
    assert said in shell.error
    assert shell.error.count("\n") == 1
    assert run.log.tail().record.n == 6


def test_a_rollback_to_a_damaged_pair_is_refused(run: History, shell: Shell) -> None:
    run.store.delete(layout.checkpoint("200-0-000000c8", "model.safetensors"))
    shell("rollback", "--to", "3", code=5)
    assert "model.safetensors" in shell.error
    assert run.log.tail().record.n == 6


def test_resume_without_a_hold_is_refused(shell: Shell) -> None:
    shell("resume", code=3)
    assert "not held" in shell.error


def test_gc_says_first_and_then_does(run: History, shell: Shell) -> None:
    everything = ("--keep", "0", "--age", "0", "--grace", "0")
    said = shell.json("gc", "--dry-run", *everything)
    assert run.log.tail().record.n == 6
    assert said["retire"] == []  # all within the rollback depth
    assert {entry["object"].split("/")[2] for entry in said["delete"]} == {"attempts", "responses"}
    done = shell.json("gc", *everything)
    assert done["deleted"] == len(said["delete"])
    assert shell.json("gc", *everything)["deleted"] == 0
    assert shell.json("verify")["ok"]


def test_gc_refuses_a_duration_that_is_none(shell: Shell) -> None:
    shell("gc", "--grace", "soon", code=2)
    assert "write seconds as" in shell.error


# --- keygen -----------------------------------------------------------------------------------------------------------


def test_keygen_makes_a_key_and_replaces_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "operator.pem"
    assert main(["keygen", str(path), "-o", "json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert stat.S_IMODE(Path(said["private"]).stat().st_mode) == 0o600
    assert Path(said["public"]).exists()
    before = path.read_bytes()
    assert main(["keygen", str(path)]) == 4
    assert "no key is ever replaced" in capsys.readouterr().err
    assert path.read_bytes() == before


# --- what goes wrong everywhere ---------------------------------------------------------------------------------------

READING = ("status", "history", "verify", "rollback", "resume", "gc")


def failed(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """The exit code and the one sentence."""
    code = main(arguments)
    out, error = capsys.readouterr()
    assert out == ""
    assert error.count("\n") == 1, error
    assert error.startswith("emrakul: ")
    assert "Traceback" not in error
    return code, error


@pytest.mark.parametrize("name", READING)
def test_a_missing_run(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, error = failed(capsys, name, str(tmp_path / "nothing"))
    assert (code, "holds no run" in error) == (4, True)
    assert not (tmp_path / "nothing").exists()


@pytest.mark.parametrize("name", READING)
def test_a_scheme_that_is_no_store(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, error = failed(capsys, name, "ftp://host/run")
    assert (code, "ftp://" in error) == (4, True)


def test_a_run_inside_a_run(run: History, capsys: pytest.CaptureFixture[str]) -> None:
    code, error = failed(capsys, "status", f"{run.store.uri}/checkpoints")
    assert (code, "lies inside the run" in error) == (4, True)


def test_a_store_that_does_not_answer(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    keys = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_MAX_ATTEMPTS": "1"}
    command = ["status", "s3://runs/mine", "--endpoint", f"http://127.0.0.1:{port}"]
    done = subprocess.run(
        [sys.executable, "-c", "import sys; from emrakul.cli import main; sys.exit(main())", *command],
        env={**os.environ, **keys},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 75
    assert done.stderr.count("\n") == 1
    assert "does not answer" in done.stderr


def test_a_store_without_credentials_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    code, error = failed(capsys, "status", "s3://runs/mine", "--endpoint", "http://127.0.0.1:9")
    assert (code, "credentials" in error) == (75, True)


def test_a_folder_that_may_not_be_read(run: History, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path(run.store.uri.removeprefix("file://")) / "log"
    moved = folder.with_name("moved")
    folder.rename(moved)
    folder.symlink_to("/etc")
    with pytest.raises(Refused):
        run.store.get(layout.record(0))
    code, error = failed(capsys, "history", run.store.uri)
    assert code in (4, 75), error


def test_a_trust_folder_that_is_empty(
    run: History, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(TRUST, "/nowhere")
    code, error = failed(capsys, "status", run.store.uri)
    assert (code, "/nowhere" in error) == (4, True)


def test_a_signing_key_that_is_missing(
    run: History, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(SIGNING_KEY, "/nowhere.pem")
    code, error = failed(capsys, "resume", run.store.uri)
    assert (code, "/nowhere.pem" in error) == (4, True)


def test_a_state_that_is_damaged(run: History, capsys: pytest.CaptureFixture[str]) -> None:
    key = layout.state(run.log.tail().record.state)
    run.store.delete(key)
    run.store.put_if_absent(key, b"{}")
    code, error = failed(capsys, "status", run.store.uri)
    assert (code, "emrakul verify" in error) == (5, True)


@pytest.mark.parametrize(
    "arguments", [("stauts",), ("status",), ("status", "x", "--nothing"), ("status", "x", "-o", "xml")]
)
def test_usage_is_one_sentence(arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert failed(capsys, *arguments)[0] == 2


def test_debug_shows_where_it_comes_from(tmp_path: Path) -> None:
    from leyline.log import NoRun

    with pytest.raises(NoRun):
        main(["status", str(tmp_path), "--debug"])


def test_a_reader_that_has_seen_enough_is_no_error(run: History) -> None:
    entry = [sys.executable, "-c", "import sys; from emrakul.cli import main; sys.exit(main())"]
    command = [*entry, "history", run.store.uri, "-o", "json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.close()
    _, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (0, "")


def test_help_lists_every_command_and_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in COMMANDS)
    documented = Path(__file__).parents[2] / "docs" / "cli.md"
    for code in ("0", "1", "2", "3", "4", "5", "6", "7", "75", "130"):
        assert f"\n    {code} " in text
        assert f"\n| {code} |" in documented.read_text()


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_and_json(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "--help"]) == 0
    text = capsys.readouterr().out
    # the operator answers nobody: what it says for machines is its log
    assert ("--log-format" if name == "operator" else "--output") in text
    assert f"`emrakul {name}" in (Path(__file__).parents[2] / "docs" / "cli.md").read_text()


def test_it_starts_fast_and_without_boto3_numpy_or_torch() -> None:
    code = (
        "import sys; from emrakul.cli import main; main(['--help']); import emrakul.cli.status, leyline.open; "
        "heavy = {'boto3', 'numpy', 'torch', 'rich.console', 'yaml'} & set(sys.modules); sys.exit(' '.join(heavy) or 0)"
    )
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert time.monotonic() - began < 10  # 0.4 s on a quiet machine
