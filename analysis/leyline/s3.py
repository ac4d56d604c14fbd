"""The object store in an S3 bucket, on boto3 alone (docs/decisions/0001-boto3-behind-the-port.md).

What makes the protocol safe here: `If-None-Match: *` on PutObject and on CompleteMultipartUpload. A response
can be lost after the write succeeded, and botocore then repeats the request and meets its own object, so a
412 is no verdict: the object is read back. A 409 on Complete means that S3 has thrown the parts away, so the
whole upload starts again.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from copy import copy
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from functools import lru_cache, partial
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, TypeVar, cast

import boto3
import botocore.loaders
import botocore.session
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    CredentialRetrievalError,
    HTTPClientError,
    IncompleteReadError,
    NoAuthTokenError,
    NoCredentialsError,
    PartialCredentialsError,
    ResponseStreamingError,
    SSLError,
    TokenRetrievalError,
)
from botocore.exceptions import ConnectionError as NoConnectionError

from leyline.digest import digest_bytes, sha256_hex
from leyline.store import (
    CHUNK,
    Changed,
    Damaged,
    Data,
    Exists,
    Head,
    NotFound,
    NotLent,
    Refused,
    StoreError,
    Unreachable,
    checked_chunks,
    checked_key,
)

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client
    from mypy_boto3_s3.type_defs import CompletedPartTypeDef, ListObjectsV2OutputTypeDef

T = TypeVar("T")

_PARTS = 10_000
"""S3's own limit on the parts of one object."""
_UPLOADS = 3
"""How often a multipart upload is begun when Complete keeps meeting a conflict."""

_IN_FLIGHT = 3
"""Parts of an upload that are held at once. With two, SeaweedFS waits for us; four gain nothing more."""

_CLOCK_SECONDS = 10.0
"""How long the server's time is reckoned on by this machine's clock before it is asked again."""

_MAKING = Lock()
"""Many threads that open their first store at once would each make a client of their own, of 10 MB."""

_NO_CREDENTIALS = (
    CredentialRetrievalError,
    NoAuthTokenError,
    NoCredentialsError,
    PartialCredentialsError,
    TokenRetrievalError,
)
_NO_ANSWER = (NoConnectionError, HTTPClientError, IncompleteReadError, ResponseStreamingError)
# Some of these come as 400, so the status alone does not tell.
_REFUSALS = ("AccessDenied", "ExpiredToken", "InvalidAccessKeyId", "InvalidToken", "SignatureDoesNotMatch")
_TRANSIENT = ("InternalError", "RequestTimeout", "ServiceUnavailable", "SlowDown", "Throttling")


class _PreconditionFailed(StoreError):
    """412: the object is there already (a write), or is another one (a read)."""


class _Conflict(Unreachable):
    """409: another operation on the same key was going on."""


@dataclass(frozen=True, kw_only=True)
class Credentials:
    """A key of one user of the store."""

    access_key: str
    secret_key: str = field(repr=False)
    session_token: str | None = field(default=None, repr=False)


class S3Store:
    """One run under `s3://bucket/prefix`. Credentials come from boto3's usual chain, unless they are given.

    `deadline` is how many seconds an operation is retried, with backoff, before it ends in Unreachable. For the rest
    see leyline.open.S3Options.
    """

    def __init__(
        self,
        bucket: str,
        prefix: str,
        *,
        endpoint: str | None = None,
        region: str | None = None,
        ca_bundle: str | None = None,
        credentials: Credentials | None = None,
        deadline: float = 30.0,
        largest: int | None = None,
        may_borrow: Callable[[str], bool] = lambda _: True,
    ) -> None:
        self._largest = largest
        self._may_borrow = may_borrow
        self._borrowed: dict[str, tuple[S3Store, str]] = {}
        self._clock: tuple[datetime, float] | None = None
        """What the server last said the time was, and this machine's monotonic clock then."""
        self._bucket = bucket
        self._prefix = f"{prefix}/" if prefix else ""
        self._deadline = deadline
        with _MAKING:
            self._client = _client(
                endpoint=endpoint,
                region=region,
                ca_bundle=ca_bundle,
                credentials=credentials,
                deadline=deadline,
                environment=tuple(sorted(item for item in os.environ.items() if item[0].startswith("AWS_"))),
            )

    @property
    def uri(self) -> str:
        return f"s3://{self._bucket}/{self._prefix}".rstrip("/")

    @property
    def endpoint(self) -> str:
        """The server's URL, as resolved from arguments and environment."""
        return self._client.meta.endpoint_url

    @property
    def served_by(self) -> str:
        """The bucket at its server: what honours conditions for one run there does so for all."""
        return f"{self.endpoint}/{self._bucket}"

    def where(self, key: str) -> str:
        lent = self._borrowed.get(key)
        return lent[0].where(lent[1]) if lent else f"{key} in {self.uri}"

    def ancestors(self) -> Iterator[S3Store]:
        """The prefixes above this one, up to the bucket: a run in one of them would contain this one."""
        segments = self._prefix.split("/")[:-1]
        for length in range(len(segments)):
            ancestor = copy(self)
            ancestor._prefix = "".join(f"{segment}/" for segment in segments[:length])
            yield ancestor

    def head(self, key: str) -> Head:
        if lent := self._borrowed.get(key):
            return replace(lent[0].head(lent[1]), key=key)
        name = self._name(key)
        answer = self._ask(key, lambda: self._client.head_object(Bucket=self._bucket, Key=name))
        modified = answer["LastModified"].astimezone(UTC)
        return Head(key=key, size=answer["ContentLength"], pin=answer["ETag"], modified=modified)

    def get(self, key: str) -> bytes:
        if lent := self._borrowed.get(key):
            return lent[0].get(lent[1])
        name = self._name(key)

        def read() -> bytes:
            answer = self._client.get_object(Bucket=self._bucket, Key=name)
            with closing(answer["Body"]) as body:
                if self._largest is not None and answer["ContentLength"] > self._largest:
                    raise Damaged(
                        f"{key} in {self.uri} is {answer['ContentLength']:,} bytes; at most {self._largest:,} are read "
                        "as a whole. Remove it, or write it smaller"
                    )
                return body.read()

        return self._ask(key, read)

    def get_range(self, key: str, start: int, stop: int, *, pin: str | None = None) -> bytes:
        if lent := self._borrowed.get(key):
            return lent[0].get_range(lent[1], start, stop, pin=pin)
        name = self._name(key)
        if start == stop:  # HTTP has no empty range
            return b""
        wanted: dict[str, Any] = {"Range": f"bytes={start}-{stop - 1}"}
        if pin is not None:
            wanted["IfMatch"] = pin

        def read() -> tuple[str, bytes]:
            answer = self._client.get_object(Bucket=self._bucket, Key=name, **wanted)
            with closing(answer["Body"]) as body:
                return answer["ETag"], body.read()

        try:
            etag, data = self._ask(key, read)
        except _PreconditionFailed as error:
            raise self._other_than_pinned(key) from error
        if pin is not None and etag != pin:
            raise self._other_than_pinned(key)
        if len(data) != stop - start:
            raise Changed(
                f"{key} in {self.uri} ends at byte {start + len(data):,}, before byte {stop:,} that was asked for"
            )
        return data

    def put_if_absent(self, key: str, data: Data) -> bool:
        name = self._name(key)
        try:
            self._ask(
                key,
                lambda: self._client.put_object(
                    Bucket=self._bucket, Key=name, Body=cast("bytes", data), IfNoneMatch="*"
                ),
            )
        except _PreconditionFailed as error:
            if self._stands(key, len(data), digest_bytes(data).chunks):
                return False
            raise self._taken(key) from error
        return True

    def put_stream(self, key: str, chunks: Iterable[Data], *, size: int, digests: Sequence[str] | None = None) -> bool:
        if size <= CHUNK:
            return self.put_if_absent(key, b"".join(checked_chunks(key, chunks, size=size)))
        if size > _PARTS * CHUNK:
            raise StoreError(
                f"{key} has {size:,} bytes, but an S3 object of ours ends at {_PARTS * CHUNK:,}; publish more shards"
            )
        uploads = 1 if isinstance(chunks, Iterator) else _UPLOADS
        for left in reversed(range(uploads)):
            try:
                return self._put_parts(key, chunks, size, digests)
            except _Conflict:
                if not left:
                    raise
                time.sleep(random.uniform(0.1, 0.5))  # noqa: S311
        raise AssertionError  # the last round returns or raises

    def list(self, prefix: str, *, after: str = "") -> Iterator[Head]:
        wanted: dict[str, Any] = {"Prefix": self._prefix + prefix}
        if after:
            wanted["StartAfter"] = self._prefix + after
        while True:
            page = self._listed(prefix, **wanted)
            for item in page.get("Contents", []):
                if not item["Key"].endswith("/"):  # consoles make such objects to show a folder
                    yield Head(
                        key=item["Key"].removeprefix(self._prefix),
                        size=item["Size"],
                        pin=item["ETag"],
                        modified=item["LastModified"].astimezone(UTC),
                    )
            if not page["IsTruncated"]:
                return
            wanted["ContinuationToken"] = page["NextContinuationToken"]

    def delete(self, key: str) -> None:
        name = self._name(key)
        with suppress(NotFound):
            self._ask(key, lambda: self._client.delete_object(Bucket=self._bucket, Key=name))

    def abort_stale(self, older_than: datetime) -> int:
        wanted: dict[str, Any] = {"Bucket": self._bucket, "Prefix": self._prefix}
        stale = []
        while True:
            page = self._ask("unfinished uploads", partial(self._client.list_multipart_uploads, **wanted))
            stale += [upload for upload in page.get("Uploads", []) if upload["Initiated"] < older_than]
            if not page.get("IsTruncated"):
                break
            wanted |= {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}
        for upload in stale:
            self._throw_away(upload["Key"], upload["UploadId"])
        return len(stale)

    def _throw_away(self, name: str, upload: str) -> None:
        with suppress(NotFound):  # completed or aborted since the listing
            self._ask(
                name.removeprefix(self._prefix),
                lambda: self._client.abort_multipart_upload(Bucket=self._bucket, Key=name, UploadId=upload),
            )

    def now(self) -> datetime:
        # who asks for the time has most often just listed something, and the answer to that bore the time
        if self._clock is None or time.monotonic() - self._clock[1] > _CLOCK_SECONDS:
            self._listed("the clock", Prefix=self._prefix, MaxKeys=1)
        if self._clock is None:
            raise StoreError(f"{self.endpoint} does not tell the time (no Date in its answers); use another store")
        told, at = self._clock
        return told + timedelta(seconds=time.monotonic() - at)

    def _listed(self, what: str, **wanted: Any) -> ListObjectsV2OutputTypeDef:
        """One page of a listing. Every page tells the server's time."""
        page = self._ask(what, lambda: self._client.list_objects_v2(Bucket=self._bucket, **wanted))
        at = time.monotonic()
        date = page["ResponseMetadata"]["HTTPHeaders"].get("date", "")
        with suppress(ValueError):
            self._clock = (parsedate_to_datetime(date).astimezone(UTC), at)
        return page

    def lender(self, uri: str) -> S3Store:
        scheme, _, rest = uri.rstrip("/").partition("://")
        if scheme != "s3":
            raise StoreError(f"{uri} is in another kind of store than the run {self.uri}; copy it into the run's store")
        checked_key(rest)
        if not self._may_borrow(uri):
            raise NotLent(
                f"a checkpoint of the run {self.uri} lies at {uri}, which no prefix of allowedRunPrefixes has"
            )
        other = copy(self)
        other._bucket, _, prefix = rest.partition("/")
        other._prefix = f"{prefix}/" if prefix else ""
        other._borrowed = {}
        return other

    def borrow(self, uri: str, keys: Mapping[str, str]) -> None:
        lender = self.lender(uri)
        self._borrowed |= {key: (lender, path) for key, path in keys.items()}

    def ignored_conditions(self, key: str) -> Iterator[str]:
        """Which conditions the server ignores, tried on `key`, which must exist. For the start-up probe."""
        name = self._name(key)
        with suppress(_PreconditionFailed):
            self._ask(
                key, lambda: self._client.get_object(Bucket=self._bucket, Key=name, IfMatch='"0"')["Body"].close()
            )
            yield "If-Match on GET"
        upload = self._begin(key)
        try:
            part = self._put_part(key, upload, 1, b"3")
            with suppress(_PreconditionFailed):
                self._complete(key, upload, [part])
                yield "If-None-Match on CompleteMultipartUpload"
        finally:
            self._abort(key, upload)

    def _name(self, key: str) -> str:
        return self._prefix + checked_key(key)

    def _put_parts(self, key: str, chunks: Iterable[Data], size: int, digests: Sequence[str] | None) -> bool:
        if digests is None:
            digests, chunks = _hashed(chunks)
        upload = self._begin(key)
        try:
            parts = self._upload(key, upload, checked_chunks(key, chunks, size=size))
            try:
                self._complete(key, upload, parts)
                return True
            except (_PreconditionFailed, NotFound) as error:
                # 412, or 404 for the upload: ours may have been completed by a request whose answer was lost.
                if self._stands(key, size, digests):
                    self._abort(key, upload)
                    return False
                if isinstance(error, NotFound):
                    raise _Conflict(f"{key} in {self.uri}: the store lost the upload; write it again") from error
                raise self._taken(key) from error
        except BaseException:
            self._abort(key, upload)
            raise

    def _upload(self, key: str, upload: str, chunks: Iterable[Data]) -> Sequence[CompletedPartTypeDef]:
        parts: list[Future[CompletedPartTypeDef]] = []
        # Leaving the pool waits for parts in flight: one that arrives after the abort would stay, and cost money.
        with ThreadPoolExecutor(_IN_FLIGHT) as pool:
            for number, chunk in enumerate(chunks, start=1):
                parts.append(pool.submit(self._put_part, key, upload, number, chunk))
                if number >= _IN_FLIGHT:
                    parts[-_IN_FLIGHT].result()
            return [part.result() for part in parts]

    def _begin(self, key: str) -> str:
        name = self._name(key)
        answer = self._ask(key, lambda: self._client.create_multipart_upload(Bucket=self._bucket, Key=name))
        return answer["UploadId"]

    def _put_part(self, key: str, upload: str, number: int, data: Data) -> CompletedPartTypeDef:
        name = self._name(key)
        answer = self._ask(
            key,
            lambda: self._client.upload_part(
                Bucket=self._bucket, Key=name, UploadId=upload, PartNumber=number, Body=cast("bytes", data)
            ),
        )
        return {"PartNumber": number, "ETag": answer["ETag"]}

    def _complete(self, key: str, upload: str, parts: Sequence[CompletedPartTypeDef]) -> None:
        name = self._name(key)
        self._ask(
            key,
            lambda: self._client.complete_multipart_upload(
                Bucket=self._bucket, Key=name, UploadId=upload, MultipartUpload={"Parts": parts}, IfNoneMatch="*"
            ),
            retry_conflict=False,
        )

    def _abort(self, key: str, upload: str) -> None:
        # One try, and no error of its own: the failure that led here is the one to tell. What is left behind
        # is removed by the bucket's lifecycle rule (docs) and by gc.
        with suppress(ClientError, BotoCoreError):
            self._client.abort_multipart_upload(Bucket=self._bucket, Key=self._name(key), UploadId=upload)

    def _stands(self, key: str, size: int, digests: Sequence[str]) -> bool:
        """Whether exactly these bytes stand under the key, whoever wrote them."""
        try:
            head = self.head(key)
            return head.size == size and all(
                sha256_hex(self.get_range(key, at, min(at + CHUNK, size), pin=head.pin)) == digest
                for at, digest in zip(range(0, size, CHUNK), digests, strict=True)
            )
        except NotFound:
            return False

    def _taken(self, key: str) -> Exists:
        return Exists(f"{key} in {self.uri} exists with other content; somebody else wrote it first")

    def _other_than_pinned(self, key: str) -> Changed:
        return Changed(f"{key} in {self.uri} is not the object that was pinned; do not overwrite checkpoints")

    def _ask(self, key: str, request: Callable[[], T], *, retry_conflict: bool = True) -> T:
        """One request, repeated while the store does not answer, until the deadline."""
        give_up = time.monotonic() + self._deadline
        pause = 0.2
        while True:
            try:
                return request()
            except (ClientError, BotoCoreError) as error:
                failure = self._as_store_error(key, error)
                retried = isinstance(failure, Unreachable) and (retry_conflict or not isinstance(failure, _Conflict))
                if not retried or time.monotonic() + pause > give_up:
                    raise failure from error
            time.sleep(random.uniform(pause / 2, pause))  # noqa: S311  jitter, not a secret
            pause = min(2 * pause, 5.0)

    def _as_store_error(self, key: str, error: ClientError | BotoCoreError) -> StoreError:
        where = f"{key} in {self.uri}" if key else self.uri
        if isinstance(error, SSLError):
            return Refused(f"{where}: {error}; give the CA that signed the store's certificate (AWS_CA_BUNDLE)")
        if isinstance(error, _NO_CREDENTIALS):
            return Refused(f"{where}: {error}; set the usual AWS variables or a profile")
        if isinstance(error, _NO_ANSWER):
            return Unreachable(
                f"{where}: the store at {self.endpoint} does not answer ({error}); check the endpoint and the network, "
                "and try again"
            )
        if not isinstance(error, ClientError):
            return StoreError(f"{where}: {error}")
        code = error.response["Error"].get("Code", "")
        status = error.response["ResponseMetadata"].get("HTTPStatusCode", 0)
        said = f"{code} {error.response['Error'].get('Message', '')}".strip()
        if code == "NoSuchBucket":
            return Refused(f"{where}: there is no such bucket at {self.endpoint}; create it or correct the run URI")
        if status == 412:
            return _PreconditionFailed(f"{where}: {said}")
        if status == 409:
            return _Conflict(f"{where}: {said}; other writers keep getting in between, try again")
        # A HEAD has no body: an expired token is a bare 400 there.
        if status in (401, 403) or code in _REFUSALS or (status == 400 and code == "400"):
            return Refused(f"{where} is refused ({said}); check the credentials and the bucket's policy")
        if status == 416:
            return Changed(f"{where} is shorter than the range that was asked for")
        if status == 404:
            return NotFound(f"{where} does not exist")
        if status >= 500 or status == 429 or code in _TRANSIENT:
            return Unreachable(f"{where}: the store at {self.endpoint} answers {said}; try again later")
        return StoreError(f"{where}: the store answers {status} {said}")


def _hashed(chunks: Iterable[Data]) -> tuple[list[str], Iterator[Data]]:
    """A list that fills with the chunks' digests while they pass, and the chunks."""
    digests: list[str] = []

    def passing() -> Iterator[Data]:
        for chunk in chunks:
            digests.append(sha256_hex(chunk))
            yield chunk

    return digests, passing()


@lru_cache(maxsize=1)
def _loader() -> botocore.loaders.Loader:
    """One for all clients: each would read the same descriptions of S3, some 10 MB, for itself."""
    return botocore.loaders.Loader()


def _time(text: str) -> datetime:
    """ISO 8601 in listings, else the format of HTTP headers."""
    try:
        return datetime.fromisoformat(text)
    except ValueError:
        return parsedate_to_datetime(text)


@lru_cache(maxsize=64)
def _client(
    *,
    endpoint: str | None,
    region: str | None,
    ca_bundle: str | None,
    credentials: Credentials | None,
    deadline: float,
    environment: tuple[tuple[str, str], ...],
) -> S3Client:
    """One client for all runs that are reached the same way: it takes 0.1 s to make and keeps connections.

    `environment` holds the AWS variables, which boto3 reads by itself: other credentials, another client.
    """
    variables = dict(environment)
    ca_bundle = ca_bundle or variables.get("AWS_CA_BUNDLE")
    if ca_bundle and not Path(ca_bundle).exists():
        raise StoreError(f"{ca_bundle} does not exist; the CA bundle must be a PEM file")
    endpoint = endpoint or variables.get("AWS_ENDPOINT_URL_S3") or variables.get("AWS_ENDPOINT_URL")
    given = credentials
    inner = botocore.session.Session()
    inner.register_component("data_loader", _loader())
    session = boto3.session.Session(
        botocore_session=inner,
        aws_access_key_id=given.access_key if given else None,
        aws_secret_access_key=given.secret_key if given else None,
        aws_session_token=given.session_token if given else None,
    )
    # botocore guesses how a time is written, and describes this machine in every request: a tenth of what one costs
    session._session.get_component("response_parser_factory").set_parser_defaults(timestamp_parser=_time)
    config = Config(
        user_agent="emrakul",
        connect_timeout=min(5.0, deadline),
        read_timeout=min(60.0, max(deadline, 1.0)),
        max_pool_connections=16,
        # requests are repeated here, until the deadline; repeated below as well, one that hangs would take four of them
        retries={"mode": "standard", "total_max_attempts": 1},
        # Other stores than AWS do not know the checksums that botocore adds since 1.36 (boto3#4392); ours are
        # in the manifests, and the signature covers the bytes in transit.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        # Servers of one's own seldom have a DNS name for each bucket.
        s3={"addressing_style": "path" if endpoint else "auto"},
    )
    try:
        return session.client(
            "s3",
            endpoint_url=endpoint,
            region_name=region or session.region_name or variables.get("AWS_REGION") or "us-east-1",
            verify=ca_bundle,
            config=config,
        )
    except (ValueError, BotoCoreError) as error:
        raise StoreError(f"no S3 client can be made: {error}; check endpoint, region and profile") from error
