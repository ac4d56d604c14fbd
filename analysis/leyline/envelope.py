"""Signed envelopes: DSSE v1 (https://github.com/secure-systems-lab/dsse) with Ed25519.

The signature covers payload type and payload, not their JSON, so nobody has to canonicalise before verifying.
Ed25519 is deterministic: a restarted writer seals the same payload into the same bytes.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, Self, get_args

import rfc8785
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from leyline.store import Damaged, StoreError

Role = Literal["trainer", "operator", "worker", "validator"]
ROLES: tuple[Role, ...] = get_args(Role)

SIGNING_KEY = "EMRAKUL_SIGNING_KEY"
"""Environment: the PEM file of this process's private key."""
TRUST = "EMRAKUL_TRUST"
"""Environment: a folder of public keys, `<role>*.pem`."""


class Untrusted(StoreError):
    """No signature by a key that is trusted for this role."""


class KeyFileError(StoreError):
    """A key file is missing, unreadable or of the wrong kind."""


@dataclass(frozen=True)
class SigningKey:
    """An Ed25519 private key."""

    private: Ed25519PrivateKey

    @cached_property
    def id(self) -> str:
        return key_id(self.private.public_key())

    @classmethod
    def from_pem(cls, path: Path) -> Self:
        try:
            key = serialization.load_pem_private_key(_read_key(path), password=None)
        except (ValueError, TypeError) as error:
            raise KeyFileError(f"{path} holds no unencrypted private key in PEM form: {error}") from error
        if not isinstance(key, Ed25519PrivateKey):
            raise KeyFileError(f"{path} holds a key that is not Ed25519; make one with `emrakul keygen`")
        return cls(key)


@dataclass(frozen=True)
class Trust:
    """Whose signatures count, by role."""

    keys: Mapping[Role, tuple[Ed25519PublicKey, ...]]

    @classmethod
    def from_folder(cls, folder: Path) -> Self:
        """Reads `<role>*.pem`. A folder that trusts nobody, or a file of no role, is a mistake and is refused."""
        keys: dict[Role, tuple[Ed25519PublicKey, ...]] = {}
        try:
            files = sorted(folder.glob("*.pem")) if folder.is_dir() else []
        except OSError as error:
            raise KeyFileError(f"{folder} cannot be read: {error.strerror}") from error
        for path in files:
            role = next((role for role in ROLES if path.name.startswith(role)), None)
            if role is None:
                raise KeyFileError(f"{path} names no role; call it <role>*.pem, where role is {_or(ROLES)}")
            keys[role] = (*keys.get(role, ()), _public_key(path))
        if not keys:
            raise KeyFileError(f"{folder} holds no public key; put <role>*.pem there, or unset {TRUST}")
        return cls(keys)


class _Signature(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    keyid: str = ""
    sig: str


class _Envelope(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    payload: str
    payloadType: str  # noqa: N815  DSSE's own spelling
    signatures: tuple[_Signature, ...] = Field(max_length=16)


def key_id(public: Ed25519PublicKey) -> str:
    """SHA-256 of the raw public key. In an envelope it is only a hint which key to try."""
    return hashlib.sha256(public.public_bytes_raw()).hexdigest()


def seal(payload: bytes, payload_type: str, keys: Sequence[SigningKey]) -> bytes:
    """The envelope as canonical JSON (RFC 8785): same payload and keys, same bytes. No keys: unsigned."""
    message = _pae(payload_type, payload)
    return rfc8785.dumps(
        {
            "payload": base64.b64encode(payload).decode(),
            "payloadType": payload_type,
            "signatures": [
                {"keyid": key.id, "sig": base64.b64encode(key.private.sign(message)).decode()}
                for key in sorted(keys, key=lambda key: key.id)
            ],
        }
    )


def open_envelope(
    data: bytes, payload_type: str, trust: Trust | None, *, roles: Collection[Role], name: str = "the envelope"
) -> bytes:
    """The payload. `name` is the object's, for error messages.

    With `trust`, at least one signature must verify under a key trusted for one of `roles`; without it, signed
    and unsigned envelopes are alike (ask `is_signed`). Damaged if it is no envelope, else Untrusted.
    """
    envelope = _parse(data, name)
    payload = _unbase64(envelope.payload, name)
    if envelope.payloadType != payload_type:
        raise Untrusted(f"{name} says it is {envelope.payloadType!r}, but {payload_type!r} belongs here")
    if trust is None:
        return payload
    message = _pae(payload_type, payload)
    trusted = {key_id(key): key for role in roles for key in trust.keys.get(role, ())}
    for signature in envelope.signatures:
        hinted = trusted.get(signature.keyid)
        candidates = [hinted] if hinted else ([] if signature.keyid else list(trusted.values()))
        if any(_verifies(key, _unbase64(signature.sig, name), message) for key in candidates):
            return payload
    signers = ", ".join(signature.keyid[:12] or "without key id" for signature in envelope.signatures)
    raise Untrusted(
        f"{name} is not signed by a key trusted for {_or(sorted(roles))} (signatures: {signers or 'none'}); "
        f"sign it with such a key, or add the signer's public key to the folder in {TRUST}"
    )


def is_signed(data: bytes, *, name: str = "the envelope") -> bool:
    """Whether the envelope carries a signature at all; whether one is good only open_envelope says."""
    return bool(_parse(data, name).signatures)


def signing_keys_from_environment() -> tuple[SigningKey, ...]:
    """The key in EMRAKUL_SIGNING_KEY, or none."""
    path = os.environ.get(SIGNING_KEY)
    return (SigningKey.from_pem(Path(path)),) if path else ()


def trust_from_environment() -> Trust | None:
    """The keys in EMRAKUL_TRUST, or None where trust is not configured."""
    folder = os.environ.get(TRUST)
    return Trust.from_folder(Path(folder)) if folder else None


def generate_key(path: Path) -> SigningKey:
    """A new key: the private half in `path`, for its owner only; the public half beside it as `<stem>.pub.pem`."""
    key = SigningKey(Ed25519PrivateKey.generate())
    private = key.private.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    public = key.private.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    for target, text, mode in ((path, private, 0o600), (path.with_name(f"{path.stem}.pub.pem"), public, 0o644)):
        try:
            with os.fdopen(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
                file.write(text)
        except OSError as error:
            raise KeyFileError(f"{target} cannot be written: {error.strerror}; no key is ever replaced") from error
    return key


def _pae(payload_type: str, payload: bytes) -> bytes:
    """DSSE's pre-authentication encoding."""
    kind = payload_type.encode()
    return b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)


def _parse(data: bytes, name: str) -> _Envelope:
    try:
        return _Envelope.model_validate_json(data)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]["msg"]
        raise Damaged(f"{name} is no DSSE envelope ({problem}); it was damaged or written by hand") from error


def _unbase64(text: str, name: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise Damaged(f"{name} holds a field that is not base64 ({error}); it was damaged") from error


def _verifies(key: Ed25519PublicKey, signature: bytes, message: bytes) -> bool:
    try:
        key.verify(signature, message)
    except InvalidSignature:
        return False
    return True


def _public_key(path: Path) -> Ed25519PublicKey:
    text = _read_key(path)
    if b"PRIVATE KEY" in text:
        raise KeyFileError(f"{path} is a private key; only the .pub.pem file belongs into the folder of {TRUST}")
    try:
        key = serialization.load_pem_public_key(text)
    except ValueError as error:
        raise KeyFileError(f"{path} holds no public key in PEM form: {error}") from error
    if not isinstance(key, Ed25519PublicKey):
        raise KeyFileError(f"{path} holds a key that is not Ed25519")
    return key


def _read_key(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise KeyFileError(f"{path} cannot be read: {error.strerror}") from error


def _or(names: Sequence[str]) -> str:
    return " or ".join(names)
