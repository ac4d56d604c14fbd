"""What the API server checks beyond types: rules in CEL, each with the sentence that a person reads.

A rule says again what a model's validator says, as far as CEL can; the API tests hold the two together. The API
server's own message about a pattern quotes the pattern, so whatever has one in a model has a sentence here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from pydantic import BaseModel, TypeAdapter
from pydantic.alias_generators import to_camel

from emrakul.api.cycle import Checkpoint, CycleSpec, PruningCycle
from emrakul.api.labels import CYCLE_NAME
from emrakul.api.policy import PolicySpec, PruningPolicy, RollbackSpec, Target
from emrakul.api.resource import CHECKPOINT, CheckpointName, Label, RunUri, Url
from emrakul.guidance import Guidance
from emrakul.quantities import Bytes, Rate, Seconds, Share
from emrakul.scaling import DEFAULT_FORMULA, NAMED_FORMULA, NAMES
from emrakul.settings import ProgressiveSchedule, SafetyConstraints, Section, Settings, StructuredPruning

MUTABLE = frozenset({"suspend", "ttl_seconds_after_finished"})
"""What may change in a cycle's spec."""


@dataclass(frozen=True)
class Rule:
    """One check; `self` is the value that has it."""

    cel: str
    says: str
    at: str = ""
    """The key that is wrong, where `self` is the object around it."""
    change: bool = False
    """It is about `oldSelf` too: any value is good, another one is not."""

    def schema(self) -> dict[str, str]:
        where = {"fieldPath": f".{self.at}"} if self.at else {}
        reason = {"reason": "FieldValueForbidden"} if self.change else {}
        return {"rule": self.cel, "message": self.says, **where, **reason}


def of_pattern(pattern: str) -> Rule:
    """The rule in place of a model's pattern."""
    return _OF_PATTERN[pattern]


def of_model(model: type[BaseModel]) -> tuple[Rule, ...]:
    """The rules over several keys of a model."""
    return _OF_MODEL.get(model, ())


def text_only(pattern: str) -> str:
    """What to write instead of a number, where people are used to one; "" where they are not."""
    return "text in quotes, such as '0.02'" if pattern == _pattern(Share) else ""


def refused(model: type[BaseModel]) -> Mapping[str, str]:
    """Keys that are not this model's, but must not be overlooked either, with what to write instead.

    Only a client that asks for strict validation hears of an unknown key; for others it is dropped without a word. A
    safety constraint copied from a settings file, in snake_case, would give way to a looser default.
    """
    if not issubclass(model, Section):
        return {}
    camel = {name: to_camel(name) for name in model.model_fields if to_camel(name) != name}
    keys = {name: f"none: write {key}, keys of a resource are camelCase" for name, key in camel.items()}
    if model is Guidance:
        says = "none: guidance cannot change a safety constraint, only the policy's settings can"
        keys |= {to_camel(name): says for name in SafetyConstraints.model_fields}
    return keys


def _pattern(annotated: Any) -> str:
    schema = TypeAdapter(annotated).json_schema()
    return str(next(one["pattern"] for one in (schema, *schema.get("anyOf", ())) if "pattern" in one))


def _matches(pattern: str) -> str:
    return f"self.matches(r'{pattern}')"


def _int_or(smallest: int, largest: int, text: str) -> str:
    return f"type(self) == int ? {smallest} <= self && self <= {largest} : {text}"


def _fixed(name: str, *, needed: bool, says: str) -> Rule:
    """The key stays as it is; one that may be left out is neither added nor removed."""
    same = f"self.{name} == oldSelf.{name}"
    if needed:
        return Rule(same, f"{name} cannot be changed: {says}", at=name, change=True)
    same = f"has(self.{name}) == has(oldSelf.{name}) && (!has(self.{name}) || {same})"
    return Rule(same, f"{name} cannot be changed, added or removed: {says}", at=name, change=True)


def _rising(*names: str) -> str:
    """Fractions as text, each at least the one before it. One that is no fraction has a sentence of its own."""
    rising = " && ".join(f"!quantity(self.{more}).isLessThan(quantity(self.{less}))" for less, more in pairwise(names))
    return f"![{', '.join(f'self.{name}' for name in names)}].all(x, isQuantity(x)) || {rising}"


def _once(name: str) -> Rule:
    cel = f"!has(self.{name}) || self.{name}.all(x, self.{name}.exists_one(y, y == x))"
    return Rule(cel, f"{name} names one twice", at=name)


_DURATION = (
    r"string(self).matches(r'^\d{1,7}[smh]$') ? "
    "duration('1s') <= duration(string(self)) && duration(string(self)) <= duration('168h') : "
    r"string(self).matches(r'^\d{1,7}$') && 1 <= int(string(self)) && int(string(self)) <= 604800"
)
# 2GB, 2gib and 100000k as Kubernetes spells them: 2G, 2Gi, 100000k
_QUANTITY = "string(self).upperAscii().replace('B', '').replace('I', 'i').replace('K', 'k').replace('ki', 'Ki')"
_SIZE = (
    f"string(self).matches(r'(?i){_pattern(Bytes)}') && [quantity({_QUANTITY})].all(size, "
    "size.compareTo(quantity('96M')) >= 0 && size.compareTo(quantity('1Pi')) <= 0)"
)

_OF_PATTERN = {
    _pattern(Label): Rule(
        _matches(_pattern(Label)), "write lower-case letters, digits and dashes, with a letter or digit at both ends"
    ),
    _pattern(Share): Rule(
        _matches(_pattern(Share)), 'write a fraction from 0 to 1 with at most nine decimals: "0.02" means 2 %'
    ),
    _pattern(Url): Rule(
        f"{_matches(_pattern(Url))} && isURL(self) && url(self).getHostname() != ''",
        "write a URL that begins with http:// or https:// and names a host",
    ),
    # a model also takes what `emrakul run` is given on one machine: a cluster has no such folder
    _pattern(RunUri): Rule(
        _matches(r"^s3://[a-z0-9][a-z0-9.-]*(/.+)?$"),
        "write s3://bucket/prefix: in a cluster a run lies in an object store, file:// and paths are for one machine",
    ),
    _pattern(Checkpoint): Rule(
        _matches(rf"^(s3://[a-z0-9][a-z0-9.-]*/(.+/)?checkpoints/({CHECKPOINT}/?|latest)|{CHECKPOINT}|latest)$"),
        "write latest, a checkpoint's name such as 4000-1-0f3a9b2c, or in full "
        "s3://bucket/run/checkpoints/4000-1-0f3a9b2c: in a cluster runs lie in an object store",
    ),
    _pattern(CheckpointName): Rule(
        _matches(_pattern(CheckpointName)), "write a checkpoint's name such as 4000-1-0f3a9b2c"
    ),
    _pattern(Target): Rule(
        _int_or(0, 999_999_999, f"string(self).matches(r'{_pattern(Target)}')"),
        "write last-good, baseline, or the number of a pair's record",
    ),
    _pattern(Seconds): Rule(
        _int_or(1, 604_800, _DURATION),
        "write seconds as 300 or 60s, minutes as 5m, hours as 1h; from a second to a week",
    ),
    _pattern(Rate): Rule(
        _int_or(1, 10**12, "string(self) == 'auto'"),
        "write a whole number of at least 1, such as 500000, or auto",
    ),
    _pattern(Bytes): Rule(
        _int_or(96_000_000, 2**50, _SIZE),
        "write a size of at least 96MB, such as 2GB (2,000,000,000 bytes) or 2Gi",
    ),
}

_FORMULA = rf"^( |\d[\d._e]*|{'|'.join(NAMES)}|ceil|floor|min|max|[-+*/(),])+$"
_FOR_GOOD = "a cycle is one pass over one checkpoint, so apply another one under a new name"
_NAME = "self.metadata.name.matches(r'^[a-z0-9]([-a-z0-9]*[a-z0-9])?$')"

_OF_MODEL: dict[type[BaseModel], tuple[Rule, ...]] = {
    PruningCycle: (
        Rule(
            f"size(self.metadata.name) <= {CYCLE_NAME}",
            f"a cycle's name has at most {CYCLE_NAME} characters, so that its jobs and pods can be named after it",
            at="metadata.name",
        ),
        Rule(_NAME, "a cycle's name has no dots, since its pods' host names begin with it", at="metadata.name"),
    ),
    CycleSpec: (
        *(
            _fixed(str(field.alias), needed=field.is_required(), says=_FOR_GOOD)
            for name, field in CycleSpec.model_fields.items()
            if name not in MUTABLE
        ),
        Rule(
            "has(self.policyRef) || self.checkpoint.contains('/')",
            "which run's? add policyRef, or write the checkpoint in full: s3://bucket/run/checkpoints/4000-1-0f3a9b2c",
            at="checkpoint",
        ),
    ),
    PruningPolicy: (
        Rule(
            f"size(self.metadata.name) <= 63 && {_NAME}",
            "a policy's name has at most 63 characters and no dots, since it is a label of its cycles",
            at="metadata.name",
        ),
    ),
    PolicySpec: (
        _fixed("run", needed=True, says="a policy's status and cycles are one run's, so apply another policy for it"),
    ),
    RollbackSpec: (
        Rule(
            "self.id != oldSelf.id || self.to == oldSelf.to",
            "a rollback is carried out once for each id: write a new id to ask for another one",
            at="id",
            change=True,
        ),
    ),
    Guidance: (
        Rule(
            "!isQuantity(self.rateFactor) || !quantity('1').isLessThan(quantity(self.rateFactor))",
            "guidance may lower the rate, never raise it: write at most 1",
            at="rateFactor",
        ),
    ),
    Settings: (
        Rule(
            f"self.workerScalingFormula.matches(r'{_FORMULA}')",
            f"a formula is made of numbers, {', '.join(NAMES)}, + - * / //, ceil, floor, min and max",
            at="workerScalingFormula",
        ),
        Rule(
            "type(self.workerCalculationRate) == int || self.workerScalingFormula.contains('worker_calculation_rate') "
            f"|| self.workerScalingFormula.replace(' ', '') == '{DEFAULT_FORMULA.replace(' ', '')}'",
            f"workerCalculationRate is auto, so a formula of your own must name it: write {NAMED_FORMULA}",
            at="workerScalingFormula",
        ),
        _once("importance"),
        Rule(
            "!self.safetyMargin.startsWith('1')",
            "a margin of 1 would never let a unit go: write less",
            at="safetyMargin",
        ),
    ),
    StructuredPruning: (_once("kinds"),),
    ProgressiveSchedule: (
        Rule(
            "self.phase2StartEpoch == self.phase1Epochs + 1",
            "phase2StartEpoch is always phase1Epochs + 1, since active pruning starts with the next epoch: change both",
            at="phase2StartEpoch",
        ),
        Rule(
            _rising("conservativeThreshold", "moderateThreshold", "aggressiveThreshold"),
            "conservativeThreshold, moderateThreshold and aggressiveThreshold rise: each is at least the one before it",
        ),
    ),
    SafetyConstraints: (
        Rule(
            _rising("accuracyDropThreshold", "cumulativeAccuracyDrop"),
            "cumulativeAccuracyDrop is at least accuracyDropThreshold, which one cycle alone may take: raise it",
            at="cumulativeAccuracyDrop",
        ),
    ),
}
