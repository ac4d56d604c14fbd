"""What the schedule and the breaker remember between cycles: two small values that the log's fold keeps."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from leyline.messages import Stage
from leyline.model import Value


class Ladder(Value):
    """Where the progressive schedule stands, once its validation-only epochs are over."""

    stage: Stage = Stage.CONSERVATIVE
    """The rung that commits; never ValidationOnly, which a checkpoint's epoch, a hold or the breaker decide."""
    streak: int = Field(default=0, ge=0)
    """Committed cycles in a row that were good enough for promotion."""

    def demoted(self) -> Ladder:
        """One stage down, never below Conservative, and the streak is lost."""
        lower = {Stage.AGGRESSIVE: Stage.MODERATE, Stage.MODERATE: Stage.CONSERVATIVE}
        return Ladder(stage=lower.get(self.stage, self.stage))


class Breaker(Value):
    """The circuit breaker against repeated failures."""

    state: Literal["closed", "open", "half-open"] = "closed"
    failures: int = Field(default=0, ge=0)
    """In a row, while closed."""
    checkpoints: int = Field(default=0, ge=0)
    """Published since it opened."""
