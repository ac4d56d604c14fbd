"""Resources: read as kubectl would take them, refused in sentences, conditions that do not flap."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from fractions import Fraction
from typing import Any

import pytest

from emrakul.api.cycle import (
    CycleStatus,
    PruningCycle,
)
from emrakul.api.manifest import load_manifest, load_policy, run_of
from emrakul.api.policy import PolicyStatus, PruningPolicy
from emrakul.api.resource import Condition, ConditionType, set_condition
from emrakul.invalid import Invalid
from emrakul.settings import Settings
from filled import filled
from leyline.messages import Stage

EIGHT_LINES = """\
apiVersion: emrakul.dev/v1alpha1
kind: PruningCycle
metadata:
  name: first
spec:
  checkpoint: s3://bucket/runs/digits/checkpoints/4000-1-0f3a9b2c
"""
POLICY = """\
apiVersion: emrakul.dev/v1alpha1
kind: PruningPolicy
metadata: {name: digits, labels: {team: vision}, managedFields: []}
spec:
  run: s3://bucket/runs/digits
  store: {endpoint: "https://store:8333", credentialsSecretRef: {name: store}}
  every: 2
  guidance: {maxStage: Moderate, rateFactor: "0.5"}
  rollback: {id: r-1, to: 12}
  settings:
    enableCheckpointPruning: true
    validationTimeout: 90s
    structuredPruning: {safetyConstraints: {accuracyDropThreshold: "0.01"}}
"""
CYCLE = """\
apiVersion: emrakul.dev/v1alpha1
kind: PruningCycle
metadata: {name: first}
spec: {checkpoint: latest, policyRef: {name: digits}}
"""
BOTH = f"{CYCLE}---\n{POLICY}"
NOON = datetime(2026, 1, 2, 12, tzinfo=UTC)


def test_a_cycle_in_eight_lines_needs_no_policy() -> None:
    cycle, policy = load_manifest(EIGHT_LINES)
    assert policy is None
    assert run_of(cycle, policy) == "s3://bucket/runs/digits"
    assert cycle.spec.checkpoint_name == "4000-1-0f3a9b2c"


def test_a_policy_is_another_document_of_the_same_file() -> None:
    cycle, policy = load_manifest(BOTH)
    assert policy is not None
    assert run_of(cycle, policy) == "s3://bucket/runs/digits"
    assert cycle.spec.checkpoint_name is None, "the latest"
    assert policy.spec.settings.enable_checkpoint_pruning
    assert policy.spec.settings.validation_timeout == 90
    assert policy.spec.settings.constraints.accuracy_drop_threshold == Fraction(1, 100)
    assert policy.spec.settings.min_importance_samples == Settings().min_importance_samples
    assert (policy.spec.guidance.cap, policy.spec.guidance.rate_factor) == (Stage.MODERATE, Fraction(1, 2))
    assert policy.spec.rollback is not None
    assert policy.spec.rollback.to == "12"
    assert load_policy(BOTH) == policy
    assert load_manifest(CYCLE, policy=policy)[1] == policy, "or it comes with --policy"


@pytest.mark.parametrize("text", [EIGHT_LINES, BOTH])
def test_a_resource_reads_back_as_it_was_written(text: str) -> None:
    cycle, policy = load_manifest(text)
    assert PruningCycle.model_validate(cycle.dump(), by_alias=True, by_name=False) == cycle
    if policy is not None:
        dumped = policy.dump()
        assert PruningPolicy.model_validate(dumped, by_alias=True, by_name=False) == policy
        assert dumped["spec"]["settings"]["safetyMargin"] == "0.5"
        assert not any(isinstance(value, float) for value in _leaves(dumped)), "no floats in a resource"


def _leaves(value: Any) -> list[Any]:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return [value] if inner is None else [leaf for one in inner for leaf in _leaves(one)]


def test_a_status_that_a_person_pastes_is_not_read() -> None:
    cycle, _ = load_manifest(EIGHT_LINES + "status: {outcome: Committed, zzz: 1}\n")
    assert cycle.status == CycleStatus()


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("kind: PruningCycle", "kind: PrunningCycle", "kind is 'PrunningCycle'; did you mean PruningCycle?"),
        ("kind: PruningCycle", "kind: Pod", "it should be PruningCycle or PruningPolicy"),
        ("v1alpha1\nkind: PruningCycle", "v1\nkind: PruningCycle", "it should be emrakul.dev/v1alpha1"),
        ("checkpoint: latest", "checkpont: latest", "spec.checkpont is no known key; did you mean checkpoint?"),
        ("checkpoint: latest, ", "", "spec.checkpoint is missing; add it"),
        ("checkpoint: latest", "checkpoint: newest", "spec.checkpoint is 'newest', which does not fit; expected: A "),
        ("policyRef: {name: digits}", "policyRef: {name: letters}", "policyRef names letters, the policies given"),
        (", policyRef: {name: digits}", "", "add policyRef: {name: digits} to its spec"),
        ("metadata: {name: first}", "metadata: {name: First}", "metadata.name is 'First'"),
        ("metadata: {name: first}", f"metadata: {{name: {'a' * 47}}}", "has 47 characters; a cycle's may have 46"),
        ("spec: {checkpoint: latest", "spec: {suspend: 1, checkpoint: latest", "spec.suspend is 1"),
        ("checkpoint: latest", "checkpoint: s3://other/checkpoints/4000-1-0f3a9b2c", "the policy speaks of s3://bucket"),
        ("s3://bucket/runs/digits", "gs://bucket/runs", "spec.run is 'gs://bucket/runs', which does not fit; expe"),
        ("run: s3://bucket/runs/digits", "run: s3://bucket/runs/digits\n  evry: 2", "did you mean every?"),
        ("enableCheckpointPruning", "enable_checkpoint_pruning", "did you mean enableCheckpointPruning (keys"),
        ('"0.01"', "0.01", 'accuracyDropThreshold is the number 0.01; fractions in a resource are text, write "0.01"'),
        ('"0.01"', '"1.5"', "accuracyDropThreshold is '1.5'; a fraction lies between 0 and 1"),
        ('rateFactor: "0.5"', 'rateFactor: "1.5"', "asks for 1.5 times the rate"),
        ("maxStage: Moderate", 'minChannelRetention: "0.1"', "a safety constraint"),
        ("to: 12", "to: yesterday", "spec.rollback.to is 'yesterday'"),
        ("https://store:8333", "store:8333", "spec.store.endpoint is 'store:8333'"),
        ("---", "---\n- a\n---", "document 2 is list in YAML"),
        ("every: 2", "every: 2\n  every: 3", "key 'every' occurs twice"),
        ("every: 2", "every: [", "is not readable YAML"),
    ],
)  # fmt: skip
def test_a_mistake_ends_in_one_sentence(old: str, new: str, says: str) -> None:
    text = BOTH.replace(old, new, 1)
    assert text != BOTH
    with pytest.raises(Invalid, match=r"^cycle\.yaml") as refusal:
        load_manifest(text, name="cycle.yaml")
    assert says in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_file_without_a_cycle_or_with_two_is_refused() -> None:
    with pytest.raises(Invalid, match="has 0 PruningCycle documents"):
        load_manifest(POLICY)
    with pytest.raises(Invalid, match="has 2 PruningCycle documents"):
        load_manifest(f"{EIGHT_LINES}---\n{EIGHT_LINES}")
    with pytest.raises(Invalid, match="has 0 PruningPolicy documents"):
        load_policy(EIGHT_LINES)
    with pytest.raises(Invalid, match="no policy that says of which run"):
        load_manifest(EIGHT_LINES.replace("s3://bucket/runs/digits/checkpoints/", ""))


# --- conditions -------------------------------------------------------------------------------------------------------


def test_a_conditions_time_moves_only_when_its_status_flips() -> None:
    def at(before: tuple[Condition, ...], status: str, minutes: int, reason: str = "Running") -> tuple[Condition, ...]:
        return set_condition(
            before,
            ConditionType.COMPLETE,
            status,  # type: ignore[arg-type]
            reason=reason,
            message=f"after {minutes} minutes",
            generation=minutes,
            now=NOON + timedelta(minutes=minutes),
        )

    first = at((), "False", 0)
    again = at(first, "False", 1, "StillRunning")
    assert again[0].last_transition_time == first[0].last_transition_time == "2026-01-02T12:00:00Z"
    assert (again[0].reason, again[0].message, again[0].observed_generation) == ("StillRunning", "after 1 minutes", 1)
    assert at(again, "True", 2)[0].last_transition_time == "2026-01-02T12:02:00Z"


def test_conditions_stand_in_the_order_of_a_cycle() -> None:
    conditions: tuple[Condition, ...] = ()
    for type_ in (ConditionType.COMPLETE, ConditionType.ADMITTED, ConditionType.ANALYZED, ConditionType.ADMITTED):
        conditions = set_condition(conditions, type_, "True", reason="Yes", generation=1, now=NOON)
    assert [one.type.value for one in conditions] == ["Admitted", "Analyzed", "Complete"]


def test_a_long_message_is_cut_rather_than_refused() -> None:
    (one,) = set_condition((), ConditionType.FAILED, "True", reason="No", message="x" * 9000, generation=1, now=NOON)
    assert len(one.message) == 4096


@pytest.mark.parametrize("model", [CycleStatus, PolicyStatus])
def test_every_status_field_survives_a_round_trip(model: type[CycleStatus | PolicyStatus]) -> None:
    status = filled(model)
    dumped = status.dump()
    assert model.model_validate(dumped, by_alias=True, by_name=False) == status
    assert not any(isinstance(value, float) for value in _leaves(dumped))
    assert not [name for name in model.model_fields if getattr(status, name) is None]


@pytest.mark.parametrize("model", [PruningCycle, PruningPolicy])
def test_the_schema_has_no_floats_and_bounds_its_text_and_lists(model: type[PruningCycle | PruningPolicy]) -> None:
    def faults(node: Any, path: str) -> list[str]:
        found = []
        if isinstance(node, dict):
            if node.get("type") == "number":
                found.append(f"{path} is a float")
            if node.get("type") == "string" and not {"maxLength", "enum", "const", "pattern"} & set(node):
                found.append(f"{path} is unbounded text")
            if node.get("type") == "array" and "maxItems" not in node:
                found.append(f"{path} is an unbounded list")
            found += [fault for key, value in node.items() for fault in faults(value, f"{path}/{key}")]
        return found

    assert faults(model.model_json_schema(by_alias=True), model.__name__) == []
