"""Models as structural OpenAPI schemas, the only ones that a CustomResourceDefinition may hold.

Such a schema has no references, no unions but int-or-string, and no closed objects: the API server drops the keys that
it does not know. Everything is bounded, so that it can tell beforehand what a CEL rule costs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from pydantic import BaseModel
from pydantic.alias_generators import to_camel
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import core_schema

from emrakul.api import rules
from emrakul.api.resource import Condition
from emrakul.quantities import share_text
from emrakul.scaling import NAMES

Schema = dict[str, Any]

REFUSED = "Refused."
"""Description of a key that is there only to be refused."""

_ANY: Schema = {"x-kubernetes-preserve-unknown-fields": True}
_INT_OR_STRING = "x-kubernetes-int-or-string"
_RULES = "x-kubernetes-validations"
_KEYS = 64
"""Of an object in Kubernetes' own words, such as an affinity."""
_KEPT = ("minimum", "maximum", "minItems", "maxItems", "maxProperties", "maxLength", "enum", "format", "required")
_NO_NUMBER: Schema = {"minimum": 0, "maximum": -1}
"""No number fits; texts are not looked at."""


def asked(model: type[BaseModel]) -> Schema:
    """Of what a person writes: with defaults, and with rules that answer mistakes in sentences."""
    return _schema(model, asked=True)


def told(model: type[BaseModel]) -> Schema:
    """Of what the operator writes, which needs neither: a default would come back as if it had been written.

    Its objects are applied as wholes: of one that is written field by field, a server-side apply with fewer fields
    leaves null behind, which no schema allows.
    """
    found = _schema(model, asked=False)
    for inner in found["properties"].values():
        if inner.get("type") == "object":
            inner["x-kubernetes-map-type"] = "atomic"
    return found


def validations(found: tuple[rules.Rule, ...]) -> Schema:
    """The rules as part of a schema."""
    return {_RULES: [rule.schema() for rule in found]} if found else {}


def _schema(model: type[BaseModel], *, asked: bool) -> Schema:
    root = model.model_json_schema(schema_generator=_Generator)
    definitions = root.pop("$defs", {})
    models = [node["model"] for node in (root, *definitions.values()) if "model" in node]
    names = {name for one in models for name in one.model_fields if "_" in name} - set(NAMES)
    return _Writer(definitions, frozenset(names), asked=asked).write(root)


class _Generator(GenerateJsonSchema):
    """pydantic's schema with each object's model in it, and without null: what is None is left out of a resource."""

    def nullable_schema(self, schema: core_schema.NullableSchema) -> JsonSchemaValue:
        return self.generate_inner(schema["schema"])

    def dict_schema(self, schema: core_schema.DictSchema) -> JsonSchemaValue:
        values = self.generate_inner(schema["values_schema"]) if "values_schema" in schema else {}
        return {"type": "object", "additionalProperties": values, "maxProperties": schema.get("max_length", _KEYS)}

    def model_schema(self, schema: core_schema.ModelSchema) -> JsonSchemaValue:
        return {**super().model_schema(schema), "model": schema["cls"]}

    def encode_default(self, dft: Any) -> Any:
        return share_text(dft) if isinstance(dft, Fraction) else super().encode_default(dft)


@dataclass(frozen=True)
class _Writer:
    definitions: Mapping[str, Schema]
    names: frozenset[str]
    """Keys with a _ in files, which descriptions speak of."""
    asked: bool

    def write(self, node: Schema) -> Schema:
        node = self._resolved(node)
        found = {"description": self._camel(node["description"])} if "description" in node else {}
        found |= {key: node[key] for key in _KEPT if key in node}
        default = _said(node.get("default"))
        if self.asked and default is not None:
            found["default"] = default
        if "model" in node:
            return found | self._object(node)
        if node.get("type") == "object":
            values = node["additionalProperties"]
            return found | {"type": "object", **({"additionalProperties": self.write(values)} if values else _ANY)}
        if node.get("type") == "array":
            return found | self._array(node)
        return found | self._leaf(node)

    def _resolved(self, node: Schema) -> Schema:
        """The definition in place of a reference; what is said beside the reference is nearer."""
        return {**self.definitions[node["$ref"].rpartition("/")[2]], **node} if "$ref" in node else node

    def _object(self, node: Schema) -> Schema:
        properties = {name: self.write(inner) for name, inner in node["properties"].items()}
        found: Schema = {"type": "object", "properties": properties}
        if not self.asked:
            return found
        for name, instead in rules.refused(node["model"]).items():
            # no other keyword lets us choose the words of the answer: 'supported values: "none: write safetyMargin"'
            properties[name] = {"description": REFUSED, "enum": [instead], **_ANY}
        return found | validations(rules.of_model(node["model"]))

    def _array(self, node: Schema) -> Schema:
        found: Schema = {"type": "array", "items": self.write(node["items"])}
        if self._resolved(node["items"]).get("model") is Condition:
            found |= {"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type"]}
        return found

    def _leaf(self, node: Schema) -> Schema:
        texts = (node, *node.get("anyOf", ()))
        pattern = next((text["pattern"] for text in texts if "pattern" in text), "")
        found: Schema = {"type": node["type"]} if "type" in node else {_INT_OR_STRING: True}
        if not pattern:
            return found
        if not self.asked:
            return found | {"pattern": pattern}
        if instead := rules.text_only(pattern):
            # beside the API server's own "must be of type string", the same way to a sentence of ours as for keys
            found["anyOf"] = [{"enum": [instead]}, _NO_NUMBER]
        return found | validations((rules.of_pattern(pattern),))

    def _camel(self, description: str) -> str:
        """On one line, with the keys of a resource instead of those of a file."""
        words = re.sub(r"\w+", lambda word: to_camel(word[0]) if word[0] in self.names else word[0], description)
        return " ".join(words.split())


def _said(default: Any) -> Any:
    """A default without what is nothing in it; None if nothing is left."""
    if isinstance(default, dict):
        default = {key: value for key, value in default.items() if _said(value) is not None}
    return None if default in ("", [], {}) else default
