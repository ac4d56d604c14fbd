"""The Kubernetes objects of the store, and of the Secrets that pods reach it with. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cluster.weed.identities import ADMIN, BUCKET, WORKER, Identity, configuration

NAME = "seaweedfs"
PORT = 8333
_LABELS = {"app": NAME}

Body = dict[str, Any]


def endpoint(namespace: str) -> str:
    """For pods; needs the cluster's DNS."""
    return f"http://{NAME}.{namespace}.svc:{PORT}"


def store(image: str, namespace: str, identities: Sequence[Identity] = (ADMIN, WORKER)) -> list[Body]:
    """A Secret, a Deployment and a Service. What is stored outlives the container, but not the pod."""
    return [
        _object("v1", "Secret", namespace, NAME, stringData={"s3.json": configuration(identities)}),
        _object("apps/v1", "Deployment", namespace, NAME, spec=_deployment(image)),
        _object("v1", "Service", namespace, NAME, spec={"selector": _LABELS, "ports": [{"name": "s3", "port": PORT}]}),
    ]


def credentials(name: str, namespace: str, identity: Identity) -> Body:
    """The Secret that a policy's `credentialsSecretRef` or `workerCredentialsSecretRef` names."""
    return _object("v1", "Secret", namespace, name, stringData=identity.environment)


def _deployment(image: str) -> Body:
    container = {
        "name": NAME,
        "image": image,
        "args": [
            "-logdir=/tmp",
            "mini",
            "-dir=/data",
            f"-bucket={BUCKET}",
            # Its parts talk on loopback; only the gateway, which asks who it is, is the Service's business.
            "-ip=127.0.0.1",
            "-ip.bind=0.0.0.0",
            f"-s3.port={PORT}",
            "-s3.config=/etc/seaweedfs/s3.json",
            "-s3.iam=false",
            "-s3.port.iceberg=0",
            "-s3.port.lance=0",
            "-admin.ui=false",
            "-webdav=false",
            "-master.telemetry=false",
        ],
        "ports": [{"name": "s3", "containerPort": PORT}],
        "readinessProbe": {"tcpSocket": {"port": PORT}, "periodSeconds": 1},
        "resources": {"requests": {"cpu": "50m", "memory": "256Mi"}, "limits": {"memory": "1Gi"}},
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "readOnlyRootFilesystem": True,
        },
        "volumeMounts": [
            {"name": "data", "mountPath": "/data"},
            {"name": "tmp", "mountPath": "/tmp"},
            {"name": "configuration", "mountPath": "/etc/seaweedfs", "readOnly": True},
        ],
    }
    pod = {
        "containers": [container],
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": 65532,
            "runAsGroup": 65532,
            "fsGroup": 65532,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "terminationGracePeriodSeconds": 5,
        "volumes": [
            {"name": "data", "emptyDir": {}},
            {"name": "tmp", "emptyDir": {}},
            {"name": "configuration", "secret": {"secretName": NAME}},
        ],
    }
    return {
        "replicas": 1,
        "strategy": {"type": "Recreate"},
        "selector": {"matchLabels": _LABELS},
        "template": {"metadata": {"labels": _LABELS}, "spec": pod},
    }


def _object(version: str, kind: str, namespace: str, name: str, **content: Body) -> Body:
    return {"apiVersion": version, "kind": kind, "metadata": {"name": name, "namespace": namespace}, **content}
