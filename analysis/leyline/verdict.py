"""verdict.json: how a verdict is sealed and read. Nothing else lets masks into the log, so where trust is configured
it must be signed: the digests in it reach the candidate, its masks and its decision, whoever wrote those.
"""

from __future__ import annotations

from collections.abc import Sequence

from leyline.envelope import Role, SigningKey, Trust, open_envelope, seal
from leyline.messages import Verdict

PAYLOAD = "application/vnd.emrakul.verdict+json"
WRITERS: tuple[Role, ...] = ("validator", "operator")
"""On one machine the validator is a process of the operator's, and signs with its key."""


def seal_verdict(verdict: Verdict, keys: Sequence[SigningKey]) -> bytes:
    """The bytes of verdict.json."""
    return seal(verdict.canonical(), PAYLOAD, keys)


def open_verdict(data: bytes, trust: Trust | None, *, name: str) -> Verdict:
    """Damaged or Untrusted for the envelope, Malformed for what it says."""
    return Verdict.parse(open_envelope(data, PAYLOAD, trust, roles=WRITERS, name=name), name=name)
