"""The operator with the rights that the chart gives it, and no others."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

from api.apiclient import Body
from charts import only, render
from cluster.apiserver import ApiServer

RELEASE_NAMESPACE = "ops"
"""Where charts.render installs to."""


def installed(server: ApiServer, home: str, given: Body) -> tuple[Path, Body]:
    """Make the chart's accounts and roles, those of the release itself in `home`: the kubeconfig and the config."""
    objects = render(given, release=home)
    for one in objects:
        if one["kind"] in ("ServiceAccount", "Role", "RoleBinding", "ClusterRole", "ClusterRoleBinding"):
            place = one["metadata"].pop("namespace", None)
            into = () if place is None else (f"--namespace={home if place == RELEASE_NAMESPACE else place}",)
            for subject in one.get("subjects", ()):
                subject["namespace"] = home
            server.kubectl("create", "--filename=-", *into, input=json.dumps(one))
    identity = server.service_account_kubeconfig(only(objects, "ServiceAccount")["metadata"]["name"], namespace=home)
    config = yaml.safe_load(only(objects, "ConfigMap")["data"]["config.yaml"])
    return identity, {name: value for name, value in config.items() if name not in ("images", "healthPort")}
