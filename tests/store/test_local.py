"""What is special about a folder: links, crashes, permissions, other processes."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from leyline.local import TEMPORARY, LocalStore
from leyline.open import open_store, probe
from leyline.store import CHUNK, Changed, Exists, NotFound, Refused, StoreError, Unsuitable


def start(code: str, *arguments: object, before: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    command = [*before, sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True)


WRITER = """
import sys
from leyline.local import LocalStore
from leyline.store import Exists
store, wins = LocalStore(sys.argv[1]), []
print("ready", flush=True); sys.stdin.readline()
for n in range(200):
    try:
        wins += [n] * store.put_if_absent(f"race/{n}", sys.argv[2].encode())
    except Exists:
        pass
print(*wins)
"""


def test_of_several_processes_one_wins_each_key(tmp_path: Path) -> None:
    writers = [start(WRITER, tmp_path, name) for name in range(4)]
    for writer in writers:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
    for writer in writers:
        assert writer.stdin
        writer.stdin.write("go\n")
        writer.stdin.flush()
    won = [writer.communicate(timeout=60)[0].split() for writer in writers]
    assert sorted(int(n) for wins in won for n in wins) == list(range(200))
    store = LocalStore(tmp_path)
    assert all(store.get(f"race/{n}") == b"%d" % name for name, wins in enumerate(won) for n in wins)


KILLED = """
import sys, time
from leyline.local import LocalStore
from leyline.store import CHUNK
def chunks():
    yield b"1" * CHUNK
    print("half", flush=True)
    time.sleep(60)
LocalStore(sys.argv[1]).put_stream("big", chunks(), size=2 * CHUNK)
"""


def test_a_killed_writer_leaves_nothing_visible(local: LocalStore, tmp_path: Path) -> None:
    writer = start(KILLED, tmp_path / "run")
    assert writer.stdout is not None
    assert writer.stdout.readline() == "half\n"
    writer.kill()
    writer.communicate(timeout=10)
    with pytest.raises(NotFound):
        local.head("big")
    assert list(local.list("")) == []
    assert local.put_stream("big", [b"1" * CHUNK, b"2" * CHUNK], size=2 * CHUNK)

    (left,) = (tmp_path / "run" / TEMPORARY).iterdir()
    local.now()
    assert left.exists(), "it might belong to a slow writer"
    os.utime(left, (0, 0))
    LocalStore(tmp_path / "run").now()
    assert not left.exists()


def test_nothing_is_left_in_the_temporary_folder(local: LocalStore, tmp_path: Path) -> None:
    local.put_if_absent("a", b"1")
    with pytest.raises(Exists):
        local.put_if_absent("a", b"2")
    with pytest.raises(StoreError):
        local.put_stream("b", [b"1"], size=2)
    assert list((tmp_path / "run" / TEMPORARY).iterdir()) == []


def no_link(*_: object, **__: object) -> None:
    raise OSError(errno.EPERM, "Operation not permitted")


def test_without_hard_links_it_renames_and_replaces_nothing(local: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "link", no_link)
    assert local.put_if_absent("a/b", b"1")
    assert not local.put_if_absent("a/b", b"1")
    with pytest.raises(Exists):
        local.put_if_absent("a/b", b"2")
    assert local.get("a/b") == b"1"


def test_a_file_system_with_neither_is_refused(local: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "link", no_link)
    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: object())
    with pytest.raises(Unsuitable, match="another file system"):
        local.put_if_absent("a", b"1")
    with pytest.raises(Unsuitable):
        probe(local)


READER = """
import sys
from leyline.local import LocalStore
from leyline.store import Refused
store = LocalStore(sys.argv[1])
assert store.get("a") == b"1"
store.now()
try:
    store.put_if_absent("b", b"2")
except Refused as error:
    print(error)
"""


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("unshare"), reason="needs a mount of its own")
def test_a_read_only_mount_is_refused_with_a_sentence(local: LocalStore, tmp_path: Path) -> None:
    local.put_if_absent("a", b"1")
    folder = tmp_path / "run"
    script = 'mount --bind "$0" "$0" && mount -o remount,bind,ro "$0" && exec "$@"'
    reader = start(READER, folder, before=("unshare", "--mount", "sh", "-c", script, str(folder)))
    said = reader.communicate(timeout=30)[0]
    if reader.returncode == 1 and not said:
        pytest.skip("mounting is not allowed here")
    assert "Read-only file system" in said
    assert "give this user access" in said


@pytest.mark.parametrize(
    ("code", "remedy"), [(errno.EROFS, "access"), (errno.EACCES, "access"), (errno.ENOSPC, "free some space")]
)
def test_what_the_file_system_refuses_is_refused(
    local: LocalStore, monkeypatch: pytest.MonkeyPatch, code: int, remedy: str
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(Refused, match=remedy):
        local.put_if_absent("a", b"1")


def test_a_run_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(Refused, match="is a file, not a folder"):
        LocalStore(tmp_path / "file" / "run").put_if_absent("a", b"1")


def test_a_key_below_an_object_is_refused(local: LocalStore) -> None:
    local.put_if_absent("a", b"1")
    with pytest.raises(StoreError, match="is a file, not a folder"):
        local.put_if_absent("a/b", b"1")


def test_no_symbolic_link_leads_out(local: LocalStore, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_text("s")
    local.put_if_absent("inside/a", b"1")
    (tmp_path / "run" / "door").symlink_to(outside)
    (tmp_path / "run" / "inside" / "file").symlink_to(outside / "secret")
    for key in ("door/secret", "inside/file"):
        with pytest.raises(Refused, match="symbolic link"):
            local.get(key)
    with pytest.raises(Refused):
        local.put_if_absent("door/new", b"1")
    with pytest.raises(Refused):
        local.delete("door/secret")
    assert [head.key for head in local.list("")] == ["inside/a"]
    assert [path.name for path in outside.iterdir()] == ["secret"]


def test_an_overwrite_in_place_is_noticed_by_the_pin(local: LocalStore, tmp_path: Path) -> None:
    local.put_if_absent("a", b"12345")
    pin = local.head("a").pin
    os.utime(tmp_path / "run" / "a", (1, 1))
    with pytest.raises(Changed):
        local.get_range("a", 0, 5, pin=pin)


def test_a_delete_leaves_no_empty_folders(local: LocalStore) -> None:
    local.put_if_absent("a/b/c", b"1")
    local.delete("a/b/c")
    assert local.put_if_absent("a", b"2")


def test_lists_in_the_order_of_whole_keys(local: LocalStore) -> None:
    names = ["a b", "a-b", "a.", "a/b", "a/c/d", "a0", "b"]
    for name in reversed(names):
        local.put_if_absent(name, b"")
    for n, name in enumerate(names):
        assert [head.key for head in local.list("", after=name)] == names[n + 1 :]


def test_the_probe_cleans_up_and_runs_once(local: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    probe(local)
    assert list(local.list("")) == []
    monkeypatch.setattr(LocalStore, "put_if_absent", no_link)
    probe(local)


def test_opens_a_uri_or_a_plain_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    named = tmp_path / "my run"
    for uri in (str(named), f"{named}/", named.as_uri(), f"file://localhost{named}".replace(" ", "%20"), "my run"):
        store = open_store(uri)
        assert store.uri == named.as_uri()
        store.put_if_absent("log/0/0.json", b"{}")


def test_a_path_may_go_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "project").mkdir()
    monkeypatch.chdir(tmp_path / "project")
    assert open_store("../runs//./one/").uri == (tmp_path / "runs" / "one").as_uri()


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("", "no run URI"),
        ("gs://bucket/run", "use s3://"),
        ("file://host/run", "file:///absolute"),
        ("file:///a/../b", "no run URI"),
        ("s3://bucket//run", "no run URI"),
        ("s3://bucket/a/./b", "no run URI"),
        ("s3://", "no S3 URI"),
        ("s3://Bad_Bucket/run", "no S3 URI"),
    ],
)
def test_what_is_no_run_uri_is_refused(uri: str, said: str) -> None:
    with pytest.raises(StoreError, match=said):
        open_store(uri)


def test_a_nested_or_foreign_run_is_refused(tmp_path: Path) -> None:
    open_store(str(tmp_path / "team" / "run")).put_if_absent("log/0/0.json", b"{}")
    with pytest.raises(StoreError, match="lies inside the run"):
        open_store(str(tmp_path / "team" / "run" / "inner"))
    with pytest.raises(StoreError, match="is no run, but holds run/log"):
        open_store(str(tmp_path / "team"))
    open_store(str(tmp_path / "team" / "other"))
