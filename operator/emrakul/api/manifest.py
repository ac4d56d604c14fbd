"""Reads the manifests that `kubectl apply` takes, for the command line: every mistake is one sentence."""

from __future__ import annotations

import difflib
from typing import Any, TypeVar

from pydantic import ValidationError

from emrakul.api.cycle import PruningCycle
from emrakul.api.policy import PruningPolicy
from emrakul.api.resource import API_VERSION
from emrakul.invalid import Invalid, read_yaml, sentence
from emrakul.settings import refuse_floats

Resource = TypeVar("Resource", PruningCycle, PruningPolicy)
_KINDS = ("PruningCycle", "PruningPolicy")


def load_manifest(
    text: str, *, name: str = "manifest", policy: PruningPolicy | None = None
) -> tuple[PruningCycle, PruningPolicy | None]:
    """The one cycle of a file, and the policy that it refers to: another document, or `policy` (of --policy).

    Invalid names file, document and key, what was expected, and what to write.
    """
    cycles, policies = _read(text, name)
    if len(cycles) != 1:
        raise Invalid(f"{name} has {len(cycles)} PruningCycle documents; exactly one is run at a time")
    cycle = cycles[0]
    chosen = _policy_of(cycle, [policy] if policy is not None else policies, name)
    run_of(cycle, chosen, name=name)
    return cycle, chosen


def load_policy(text: str, *, name: str = "policy") -> PruningPolicy:
    """The one policy of a file; cycles beside it are left alone."""
    _, policies = _read(text, name)
    if len(policies) != 1:
        raise Invalid(f"{name} has {len(policies)} PruningPolicy documents; exactly one is expected")
    return policies[0]


def run_of(cycle: PruningCycle, policy: PruningPolicy | None, *, name: str = "manifest") -> str:
    """The run that a cycle is about, from its checkpoint or its policy; Invalid if they are none or disagree."""
    own = cycle.spec.run
    given = policy.spec.run.rstrip("/") if policy is not None else None
    if own is None and given is None:
        raise Invalid(
            f"{name}: spec.checkpoint is {cycle.spec.checkpoint!r} and there is no policy that says of which run; "
            "write it in full, as in s3://bucket/run/checkpoints/4000-1-0f3a9b2c, or add a PruningPolicy and policyRef"
        )
    if own is not None and given is not None and own.rstrip("/") != given:
        raise Invalid(f"{name}: spec.checkpoint lies in the run {own}, the policy speaks of {given}; make them one")
    return own or given or ""


def _policy_of(cycle: PruningCycle, policies: list[PruningPolicy], name: str) -> PruningPolicy | None:
    if cycle.spec.policy_ref is None:
        if policies:
            raise Invalid(
                f"{name}: PruningCycle {cycle.metadata.name} has no policyRef, but there is a PruningPolicy; "
                f"add policyRef: {{name: {policies[0].metadata.name}}} to its spec"
            )
        return None
    wanted = cycle.spec.policy_ref.name
    for policy in policies:
        if policy.metadata.name == wanted:
            return policy
    there = ", ".join(policy.metadata.name for policy in policies) or "none"
    raise Invalid(
        f"{name}: policyRef names {wanted}, the policies given are: {there}; put the PruningPolicy into the same file, "
        "after a line of ---, or give it with --policy"
    )


def _read(text: str, name: str) -> tuple[list[PruningCycle], list[PruningPolicy]]:
    cycles: list[PruningCycle] = []
    policies: list[PruningPolicy] = []
    documents = read_yaml(text, name=name)
    for number, document in enumerate(documents, start=1):
        where = f"{name}, document {number}" if len(documents) > 1 else name
        if not isinstance(document, dict):
            raise Invalid(f"{where} is {type(document).__name__} in YAML; a resource is a mapping of keys to values")
        if _kind(document, where) == "PruningCycle":
            cycles.append(parse_resource(PruningCycle, document, where))
        else:
            policies.append(parse_resource(PruningPolicy, document, where))
    return cycles, policies


def _kind(document: dict[str, Any], where: str) -> str:
    kind, version = document.get("kind"), document.get("apiVersion")
    if kind not in _KINDS:
        near = difflib.get_close_matches(str(kind), _KINDS, n=1)
        raise Invalid(
            f"{where}: kind is {kind!r}; " + (f"did you mean {near[0]}?" if near else f"it should be {_KINDS[0]} or "
            f"{_KINDS[1]}")
        )  # fmt: skip
    if version != API_VERSION:
        raise Invalid(f"{where}: apiVersion is {version!r}; it should be {API_VERSION}")
    return str(kind)


def parse_resource(model: type[Resource], document: dict[str, Any], where: str) -> Resource:
    """One resource without its status; Invalid says what is wrong and what to write."""
    # status is the operator's: what a person pastes there from `kubectl get` is not read
    content = {key: value for key, value in document.items() if key != "status"}
    refuse_floats(content.get("spec"), f"{where}: spec")
    try:
        return model.model_validate(content, by_alias=True, by_name=False)
    except ValidationError as error:
        raise Invalid(sentence(error, model, name=where, camel=True)) from error
