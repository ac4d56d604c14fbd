"""Turns what pydantic and YAML say of a person's file into one sentence: where, what was found, what to write."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.alias_generators import to_camel, to_snake
from pydantic.fields import FieldInfo


class Invalid(ValueError):
    """A person's input that cannot be used; the message is the sentence to show."""


class _Loader(yaml.SafeLoader):
    """YAML without a second meaning: a key that occurs twice is refused (PyYAML silently keeps the last)."""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[str] = set()
    for key, _ in node.value:
        if isinstance(key, yaml.ScalarNode):
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key.value!r} occurs twice", key.start_mark)
            seen.add(key.value)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)

MAX_TEXT = 1_000_000
"""Characters; a manifest is a few thousand, and YAML costs far more memory than its text."""


def read_yaml(text: str, *, name: str) -> list[Any]:
    """Every document of a YAML text, empty ones left out."""
    if len(text) > MAX_TEXT:
        raise Invalid(f"{name} has {len(text):,} characters; more than {MAX_TEXT:,} is refused")
    if "&" in text and any(isinstance(token, yaml.AnchorToken) for token in _tokens(text, name)):
        raise Invalid(f"{name} uses a YAML anchor (&); write the value out where it is needed")
    try:
        # _Loader is a SafeLoader: it builds plain data only
        documents = list(yaml.load_all(text, Loader=_Loader))
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise Invalid(f"{name} is not readable YAML: {_yaml_fault(error)}") from error
    return [document for document in documents if document is not None]


def _tokens(text: str, name: str) -> Iterable[yaml.Token]:
    try:
        yield from yaml.scan(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise Invalid(f"{name} is not readable YAML: {_yaml_fault(error)}") from error


def _yaml_fault(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error)
    return f"line {mark.line + 1}: {problem}" if mark else " ".join(problem.split())


def sentence(error: ValidationError, model: type[BaseModel], *, name: str, camel: bool = False) -> str:
    """The first fault of `error` as one sentence about `name`; `camel` if its keys are those of a custom resource."""
    faults = error.errors()
    # an unknown key is usually the cause of whatever else is wrong (the key it was meant to be is missing)
    first = next((fault for fault in faults if fault["type"] == "extra_forbidden"), faults[0])
    path = [part for part in first["loc"] if not (isinstance(part, str) and part.startswith(("function-", "tagged-")))]
    where = ".".join(str(part) for part in path)
    if first["type"] == "extra_forbidden":
        text = f"{name}: {where} is no known key; {_did_you_mean(str(path[-1]), _keys(model, path[:-1], camel))}"
    elif first["type"] == "missing":
        text = f"{name}: {where} is missing; add it"
    elif first["type"] in ("value_error", "assertion_error"):
        message = first["msg"].removeprefix("Value error, ")
        text = f"{name}: {where}{'' if not where else ' ' if message.startswith('is ') else ': '}{message}"
    elif first["type"] == "string_pattern_mismatch":
        meaning = _description(model, path, camel)
        text = f"{name}: {where} is {_shown(first['input'])}, which does not fit; {meaning or first['ctx']['pattern']}"
    else:
        expected = first["msg"].replace("Input should be", "it should be", 1)
        text = f"{name}: {where} is {_shown(first['input'])}, {expected}"
    return text + (f" (and {len(faults) - 1} more)" if len(faults) > 1 else "")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _keys(model: type[BaseModel], path: list[Any], camel: bool) -> list[str]:
    """The keys that the model at `path` knows."""
    current: type[BaseModel] | None = model
    for part in path:
        if current is not None and not isinstance(part, int):
            field = _fields(current, camel).get(str(part))
            current = _model_in(field.annotation) if field is not None else None
    return list(_fields(current, camel)) if current is not None else []


def _description(model: type[BaseModel], path: list[Any], camel: bool) -> str:
    """What the documentation of the field at `path` says, as the end of a sentence."""
    current: type[BaseModel] | None = model
    found = ""
    for part in path:
        if current is not None and not isinstance(part, int):
            field = _fields(current, camel).get(str(part))
            found = (field.description or "") if field is not None else ""
            current = _model_in(field.annotation) if field is not None else None
    return "expected: " + found.replace("\n", " ").rstrip(".") if found else ""


def _fields(model: type[BaseModel], camel: bool) -> dict[str, FieldInfo]:
    return {to_camel(name) if camel else name: field for name, field in model.model_fields.items()}


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in getattr(annotation, "__args__", ()):
        if found := _model_in(argument):
            return found
    return None


def _did_you_mean(key: str, known: list[str]) -> str:
    for spelling, style in ((to_snake(key), "snake_case in files"), (to_camel(key), "camelCase in a resource")):
        if spelling != key and spelling in known:
            return f"did you mean {spelling} (keys are {style})?"
    if near := difflib.get_close_matches(key, known, n=1, cutoff=0.6):
        return f"did you mean {near[0]}?"
    return f"known here: {', '.join(sorted(known))}" if known else "remove it"
