"""Basic pruning: the exact global threshold over single weights, from sparse histograms of float32 keys.

A key is a score's bit pattern; non-negative floats order like their bits. Pass one counts the high 16 bits, pass two
the low 16 bits of one bucket a parameter, where any can be set. With tau the threshold, parameter p gives
min(count_p(<= tau), cap_p); what is equal to tau goes in canonical order (parameter UUID, then flat index), so the
result does not depend on slices, workers or order.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from emrakul.settings import Settings
from emrakul.strategy.budget import MARGIN, RATE, RETENTION, allowance, budget_key
from leyline.messages import Budget, Slice, Tie
from leyline.model import Malformed
from leyline.topology import Kind, Parameter, Topology

BUCKETS = 1 << 16
Counts = NDArray[np.int64]
"""[BUCKETS] weights by 16 bits of their key."""
Sparse = Mapping[str, NDArray[Any]]
"""The arrays of histogram or refine answers: `<slice key>/bucket` and `<slice key>/count`, and of histogram answers
`<slice key>/whole` where the lower 16 bits of every key are zero."""


@dataclass(frozen=True, kw_only=True)
class Quota:
    """One parameter's part: its slices in C order, and how many of its weights may go at most."""

    name: str
    parameter: Parameter
    slices: tuple[Slice, ...]
    live: int
    cap: int


@dataclass(frozen=True, kw_only=True)
class WeightShare:
    """What the weights of one domain give in this cycle: budget.achieved of them."""

    budget: Budget
    quotas: tuple[Quota, ...]
    """In canonical order, by parameter UUID."""
    full: bool
    """Every parameter was at its cap before the cycle."""


class Histogram(NamedTuple):
    """How many weights have each value of 16 bits, without those that none has: there may be ten thousand of these."""

    values: Counts
    """Rising."""
    counts: Counts

    def upto(self, value: int) -> int:
        """Weights with at most this value."""
        return int(self.counts[: np.searchsorted(self.values, value, side="right")].sum())

    def reaching(self, wanted: int) -> int:
        """The value at which so many weights have it or a lower one; BUCKETS where they never are so many."""
        at = int(np.searchsorted(np.cumsum(self.counts), wanted))
        return int(self.values[at]) if at < len(self.values) else BUCKETS

    def add_to(self, total: Counts, *, start: int = 0, cap: int | None = None) -> None:
        """Add to `total` [BUCKETS] what each value adds; with a cap, as far as `start` and all up to it are below."""
        found = start + np.cumsum(self.counts)
        found = found if cap is None else np.minimum(found, cap)
        total[self.values] += np.diff(found, prepend=start if cap is None else min(start, cap))


def counts_of(slices: Iterable[Slice], arrays: Sparse) -> Histogram:
    """The slices' histograms together; a refine answer may name whole keys, only their low 16 bits count."""
    values, counts = [], []
    for piece in slices:
        bucket, count = arrays.get(f"{piece.key}/bucket"), arrays.get(f"{piece.key}/count")
        if bucket is None or count is None or bucket.shape != count.shape or bucket.ndim != 1 or (count < 0).any():
            raise Malformed(f"the answer for {piece.key} has no histogram, or one whose two arrays do not fit")
        if count.sum() > piece.stop - piece.start:
            raise Malformed(f"the histogram of {piece.key} counts {count.sum()} of {piece.stop - piece.start} weights")
        values.append(bucket.astype(np.int64) & (BUCKETS - 1))
        counts.append(count.astype(np.int64))
    found, at = np.unique(np.concatenate(values), return_inverse=True)
    total = np.zeros(len(found), dtype=np.int64)
    np.add.at(total, at, np.concatenate(counts))
    return Histogram(found, total)


def spend_weights(
    topology: Topology,
    slices: Mapping[str, Sequence[Slice]],
    coarse: Sparse,
    *,
    rate: Fraction,
    carry: Mapping[str, str],
    settings: Settings,
) -> tuple[WeightShare, ...]:
    """Budgets of every domain, from the first round. `slices` are each parameter's, in C order."""
    shares = []
    for domain in topology.domains:
        names = [name for name in slices if topology.parameters[name].domain == domain]
        if names:
            quotas = [_quota(name, topology.parameters[name], slices[name], coarse, settings) for name in names]
            quotas.sort(key=lambda quota: quota.parameter.uuid)
            shares.append(_share(domain, quotas, coarse, rate, carry, settings))
    return tuple(shares)


def _quota(name: str, parameter: Parameter, slices: Sequence[Slice], coarse: Sparse, settings: Settings) -> Quota:
    live = int(counts_of(slices, coarse).counts.sum())
    keep = math.ceil(settings.constraints.min_channel_retention * parameter.size)
    return Quota(name=name, parameter=parameter, slices=tuple(slices), live=live, cap=max(live - keep, 0))


def _share(
    domain: str,
    quotas: Sequence[Quota],
    coarse: Sparse,
    rate: Fraction,
    carry: Mapping[str, str],
    settings: Settings,
) -> WeightShare:
    live = sum(quota.live for quota in quotas)
    carried = Fraction(carry.get(budget_key(domain, Kind.WEIGHT), "0"))
    given = allowance(rate=rate, live=live, carry=carried)
    below = [counts_of(quota.slices, coarse) for quota in quotas]
    total = np.zeros(BUCKETS, dtype=np.int64)
    for counts in below:
        counts.add_to(total)
    last = _last_eligible(total, _limit_factor(settings))
    eligible = [counts.upto(last) for counts in below]
    possible = sum(min(count, quota.cap) for count, quota in zip(eligible, quotas, strict=True))
    achieved = min(given.allowed, possible)
    full = not any(quota.cap for quota in quotas)
    capped = any(count > quota.cap for count, quota in zip(eligible, quotas, strict=True))
    short = RETENTION if full or capped else MARGIN
    budget = Budget(
        domain=domain,
        kind=Kind.WEIGHT,
        live=live,
        original=sum(quota.parameter.size for quota in quotas),
        requested=float(rate),
        carry_in=str(carried),
        allowed=given.allowed,
        eligible=sum(eligible),
        achieved=achieved,
        carry_out=str(given.carry_out),
        bound=RATE if achieved == given.allowed else short,
    )
    return WeightShare(budget=budget, quotas=tuple(quotas), full=full)


def _limit_factor(settings: Settings) -> Fraction:
    """(1 - margin) on the amplitude |w|; squared where keys may be w^2 F / 2, which is a square.

    Which of the two a checkpoint's keys are is not known here; for magnitude the square keeps more, never less.
    """
    keep = 1 - settings.safety_margin
    squared = next(name for name in settings.scorers if name in ("fisher", "magnitude")) == "fisher"
    return keep * keep if squared else keep


def _last_eligible(counts: Counts, factor: Fraction) -> int:
    """The last bucket wholly within `factor` times the median, or -1; the median is taken at its bucket's low edge.

    A bucket is 1/128 wide, so this keeps at most that much more than the exact rule.
    """
    total = int(counts.sum())
    if not total:
        return -1
    median = int(np.searchsorted(np.cumsum(counts), (total + 1) // 2))
    limit = float(_value(median << 16)) * float(factor)
    upper = _value((np.arange(BUCKETS // 2, dtype=np.uint32) << 16) | 0xFFFF)
    with np.errstate(invalid="ignore"):
        return int((upper <= limit).sum()) - 1


def _value(keys: Any) -> NDArray[np.float32]:
    return np.asarray(keys, dtype=np.uint32).view(np.float32)


def refine_buckets(shares: Iterable[WeightShare], coarse: Sparse) -> dict[str, int]:
    """The upper 16 bits that the second round looks into, by slice key. What it needs not read is left out."""
    return {
        piece.key: bucket
        for share in shares
        for quota, bucket in _thresholds(share, coarse)
        for piece in quota.slices
        if _lower(piece, bucket, coarse) is None
    }


def ties(shares: Iterable[WeightShare], coarse: Sparse, fine: Sparse) -> dict[str, Tie]:
    """The exact threshold of every slice that loses weights, by slice key."""
    found: dict[str, Tie] = {}
    for share in shares:
        whole = dict(fine)
        for quota, bucket in _thresholds(share, coarse):
            for piece in quota.slices:
                whole |= _lower(piece, bucket, coarse) or {}
        found |= _ties(share, coarse, whole)
    return found


def _lower(piece: Slice, bucket: int, coarse: Sparse) -> dict[str, NDArray[Any]] | None:
    """The second round's answer for a slice, where the first one tells it: it has no key there, or none of its keys
    has lower bits, as with bfloat16."""
    count = coarse[f"{piece.key}/count"][coarse[f"{piece.key}/bucket"] == bucket]
    if count.size and f"{piece.key}/whole" not in coarse:
        return None
    return {f"{piece.key}/bucket": np.zeros(count.size, dtype=np.uint32), f"{piece.key}/count": count}


def _thresholds(share: WeightShare, coarse: Sparse) -> list[tuple[Quota, int]]:
    """Each parameter that loses weights, with the bucket of its threshold: the global one, or its own cap's below."""
    k = share.budget.achieved
    if not k:
        return []
    counts = [counts_of(quota.slices, coarse) for quota in share.quotas]
    given = np.zeros(BUCKETS, dtype=np.int64)
    for quota, found in zip(share.quotas, counts, strict=True):
        found.add_to(given, cap=quota.cap)
    common = int(np.searchsorted(np.cumsum(given), k))
    return [
        (quota, min(found.reaching(quota.cap), common))
        for quota, found in zip(share.quotas, counts, strict=True)
        if quota.cap and found.upto(common)
    ]


def _ties(share: WeightShare, coarse: Sparse, fine: Sparse) -> dict[str, Tie]:
    chosen = _thresholds(share, coarse)
    if not chosen:
        return {}
    common = max(bucket for _, bucket in chosen)
    before = [counts_of(quota.slices, coarse).upto(bucket - 1) for quota, bucket in chosen]
    within = [counts_of(quota.slices, fine) for quota, _ in chosen]
    begun, given = 0, np.zeros(BUCKETS, dtype=np.int64)
    for (quota, bucket), start, found in zip(chosen, before, within, strict=True):
        begun += min(start, quota.cap) if bucket == common else quota.cap
        if bucket == common:
            found.add_to(given, start=start, cap=quota.cap)
    low = int(np.searchsorted(begun + np.cumsum(given), share.budget.achieved))
    left = share.budget.achieved - begun - int(given[:low].sum())
    ties: dict[str, Tie] = {}
    for (quota, bucket), start, found in zip(chosen, before, within, strict=True):
        own = found.reaching(quota.cap - start)
        if bucket < common or own < low:  # its own cap comes first
            ties |= _spread(quota, bucket, own, quota.cap - start - found.upto(own - 1), fine)
        else:
            below = found.upto(low - 1)
            taken = min(found.upto(low) - below, quota.cap - start - below, left)
            left -= taken
            ties |= _spread(quota, bucket, low, taken, fine)
    if left:
        raise Malformed(f"the two histograms disagree by {left} weights in domain {share.budget.domain}")
    return ties


def _spread(quota: Quota, bucket: int, low: int, equal: int, fine: Sparse) -> dict[str, Tie]:
    """The parameter's threshold for each slice; of what is equal to it, the first `equal` in flat order go."""
    found = {}
    for piece in quota.slices:
        counts = counts_of((piece,), fine)
        here = min(counts.upto(low) - counts.upto(low - 1), equal)
        equal -= here
        found[piece.key] = Tie(below=(bucket << 16) | low, equal=here)
    return found
