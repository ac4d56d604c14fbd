"""What can go wrong between us and an S3 server."""

from __future__ import annotations

import socket
import time
from pathlib import Path

import pytest

from faults import Faults
from leyline.open import open_store, probe
from leyline.s3 import Credentials, S3Store
from leyline.store import CHUNK, Damaged, Exists, NotFound, Refused, StoreError, Unreachable, Unsuitable
from servers import S3Server, free_ports, rclone

CHUNKS = [b"1" * CHUNK, b"2"]


def uploads(store: S3Store) -> int:
    """Multipart uploads that are begun and neither completed nor aborted."""
    found = store._client.list_multipart_uploads(Bucket=store._bucket, Prefix=store._prefix)
    return len(found.get("Uploads", []))


def test_what_is_larger_than_is_read_as_a_whole_is_damaged(s3: S3Store) -> None:
    s3.put_if_absent("big", b"x" * 1001)
    s3.put_if_absent("fits", b"x" * 1000)
    bucket, _, prefix = s3.uri.removeprefix("s3://").partition("/")
    bounded = S3Store(bucket, prefix, largest=1000)
    assert len(bounded.get("fits")) == 1000
    with pytest.raises(Damaged, match=r"big in .* is 1,001 bytes; at most 1,000 are read as a whole"):
        bounded.get("big")


def test_a_lost_response_of_a_put_is_repaired(s3: S3Store, faults: Faults) -> None:
    faults.lose_response("PutObject")
    s3.put_if_absent("a", b"mine")
    assert s3.get("a") == b"mine"
    assert faults.seen["PutObject"] == 2


def test_a_store_that_takes_requests_and_answers_none_has_the_deadline_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        credentials = Credentials(access_key="a", secret_key="b")
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        store = S3Store("runs", "one", endpoint=endpoint, region="us-east-1", credentials=credentials, deadline=1.0)
        began = time.monotonic()
        with pytest.raises(Unreachable, match=f"the store at {endpoint} does not answer"):
            store.head("log/0/0.json")
    assert time.monotonic() - began < 3


def test_a_lost_response_does_not_hide_another_writer(s3: S3Store, faults: Faults) -> None:
    s3.put_if_absent("a", b"theirs")
    faults.lose_response("PutObject")
    with pytest.raises(Exists):
        s3.put_if_absent("a", b"mine")


def test_a_lost_response_of_complete_is_repaired(s3: S3Store, faults: Faults) -> None:
    faults.lose_response("CompleteMultipartUpload")
    s3.put_stream("big", CHUNKS, size=CHUNK + 1)
    assert s3.head("big").size == CHUNK + 1
    assert uploads(s3) == 0


def test_a_conflict_of_a_put_is_retried(s3: S3Store, faults: Faults) -> None:
    faults.answer("PutObject", 409, "ConditionalRequestConflict", times=2)
    assert s3.put_if_absent("a", b"1")


def test_a_conflict_of_complete_uploads_all_parts_again(s3: S3Store, faults: Faults) -> None:
    faults.answer("CompleteMultipartUpload", 409, "ConditionalRequestConflict")
    assert s3.put_stream("big", CHUNKS, size=CHUNK + 1)
    assert faults.seen["CreateMultipartUpload"] == 2
    assert faults.seen["UploadPart"] == 4
    assert uploads(s3) == 0


def test_a_conflict_of_complete_cannot_be_redone_from_a_generator(s3: S3Store, faults: Faults) -> None:
    faults.answer("CompleteMultipartUpload", 409, "ConditionalRequestConflict")
    with pytest.raises(Unreachable, match="try again"):
        s3.put_stream("big", iter(CHUNKS), size=CHUNK + 1)
    assert uploads(s3) == 0
    with pytest.raises(NotFound):
        s3.head("big")


@pytest.mark.parametrize(("status", "code"), [(503, "SlowDown"), (500, "InternalError"), (429, "TooManyRequests")])
def test_a_busy_server_is_asked_again(s3: S3Store, faults: Faults, status: int, code: str) -> None:
    faults.answer("PutObject", status, code, times=2)
    assert s3.put_if_absent("a", b"1")


def test_a_server_that_stays_busy_is_unreachable_at_the_deadline(seaweed: S3Server, s3: S3Store) -> None:
    impatient = S3Store(seaweed.bucket, "busy", deadline=1)
    faults = Faults(impatient)
    try:
        faults.answer("UploadPart", 503, "ServiceUnavailable", times=1000)
        started = time.monotonic()
        with pytest.raises(Unreachable, match="ServiceUnavailable"):
            impatient.put_stream("big", CHUNKS, size=CHUNK + 1)
    finally:
        faults.remove()
    assert time.monotonic() - started < 15
    assert uploads(impatient) == 0


def test_a_failed_stream_leaves_no_multipart_upload(s3: S3Store) -> None:
    def failing():  # type: ignore[no-untyped-def]
        yield CHUNKS[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        s3.put_stream("big", failing(), size=CHUNK + 1)
    s3.put_if_absent("taken", b"")
    with pytest.raises(Exists):
        s3.put_stream("taken", CHUNKS, size=CHUNK + 1)
    assert uploads(s3) == 0


def test_a_wrong_secret_is_refused_at_once(seaweed: S3Server, s3: S3Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    store = S3Store(seaweed.bucket, "run")
    for ask in (store.head, store.get, lambda key: store.put_if_absent(key, b"")):
        with pytest.raises(Refused, match="credentials"):
            ask("a")


def test_an_expired_token_is_refused_also_where_s3_says_400(s3: S3Store, faults: Faults) -> None:
    faults.answer("GetObject", 400, "ExpiredToken")
    with pytest.raises(Refused, match="ExpiredToken"):
        s3.get("a")


def test_without_credentials_it_is_refused(s3: S3Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    with pytest.raises(Refused, match="credentials"):
        S3Store("runs", "run").head("a")


def test_a_bucket_that_is_not_there_says_so(s3: S3Store) -> None:
    with pytest.raises(Refused, match=r"no such bucket.*create it"):
        S3Store("no-such-bucket", "run").get("a")


def test_a_closed_port_is_unreachable(s3: S3Store) -> None:
    (port,) = free_ports(1)
    store = S3Store("runs", "run", endpoint=f"http://127.0.0.1:{port}", deadline=0.5)
    started = time.monotonic()
    with pytest.raises(Unreachable, match=str(port)):
        store.head("a")
    assert time.monotonic() - started < 5


def test_a_missing_ca_bundle_is_named() -> None:
    with pytest.raises(StoreError, match=r"/no/ca\.pem"):
        S3Store("runs", "run", ca_bundle="/no/ca.pem")


def test_the_probe_accepts_a_store_with_conditions_and_cleans_up(
    s3: S3Store, faults: Faults, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("leyline.open._probed", set())  # whatever the tests before this one did in the bucket
    probe(s3)
    assert faults.seen["CompleteMultipartUpload"] == 1
    assert list(s3.list("")) == []
    assert uploads(s3) == 0
    requests = faults.seen.total()
    probe(s3)
    probe(S3Store(s3.uri.split("/")[2], "another-run"))
    assert faults.seen.total() == requests, "a thousand runs in a bucket are one store"


def test_the_time_is_asked_for_once_where_a_listing_has_told_it(
    s3: S3Store, faults: Faults, monkeypatch: pytest.MonkeyPatch
) -> None:
    began = s3.now()
    list(s3.list(""))
    assert faults.seen["ListObjectsV2"] == 2
    passed = 0.0
    real = time.monotonic
    monkeypatch.setattr(time, "monotonic", lambda: real() + passed)
    for passed in (0.0, 4.0, 9.0):
        assert abs((s3.now() - began).total_seconds() - passed) < 2
    assert faults.seen["ListObjectsV2"] == 2
    passed = 11.0  # too long ago: what the server says counts, and it knows nothing of our eleven seconds
    assert abs((s3.now() - began).total_seconds()) < 2
    assert faults.seen["ListObjectsV2"] == 3


@pytest.mark.parametrize("date", [None, "", "soon"])
def test_a_server_that_tells_no_time_can_be_listed_all_the_same(
    s3: S3Store, monkeypatch: pytest.MonkeyPatch, date: str | None
) -> None:
    page = {"ResponseMetadata": {"HTTPHeaders": {} if date is None else {"date": date}}, "IsTruncated": False}
    monkeypatch.setattr(s3, "_ask", lambda _what, _request: page)
    assert list(s3.list("")) == []
    with pytest.raises(StoreError, match="does not tell the time"):
        s3.now()


def test_the_probe_refuses_a_store_that_ignores_conditions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with rclone(tmp_path) as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        store = S3Store(server.bucket, "run")
        with pytest.raises(Unsuitable, match="If-None-Match on PUT"):
            probe(store)
        assert list(store.list("")) == []
        store.put_if_absent("there", b"")
        assert list(store.ignored_conditions("there")) == [
            "If-Match on GET",
            "If-None-Match on CompleteMultipartUpload",
        ]


def test_a_nested_or_foreign_run_is_refused(s3: S3Store, seaweed: S3Server) -> None:
    base = s3.uri
    open_store(f"{base}/team/run").put_if_absent("log/0/0.json", b"{}")
    open_store(f"{base}/team/run/")
    with pytest.raises(StoreError, match=f"lies inside the run {base}/team/run"):
        open_store(f"{base}/team/run/inner/most")
    with pytest.raises(StoreError, match="is no run, but holds run/log"):
        open_store(f"{base}/team")
    open_store(f"{base}/team/runner")
