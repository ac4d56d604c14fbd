"""What a worker pod is given to reach the store and to read keys: variables, and Secrets mounted as files.

Without a Secret for the store the pod's service account is its identity (workload identity). That needs no token for
the API server: on EKS a webhook mounts one of another audience by itself, on GKE the node's metadata server answers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from emrakul.api.policy import StoreSpec
from emrakul.runtime.config import Keys
from emrakul.runtime.overrides import FOLDER, RESERVED, TEMPORARY
from leyline.crypt import DATA_KEY
from leyline.envelope import SIGNING_KEY, TRUST

_TEMPORARY_SIZE = "1Gi"
"""Nobody needs much of it; a pod that writes more is evicted instead of its node's disk being filled."""


@dataclass(frozen=True)
class Mount:
    """A volume and where it is mounted."""

    volume: dict[str, Any]
    path: str

    @property
    def mount(self) -> dict[str, Any]:
        read_only = {} if "emptyDir" in self.volume else {"readOnly": True}
        return {"name": self.volume["name"], "mountPath": self.path, **read_only}


TEMPORARY_FOLDER = Mount({"name": f"{RESERVED}tmp", "emptyDir": {"sizeLimit": _TEMPORARY_SIZE}}, TEMPORARY)


@dataclass(frozen=True)
class Given:
    """Variables of the environment, and what is mounted for them."""

    env: tuple[dict[str, Any], ...] = ()
    mounts: tuple[Mount, ...] = ()

    def __add__(self, other: Given) -> Given:
        return Given(self.env + other.env, self.mounts + other.mounts)


def store(spec: StoreSpec) -> Given:
    """Endpoint, region, credentials and CA of the run's store, as boto3 reads them.

    The endpoint is only S3's: workload identity asks another service of AWS for credentials.
    """
    env = [_value("AWS_ENDPOINT_URL_S3", spec.endpoint)] if spec.endpoint else []
    env += [_value("AWS_REGION", spec.region)] if spec.region else []
    if secret := spec.worker_credentials_secret_ref or spec.credentials_secret_ref:
        env += [_secret(secret.name, name) for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")]
        env.append(_secret(secret.name, "AWS_SESSION_TOKEN", optional=True))
    given = Given(tuple(env))
    if ca := spec.ca_bundle_ref:
        given += _file("AWS_CA_BUNDLE", "ca", secret=ca.name, key=ca.key, path="ca.crt")
    return given


def keys(named: Keys, *, signs: bool, decrypts: bool) -> Given:
    """Trust for everybody; the key that signs and the key of statistics only for those who use them."""
    given = Given()
    if named.trust_secret:
        mount = Mount({"name": f"{RESERVED}trust", "secret": {"secretName": named.trust_secret}}, f"{FOLDER}/trust")
        given += Given((_value(TRUST, mount.path),), (mount,))
    if signs and named.signing_key_secret:
        given += _file(SIGNING_KEY, "signing", secret=named.signing_key_secret, key="signing.pem")
    if decrypts and named.data_key_secret:
        given += _file(DATA_KEY, "data", secret=named.data_key_secret, key="data.key")
    return given


def _file(variable: str, name: str, *, secret: str, key: str, path: str | None = None) -> Given:
    """One key of a Secret as a file, and a variable that says where it is."""
    source = {"secretName": secret, "items": [{"key": key, "path": path or key}]}
    mount = Mount({"name": f"{RESERVED}{name}", "secret": source}, f"{FOLDER}/{name}")
    return Given((_value(variable, f"{mount.path}/{path or key}"),), (mount,))


def _value(name: str, value: str) -> dict[str, Any]:
    return {"name": name, "value": value}


def _secret(secret: str, key: str, *, optional: bool = False) -> dict[str, Any]:
    reference: dict[str, Any] = {"name": secret, "key": key, **({"optional": True} if optional else {})}
    return {"name": key, "valueFrom": {"secretKeyRef": reference}}
