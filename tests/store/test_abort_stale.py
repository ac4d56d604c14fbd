"""Unfinished uploads of killed writers, on a real server: the old ones go, a writer at work is not disturbed."""

from __future__ import annotations

from datetime import timedelta

from leyline.s3 import S3Store


def unfinished(store: S3Store) -> int:
    found = store._client.list_multipart_uploads(Bucket=store._bucket, Prefix=store._prefix)
    return len(found.get("Uploads", []))


def test_only_uploads_older_than_the_limit_are_thrown_away(s3: S3Store) -> None:
    upload = s3._begin("checkpoints/half")
    s3._put_part("checkpoints/half", upload, 1, b"x" * 1000)
    assert s3.abort_stale(s3.now() - timedelta(hours=1)) == 0
    assert unfinished(s3) == 1
    assert s3.abort_stale(s3.now() + timedelta(seconds=2)) == 1
    assert unfinished(s3) == 0


def test_another_runs_uploads_stay(s3: S3Store) -> None:
    other = S3Store(s3._bucket, s3._prefix.rstrip("/") + "-other", deadline=10)
    other._begin("checkpoints/half")
    assert s3.abort_stale(s3.now() + timedelta(seconds=2)) == 0
    assert unfinished(other) == 1
