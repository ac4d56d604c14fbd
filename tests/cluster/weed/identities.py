"""Who may do what in the store. SeaweedFS limits an action to a bucket, or to what matches `bucket/pattern*`.

Without the star at its end a path allows nothing, and says nothing. `Write` is also overwriting and deleting. Who is
limited to paths may not ask for the bucket itself (HeadBucket is 403), but may list and write under them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass

BUCKET = "runs"


@dataclass(frozen=True, kw_only=True)
class Identity:
    """A user of the store; its access key is its name."""

    name: str
    secret_key: str
    actions: tuple[str, ...]

    @property
    def environment(self) -> dict[str, str]:
        return {"AWS_ACCESS_KEY_ID": self.name, "AWS_SECRET_ACCESS_KEY": self.secret_key}


ADMIN = Identity(name="admin", secret_key="admin-secret", actions=("Admin",))
"""The control plane and the trainer: all of every run."""

WORKER = Identity(
    name="worker",
    secret_key="worker-secret",
    actions=(f"Read:{BUCKET}/*", f"List:{BUCKET}/*", f"Write:{BUCKET}/*/cycles/*"),
)
"""Worker pods: what they write lies under `cycles/`, so that the log is out of their reach."""


def configuration(identities: Iterable[Identity]) -> str:
    """What `weed -s3.config` reads."""
    return json.dumps(
        {
            "identities": [
                {
                    "name": identity.name,
                    "credentials": [{"accessKey": identity.name, "secretKey": identity.secret_key}],
                    "actions": list(identity.actions),
                }
                for identity in identities
            ]
        }
    )
