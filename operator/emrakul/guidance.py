"""Tamiyo's guidance: it may cap the stage, hold, or lower the rate. What would loosen anything is refused."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from pydantic import ValidationError
from pydantic.alias_generators import to_snake

from emrakul.invalid import Invalid, sentence
from emrakul.quantities import Share
from emrakul.settings import Flag, SafetyConstraints, Section, Settings
from leyline.messages import Stage


class Guidance(Section):
    """What an outside strategist asks of the next cycles. Each field can only hold back."""

    max_stage: Stage | None = None
    """No stage above this one."""
    hold: Flag = False
    """True: ValidationOnly, as long as it says so. False does not end a hold that a rollback left."""
    rate_factor: Share = Fraction(1)
    """Factor on the stage's rate, at most 1."""

    @property
    def cap(self) -> Stage | None:
        """The highest stage that it allows."""
        return Stage.VALIDATION_ONLY if self.hold else self.max_stage


_CONSTRAINTS = frozenset(SafetyConstraints.model_fields)
_SETTINGS = frozenset(Settings.model_fields) | {"conservative_threshold", "moderate_threshold", "aggressive_threshold"}


def read_guidance(content: Mapping[str, Any], *, name: str = "guidance", camel: bool = False) -> Guidance:
    """Guidance from plain data (snake_case, or camelCase from a resource). Invalid says what it may not ask."""
    for key in content:
        plain = to_snake(str(key))
        if plain in _CONSTRAINTS:
            raise Invalid(
                f"{name} sets {key}, a safety constraint; guidance may cap the stage, hold or lower the rate, and "
                "constraints are changed in the policy by whoever owns it"
            )
        if plain in _SETTINGS:
            raise Invalid(f"{name} sets {key}, which is a setting; guidance has max_stage, hold and rate_factor only")
    factor = content.get("rateFactor" if camel else "rate_factor", 0)
    try:
        too_much = not isinstance(factor, bool) and float(factor) > 1
    except (TypeError, ValueError):
        too_much = False
    if too_much:
        raise Invalid(f"{name} asks for {factor} times the rate; guidance may lower it, so write at most 1")
    try:
        return Guidance.model_validate(dict(content), by_alias=camel, by_name=not camel)
    except ValidationError as error:
        raise Invalid(sentence(error, Guidance, name=name, camel=camel)) from error
