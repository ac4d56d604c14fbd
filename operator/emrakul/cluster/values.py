"""The chart's values as a model: charts/emrakul-operator/values.schema.json is made of it, values.yaml is held to it.

Nothing here runs in a cluster. What the operator is told goes through the chart's ConfigMap, as `OperatorConfig`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from emrakul.api.policy import Objects, PodOverrides, SecretRef, Strings
from emrakul.api.resource import Label, Model, Text
from emrakul.runtime.config import Defaults, RunPrefix

# Helm's users unset a text by writing "", and `--set key=` gives it to them.
MaybeName = Annotated[str, Field(pattern=r"^([a-z0-9]([-a-z0-9]*[a-z0-9])?)?$", max_length=63)]
AnyName = Annotated[str, Field(pattern=r"^(\*|[a-z0-9]([-a-z0-9]*[a-z0-9])?)$", max_length=63)]
MaybeUrl = Annotated[str, Field(pattern=r"^(https?://.+)?$", max_length=1024)]
Port = Annotated[int, Field(ge=1, le=65535)]
Ports = Annotated[tuple[Port, ...], Field(max_length=16)]
SomePorts = Annotated[Ports, Field(min_length=1)]
Duration = Annotated[str, Field(pattern=r"^[1-9][0-9]*(s|m|h)$", max_length=8)]
# Helm checks no model, only the schema made of it: what the API server takes once, and names that the chart has taken.
_ONCE: dict[str, Any] = {"uniqueItems": True}
Namespaces = Annotated[tuple[Label, ...], Field(max_length=256, json_schema_extra=_ONCE)]
_LABELS = ("helm.sh/chart", *(f"app.kubernetes.io/{name}" for name in ("name", "instance", "version", "managed-by")))
PodLabels = Annotated[Strings, Field(json_schema_extra={"properties": dict.fromkeys(_LABELS, False)})]
PodAnnotations = Annotated[Strings, Field(json_schema_extra={"properties": {"checksum/config": False}})]
Volumes = Annotated[
    Objects,
    Field(
        json_schema_extra={
            "items": {
                "type": "object",
                "required": ["name"],
                "properties": {
                    "name": {"not": {"enum": ["config", "tmp", "trust", "signing-key", "data-key", "ca-bundle"]}}
                },
            }
        }
    ),
]
VolumeMounts = Annotated[
    Objects,
    Field(
        json_schema_extra={
            "items": {
                "type": "object",
                "required": ["name", "mountPath"],
                "properties": {"mountPath": {"not": {"pattern": "^/(tmp|etc/emrakul(-ca|-keys/[^/]*)?)/*$"}}},
            }
        }
    ),
]


class Image(Model):
    """One image; a digest is stronger than a tag, and no tag is the chart's appVersion."""

    repository: Annotated[str, Field(min_length=1, max_length=256)]
    """With the registry before it, where it is not the container runtime's default."""
    tag: Annotated[str, Field(pattern=r"^([A-Za-z0-9_][A-Za-z0-9_.-]*)?$", max_length=128)] = ""
    digest: Annotated[str, Field(pattern=r"^(sha256:[0-9a-f]{64})?$")] = ""


class OperatorImage(Image):
    """The operator's image, and when all three are pulled."""

    repository: Annotated[str, Field(min_length=1, max_length=256)] = "emrakul/operator"
    pull_policy: Literal["Always", "IfNotPresent", "Never"] = "IfNotPresent"
    """Of worker pods too."""


class ServiceAccount(Model):
    """A service account that the chart makes, or one that is there."""

    create: bool
    name: MaybeName = ""
    annotations: Strings = {}
    """Of workload identity, such as eks.amazonaws.com/role-arn."""


class KeySecrets(Model):
    """Names of Secrets with keys; none are needed, and nobody's signature is required without trustSecret."""

    trust_secret: MaybeName = ""
    """Public keys, `<role>*.pem`."""
    signing_key_secret: MaybeName = ""
    """`signing.pem`, a private key."""
    data_key_secret: MaybeName = ""
    """`data.key`, of encrypted importance statistics."""


class CaBundle(Model):
    """CAs that the operator itself trusts for stores and sinks."""

    config_map: MaybeName = ""
    """In the release's namespace; "" is what the image brings."""
    key: Text = "ca.crt"


class WorkerPods(Model):
    """What every worker pod gets, before a policy's own overrides."""

    service_account: ServiceAccount = ServiceAccount(create=False)
    """Of worker pods: made in each namespace that is named in `namespaces`, else in `allowedRunPrefixes`."""
    pod_overrides: PodOverrides = PodOverrides()


class Crds(Model):
    """The two resource definitions."""

    enabled: bool = True
    """False where somebody else installs them from crds/."""
    keep: bool = True
    """They, and with them every cycle and policy, stay when the release is uninstalled."""


class ServiceMonitor(Model):
    """Of the Prometheus operator, whose resource definitions must be there."""

    enabled: bool = False
    interval: Duration = "30s"
    labels: Strings = {}
    """That your Prometheus selects by."""


class Rules(Model):
    """Alerts on the service levels, as a PrometheusRule."""

    enabled: bool = False
    labels: Strings = {}


class Metrics(Model):
    """Metrics are served at /metrics in any case; this is who looks at them."""

    service_monitor: ServiceMonitor = ServiceMonitor()
    rules: Rules = Rules()


class NetworkPolicies(Model):
    """Network policies of the operator and of worker pods, where the cluster's network enforces such."""

    enabled: bool = False
    api_server_ports: SomePorts = (443, 6443)
    """Reached by the operator only, which can do nothing without."""
    store_ports: Ports = (443,)
    """Of stores and of the cloud's token service, reached by the operator and by worker pods."""
    sink_ports: Ports = ()
    """Reached by the operator only."""


class Values(Model):
    """Everything that can be set on the chart. A key that is not here is refused."""

    namespaces: Namespaces = ()
    """Namespaces that are watched, with a Role in each and no rights elsewhere; empty: the whole cluster."""
    operator_class: MaybeName = ""
    """Only objects whose spec.operatorClass is this are handled; "" is those without one."""
    allowed_run_prefixes: Annotated[dict[AnyName, tuple[RunPrefix, ...]], Field(max_length=1024)] = {}
    """Run prefixes that each namespace may name; `*` is any namespace. Cluster-wide nothing is allowed by default."""
    defaults: Defaults = Defaults()
    """Store and settings of cycles without a policy. Secrets are looked up in the cycle's namespace."""
    sink: MaybeUrl = ""
    """Where outcomes go as CloudEvents, for policies that name no sink of their own."""
    image: OperatorImage = OperatorImage()
    worker_image: Image = Image(repository="emrakul/worker")
    validator_image: Image = Image(repository="emrakul/validator")
    image_pull_secrets: Annotated[tuple[SecretRef, ...], Field(max_length=8)] = ()
    """Of the operator; worker pods have theirs in workers.podOverrides."""
    keys: KeySecrets = KeySecrets()
    """Secrets of each tenant's namespace, for worker pods."""
    operator_keys: KeySecrets = KeySecrets()
    """Secrets of the release's namespace, for the operator."""
    ca_bundle: CaBundle = CaBundle()
    workers: WorkerPods = WorkerPods()
    service_account: ServiceAccount = ServiceAccount(create=True)
    """Of the operator."""
    secret_names: Annotated[tuple[AnyName, ...], Field(max_length=256)] = ("*",)
    """Secrets that the operator may read, in the namespaces it watches; `*` is any, empty is none."""
    crds: Crds = Crds()
    log_level: Literal["debug", "info", "warning"] = "info"
    log_format: Literal["json", "text"] = "json"
    resources: dict[str, Any] = {"requests": {"cpu": "100m", "memory": "256Mi"}, "limits": {"memory": "512Mi"}}
    node_selector: Strings = {}
    tolerations: Objects = ()
    affinity: dict[str, Any] = {}
    priority_class_name: Annotated[str, Field(max_length=253)] = ""
    run_as_user: Annotated[int, Field(ge=1)] | None = 65532
    """Null where the cluster chooses one, as OpenShift does."""
    pod_annotations: PodAnnotations = {}
    pod_labels: PodLabels = {}
    """Beside those of the chart, which are what its Service, its network policies and Helm find the pod by."""
    extra_env: Objects = ()
    """Of the operator's container: a proxy, AWS_REGION."""
    extra_volumes: Volumes = ()
    """Of the operator's pod: a token for a cloud of another cluster."""
    extra_volume_mounts: VolumeMounts = ()
    metrics: Metrics = Metrics()
    network_policy: NetworkPolicies = NetworkPolicies()


def schema() -> dict[str, Any]:
    """The JSON Schema (draft 7) that Helm checks values against before it renders anything."""
    made = _plain(Values.model_json_schema(by_alias=True))
    made["properties"]["global"] = {"type": "object", "description": "Handed down by a parent chart; nothing reads it."}
    return {"$schema": "http://json-schema.org/draft-07/schema#", **made}


def _plain(node: Any) -> Any:
    """Without what tells Helm's users nothing: titles, Kubernetes' words, defaults told again, null as a choice."""
    if isinstance(node, list):
        return [_plain(part) for part in node]
    if not isinstance(node, dict):
        return node
    kept = {
        key: _plain(value)
        for key, value in node.items()
        if not (key == "title" and isinstance(value, str)) and not key.startswith("x-kubernetes-")
    }
    # a message about two failed choices hides the one that was meant
    choices = [choice for choice in kept.get("anyOf", ()) if choice != {"type": "null"}]
    if len(choices) == 1:
        del kept["anyOf"]
        if kept.get("default", ...) is None:
            del kept["default"]
        kept = {**choices[0], **kept}
    if "$ref" in kept:
        kept.pop("default", None)
    if "patternProperties" in kept:  # a key that fits none of them is none of the model's
        kept["additionalProperties"] = False
    return kept
