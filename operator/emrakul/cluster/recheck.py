"""Recovery validation in a cluster: urabrask as a Job of the policy, which loads the pair of one record."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from emrakul.api import labels
from emrakul.api.policy import PolicySpec
from emrakul.cluster.children import Children, Taken
from emrakul.cluster.kube import Forbidden, Rejected
from emrakul.cluster.services import Services
from emrakul.cluster.source import frozen_of
from emrakul.cluster.supervisor import Key
from emrakul.rollback import NoAnswer
from emrakul.runtime import podends
from emrakul.runtime.config import OperatorConfig
from emrakul.runtime.jobs import recheck
from emrakul.runtime.jobstatus import terminal
from emrakul.runtime.pods import Owner, Terms
from leyline import exits

ATTEMPTS = 3
"""Jobs for one record; one that says nothing of the pair is tried again."""


@dataclass(frozen=True, kw_only=True)
class Recheck:
    """Validate, for one policy: it is called in a thread and never waits, so a Job that runs is no answer yet."""

    children: Children
    terms: Terms
    run: str

    @classmethod
    def of(cls, services: Services, key: Key, body: dict[str, Any], spec: PolicySpec) -> Recheck:
        config: OperatorConfig = services.config
        frozen = frozen_of(spec, config.defaults.store)
        uid = body["metadata"]["uid"]
        children = Children(
            kube=services.kube, loop=services.loop, namespace=key.namespace, owner=labels.POLICY_UID, uid=uid
        )
        terms = Terms(
            owner=Owner(kind="PruningPolicy", name=key.name, uid=uid, namespace=key.namespace),
            config=config,
            settings=spec.settings,
            images={"worker": config.images.worker, "validator": config.images.validator},
            store=frozen.store,
            overrides=spec.pod_overrides,
            queue=frozen.queue,
        )
        return cls(children=children, terms=terms, run=spec.run.rstrip("/"))

    def __call__(self, record: int) -> str | None:
        every = self.children.list()
        found = [job for job in every if job["metadata"]["labels"].get(labels.STEP) == str(record)]
        self._clear([job for job in every if job not in found])  # of rollbacks before this one
        attempt = 0
        if found:
            newest = max(found, key=lambda job: int(job["metadata"]["labels"][labels.LAUNCH]))
            attempt = int(newest["metadata"]["labels"][labels.LAUNCH]) + 1
            end = terminal(newest)
            if end is None:
                raise NoAnswer(f"the validator is looking at record {record}")
            if end["type"] == "Complete":
                self._clear(found)
                return None
            ends = podends.ends(self.children.pods(newest))
            said = ends[-1].said if ends else ""
            if any(end.code == exits.BAD_INPUT for end in ends):
                self._clear(found)
                return said or f"record {record} breaks a rule; the validator's exit code was {exits.BAD_INPUT}"
            if attempt >= ATTEMPTS:
                raise NoAnswer(f"the validator could not judge record {record}: {said or 'its pods never ran'}")
        try:
            self.children.create(recheck(self.terms, run_uri=self.run, record=record, attempt=attempt))
        except (Rejected, Forbidden, Taken) as error:
            raise NoAnswer(f"the validator cannot be started for record {record}: {error}") from error
        raise NoAnswer(f"the validator was started for record {record}")

    def _clear(self, jobs: list[dict[str, Any]]) -> None:
        for job in jobs:
            self.children.delete(job)
