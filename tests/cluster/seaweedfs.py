"""SeaweedFS as a Deployment with a Service, named as examples/cluster names it: the tests' object store."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from cluster.cluster import Cluster
from cluster.processes import wait_until
from cluster.relay import relayed
from leyline.s3 import Credentials, S3Store

Body = dict[str, Any]

BUCKET = "emrakul"
GUARDED = "guarded"
"""The prefix where WORKER may write, and only what workers have to."""
NAMESPACE = "store"
ENDPOINT = f"http://seaweedfs.{NAMESPACE}:8333"
"""For pods."""
REGION = "us-east-1"
OWNER = Credentials(access_key="digits", secret_key="change-me")
WORKER = Credentials(access_key="worker", secret_key="another")

_LABELS = {"app": "seaweedfs"}
_COMMAND = (
    "/weed",
    "mini",
    "-dir=/data",
    "-ip=127.0.0.1",
    "-ip.bind=0.0.0.0",
    "-admin.ui=false",
    "-webdav=false",
    "-s3.iam=false",
    "-s3.port.iceberg=0",
    "-s3.port.lance=0",
    "-s3.config=/etc/seaweedfs/identities.json",
    "-master.telemetry=false",
)


@dataclass(frozen=True)
class SeaweedFS:
    """The store as this process reaches it."""

    endpoint: str

    def run(self, prefix: str, credentials: Credentials = OWNER) -> S3Store:
        return S3Store(BUCKET, prefix, endpoint=self.endpoint, region=REGION, credentials=credentials)


@contextmanager
def deployed(cluster: Cluster, image: str) -> Iterator[SeaweedFS]:
    """It stays in the cluster; what it held at an earlier time is gone."""
    cluster.kubectl("delete", "namespace", NAMESPACE, "--ignore-not-found")
    objects = {"apiVersion": "v1", "kind": "List", "items": _objects(image)}
    cluster.kubectl("apply", "--filename=-", input=json.dumps(objects))
    cluster.kubectl("rollout", "status", "deployment/seaweedfs", f"--namespace={NAMESPACE}", "--timeout=120s")
    (node,) = json.loads(cluster.kubectl("get", "nodes", "--output=json"))["items"]
    (host,) = (one["address"] for one in node["status"]["addresses"] if one["type"] == "InternalIP")
    service = json.loads(cluster.kubectl("get", "service/seaweedfs", f"--namespace={NAMESPACE}", "--output=json"))
    with relayed(partial(cluster.connect, host, service["spec"]["ports"][0]["nodePort"])) as port:
        endpoint = f"http://127.0.0.1:{port}"
        wait_until("SeaweedFS has its bucket", lambda: _has_bucket(endpoint), seconds=60)
        yield SeaweedFS(endpoint)


def secret(name: str, credentials: Credentials = OWNER) -> Body:
    """Credentials as a policy names them."""
    keys = {"AWS_ACCESS_KEY_ID": credentials.access_key, "AWS_SECRET_ACCESS_KEY": credentials.secret_key}
    return {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": name}, "stringData": keys}


def _has_bucket(endpoint: str) -> bool:
    """Makes it, which works later than listening does."""
    client = boto3.client(
        "s3",
        endpoint_url=endpoint,
        region_name=REGION,
        aws_access_key_id=OWNER.access_key,
        aws_secret_access_key=OWNER.secret_key,
        config=Config(connect_timeout=2, read_timeout=5, retries={"total_max_attempts": 1}),
    )
    try:
        client.create_bucket(Bucket=BUCKET)
    except client.exceptions.BucketAlreadyOwnedByYou:
        return True
    except (BotoCoreError, ClientError):
        return False
    finally:
        client.close()
    return True


def _objects(image: str) -> list[Body]:
    where = {"name": "seaweedfs", "namespace": NAMESPACE}
    container = {
        "name": "weed",
        "image": image,
        "command": list(_COMMAND),
        "ports": [{"containerPort": 8333}],
        "readinessProbe": {"tcpSocket": {"port": 8333}, "periodSeconds": 1},
        "resources": {"requests": {"cpu": "50m", "memory": "256Mi"}},
        "volumeMounts": [
            {"name": "data", "mountPath": "/data"},
            {"name": "tmp", "mountPath": "/tmp"},
            {"name": "identities", "mountPath": "/etc/seaweedfs"},
        ],
    }
    volumes = [
        {"name": "data", "emptyDir": {}},
        {"name": "tmp", "emptyDir": {}},
        {"name": "identities", "secret": {"secretName": "identities"}},
    ]
    template = {"metadata": {"labels": _LABELS}, "spec": {"containers": [container], "volumes": volumes}}
    deployment = {"selector": {"matchLabels": _LABELS}, "template": template}
    service = {"type": "NodePort", "selector": _LABELS, "ports": [{"port": 8333}]}
    identities = {"identities.json": json.dumps({"identities": _identities()})}
    return [
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}},
        {
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": {"name": "identities", "namespace": NAMESPACE},
            "stringData": identities,
        },
        {"apiVersion": "v1", "kind": "Service", "metadata": where, "spec": service},
        {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": where, "spec": deployment},
    ]


def _identities() -> list[Body]:
    everything = ["Admin", "Read", "Write", "List"]
    of_a_worker = [f"Read:{BUCKET}", f"List:{BUCKET}", f"Write:{BUCKET}/{GUARDED}/cycles/*"]
    return [_identity("owner", OWNER, everything), _identity("worker", WORKER, of_a_worker)]


def _identity(name: str, credentials: Credentials, actions: list[str]) -> Body:
    keys = {"accessKey": credentials.access_key, "secretKey": credentials.secret_key}
    return {"name": name, "credentials": [keys], "actions": actions}
