"""How long answers will be: quantiles of what each tenant was seen to get. Pure.

One histogram a tenant, in buckets that grow by a quarter, whose old counts fade; the tenants together make another
one, for a tenant of which too little is known. `max_tokens` is always the cap.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Final

TENANT_LIMIT: Final = 1_000
"""Tenants that are remembered; the one heard of longest ago is forgotten first."""

BUCKET_GROWTH: Final = 1.25

BUCKET_COUNT: Final = 64
"""Up to more than a million tokens."""

MEMORY_COUNT: Final = 200.0
"""What was seen so many answers ago counts 1/e of what is seen now."""

FEWEST_ANSWERS: Final = 20.0
"""With fewer (faded) answers a tenant's own histogram says nothing."""


class AnswerLengths:
    """What answers were like.

    Args:
        default_token_count: the expectation while nothing is known.
    """

    def __init__(self, default_token_count: int) -> None:
        self.default_token_count = default_token_count
        self._all = _Histogram()
        self._tenants: OrderedDict[str, _Histogram] = OrderedDict()

    def see(self, tenant: str, token_count: int) -> None:
        """An answer has ended by itself."""
        histogram = self._tenants.get(tenant)
        if histogram is None:
            histogram = self._tenants[tenant] = _Histogram()
            if len(self._tenants) > TENANT_LIMIT:
                self._tenants.popitem(last=False)
        self._tenants.move_to_end(tenant)
        histogram.add(token_count)
        self._all.add(token_count)

    def is_known(self, tenant: str) -> bool:
        """Whether enough answers, of the tenant or of all, were seen to expect anything."""
        own = self._tenants.get(tenant)
        return self._all.weight >= FEWEST_ANSWERS or (own is not None and own.weight >= FEWEST_ANSWERS)

    def expected(self, tenant: str, max_tokens: int, quantile: float) -> int:
        """So many tokens an answer has, at most, in this share of the cases."""
        for histogram in (self._tenants.get(tenant), self._all):
            if histogram is not None and histogram.weight >= FEWEST_ANSWERS:
                return max(1, min(max_tokens, histogram.quantile(quantile)))
        return max(1, min(max_tokens, self.default_token_count))


class _Histogram:
    def __init__(self) -> None:
        self._counts = [0.0] * BUCKET_COUNT
        self._unit = 1.0
        self.total = 0.0

    @property
    def weight(self) -> float:
        """How many answers are in it, faded."""
        return self.total / self._unit

    def add(self, token_count: int) -> None:
        # Growing the new one's weight is the same as fading all the others.
        self._unit *= 1 + 1 / MEMORY_COUNT
        if self._unit > 1e9:
            self._counts = [count / self._unit for count in self._counts]
            self.total, self._unit = self.total / self._unit, 1.0
        self._counts[_bucket(token_count)] += self._unit
        self.total += self._unit

    def quantile(self, quantile: float) -> int:
        """The upper end of the bucket in which it lies."""
        wanted, seen = quantile * self.total, 0.0
        for bucket, count in enumerate(self._counts):
            seen += count
            if seen >= wanted and count:
                return math.ceil(BUCKET_GROWTH**bucket)
        return math.ceil(BUCKET_GROWTH ** (BUCKET_COUNT - 1))


def _bucket(token_count: int) -> int:
    if token_count <= 1:
        return 0
    return min(BUCKET_COUNT - 1, math.ceil(math.log(token_count, BUCKET_GROWTH) - 1e-9))
