"""One PruningCycle as it was read: what it asks for, and what its status says so far. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import ValidationError

from emrakul.api import labels
from emrakul.api.cycle import CycleStatus, PruningCycle
from emrakul.api.manifest import parse_resource
from emrakul.api.policy import PolicyStatus
from emrakul.api.resource import ConditionType
from emrakul.cluster.kube import Body
from emrakul.cluster.supervisor import Key
from emrakul.invalid import Invalid


@dataclass(frozen=True, kw_only=True)
class Subject:
    """One resource, as it was read."""

    key: Key
    body: Body
    cycle: PruningCycle
    status: CycleStatus

    @property
    def uid(self) -> str:
        return str(self.body["metadata"]["uid"])

    @property
    def resource(self) -> str:
        """How the log names it: a later resource of the same name is another one."""
        return f"{self.key.namespace}/{self.key.name}/{self.uid}"

    @property
    def generation(self) -> int:
        return int(self.body["metadata"].get("generation", 0))

    @property
    def by_policy(self) -> str | None:
        """UID of the policy that made it."""
        return (self.body["metadata"].get("labels") or {}).get(labels.POLICY_UID)


def subject_of(key: Key, body: Body) -> Subject | str:
    """The resource, or why it is none: older objects may not fit a newer schema."""
    try:
        cycle = parse_resource(PruningCycle, plain(body), f"PruningCycle {key.name}")
    except Invalid as error:
        return str(error)
    return Subject(key=key, body=body, cycle=cycle, status=status_of(body))


def plain(body: Body) -> Body:
    """Without what others may hang on an object: labels and annotations are no input."""
    return {**body, "metadata": {name: body["metadata"].get(name) for name in ("name", "namespace")}}


def status_of(body: Body) -> CycleStatus:
    """The status as it stands; one that does not fit is made again from the store."""
    try:
        return CycleStatus.model_validate(body.get("status") or {})
    except ValidationError:
        return CycleStatus()


def seen_of(status: CycleStatus | PolicyStatus) -> tuple[int, str] | None:
    """Number and digest of the newest record that a status names."""
    return (status.seen.record, status.seen.digest) if status.seen else None


def is_admitted(status: CycleStatus) -> bool:
    return any(c.type is ConditionType.ADMITTED and c.status == "True" for c in status.conditions)
