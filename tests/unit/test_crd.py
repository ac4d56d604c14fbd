"""The definitions are what the API server takes: structural, bounded, small, with a place for all that is written."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from emrakul.api.crd import definitions
from emrakul.api.cycle import CycleSpec, CycleStatus, PruningCycle
from emrakul.api.manifest import parse_resource
from emrakul.api.policy import PolicySpec, PolicyStatus, PruningPolicy
from emrakul.invalid import Invalid
from emrakul.settings import Section, Settings
from filled import filled

ROOT = Path(__file__).parents[2]
MANIFESTS = ROOT / "tests" / "api" / "manifests"
CYCLES, POLICIES = definitions()
BOTH = pytest.mark.parametrize("crd", [CYCLES, POLICIES], ids=["cycles", "policies"])

OPEN = "x-kubernetes-preserve-unknown-fields"
UNION = "x-kubernetes-int-or-string"
KEYWORDS = {
    *("type", "description", "default", "properties", "required", "items", "additionalProperties", "anyOf", "enum"),
    *("minimum", "maximum", "minItems", "maxItems", "maxLength", "maxProperties", "pattern", "format"),
    *(OPEN, UNION, "x-kubernetes-validations"),
    *("x-kubernetes-list-type", "x-kubernetes-list-map-keys", "x-kubernetes-map-type"),
}


def schema_of(crd: dict[str, Any]) -> dict[str, Any]:
    schema: dict[str, Any] = crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    return schema


def walk(schema: dict[str, Any], path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every schema inside a schema, with where it is."""
    yield path, schema
    for name, inner in schema.get("properties", {}).items():
        yield from walk(inner, f"{path}.{name}")
    for keyword in ("items", "additionalProperties"):
        if keyword in schema:
            yield from walk(schema[keyword], f"{path}[]")


def faults(schema: dict[str, Any]) -> list[str]:
    """What the API server, or the cost of a rule, would stumble over."""
    found = []
    for path, node in walk(schema):
        found += [f"{path}: {keyword} is not structural" for keyword in sorted(set(node) - KEYWORDS)]
        kind = node.get("type")
        if kind is None and not (node.get(UNION) or node.get(OPEN)):
            found.append(f"{path} has no type")
        if kind == "object" and not ({"properties", "additionalProperties"} & set(node) or node.get(OPEN)):
            found += [] if path.endswith(".metadata") else [f"{path} keeps no key"]
        if kind == "object" and "properties" not in node and "maxProperties" not in node:
            found.append(f"{path} has no maxProperties")
        if kind == "array" and "maxItems" not in node:
            found.append(f"{path} has no maxItems")
        if kind == "string" and not ({"maxLength", "enum"} & set(node)) and path not in (".apiVersion", ".kind"):
            found.append(f"{path} has no maxLength")
        if kind == "integer" and "enum" not in node and not {"minimum", "maximum"} <= set(node):
            found.append(f"{path} is not bounded")
        if kind == "number":
            found.append(f"{path} is a float")
        if any(set(one) & {"type", "properties", "items", "default"} for one in node.get("anyOf", ())):
            found.append(f"{path}: anyOf holds more than values")
    return found


def misfits(value: Any, schema: dict[str, Any], path: str = "") -> list[str]:
    """Where a value has a key that would be dropped, or is not what the schema says."""
    if schema.get(UNION):
        return [] if isinstance(value, int | str) and not isinstance(value, bool) else [f"{path} is {value!r}"]
    kinds = {"object": dict, "array": list, "string": str, "integer": int, "boolean": bool}
    kind = kinds.get(schema.get("type", ""))
    if kind is not None and (not isinstance(value, kind) or (kind is int and isinstance(value, bool))):
        return [f"{path} is {value!r}, not {schema['type']}"]
    found = []
    if "enum" in schema and value not in schema["enum"]:
        found.append(f"{path} is {value!r}, none of {schema['enum']}")
    if isinstance(value, str | list | dict):
        bounds = ("maxLength", "maxItems", "maxProperties")
        found += [f"{path} is too long" for bound in bounds if len(value) > schema.get(bound, len(value))]
    if isinstance(value, list):
        found += [fault for n, one in enumerate(value) for fault in misfits(one, schema["items"], f"{path}[{n}]")]
    if isinstance(value, dict) and not schema.get(OPEN):
        properties = schema.get("properties", {})
        found += [f"{path}.{name} is missing" for name in schema.get("required", ()) if name not in value]
        for name, one in value.items():
            inner = properties.get(name, schema.get("additionalProperties"))
            found += [f"{path}.{name} is unknown"] if inner is None else misfits(one, inner, f"{path}.{name}")
    return found


def defaulted(value: Any, schema: dict[str, Any]) -> Any:
    """The value as the API server stores it: defaults first, then those inside."""
    if not isinstance(value, dict):
        return value
    stored = copy.deepcopy(value)
    for name, inner in schema.get("properties", {}).items():
        if name not in stored and "default" in inner:
            stored[name] = copy.deepcopy(inner["default"])
        if name in stored:
            stored[name] = defaulted(stored[name], inner)
    return stored


@BOTH
def test_a_definition_is_structural_and_bounded(crd: dict[str, Any]) -> None:
    assert faults(schema_of(crd)) == []


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"$ref": "#/x"}, "$ref is not structural"),
        ({"nullable": True}, "nullable is not structural"),
        ({"patternProperties": {}}, "patternProperties is not structural"),
        ({"type": "string", "maxLength": None}, ""),
        ({"type": "number"}, "is a float"),
        ({"type": "array", "items": {"type": "boolean"}}, "has no maxItems"),
        ({"type": "object", "additionalProperties": {"type": "boolean"}}, "has no maxProperties"),
        ({"type": "object"}, "keeps no key"),
        ({"type": "integer", "minimum": 0}, "is not bounded"),
        ({"anyOf": [{"type": "string"}]}, "anyOf holds more than values"),
        ({}, "has no type"),
        ({"type": "string"}, "has no maxLength"),
    ],
)
def test_what_is_not_structural_or_not_bounded_is_found(change: dict[str, Any], says: str) -> None:
    found = faults({"type": "object", "properties": {"one": change}})
    assert any(says in fault for fault in found) == bool(says)


@BOTH
def test_a_definition_fits_a_plain_apply(crd: dict[str, Any]) -> None:
    size = len(json.dumps(crd, separators=(",", ":")))
    print(f"{crd['metadata']['name']}: {size:,} bytes of JSON")
    assert size < 60_000, "kubectl apply keeps a copy in an annotation, which has 256 KiB"


@BOTH
def test_it_is_known_by_short_names_and_speaks_of_itself(crd: dict[str, Any]) -> None:
    names = crd["spec"]["names"]
    assert names["categories"] == ["emrakul"]
    assert not {"pc", "po", "pv"} & set(names["shortNames"]), "those are Kubernetes' own"
    version = crd["spec"]["versions"][0]
    assert version["subresources"] == {"status": {}}
    missing = [
        path
        for path, node in walk(schema_of(crd))
        if "description" not in node and path not in (".apiVersion", ".kind") and not path.startswith(".metadata")
        if not path.endswith("[]") and not path.startswith(".spec.settings.accuracyTargets.")
    ]
    assert missing == [], "kubectl explain would say <no description>"


def test_a_description_speaks_of_a_resources_keys() -> None:
    settings = schema_of(POLICIES)["properties"]["spec"]["properties"]["settings"]["properties"]
    schedule = settings["structuredPruning"]["properties"]["progressiveSchedule"]["properties"]
    assert "phase1Epochs + 1" in schedule["phase2StartEpoch"]["description"]
    formula = settings["workerScalingFormula"]["description"]
    assert "worker_calculation_rate" in formula, "a formula's own names stay"


@pytest.mark.parametrize(("crd", "model"), [(CYCLES, CycleStatus), (POLICIES, PolicyStatus)])
def test_there_is_a_place_for_every_field_of_a_status(
    crd: dict[str, Any], model: type[CycleStatus | PolicyStatus]
) -> None:
    status = filled(model)
    assert not [name for name in model.model_fields if getattr(status, name) in (None, (), {}, "")]
    schema = schema_of(crd)["properties"]["status"]
    assert misfits(status.dump(), schema) == []
    assert not [path for path, node in walk(schema) if "default" in node], "a default would come back as if written"
    assert not [path for path, node in walk(schema) if "x-kubernetes-validations" in node]
    without = {**schema, "properties": {name: one for name, one in schema["properties"].items() if name != "seen"}}
    assert misfits(status.dump(), without) == [".seen is unknown"], "a key that the schema lacks would be lost"


def test_conditions_are_a_map_by_type() -> None:
    for crd in definitions():
        conditions = schema_of(crd)["properties"]["status"]["properties"]["conditions"]
        assert (conditions["x-kubernetes-list-type"], conditions["x-kubernetes-list-map-keys"]) == ("map", ["type"])


def test_a_cycles_defaults_are_the_models() -> None:
    spec = {"checkpoint": "latest", "policyRef": {"name": "digits"}}
    stored = defaulted(spec, schema_of(CYCLES)["properties"]["spec"])
    assert stored == {**spec, "suspend": False}
    assert CycleSpec.model_validate(stored, by_alias=True) == CycleSpec.model_validate(spec, by_alias=True)


@pytest.mark.parametrize("settings", [{}, {"settings": {"structuredPruning": {"progressiveSchedule": {}}}}])
def test_a_policys_defaults_are_the_models(settings: dict[str, Any]) -> None:
    spec = {"run": "s3://bucket/run", **settings}
    schema = schema_of(POLICIES)["properties"]["spec"]
    stored = defaulted(spec, schema)
    assert misfits(stored, schema) == []
    assert PolicySpec.model_validate(stored, by_alias=True) == PolicySpec.model_validate(spec, by_alias=True)
    assert stored["settings"] == {
        name: value for name, value in Settings().model_dump(mode="json", by_alias=True).items() if value != []
    }
    assert (stored["every"], stored["historyLimit"], stored["ttlSecondsAfterFinished"]) == (1, 20, 604_800)


def test_every_key_of_a_cycle_but_two_is_fixed() -> None:
    rules = schema_of(CYCLES)["properties"]["spec"]["x-kubernetes-validations"]
    fixed = {rule["fieldPath"][1:] for rule in rules if "oldSelf" in rule["rule"]}
    keys = set(schema_of(CYCLES)["properties"]["spec"]["properties"])
    assert keys - fixed == {"suspend", "ttlSecondsAfterFinished"}


def test_no_setting_of_two_words_is_overlooked_in_snake_case() -> None:
    schema = schema_of(POLICIES)["properties"]["spec"]["properties"]["settings"]
    for file_keys, resource_keys in pairs(Settings(), schema):
        for name, camel in file_keys.items():
            if name != camel:
                assert f"write {camel}" in resource_keys[name]["enum"][0]
    assert misfits({"safety_margin": "0.2"}, schema), "refused, not dropped"


def pairs(section: Section, schema: dict[str, Any]) -> Iterator[tuple[dict[str, str], dict[str, Any]]]:
    """Each section's keys in a file by those of a resource, beside what the schema has for it."""
    fields = type(section).model_fields
    yield {name: str(field.alias) for name, field in fields.items()}, schema["properties"]
    for name, field in fields.items():
        inner = getattr(section, name)
        if isinstance(inner, Section):
            yield from pairs(inner, schema["properties"][field.alias])


def test_the_files_are_the_definitions() -> None:
    for crd in definitions():
        text = (ROOT / "crds" / f"{crd['metadata']['name']}.yaml").read_text()
        assert text.startswith("# Generated")
        assert yaml.safe_load(text) == crd, "run `make contracts`"


def invalid() -> list[Any]:
    cases = [one for name in ("cycles", "policies") for one in yaml.safe_load((MANIFESTS / f"{name}.yaml").read_text())]
    return [
        pytest.param(one["manifest"], one.get("one_machine", False), id=f"{one['manifest']['kind']}: {one['name']}")
        for one in cases
    ]


@pytest.mark.parametrize(("manifest", "taken"), invalid())
def test_a_manifest_that_a_cluster_refuses_is_refused_on_one_machine(manifest: dict[str, Any], taken: bool) -> None:
    model = PruningCycle if manifest["kind"] == "PruningCycle" else PruningPolicy
    assert reads(model, manifest) == taken


def reads(model: type[PruningCycle | PruningPolicy], manifest: dict[str, Any]) -> bool:
    try:
        parse_resource(model, manifest, "manifest")
    except Invalid:
        return False
    return True
