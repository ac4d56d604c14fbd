"""Everything that happened to a namespace's objects, as the API server told it while it happened."""

from __future__ import annotations

import threading
from collections import Counter, defaultdict
from itertools import groupby

from api.apiclient import CYCLES, JOBS, POLICIES, Api, Body


class History:
    """Follows cycles, policies and Jobs from before the first is made."""

    def __init__(self, api: Api, namespace: str) -> None:
        self.made: Counter[str] = Counter()
        """Times that an object of this kind and name was made."""
        self.deleted: Counter[str] = Counter()
        self._conditions: defaultdict[str, list[str]] = defaultdict(list)
        for kind in (CYCLES, POLICIES, JOBS):
            threading.Thread(target=self._follow, args=(api, kind, namespace), daemon=True).start()

    def _follow(self, api: Api, kind: str, namespace: str) -> None:
        for event in api.watch(kind, namespace):
            name = f"{kind.rpartition('}')[2]}/{event['object']['metadata'].get('name')}"
            if event["type"] == "ADDED":
                self.made[name] += 1
            elif event["type"] == "DELETED":
                self.deleted[name] += 1
            if kind != JOBS:
                self._note(name, event["object"])

    def _note(self, name: str, body: Body) -> None:
        for condition in (body.get("status") or {}).get("conditions", ()):
            self._conditions[f"{name} {condition['type']}"].append(condition["status"])

    def flapping(self) -> dict[str, list[str]]:
        """Conditions that became what they had been before."""
        turns = {name: [status for status, _ in groupby(values)] for name, values in self._conditions.items()}
        return {name: values for name, values in turns.items() if len(values) > len(set(values))}
