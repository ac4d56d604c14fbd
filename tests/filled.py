"""A value of a model with every field in it, made from the model's own schema, so that no new field is forgotten."""

from __future__ import annotations

import re
from typing import Any, TypeVar

from pydantic import BaseModel

Filled = TypeVar("Filled", bound=BaseModel)

_TEXTS = ("once", "Committed", "0" * 64, "https://store:8333/events", "4000-1-0f3a9b2c", "s3://bucket/run")
"""One of them fits whatever pattern a text has."""


def filled(model: type[Filled]) -> Filled:
    """No field is None, and no text, list or mapping is empty."""
    schema = model.model_json_schema(by_alias=True)
    return model.model_validate(_value(schema, schema.get("$defs", {})), by_alias=True, by_name=False)


def _value(node: dict[str, Any], definitions: dict[str, Any]) -> Any:
    if "$ref" in node:
        return _value(definitions[node["$ref"].rpartition("/")[2]], definitions)
    if "anyOf" in node:
        return _value(next(one for one in node["anyOf"] if one.get("type") != "null"), definitions)
    if "enum" in node:
        return node["enum"][-1]
    if "properties" in node:
        return {name: _value(inner, definitions) for name, inner in node["properties"].items()}
    match node["type"]:
        case "object":
            values = [*node.get("patternProperties", {}).values(), node.get("additionalProperties")]
            free = not isinstance(values[0], dict)
            return {"key": {"within": [1, "two", True]} if free else _value(values[0], definitions)}
        case "array":
            return [_value(node["items"], definitions)]
        case "string":
            return next(text for text in _TEXTS if re.search(node.get("pattern", ""), text))
        case "boolean":
            return True
        case "integer":
            return max(7, node.get("minimum", 0))
    raise AssertionError(f"no value is known for {node}")
