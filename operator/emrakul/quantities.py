"""Numbers as people write them, kept exact: fractions, seconds, bytes."""

from __future__ import annotations

import re
from decimal import Decimal
from fractions import Fraction
from typing import Annotated, Any, Literal

from pydantic import PlainSerializer, PlainValidator, WithJsonSchema

_DECIMAL = re.compile(r"^(0(\.\d{1,9})?|1(\.0{1,9})?)$")
_DURATION = re.compile(r"^(\d{1,7})(s|m|h)?$")
_SIZE = re.compile(r"^(\d{1,15})(\.\d{1,3})?([KMGT]i?)?B?$", re.IGNORECASE)
_SECONDS = {"s": 1, "m": 60, "h": 3600}
_POWER = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}


def parse_share(value: Any) -> Fraction:
    """A share of a whole, 0 to 1, exactly as it is written: 0.01 is 1/100, be it text or a float of a file."""
    if isinstance(value, Fraction):
        value = share_text(value)
    text = value if isinstance(value, str) else "" if isinstance(value, bool) else _number_text(value)
    if not _DECIMAL.match(text):
        raise ValueError(f"is {value!r}; a fraction lies between 0 and 1 with at most nine decimals, 0.02 means 2 %")
    return Fraction(text)


def _number_text(value: Any) -> str:
    # repr of a float is the shortest text that reads back as it: what the person typed
    return format(Decimal(repr(value)), "f") if isinstance(value, int | float) else ""


def share_text(value: Fraction) -> str:
    """The one decimal text of a share: 1/50 is "0.02"."""
    text = format(Decimal(value.numerator) / Decimal(value.denominator), "f")
    return text.rstrip("0").rstrip(".") if "." in text else text


Share = Annotated[
    Fraction,
    PlainValidator(parse_share),
    PlainSerializer(share_text, return_type=str),
    WithJsonSchema({"type": "string", "pattern": _DECIMAL.pattern, "maxLength": 11}),
]
"""An exact fraction between 0 and 1; as text in a resource."""


def parse_seconds(value: Any) -> int:
    """Seconds: 300, "60s", "5m", "1h"; never 0."""
    match = _DURATION.match(str(value)) if isinstance(value, int | str) and not isinstance(value, bool) else None
    seconds = int(match[1]) * _SECONDS[match[2] or "s"] if match else 0
    if not 1 <= seconds <= 7 * 86400:
        raise ValueError(f"is {value!r}; write seconds as 300 or 60s, minutes as 5m, hours as 1h (at most a week)")
    return seconds


def parse_bytes(value: Any) -> int:
    """Bytes: 2000000000, "2GB" and "2G" (decimal), "2Gi" and "2GiB" (binary)."""
    match = _SIZE.match(str(value)) if isinstance(value, int | str) and not isinstance(value, bool) else None
    size = 0
    if match:
        unit = (match[3] or "").lower()
        base = 1024 if unit.endswith("i") else 1000
        size = int(Fraction(match[1] + (match[2] or "")) * base ** _POWER[unit.removesuffix("i")])
    if not 96_000_000 <= size <= 2**50:  # a worker that holds nothing yet needs 90 MB
        raise ValueError(f"is {value!r}; write a size of at least 96MB such as 2GB (2,000,000,000 bytes) or 2Gi")
    return size


def parse_rate(value: Any) -> int | Literal["auto"]:
    """A whole number above 0, or auto."""
    if value == "auto":
        return "auto"
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 10**12:
        raise ValueError(f"is {value!r}; write a whole number of at least 1, such as 500000, or auto")
    return value


def _int_or_string(pattern: str) -> WithJsonSchema:
    return WithJsonSchema(
        {
            "anyOf": [{"type": "integer"}, {"type": "string", "pattern": pattern, "maxLength": 24}],
            "x-kubernetes-int-or-string": True,
        }
    )


Seconds = Annotated[int, PlainValidator(parse_seconds), _int_or_string(_DURATION.pattern)]
Bytes = Annotated[int, PlainValidator(parse_bytes), _int_or_string(_SIZE.pattern)]
Rate = Annotated[int | Literal["auto"], PlainValidator(parse_rate), _int_or_string("^auto$")]
