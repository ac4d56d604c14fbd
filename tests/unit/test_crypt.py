from __future__ import annotations

import base64
from pathlib import Path

import pytest

from leyline.crypt import (
    FRAME,
    DataKey,
    KeyRing,
    SealedObject,
    WrongKey,
    decrypt,
    encrypt,
    sealed_size,
)
from leyline.digest import digest_bytes
from leyline.local import LocalStore
from leyline.store import CHUNK, Damaged, StoreError

KEY, CHECKPOINT = "checkpoints/400-1-ab/importance/0", "400-1-ab"
OLD, NEW = DataKey(b"o" * 32), DataKey(b"n" * 32)
HEADER, STEP = 80, FRAME + 16


def sealed(plain: bytes, *, key: str = KEY, checkpoint: str = CHECKPOINT, ring: KeyRing | None = None) -> bytes:
    chunks = [plain[at : at + CHUNK] for at in range(0, len(plain), CHUNK)]
    ring = ring or KeyRing(OLD)
    return b"".join(encrypt(chunks, digest=digest_bytes(plain), key=key, checkpoint=checkpoint, ring=ring))


def opened(data: bytes, *, key: str = KEY, checkpoint: str = CHECKPOINT, ring: KeyRing | None = None) -> bytes:
    return decrypt(data, key=key, checkpoint=checkpoint, ring=ring or KeyRing(OLD))


def plaintext(size: int) -> bytes:
    return (bytes(range(251)) * (size // 251 + 1))[:size]


PLAIN = plaintext(2 * FRAME + 5)


@pytest.mark.parametrize("size", [0, 1, FRAME - 1, FRAME, FRAME + 1, CHUNK, CHUNK + 1])
def test_what_is_encrypted_decrypts(size: int) -> None:
    plain = plaintext(size)
    data = sealed(plain)
    assert len(data) == sealed_size(size)
    assert opened(data) == plain
    assert len(plain) < 64 or plain[:64] not in data


def test_a_restarted_writer_produces_the_same_bytes() -> None:
    assert sealed(PLAIN) == sealed(PLAIN)


def test_no_two_messages_share_a_key_and_nonce() -> None:
    """Else the first bytes of equal plaintext would be equal: one bit at the end, another place, another key."""
    other = PLAIN[:-1] + b"\0"
    variants = [
        sealed(PLAIN),
        sealed(other),
        sealed(PLAIN, key="checkpoints/400-1-ab/importance/1"),
        sealed(PLAIN, checkpoint="500-1-cd"),
        sealed(PLAIN, ring=KeyRing(NEW)),
        sealed(PLAIN + b"\0"),
    ]
    assert len({data[HEADER : HEADER + 64] for data in variants}) == len(variants)


def test_names_cannot_be_shifted_into_each_other() -> None:
    with pytest.raises(Damaged):
        opened(sealed(PLAIN, key="ab", checkpoint="c"), key="a", checkpoint="bc")


def test_it_is_cut_for_put_stream(tmp_path: Path) -> None:
    plain = plaintext(CHUNK + 3 * FRAME + 17)
    chunks = [plain[:CHUNK], plain[CHUNK:]]
    store = LocalStore(tmp_path)
    pieces = encrypt(chunks, digest=digest_bytes(plain), key=KEY, checkpoint=CHECKPOINT, ring=KeyRing(OLD))
    store.put_stream(KEY, pieces, size=sealed_size(len(plain)))

    sealed_object = SealedObject(store, KEY, checkpoint=CHECKPOINT, ring=KeyRing(OLD))
    assert sealed_object.size == len(plain)
    for start, stop in [(0, 0), (0, 1), (FRAME - 1, FRAME + 1), (FRAME, 2 * FRAME), (CHUNK - 5, len(plain))]:
        assert sealed_object.read(start, stop) == plain[start:stop]
    with pytest.raises(Damaged, match="were asked for"):
        sealed_object.read(0, len(plain) + 1)


def frames(data: bytes) -> list[bytes]:
    return [data[:HEADER], *(data[at : at + STEP] for at in range(HEADER, len(data), STEP))]


def swap(data: bytes) -> bytes:
    header, first, second, *rest = frames(data)
    return b"".join([header, second, first, *rest])


def graft(data: bytes) -> bytes:
    """A frame of the same number from another object under the same data key."""
    header, _, *rest = frames(data)
    return b"".join([header, frames(sealed(PLAIN, key="other"))[1], *rest])


def flip(at: int) -> object:
    return lambda data: data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def shorten(data: bytes) -> bytes:
    """The last frame cut off, and the size in the header made to fit."""
    cut = data[: HEADER + 2 * STEP]
    return cut[: HEADER - 8] + (2 * FRAME).to_bytes(8, "big") + cut[HEADER:]


@pytest.mark.parametrize(
    "tamper",
    [
        swap,
        graft,
        shorten,
        flip(0),
        flip(24),
        flip(64),
        flip(HEADER - 1),
        flip(HEADER),
        flip(HEADER + STEP - 1),
        flip(sealed_size(len(PLAIN)) - 1),
        lambda data: data[:-1],
        lambda data: data + b"\0",
        lambda data: data[: HEADER + 2 * STEP],
        lambda data: data[: HEADER - 1],
        lambda data: b"",
    ],
)
def test_tampered_truncated_and_swapped_frames_are_damaged(tamper, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    data = tamper(sealed(PLAIN))
    with pytest.raises(Damaged, match=KEY):
        opened(data)
    store = LocalStore(tmp_path)
    store.put_if_absent(KEY, data)
    with pytest.raises(Damaged, match=KEY):
        SealedObject(store, KEY, checkpoint=CHECKPOINT, ring=KeyRing(OLD)).read(0, len(PLAIN))


def test_another_object_or_checkpoint_does_not_open() -> None:
    data = sealed(PLAIN)
    for place in ({"key": "other"}, {"checkpoint": "other"}):
        with pytest.raises(Damaged):
            opened(data, **place)  # type: ignore[arg-type]


def test_a_wrong_key_says_so_and_is_no_damage() -> None:
    with pytest.raises(WrongKey, match=f"{OLD.id.hex()[:12]}.*{NEW.id.hex()[:12]}") as caught:
        opened(sealed(PLAIN), ring=KeyRing(NEW))
    assert not isinstance(caught.value, Damaged)
    assert isinstance(caught.value, StoreError)


def test_rotation_reads_the_old_and_writes_the_new() -> None:
    rotated = KeyRing(NEW, (OLD,))
    assert opened(sealed(PLAIN), ring=rotated) == PLAIN
    fresh = sealed(PLAIN, ring=rotated)
    assert opened(fresh, ring=KeyRing(NEW)) == PLAIN
    with pytest.raises(WrongKey):
        opened(fresh, ring=KeyRing(OLD))


def test_a_digest_of_other_bytes_encrypts_nothing() -> None:
    pieces = encrypt([b"other"], digest=digest_bytes(b"bytes"), key=KEY, checkpoint=CHECKPOINT, ring=KeyRing(OLD))
    with pytest.raises(Damaged, match="write it again"):
        next(pieces)


def test_keys_come_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EMRAKUL_DATA_KEY", raising=False)
    assert KeyRing.from_environment() is None
    new, old = (base64.b64encode(key.secret).decode() for key in (NEW, OLD))
    monkeypatch.setenv("EMRAKUL_DATA_KEY", new)
    assert KeyRing.from_environment() == KeyRing(NEW)
    (tmp_path / "keys").write_text(f"{new}\n{old}\n")
    monkeypatch.setenv("EMRAKUL_DATA_KEY", str(tmp_path / "keys"))
    assert KeyRing.from_environment() == KeyRing(NEW, (OLD,))


@pytest.mark.parametrize(
    ("value", "said"),
    [("not base64!", "neither"), ("c2hvcnQ=", "32 bytes"), ("/no/file", "cannot be read"), (" ", "without a key")],
)
def test_keys_that_cannot_be_meant_are_refused(value: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMRAKUL_DATA_KEY", value)
    with pytest.raises(WrongKey, match=said):
        KeyRing.from_environment()


def test_a_key_is_never_printed() -> None:
    assert "oooo" not in repr(KeyRing(OLD))
