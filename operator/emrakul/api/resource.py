"""What both resources share: camelCase frozen models, bounded text, metadata and conditions."""

from __future__ import annotations

from datetime import UTC, datetime
from enum import StrEnum
from fractions import Fraction
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic.alias_generators import to_camel

GROUP = "emrakul.dev"
VERSION = "v1alpha1"
API_VERSION = f"{GROUP}/{VERSION}"

CHECKPOINT = r"\d{1,12}-\d{1,9}-[0-9a-f]{8}"
_LABEL = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"

Label = Annotated[str, Field(pattern=_LABEL, max_length=63)]
Text = Annotated[str, Field(max_length=256)]
Message = Annotated[str, Field(max_length=4096)]
Uri = Annotated[str, Field(max_length=2048)]
RunUri = Annotated[str, Field(pattern=r"^(s3://[a-z0-9]|file:///|\.?/)", max_length=1024)]
Url = Annotated[str, Field(pattern=r"^https?://", max_length=1024)]
CheckpointName = Annotated[str, Field(pattern=rf"^{CHECKPOINT}$", max_length=31)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$", max_length=64)]
Count = Annotated[int, Field(ge=0, le=2**53)]
Counts = Annotated[dict[Label, Count], Field(max_length=8)]


def _number(value: Any) -> Any:
    if isinstance(value, Fraction):
        value = float(value)
    return format(value, ".6g") if isinstance(value, int | float) and not isinstance(value, bool) else value


Number = Annotated[str, BeforeValidator(_number), Field(max_length=24)]
"""A measured number, as text: floats do not survive every client."""


class Model(BaseModel):
    """Frozen and closed, camelCase outside."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        alias_generator=to_camel,
        validate_by_name=True,
        validate_by_alias=True,
        use_attribute_docstrings=True,
    )

    def dump(self) -> dict[str, Any]:
        """Plain JSON as the API server takes it; what is None is left out."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)


class Metadata(Model):
    """Of Kubernetes' metadata, what is read here; the rest belongs to others and is ignored."""

    model_config = ConfigDict(extra="ignore", use_attribute_docstrings=True)

    name: Label
    """Lower-case letters, digits and dashes, at most 63."""
    namespace: Label | None = None
    uid: Text | None = None
    generation: Count = 0
    labels: Annotated[dict[str, Annotated[str, Field(max_length=63)]], Field(max_length=64)] = {}
    annotations: Annotated[dict[str, Annotated[str, Field(max_length=262_144)]], Field(max_length=64)] = {}


class ConditionType(StrEnum):
    """In the order in which a cycle reaches them; Ready is a policy's."""

    READY = "Ready"
    ADMITTED = "Admitted"
    ANALYZED = "Analyzed"
    VALIDATED = "Validated"
    COMMITTED = "Committed"
    COMPLETE = "Complete"
    FAILED = "Failed"


ConditionStatus = Literal["True", "False", "Unknown"]


class Condition(Model):
    """One condition, with Kubernetes' own fields."""

    type: ConditionType
    """What is asked."""
    status: ConditionStatus
    """The answer."""
    reason: Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9]*$", max_length=64)]
    """Why, in one word."""
    message: Message = ""
    """Why, in a sentence."""
    observed_generation: Count = 0
    """Generation of the spec that it speaks of."""
    last_transition_time: Annotated[str, Field(max_length=32)]
    """RFC 3339 in UTC: when `status` became what it is."""


def set_condition(
    conditions: tuple[Condition, ...],
    type_: ConditionType,
    status: ConditionStatus,
    *,
    reason: str,
    message: str = "",
    generation: int,
    now: datetime,
) -> tuple[Condition, ...]:
    """The conditions with this one set, in order of type. Its transition time moves only if its status flips."""
    before = next((one for one in conditions if one.type is type_), None)
    kept = before is not None and before.status == status
    condition = Condition(
        type=type_,
        status=status,
        reason=reason,
        message=message if len(message) <= 4096 else message[:4095] + "…",
        observed_generation=generation,
        last_transition_time=before.last_transition_time if before is not None and kept else rfc3339(now),
    )
    order = list(ConditionType)
    others = [one for one in conditions if one.type is not type_]
    return tuple(sorted([*others, condition], key=lambda one: order.index(one.type)))


def rfc3339(time: datetime) -> str:
    """Seconds in UTC, as Kubernetes writes times."""
    return time.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def parse_time(text: str) -> datetime:
    """RFC 3339, as Kubernetes writes it, with or without fractions of a second."""
    return datetime.fromisoformat(text)
