"""The accuracy gate: is the candidate's true accuracy drop at most what is allowed? Pure; no torch.

Both models answer the same N samples. b samples only the reference gets right, c only the candidate; the drop is
(b - c) / N. The upper bound is Agresti and Min's for paired proportions (Statistics in Medicine 24, 2005): one more
sample is added to each of b and c's opposite cells, which keeps its coverage where b and c are small.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from leyline.messages import GateResult

Z = 1.645
"""Normal quantile of a one-sided 95 % bound."""

Outcome = Literal["PASS", "FAIL", "INCONCLUSIVE"]

Right = NDArray[np.bool_]
"""Per sample, whether the answer was right. [N]"""


def upper_bound(n: float, lost: float, gained: float) -> float:
    """Upper 95 % bound of the accuracy drop."""
    difference = lost - gained
    variance = lost + gained + 1 - difference**2 / (n + 2)
    return (difference + Z * math.sqrt(max(variance, 0.0))) / (n + 2)


def samples_needed(n: int, lost: int, gained: int, allowed: float) -> int:
    """Samples at which the same rates of disagreement would pass; 0 if no number does (the drop is not below it)."""
    if lost - gained >= allowed * n:
        return 0

    def passes(size: int) -> bool:
        return upper_bound(size, lost * size / n, gained * size / n) <= allowed

    high = 1
    while not passes(high):
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if passes(middle) else (middle, high)
    return high


def gate(against: str, reference: Right, candidate: Right, allowed: float) -> GateResult:
    """PASS if the upper bound is within `allowed` (0.02 is two percentage points), FAIL if the drop itself is above it.

    INCONCLUSIVE in between: too few samples for the disagreement there is.
    """
    if reference.shape != candidate.shape or not reference.size:
        raise ValueError(f"a paired gate needs the same samples; it got {reference.shape} and {candidate.shape}")
    n = reference.size
    lost, gained = int((reference & ~candidate).sum()), int((~reference & candidate).sum())
    drop, upper = (lost - gained) / n, upper_bound(n, lost, gained)
    outcome: Literal["PASS", "FAIL", "INCONCLUSIVE"] = (
        "FAIL" if drop > allowed else "PASS" if upper <= allowed else "INCONCLUSIVE"
    )
    return GateResult(
        against=against,
        outcome=outcome,
        n=n,
        right_reference=int(reference.sum()),
        right_candidate=int(candidate.sum()),
        lost=lost,
        gained=gained,
        drop=drop,
        upper=upper,
        allowed=allowed,
        needed=samples_needed(n, lost, gained, allowed) if outcome == "INCONCLUSIVE" else 0,
    )


def sentence(result: GateResult) -> str:
    """What a gate found, for a person."""
    measured = (
        f"against {result.against}: {result.right_candidate} of {result.n} right where {result.right_reference} were, "
        f"a drop of {100 * result.drop:.2f} points (at most {100 * result.upper:.2f} with 95 % confidence), "
        f"{100 * result.allowed:g} allowed"
    )
    if result.outcome != "INCONCLUSIVE":
        return measured
    if result.needed:
        return f"{measured}; at this disagreement it would take {result.needed} samples to tell"
    return f"{measured}; the drop is the whole allowance, so no number of samples would pass it"
