"""How long answers will be: quantiles of what each tenant was seen to get of each model. Pure.

One histogram a tenant and model, in buckets that grow by a quarter, whose old counts fade. Of a model of which too
little is known, what the tenant gets of all models is expected; of such a tenant, what all tenants get. `max_tokens` is
always the cap.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterable
from typing import Final

HISTOGRAM_LIMIT: Final = 1_000
"""Histograms that are kept, one a tenant and model; the tenant heard of longest ago is forgotten first, whole."""

BUCKET_GROWTH: Final = 1.25

BUCKET_COUNT: Final = 64
"""Up to more than a million tokens."""

MEMORY_COUNT: Final = 200.0
"""What was seen so many answers ago counts 1/e of what is seen now."""

FEWEST_ANSWERS: Final = 20.0
"""With fewer (faded) answers a histogram says nothing."""


class AnswerLengths:
    """What answers were like.

    Args:
        default_token_count: the expectation while nothing is known.
    """

    def __init__(self, default_token_count: int) -> None:
        self.default_token_count = default_token_count
        self._all = _Histogram()
        self._tenants: OrderedDict[str, dict[str, _Histogram]] = OrderedDict()
        self._histogram_count = 0

    def see(self, tenant: str, model: str, token_count: int) -> None:
        """An answer of a model has ended by itself."""
        models = self._tenants.setdefault(tenant, {})
        self._tenants.move_to_end(tenant)
        if model not in models:
            models[model] = _Histogram()
            self._histogram_count += 1
            while self._histogram_count > HISTOGRAM_LIMIT:
                _, forgotten = self._tenants.popitem(last=False)
                self._histogram_count -= len(forgotten)
        models[model].add(token_count)
        self._all.add(token_count)

    def is_known(self, tenant: str, model: str) -> bool:
        """Whether enough answers, of the tenant or of all, were seen to expect anything."""
        return self._best(tenant, model) is not None

    def expected(self, tenant: str, model: str, max_tokens: int, quantile: float) -> int:
        """So many tokens an answer has, at most, in this share of the cases."""
        best = self._best(tenant, model)
        return max(1, min(max_tokens, self.default_token_count if best is None else best.quantile(quantile)))

    def _best(self, tenant: str, model: str) -> _Histogram | None:
        """The narrowest histogram that says anything."""
        models = self._tenants.get(tenant, {})
        own = models.get(model)
        if own is not None and own.weight >= FEWEST_ANSWERS:
            return own
        whole = _Histogram.together(models.values())
        return next((each for each in (whole, self._all) if each.weight >= FEWEST_ANSWERS), None)


class _Histogram:
    def __init__(self) -> None:
        self._counts = [0.0] * BUCKET_COUNT
        self._unit = 1.0
        self.total = 0.0

    @classmethod
    def together(cls, histograms: Iterable[_Histogram]) -> _Histogram:
        """What is in several; each has faded by its own answers."""
        made = cls()
        for each in histograms:
            made.total += each.weight
            made._counts = [count + more / each._unit for count, more in zip(made._counts, each._counts, strict=True)]
        return made

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
