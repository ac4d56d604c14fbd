"""What a rule answers: a reason from the one list, and a sentence for this case."""

from __future__ import annotations

from dataclasses import dataclass

from leyline.reasons import OUTCOME_OF, REMEDY, Outcome, Reason


@dataclass(frozen=True)
class Finding:
    """Why a cycle ends as it does."""

    reason: Reason
    message: str
    """What was found, where, and what was expected; the remedy comes from the reason."""

    @property
    def outcome(self) -> Outcome:
        return OUTCOME_OF[self.reason]

    @property
    def sentence(self) -> str:
        """The message with its remedy."""
        text = self.message.rstrip()
        if text and text[-1] not in ".!?":
            text += "."
        return f"{text} {REMEDY[self.reason]}".strip()
