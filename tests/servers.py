"""Real object stores for tests and benches: each a process of its own on 127.0.0.1, ended by its pid."""

from __future__ import annotations

import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

_PORTS = (
    "s3.port",
    "s3.port.grpc",
    "master.port",
    "master.port.grpc",
    "volume.port",
    "volume.port.grpc",
    "filer.port",
    "filer.port.grpc",
    "admin.port",
    "admin.port.grpc",
)


@dataclass(frozen=True, kw_only=True)
class S3Server:
    endpoint: str
    access_key: str
    secret_key: str
    bucket: str
    pid: int

    @property
    def environment(self) -> dict[str, str]:
        """The usual AWS variables for this server."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_DEFAULT_REGION": "us-east-1",
        }


@contextmanager
def seaweedfs(folder: Path, *, bucket: str = "runs", numbers: Sequence[int] | None = None) -> Iterator[S3Server]:
    """SeaweedFS in one process, its data in `folder`, with a bucket. `numbers`: the ports of a server before it."""
    ports = dict(zip(_PORTS, numbers or free_ports(len(_PORTS)), strict=True))
    command = [
        _program("weed"),
        f"-logdir={folder}",
        "mini",
        f"-dir={folder}",
        "-ip=127.0.0.1",
        "-ip.bind=127.0.0.1",
        "-admin.ui=false",
        "-webdav=false",
        "-s3.iam=false",
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
        "-master.telemetry=false",
        *(f"-{name}={port}" for name, port in ports.items()),
    ]
    with _running(command, folder=folder, port=ports["s3.port"], bucket=bucket) as server:
        yield server


@contextmanager
def rclone(folder: Path, *, bucket: str = "runs") -> Iterator[S3Server]:
    """`rclone serve s3`: a store that ignores every condition."""
    (port,) = free_ports(1)
    command = [
        _program("rclone"),
        "serve",
        "s3",
        str(folder),
        f"--addr=127.0.0.1:{port}",
        "--auth-key=tester,secret-key",
    ]
    with _running(command, folder=folder, port=port, bucket=bucket) as server:
        yield server


def free_ports(count: int) -> Sequence[int]:
    """Different ports that nobody listens on.

    Below those that the system gives to clients and Kubernetes to services: one of these might be taken by the time
    that a server has started.
    """
    found: list[int] = []
    chance = random.SystemRandom()  # a test may have seeded the other one, in each process alike
    while len(found) < count:
        port = chance.randrange(12_000, 30_000)
        with socket.socket() as one, suppress(OSError):
            one.bind(("127.0.0.1", port))
            if port not in found:
                found.append(port)
    return found


@contextmanager
def _running(command: Sequence[str], *, folder: Path, port: int, bucket: str) -> Iterator[S3Server]:
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "server.log"
    keys = {"AWS_ACCESS_KEY_ID": "tester", "AWS_SECRET_ACCESS_KEY": "secret-key"}
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, cwd=folder, env=_clean(os.environ) | keys, stdout=output, stderr=subprocess.STDOUT
        )
    server = S3Server(
        endpoint=f"http://127.0.0.1:{port}",
        access_key="tester",
        secret_key="secret-key",
        bucket=bucket,
        pid=process.pid,
    )
    try:
        _wait_for(server, process, log)
        yield server
    finally:
        process.terminate()
        try:
            process.wait(3)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(10)


def _wait_for(server: S3Server, process: subprocess.Popen[bytes], log: Path) -> None:
    """Until the server has made the bucket, which is later than until it listens."""
    client = boto3.client(
        "s3",
        endpoint_url=server.endpoint,
        region_name="us-east-1",
        aws_access_key_id=server.access_key,
        aws_secret_access_key=server.secret_key,
        config=Config(
            connect_timeout=1, read_timeout=5, retries={"total_max_attempts": 1}, s3={"addressing_style": "path"}
        ),
    )
    give_up = time.monotonic() + 30
    while True:
        try:
            client.create_bucket(Bucket=server.bucket)
            break
        except client.exceptions.BucketAlreadyOwnedByYou:
            break  # a server on this folder made it before
        except (BotoCoreError, ClientError) as error:
            if process.poll() is not None or time.monotonic() > give_up:
                raise RuntimeError(f"the server did not start: {error}\n{log.read_text()[-2000:]}") from error
            time.sleep(0.1)
    client.close()


def _clean(environment: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if not name.startswith("AWS_")}


def _program(name: str) -> str:
    """A program that a wheel put beside the interpreter."""
    return str(Path(sys.executable).parent / name)
