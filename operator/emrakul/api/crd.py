"""The two CustomResourceDefinitions, made from the models. Pure: the files in crds/ and the chart are this, written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from emrakul.api import rules, structural
from emrakul.api.cycle import CycleSpec, CycleStatus, PruningCycle
from emrakul.api.policy import PolicySpec, PolicyStatus, PruningPolicy
from emrakul.api.resource import GROUP, VERSION

_NAME = {"type": "object", "properties": {"name": {"type": "string", "maxLength": 253}}}
"""Of metadata only what a rule looks at: the bound tells its cost, the rules have the sentences."""


@dataclass(frozen=True, kw_only=True)
class Column:
    """One column of `kubectl get`."""

    name: str
    path: str
    type: str = "string"
    wide: bool = False

    def schema(self) -> dict[str, Any]:
        plain = {"name": self.name, "type": self.type, "jsonPath": self.path}
        return plain | ({"priority": 1} if self.wide else {})


_AGE = Column(name="Age", path=".metadata.creationTimestamp", type="date")
_MESSAGE = Column(name="Message", path=".status.message", wide=True)

_CYCLE_COLUMNS = (
    Column(name="Run", path=".status.run"),
    Column(name="Checkpoint", path=".status.checkpoint"),
    Column(name="Stage", path=".status.stage"),
    Column(name="State", path=".status.state"),
    Column(name="Progress", path=".status.progress"),
    Column(name="Pruned", path=".status.pruned"),
    Column(name="Drop", path=".status.accuracy.drop"),
    _AGE,
    _MESSAGE,
)
_POLICY_COLUMNS = (
    Column(name="Run", path=".spec.run"),
    Column(name="Stage", path=".status.stage"),
    Column(name="Breaker", path=".status.breaker"),
    Column(name="Live", path=".status.live"),
    Column(name="Tip", path=".status.tip.checkpoint"),
    Column(name="Ready", path='.status.conditions[?(@.type=="Ready")].status'),
    _AGE,
    _MESSAGE,
)


def definitions() -> tuple[dict[str, Any], ...]:
    """Both, as the API server takes them."""
    cycle = _definition(
        PruningCycle, CycleSpec, CycleStatus, plural="pruningcycles", short=("prune", "prc"), columns=_CYCLE_COLUMNS
    )
    policy = _definition(
        PruningPolicy, PolicySpec, PolicyStatus, plural="pruningpolicies", short=("prp",), columns=_POLICY_COLUMNS
    )
    # kubectl get prune --field-selector status.state=Analyzing
    cycle["spec"]["versions"][0]["selectableFields"] = [{"jsonPath": ".status.state"}]
    return cycle, policy


def _definition(
    resource: type[BaseModel],
    spec: type[BaseModel],
    status: type[BaseModel],
    *,
    plural: str,
    short: tuple[str, ...],
    columns: tuple[Column, ...],
) -> dict[str, Any]:
    kind = resource.__name__
    schema = {
        "description": resource.__doc__,
        "type": "object",
        "required": ["spec"],
        "properties": {
            "apiVersion": {"type": "string"},
            "kind": {"type": "string"},
            "metadata": _NAME,
            "spec": structural.asked(spec),
            "status": structural.told(status),
        },
        **structural.validations(rules.of_model(resource)),
    }
    version = {
        "name": VERSION,
        "served": True,
        "storage": True,
        "subresources": {"status": {}},
        "additionalPrinterColumns": [column.schema() for column in columns],
        "schema": {"openAPIV3Schema": schema},
    }
    names = {
        "kind": kind,
        "listKind": f"{kind}List",
        "plural": plural,
        "singular": kind.lower(),
        "shortNames": list(short),
        "categories": ["emrakul"],
    }
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{plural}.{GROUP}"},
        "spec": {"group": GROUP, "scope": "Namespaced", "names": names, "versions": [version]},
    }
