"""From a run's URI and what a resource says of its store to the opened run: Secrets, tenants, keys."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import tempfile
import time
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path

from emrakul.api.policy import StoreSpec
from emrakul.cluster.kube import SECRETS, Forbidden, Kube
from emrakul.runtime.config import OperatorConfig
from leyline.envelope import SigningKey, Trust, signing_keys_from_environment, trust_from_environment
from leyline.log import Log
from leyline.open import open_store, probe
from leyline.s3 import Credentials
from leyline.store import ObjectStore

KEPT = 2_000
"""Opened runs that are kept: each holds its newest record and state."""
SECRET_SECONDS = 60.0
"""How old a Secret may be: a rotated key is used after this long."""
CHECK_SECONDS = 30.0
"""How long a log may be read on without a look at what was read of it before: an older copy goes unnoticed so long."""
SECRET_BYTES = 200_000
LARGEST_BYTES = 128 * 1024 * 1024
"""Objects that are read as a whole are at most this large (masks of a billion single weights are): what a tenant's run
holds must not end the process of all."""
FILES = 100
"""CA bundles that are kept as files."""


class NotReady(Exception):
    """What a resource names is not there (yet): a Secret, a key in it."""


@dataclass(frozen=True, kw_only=True)
class Access:
    """How one namespace reaches one run."""

    namespace: str
    run: str
    store: StoreSpec

    @property
    def name(self) -> str:
        """The run and where it lies: the same URI at another endpoint is another one."""
        return f"{self.run} at {self.store.endpoint}" if self.store.endpoint else self.run


@dataclass(kw_only=True)
class OpenRun:
    """An opened run. A log is for one thread at a time: whoever reads or writes it holds `lock`."""

    access: Access
    store: ObjectStore
    log: Log
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    seen: tuple[int, str] = (-1, "")
    """The newest record that a status named: what one resource saw, the log is held to for all of them."""
    checked: float = field(default_factory=time.monotonic)
    """When it and the newest record that was read were last found in the log."""
    told: int = -1
    """The newest record of which those who wait for this run were told."""


@dataclass(frozen=True)
class _Reached:
    """What a store is reached with; another key or CA is another connection."""

    credentials: Credentials | None
    ca_bundle: str | None


class Runs:
    """Opens runs and keeps them open."""

    def __init__(self, kube: Kube, config: OperatorConfig) -> None:
        self._kube = kube
        self._config = config
        self._open: OrderedDict[Access, tuple[_Reached, OpenRun]] = OrderedDict()
        self._secrets: dict[tuple[str, str], tuple[float, dict[str, str]]] = {}
        self._folder = tempfile.TemporaryDirectory(prefix="emrakul-ca-")
        """CA bundles; gone with close()."""
        self.trust: Trust | None = trust_from_environment()
        self.keys: tuple[SigningKey, ...] = signing_keys_from_environment()

    def close(self) -> None:
        self._folder.cleanup()

    async def open(self, access: Access, *, seen: tuple[int, str] | None = None) -> OpenRun:
        """The run, its newest record read. `seen` is a record known from before (a status).

        NotReady if a Secret is missing; NoRun, StoreReverted, Refused, Unreachable, Unsuitable as the store says.
        """
        reached = await self._reach(access)
        found = self._open.get(access)
        if found is None or found[0] != reached:  # a rotated key: the old connection is of no use
            made = await asyncio.to_thread(self._make, access, reached, seen)
            found = self._open.get(access)
            if found is None or found[0] != reached:  # nobody was faster
                found = self._open[access] = (reached, made)
        self._open.move_to_end(access)
        while len(self._open) > KEPT:
            self._open.popitem(last=False)
        run = found[1]
        if seen is not None and seen[0] > run.seen[0]:
            run.seen, run.checked = seen, float("-inf")
        if time.monotonic() - run.checked > CHECK_SECONDS:
            async with run.lock:
                await asyncio.to_thread(_check, run)
            run.checked = time.monotonic()
        return run

    def _make(self, access: Access, reached: _Reached, seen: tuple[int, str] | None) -> OpenRun:
        store = open_store(
            access.run,
            endpoint=access.store.endpoint,
            region=access.store.region,
            ca_bundle=reached.ca_bundle,
            credentials=reached.credentials,
            largest=LARGEST_BYTES,
            may_borrow=lambda uri: self._config.allows(access.namespace, uri),
        )
        log = Log(store, keys=self.keys, trust=self.trust, seen=seen)
        log.tail()
        probe(store)
        return OpenRun(access=access, store=store, log=log, seen=seen or (-1, ""))

    async def _reach(self, access: Access) -> _Reached:
        spec = access.store
        if (
            spec.endpoint
            and spec.credentials_secret_ref is None
            and spec.endpoint != self._config.defaults.store.endpoint
        ):
            raise NotReady(
                f"store.endpoint is {spec.endpoint} and no credentialsSecretRef is named; the operator's own identity "
                "is only shown to the endpoint of its chart, so name a Secret"
            )
        credentials = None
        if spec.credentials_secret_ref is not None:
            name = spec.credentials_secret_ref.name
            data = await self._secret(access.namespace, name)
            credentials = Credentials(
                access_key=_value(data, "AWS_ACCESS_KEY_ID", access.namespace, name),
                secret_key=_value(data, "AWS_SECRET_ACCESS_KEY", access.namespace, name),
                session_token=_value(data, "AWS_SESSION_TOKEN", access.namespace, name)
                if "AWS_SESSION_TOKEN" in data
                else None,
            )
        ca_bundle = None
        if spec.ca_bundle_ref is not None:
            data = await self._secret(access.namespace, spec.ca_bundle_ref.name)
            ca_bundle = self._file(_value(data, spec.ca_bundle_ref.key, access.namespace, spec.ca_bundle_ref.name))
        return _Reached(credentials, ca_bundle)

    async def _secret(self, namespace: str, name: str) -> dict[str, str]:
        now = time.monotonic()
        self._secrets = {key: one for key, one in self._secrets.items() if now - one[0] < SECRET_SECONDS}
        if (known := self._secrets.get((namespace, name))) is not None:
            return known[1]
        try:
            body = await self._kube.get(SECRETS, namespace, name)
        except Forbidden as error:
            raise NotReady(f"Secret {namespace}/{name} may not be read; secretNames of the chart lacks it") from error
        if body is None:
            raise NotReady(f"Secret {namespace}/{name} does not exist; create it with the store's credentials")
        data = dict(body.get("data") or {})
        if sum(map(len, data.values())) > SECRET_BYTES:
            raise NotReady(f"Secret {namespace}/{name} is larger than {SECRET_BYTES:,} bytes; keep the key alone in it")
        self._secrets[namespace, name] = (now, data)
        return data

    def _file(self, pem: str) -> str:
        path = Path(self._folder.name) / f"{hashlib.sha256(pem.encode()).hexdigest()[:16]}.pem"
        if not path.exists():
            for old in sorted(path.parent.iterdir(), key=lambda one: one.stat().st_mtime)[:-FILES]:
                old.unlink()  # a client has read its own when it was made
            path.write_text(pem)
        return str(path)


def _check(run: OpenRun) -> None:
    """StoreReverted unless all that was ever seen of the log still stands there. In a thread."""
    n, digest = run.seen
    if n >= 0:
        run.log.expect(n, digest)
    run.log.check()


def _value(data: dict[str, str], key: str, namespace: str, name: str) -> str:
    if key not in data:
        raise NotReady(f"Secret {namespace}/{name} has no key {key}; it has {', '.join(sorted(data)) or 'none'}")
    try:
        return base64.b64decode(data[key]).decode()
    except ValueError as error:
        raise NotReady(f"Secret {namespace}/{name}: {key} is not text") from error
