"""The cluster's own certificate authority. Elliptic keys: a hundred take less time than one of RSA."""

from __future__ import annotations

import base64
import datetime
import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

_LIFE = datetime.timedelta(days=365)
_CLOCKS_DIFFER = datetime.timedelta(hours=1)


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A certificate and its private key, both files in PEM."""

    certificate: Path
    key: Path

    @property
    def exists(self) -> bool:
        return self.certificate.exists() and self.key.exists()


class Authority:
    """A folder of certificates under one root that is made at first use, and found again later."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.root = self._pair("ca")
        if not self.root.exists:
            folder.mkdir(parents=True, exist_ok=True)
            key = _new_key()
            name = _name("emrakul-tests", ())
            certificate = (
                _builder(name, issuer=name, key=key)
                .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
                .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
                .sign(key, hashes.SHA256())
            )
            _write(self.root, certificate, key)

    @property
    def root_base64(self) -> str:
        return base64.b64encode(self.root.certificate.read_bytes()).decode()

    def server(self, common_name: str, *, hosts: Sequence[str]) -> Pair:
        """For a server that is reached as each of `hosts`, names or IP addresses."""
        names = x509.SubjectAlternativeName([_general_name(host) for host in hosts])
        return self._leaf(common_name, (), ExtendedKeyUsageOID.SERVER_AUTH, names)

    def client(self, user: str, *, groups: Sequence[str] = ()) -> Pair:
        """For the Kubernetes user `user`: the API server reads groups from the organizations."""
        return self._leaf(user, groups, ExtendedKeyUsageOID.CLIENT_AUTH, None)

    def signing_key(self, name: str) -> Pair:
        """A key alone, with its public half, as service-account tokens are signed and checked with."""
        pair = Pair(certificate=self._folder / f"{name}.pub", key=self._folder / f"{name}.key")
        if not pair.exists:
            key = _new_key()
            form = serialization.PublicFormat.SubjectPublicKeyInfo
            pair.certificate.write_bytes(key.public_key().public_bytes(serialization.Encoding.PEM, form))
            _write_key(pair.key, key)
        return pair

    def _leaf(
        self,
        common_name: str,
        organizations: Sequence[str],
        usage: x509.ObjectIdentifier,
        names: x509.SubjectAlternativeName | None,
    ) -> Pair:
        pair = self._pair(quote("+".join([common_name, *organizations]), safe="+"))
        if pair.exists:
            return pair
        root = x509.load_pem_x509_certificate(self.root.certificate.read_bytes())
        root_key = serialization.load_pem_private_key(self.root.key.read_bytes(), password=None)
        assert isinstance(root_key, ec.EllipticCurvePrivateKey)
        key = _new_key()
        builder = (
            _builder(_name(common_name, organizations), issuer=root.subject, key=key)
            .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(root_key.public_key()), critical=False)
        )
        if names is not None:
            builder = builder.add_extension(names, critical=False)
        _write(pair, builder.sign(root_key, hashes.SHA256()), key)
        return pair

    def _pair(self, name: str) -> Pair:
        return Pair(certificate=self._folder / f"{name}.crt", key=self._folder / f"{name}.key")


def _new_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def _name(common_name: str, organizations: Sequence[str]) -> x509.Name:
    return x509.Name(
        [
            *(x509.NameAttribute(NameOID.ORGANIZATION_NAME, organization) for organization in organizations),
            x509.NameAttribute(NameOID.COMMON_NAME, common_name),
        ]
    )


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _builder(subject: x509.Name, *, issuer: x509.Name, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _CLOCKS_DIFFER)
        .not_valid_after(now + _LIFE)
    )


def _write(pair: Pair, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> None:
    pair.certificate.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    _write_key(pair.key, key)


def _write_key(path: Path, key: ec.EllipticCurvePrivateKey) -> None:
    form = serialization.PrivateFormat.PKCS8
    path.touch(mode=0o600)
    path.write_bytes(key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption()))
