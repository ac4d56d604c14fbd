"""Opening a run URI: which store it names, whether it is a run of its own, and whether the store is safe."""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, TypedDict, Unpack

from leyline.local import LocalStore
from leyline.store import Exists, NotFound, ObjectStore, Refused, StoreError, Unsuitable

if TYPE_CHECKING:
    from leyline.s3 import Credentials, S3Store

GENESIS = "log/0/0.json"
"""The first record of a run's log: where it stands, there is a run."""

PROBES = ".probe"

_OWN = ("log", "state", "checkpoints", "cycles", "reports", "guidance", PROBES)
_S3_URI = re.compile(r"s3://(?P<bucket>[a-z0-9][a-z0-9.-]{1,61}[a-z0-9])(?:/(?P<prefix>.*))?")

_probed: set[str] = set()


class S3Options(TypedDict, total=False):
    """How a run in S3 is reached; left out, the usual AWS variables count. A local run needs none of it."""

    endpoint: str | None
    region: str | None
    ca_bundle: str | None
    credentials: Credentials | None
    largest: int
    """Bytes that an object may have that is read as a whole; a larger one is Damaged."""
    may_borrow: Callable[[str], bool]
    """Whether imported checkpoints of this run may lie at this URI; left out: anywhere."""


def open_store(uri: str, **options: Unpack[S3Options]) -> ObjectStore:
    """The store of the run at `s3://bucket/prefix`, `file:///folder` or a plain path.

    StoreError if the URI is malformed, lies inside another run, contains one, or holds folders that are no run's. To
    know that, the store is asked, so this may also end in Refused or Unreachable.
    """
    store = _store_for(uri, options)
    for ancestor in store.ancestors():
        if _is_run(ancestor):
            raise StoreError(f"{uri} lies inside the run {ancestor.uri}; give each run a prefix outside of all others")
    if not _is_run(store) and (foreign := next(_foreign(store), None)):
        raise StoreError(
            f"{uri} is no run, but holds {foreign}; give the new run an empty prefix of its own, and not one that "
            "contains other runs"
        )
    return store


def probe(store: ObjectStore) -> None:
    """Refuses (Unsuitable) a store on which the protocol would be unsafe, before the first real write.

    Each condition that the protocol relies on is broken once on purpose. Writes below `.probe/`, cleans up, and
    does nothing for a bucket or folder that this process has probed before.
    """
    name = getattr(store, "served_by", store.uri)
    if name in _probed:
        return
    key = f"{PROBES}/{uuid.uuid4().hex}"
    try:
        ignored = next(_ignored_conditions(store, key), None)
    finally:
        with suppress(StoreError):
            store.delete(key)
    if ignored:
        raise Unsuitable(
            f"{store.uri}: the store ignores {ignored}, so two writers could overwrite each other's work; use a "
            "store with conditional writes (AWS S3, SeaweedFS 4.48 or later) or a local folder"
        )
    _probed.add(name)


def _store_for(uri: str, options: S3Options) -> LocalStore | S3Store:
    scheme, separator, rest = uri.partition("://")
    if separator and scheme not in ("s3", "file"):
        raise StoreError(f"{uri}: {scheme}:// is no store we know; use s3://bucket/prefix, file:///folder or a path")
    path = rest.rstrip("/")  # of a URI; a plain path is the system's to read
    segments = path.removeprefix("/").split("/") if path else []
    if not uri or {"", ".", ".."} & set(segments):
        raise StoreError(f"{uri!r} is no run URI: it is empty or has empty, '.' or '..' segments; write it in full")
    if scheme == "s3" and separator:
        match = _S3_URI.fullmatch(uri.rstrip("/"))
        if match is None:
            raise StoreError(f"{uri} is no S3 URI; write s3://bucket/prefix with a valid bucket name")
        # boto3 takes a third of a second to import: a local run does not pay for it.
        from leyline.s3 import S3Store

        return S3Store(match["bucket"], match["prefix"] or "", **options)
    return LocalStore(uri)


def run_around(store: ObjectStore) -> str | None:
    """The URI of the run that `store` is or lies in, or None."""
    found = (one for one in (store, *store.ancestors()) if _is_run(one))
    return next((one.uri for one in found), None)


def _is_run(store: ObjectStore) -> bool:
    try:
        store.head(GENESIS)
    except (NotFound, Refused):  # a tenant may not look at the prefixes above its own
        return False
    return True


def _foreign(store: ObjectStore) -> Iterator[str]:
    """Folders in the prefix that no run has: another run, or somebody's data. One listing a folder."""
    after = ""
    while found := next(store.list("", after=after), None):
        folder, is_folder, _ = found.key.partition("/")
        if is_folder and folder not in _OWN:
            yield found.key
        # "0" follows "/": on to what stands behind the folder.
        after = f"{folder}0" if is_folder else found.key


def _ignored_conditions(store: ObjectStore, key: str) -> Iterator[str]:
    store.put_if_absent(key, b"1")
    with suppress(Exists):
        store.put_if_absent(key, b"2")
        yield "If-None-Match on PUT"
    # Only S3 has multipart uploads and headers that may be ignored; the adapter tries these itself.
    if ignores := getattr(store, "ignored_conditions", None):
        yield from ignores(key)
