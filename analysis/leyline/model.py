"""The base of every value that is stored or sent: frozen, closed, and with one canonical JSON form."""

from __future__ import annotations

import hashlib
import json
from typing import Any, Self

import rfc8785
from pydantic import BaseModel, ConfigDict, ValidationError


def printable(text: str) -> str:
    """What a terminal would act on, written as in a Python string: names in files may come from anybody."""
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)


class Malformed(ValueError):
    """Stored data is not what its contract says; the sentence names the thing and the first fault."""

    def __init__(self, sentence: str) -> None:
        super().__init__(printable(sentence))


class Value(BaseModel):
    """A frozen contract value. Unknown keys are refused, so a newer writer is noticed, never half understood."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")

    def canonical(self) -> bytes:
        """RFC 8785 JSON: equal values give equal bytes, whoever writes them."""
        return canonical_json(json.loads(self.model_dump_json()))  # by way of JSON, where "NaN" is text

    def sha256(self) -> str:
        """SHA-256 of the canonical JSON, in hex."""
        return hashlib.sha256(self.canonical()).hexdigest()

    @classmethod
    def parse(cls, data: bytes, *, name: str) -> Self:
        """Read one value; Malformed names `name` and the first thing that is wrong."""
        try:
            return cls.model_validate_json(data)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "the document"
            raise Malformed(f"{name} is not a valid {cls.__name__}: {where}: {first['msg']}") from error


def canonical_json(value: Any) -> bytes:
    """RFC 8785 JSON of plain JSON data (integers up to 2**53, finite floats)."""
    return rfc8785.dumps(value)


def key_of(**content: Any) -> str:
    """Key of a pure result: SHA-256 over the canonical JSON of what determined it."""
    return hashlib.sha256(canonical_json(content)).hexdigest()
