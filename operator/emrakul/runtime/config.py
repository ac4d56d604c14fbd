"""What an operator is told by its chart: one file, read once at the start."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, ValidationError

from emrakul.api.policy import PodOverrides, StoreSpec
from emrakul.api.resource import Label, Model, Text
from emrakul.invalid import Invalid, read_yaml, sentence
from emrakul.runtime.overrides import layered
from emrakul.settings import Settings, refuse_floats

ANY_NAMESPACE = "*"

RunPrefix = Annotated[str, Field(pattern=r"^s3://([a-z0-9][a-z0-9.-]*(/.*)?)?$", max_length=1024)]
Image = Annotated[str, Field(min_length=1, max_length=512)]


class Images(Model):
    """What worker pods run. A reference with a digest stays what it is for a cycle's whole life."""

    worker: Image
    """Analysis and apply, without torch."""
    validator: Image
    """Urabrask, with torch."""
    pull_policy: Annotated[str, Field(pattern=r"^(Always|IfNotPresent|Never)$")] = "IfNotPresent"


class Defaults(Model):
    """What a cycle without a policy uses. Secrets are named here and read in the cycle's own namespace."""

    store: StoreSpec = StoreSpec()
    settings: Settings = Settings()


class Keys(Model):
    """Secrets, in each tenant's namespace, that worker pods mount: nobody's signature is required without them."""

    trust_secret: Label | None = None
    """Public keys, `<role>*.pem`: only what they signed is analysed."""
    signing_key_secret: Label | None = None
    """`signing.pem`: the validator's, for its verdicts."""
    data_key_secret: Label | None = None
    """`data.key`: of encrypted importance statistics."""


class Workers(Model):
    """What every worker pod gets, before a policy's own overrides."""

    service_account_name: Label | None = None
    """Exists in each tenant's namespace and has no rights in the API; left out: the namespace's `default`."""
    pod_overrides: PodOverrides = PodOverrides()


class OperatorConfig(Model):
    """The whole of the operator's configuration."""

    operator_class: Annotated[str, Field(pattern=r"^([a-z0-9]([-a-z0-9]*[a-z0-9])?)?$", max_length=63)] = ""
    """Only objects whose spec.operatorClass is this are handled; "" is those without one."""
    namespaces: Annotated[tuple[Label, ...], Field(max_length=256)] = ()
    """The namespaces that are watched; empty: the whole cluster."""
    images: Images
    defaults: Defaults = Defaults()
    allowed_run_prefixes: Annotated[dict[Text, tuple[RunPrefix, ...]], Field(max_length=1024)] = {}
    """Run prefixes that each namespace may name; `*` is any namespace. In namespaced mode nothing set allows all."""
    keys: Keys = Keys()
    workers: Workers = Workers()
    sink: Annotated[str, Field(pattern=r"^https?://", max_length=1024)] | None = None
    """Where outcomes go as CloudEvents, for policies that name no sink of their own."""
    health_port: Annotated[int, Field(ge=0, le=65535)] = 8080
    """Of /health/emrakul, /healthz, /readyz and /metrics; 0: any free one."""

    def allows(self, namespace: str, run: str) -> bool:
        """Whether objects of this namespace may name this run. A prefix ends at a slash, never inside a name."""
        if not run.startswith("s3://"):  # a file of the operator's own pod is nobody's run
            return False
        if not self.allowed_run_prefixes:
            return bool(self.namespaces)
        given = (*self.allowed_run_prefixes.get(namespace, ()), *self.allowed_run_prefixes.get(ANY_NAMESPACE, ()))
        wanted = f"{run.rstrip('/')}/"
        return any(prefix == "s3://" or wanted.startswith(f"{prefix.rstrip('/')}/") for prefix in given)


def load_config(text: str, *, name: str = "operator configuration") -> OperatorConfig:
    """Read the file; Invalid says which key is wrong and what was expected."""
    documents = read_yaml(text, name=name)
    content: Any = documents[0] if len(documents) == 1 else None
    if not isinstance(content, dict):
        raise Invalid(f"{name} is no mapping of keys to values; the chart writes it from its values")
    refuse_floats(content, name)
    try:
        config = OperatorConfig.model_validate(content, by_alias=True, by_name=False)
        layered(config.workers.pod_overrides)
        return config
    except ValidationError as error:
        raise Invalid(sentence(error, OperatorConfig, name=name, camel=True)) from error
