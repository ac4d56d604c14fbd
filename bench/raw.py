"""What the hardware and the server can do, without us: plain boto3 (8 threads x 16 MiB), plain files.

    python bench/raw.py RUN FOLDER KEY SIZE

says how many seconds it takes to read, to write and to hash (SHA-256) so many bytes, and how busy the cores were.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from lines import seconds
from machine import busy, jiffies

THREADS = 8
PART = 16 * 2**20


class Raw(Protocol):
    """Bytes in and out as fast as is plainly possible."""

    name: str

    def read(self, key: str, size: int) -> None:
        """The first `size` bytes of an object."""
        ...

    def write(self, key: str, size: int) -> None:
        """An object of `size` bytes that nobody has compressed."""
        ...

    def delete(self, key: str) -> None: ...

    def evict(self) -> None:
        """The operating system forgets what it holds of the data in memory."""
        ...


def raw_of(uri: str, folder: Path) -> Raw:
    """For the run at `uri`; `folder` is where the server (or the run itself) keeps its data."""
    parts = urlsplit(uri)
    if parts.scheme == "s3":
        return RawS3(parts.netloc, parts.path.strip("/"), folder)
    return RawFiles(Path(parts.path or uri))


class RawS3:
    """boto3 as its documentation shows it, but for conditions and digests: it has none."""

    name = "boto3"

    def __init__(self, bucket: str, prefix: str, folder: Path) -> None:
        import boto3
        from botocore.config import Config

        config = Config(
            max_pool_connections=THREADS,
            s3={"addressing_style": "path"},
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
        )
        self.client: Any = boto3.client("s3", config=config)
        self.bucket, self.prefix, self.folder = bucket, prefix, folder
        self.part = os.urandom(PART)

    def read(self, key: str, size: int) -> None:
        def part(at: int) -> None:
            wanted = f"bytes={at}-{min(at + PART, size) - 1}"
            self.client.get_object(Bucket=self.bucket, Key=f"{self.prefix}/{key}", Range=wanted)["Body"].read()

        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(part, range(0, size, PART)))

    def write(self, key: str, size: int) -> None:
        where = {"Bucket": self.bucket, "Key": f"{self.prefix}/{key}"}
        upload = self.client.create_multipart_upload(**where)["UploadId"]

        def part(number: int) -> dict[str, Any]:
            body = self.part[: min(PART, size - (number - 1) * PART)]
            answer = self.client.upload_part(**where, UploadId=upload, PartNumber=number, Body=body)
            return {"PartNumber": number, "ETag": answer["ETag"]}

        with ThreadPoolExecutor(THREADS) as pool:
            parts = list(pool.map(part, range(1, -(-size // PART) + 1)))
        self.client.complete_multipart_upload(**where, UploadId=upload, MultipartUpload={"Parts": parts})

    def delete(self, key: str) -> None:
        self.client.delete_object(Bucket=self.bucket, Key=f"{self.prefix}/{key}")

    def evict(self) -> None:
        evict(self.folder)


class RawFiles:
    """pread and pwrite; what was written is on the disk when it is done, as it is with us."""

    name = "pread, pwrite, fsync"

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.part = os.urandom(PART)

    def read(self, key: str, size: int) -> None:
        file = os.open(self.folder / key, os.O_RDONLY)
        try:
            with ThreadPoolExecutor(THREADS) as pool:
                list(pool.map(lambda at: len(os.pread(file, min(PART, size - at), at)), range(0, size, PART)))
        finally:
            os.close(file)

    def write(self, key: str, size: int) -> None:
        path = self.folder / key
        path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        try:
            with ThreadPoolExecutor(THREADS) as pool:
                list(pool.map(lambda at: os.pwrite(file, self.part[: size - at], at), range(0, size, PART)))
            os.fsync(file)
        finally:
            os.close(file)

    def delete(self, key: str) -> None:
        (self.folder / key).unlink()

    def evict(self) -> None:
        evict(self.folder)


def name_of_raw(uri: str) -> str:
    return RawS3.name if uri.startswith("s3:") else RawFiles.name


NOISE = os.urandom(PART)


def hashed(size: int) -> None:
    """SHA-256 on all cores: what every byte that is read or written costs us above the plainest way."""
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(lambda at: hashlib.sha256(NOISE[: size - at]).digest(), range(0, size, PART)))


def main() -> None:
    uri, folder, key, size = sys.argv[1], Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
    raw, new = raw_of(uri, folder), f"raw/{os.getpid()}"
    raw.read(key, 1)  # the first call of a client sets it up
    since = jiffies()
    took = {"read": seconds(lambda: raw.read(key, size)), "write": seconds(lambda: raw.write(new, size))}
    took["busy"] = busy(since)
    took["hash"] = seconds(lambda: hashed(size))
    raw.delete(new)
    print(json.dumps(took))


def evict(folder: Path) -> None:
    for path in _files(folder):
        with suppress(OSError):
            file = os.open(path, os.O_RDONLY)
            try:
                os.fsync(file)  # what is not on the disk yet cannot be forgotten
                os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(file)


def _files(folder: Path) -> Iterator[Path]:
    for parent, _, names in os.walk(folder):
        for name in names:
            yield Path(parent, name)


if __name__ == "__main__":
    main()
