"""Kubeconfig documents, whole in one file: they work wherever the file is copied to. JSON is YAML too."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping

from cluster.certificates import Pair


def with_certificate(pair: Pair, *, server: str, root: str, namespace: str = "default") -> str:
    """For the user whom the certificate names. `root`: the authority's certificate in base64."""
    user = {
        "client-certificate-data": base64.b64encode(pair.certificate.read_bytes()).decode(),
        "client-key-data": base64.b64encode(pair.key.read_bytes()).decode(),
    }
    return _kubeconfig(user, server=server, root=root, namespace=namespace)


def with_token(token: str, *, server: str, root: str, namespace: str = "default") -> str:
    """For the service account whom the token names. `root`: the authority's certificate in base64."""
    return _kubeconfig({"token": token}, server=server, root=root, namespace=namespace)


def _kubeconfig(user: Mapping[str, str], *, server: str, root: str, namespace: str) -> str:
    document = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "tests",
        "clusters": [{"name": "tests", "cluster": {"server": server, "certificate-authority-data": root}}],
        "contexts": [{"name": "tests", "context": {"cluster": "tests", "user": "tests", "namespace": namespace}}],
        "users": [{"name": "tests", "user": user}],
    }
    return json.dumps(document, indent=2)
