"""What every worker pod is, whoever asks for it: as the Pod Security Standard "restricted" says, with a read-only root.

A policy's pods run in the policy's namespace, with that namespace's own Secrets and accounts, but it is the operator
that makes them. So nobody gets by way of it what "restricted" would refuse, whether or not the namespace enforces it.
"""

from __future__ import annotations

from typing import Any

from emrakul.api.policy import PodOverrides
from emrakul.invalid import Invalid

POD: dict[str, Any] = {
    "runAsNonRoot": True,
    "runAsUser": 65532,
    "runAsGroup": 65532,
    "fsGroup": 65532,
    "seccompProfile": {"type": "RuntimeDefault"},
}
CONTAINER: dict[str, Any] = {
    "allowPrivilegeEscalation": False,
    "capabilities": {"drop": ["ALL"]},
    "readOnlyRootFilesystem": True,
}

WHO = ("runAsUser", "runAsGroup", "fsGroup", "fsGroupChangePolicy", "supplementalGroups", "supplementalGroupsPolicy")
"""Of a security context, what may be chosen: as whom a worker runs. null leaves the choice to the cluster."""
VOLUMES = ("configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret")


API_SERVER = "https://kubernetes.default.svc"
"""The audience of a cluster's own API server, by default."""


def check(overrides: PodOverrides) -> None:
    """Invalid where they ask for more than "restricted" allows."""
    for key, value in (overrides.security_context or {}).items():
        if key == "runAsUser" and value == 0:
            raise Invalid("podOverrides.securityContext.runAsUser is 0; worker pods run as non-root, name another user")
        if key not in WHO and {**POD, **CONTAINER}.get(key) != value:
            raise Invalid(
                f"podOverrides.securityContext.{key} cannot be changed; only {', '.join(WHO)} can, "
                "where null leaves the choice to the cluster"
            )
    for volume in overrides.volumes:
        for kind in volume.keys() - {"name"}:
            if kind not in VOLUMES:
                raise Invalid(
                    f"podOverrides.volumes: {volume.get('name')} is of kind {kind}; "
                    f"worker pods may mount {', '.join(VOLUMES)}"
                )
        _check_tokens(volume)


def _check_tokens(volume: dict[str, Any]) -> None:
    """A token without an audience is one for the API server, which a worker has no business with."""
    for source in (volume.get("projected") or {}).get("sources") or ():
        token = source.get("serviceAccountToken")
        if token is not None and str(token.get("audience") or API_SERVER).startswith(API_SERVER):
            raise Invalid(
                f"podOverrides.volumes: {volume.get('name')} has a serviceAccountToken for the API server; name the "
                "audience of the service that takes it, such as sts.amazonaws.com"
            )
