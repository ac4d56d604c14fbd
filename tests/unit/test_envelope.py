from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from leyline.envelope import (
    KeyFileError,
    SigningKey,
    Trust,
    Untrusted,
    generate_key,
    is_signed,
    open_envelope,
    seal,
    signing_keys_from_environment,
    trust_from_environment,
)
from leyline.store import Damaged

KIND = "application/vnd.emrakul.record+json"
TRAINER = SigningKey(Ed25519PrivateKey.from_private_bytes(b"t" * 32))
OPERATOR = SigningKey(Ed25519PrivateKey.from_private_bytes(b"o" * 32))
TRUST = Trust({"trainer": (TRAINER.private.public_key(),), "operator": (OPERATOR.private.public_key(),)})


def changed(envelope: bytes, **fields: object) -> bytes:
    return json.dumps({**json.loads(envelope), **fields}).encode()


@given(st.binary(max_size=200), st.text(max_size=20))
def test_what_is_sealed_opens_and_sealing_is_deterministic(payload: bytes, kind: str) -> None:
    sealed = seal(payload, kind, [TRAINER])
    assert sealed == seal(payload, kind, [TRAINER])
    assert open_envelope(sealed, kind, TRUST, roles=["trainer"]) == payload


def test_the_signature_is_that_of_the_dsse_specification() -> None:
    """PAE from the specification's own test vector."""
    envelope = json.loads(seal(b"hello world", "http://example.com/HelloWorld", [TRAINER]))
    signature = base64.b64decode(envelope["signatures"][0]["sig"])
    TRAINER.private.public_key().verify(signature, b"DSSEv1 29 http://example.com/HelloWorld 11 hello world")
    assert envelope["payload"] == base64.b64encode(b"hello world").decode()


def test_without_trust_signed_and_unsigned_open() -> None:
    unsigned, signed = seal(b"p", KIND, []), seal(b"p", KIND, [TRAINER])
    assert open_envelope(unsigned, KIND, None, roles=["trainer"]) == b"p"
    assert open_envelope(signed, KIND, None, roles=["trainer"]) == b"p"
    assert (is_signed(unsigned), is_signed(signed)) == (False, True)


def test_with_trust_an_unsigned_envelope_is_refused() -> None:
    with pytest.raises(Untrusted, match=r"record 7 is not signed .* trainer .*none"):
        open_envelope(seal(b"p", KIND, []), KIND, TRUST, roles=["trainer"], name="record 7")


def test_a_key_counts_only_for_its_role() -> None:
    sealed = seal(b"p", KIND, [TRAINER])
    with pytest.raises(Untrusted, match="operator"):
        open_envelope(sealed, KIND, TRUST, roles=["operator"])
    assert open_envelope(sealed, KIND, TRUST, roles=["operator", "trainer"]) == b"p"


def test_one_good_signature_among_others_is_enough() -> None:
    stranger = SigningKey(Ed25519PrivateKey.generate())
    sealed = seal(b"p", KIND, [stranger, OPERATOR])
    assert sealed == seal(b"p", KIND, [OPERATOR, stranger])
    assert open_envelope(sealed, KIND, TRUST, roles=["operator"]) == b"p"


def test_the_key_id_is_only_a_hint() -> None:
    sealed = json.loads(seal(b"p", KIND, [TRAINER]))
    (signature,) = sealed["signatures"]
    unnamed = changed(json.dumps(sealed).encode(), signatures=[{"sig": signature["sig"]}])
    assert open_envelope(unnamed, KIND, TRUST, roles=["trainer"]) == b"p"
    renamed = changed(json.dumps(sealed).encode(), signatures=[{**signature, "keyid": OPERATOR.id}])
    with pytest.raises(Untrusted):
        open_envelope(renamed, KIND, TRUST, roles=["trainer", "operator"])


@pytest.mark.parametrize(
    "fields",
    [
        {"payload": base64.b64encode(b"q").decode()},
        {"payloadType": "other"},
        {"signatures": [{"keyid": TRAINER.id, "sig": base64.b64encode(bytes(64)).decode()}]},
        {"signatures": [{"keyid": TRAINER.id, "sig": ""}]},
    ],
)
def test_tampering_is_refused(fields: dict[str, object]) -> None:
    with pytest.raises(Untrusted):
        open_envelope(changed(seal(b"p", KIND, [TRAINER]), **fields), KIND, TRUST, roles=["trainer"])


def test_a_signature_for_another_type_does_not_carry_over() -> None:
    sealed = changed(seal(b"p", "other", [TRAINER]), payloadType=KIND)
    with pytest.raises(Untrusted):
        open_envelope(sealed, KIND, TRUST, roles=["trainer"])


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{}",
        b"[]",
        b"\xff",
        changed(seal(b"p", KIND, []), payload="not base64!"),
        changed(seal(b"p", KIND, []), extra=1),
        changed(seal(b"p", KIND, []), signatures=[{"sig": ""}] * 17),
    ],
)
def test_what_is_no_envelope_is_damaged(data: bytes) -> None:
    with pytest.raises(Damaged, match="the envelope"):
        open_envelope(data, KIND, None, roles=["trainer"])


def test_keys_come_from_files_named_in_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EMRAKUL_SIGNING_KEY", raising=False)
    monkeypatch.delenv("EMRAKUL_TRUST", raising=False)
    assert signing_keys_from_environment() == ()
    assert trust_from_environment() is None

    trust = tmp_path / "trust"
    trust.mkdir()
    first, second = (generate_key(tmp_path / f"trainer-{n}.pem") for n in (1, 2))
    for n in (1, 2):
        (tmp_path / f"trainer-{n}.pub.pem").rename(trust / f"trainer-{n}.pub.pem")
    monkeypatch.setenv("EMRAKUL_SIGNING_KEY", str(tmp_path / "trainer-2.pem"))
    monkeypatch.setenv("EMRAKUL_TRUST", str(trust))
    (key,) = signing_keys_from_environment()
    assert key.id == second.id != first.id
    sealed = seal(b"p", KIND, [key])
    assert open_envelope(sealed, KIND, trust_from_environment(), roles=["trainer"]) == b"p"


def test_a_private_key_is_for_its_owner_and_is_never_replaced(tmp_path: Path) -> None:
    path = tmp_path / "trainer.pem"
    generate_key(path)
    assert path.stat().st_mode & 0o777 == 0o600
    before = path.read_bytes()
    with pytest.raises(KeyFileError, match="no key is ever replaced"):
        generate_key(path)
    assert path.read_bytes() == before


def test_key_files_that_cannot_be_meant_are_refused(tmp_path: Path) -> None:
    with pytest.raises(KeyFileError, match="holds no public key"):
        Trust.from_folder(tmp_path / "nowhere")
    with pytest.raises(KeyFileError, match="cannot be read"):
        SigningKey.from_pem(tmp_path / "nowhere.pem")
    generate_key(tmp_path / "trainer.pem")
    with pytest.raises(KeyFileError, match="is a private key"):
        Trust.from_folder(tmp_path)
    with pytest.raises(KeyFileError, match="no unencrypted private key"):
        SigningKey.from_pem(tmp_path / "trainer.pub.pem")
    (tmp_path / "trainer.pem").rename(tmp_path / "aside")
    (tmp_path / "someone.pem").write_text("x")
    with pytest.raises(KeyFileError, match="names no role"):
        Trust.from_folder(tmp_path)
    (tmp_path / "someone.pem").rename(tmp_path / "worker.pem")
    with pytest.raises(KeyFileError, match="no public key in PEM"):
        Trust.from_folder(tmp_path)


def test_only_ed25519_keys_are_taken(tmp_path: Path) -> None:
    key = generate_private_key(SECP256R1())
    (tmp_path / "other").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    (tmp_path / "worker.pem").write_bytes(
        key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    with pytest.raises(KeyFileError, match="not Ed25519"):
        SigningKey.from_pem(tmp_path / "other")
    with pytest.raises(KeyFileError, match="not Ed25519"):
        Trust.from_folder(tmp_path)
