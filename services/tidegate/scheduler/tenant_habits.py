"""What a tenant's requests were like lately, to judge the next one by its headers alone. Pure."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Final

from tidegate.scheduler.request import Request, ServiceClass

TENANT_LIMIT: Final = 1_000
"""Tenants that are remembered; the one heard of longest ago is forgotten first."""

STEADY_COUNT: Final = 20
"""After so many requests of one class in a row, the next one is taken to be of it, too. The same of requests whose
answers nobody can know before, because they are drawn by lot."""

NEWEST_WEIGHT: Final = 0.1
"""What the newest request counts in the averages."""

SMALLEST_SHARE: Final = 0.5
"""Of the harmonic mean of what a tenant's requests take: what takes no more is small, however much they differ."""


@dataclass(slots=True)
class Habit:
    """The requests of a tenant: their class, and how many in a row had it; cost, work, one over the work, and answer
    tokens on average; how many in a row had no answer that could be known."""

    service_class: ServiceClass
    count: int
    cost: float
    work: float
    inverse_work: float
    answer_token_count: float
    drawn_count: int = 0

    @property
    def small_work(self) -> float:
        """What a small one of them takes: of those that are all alike what each does, of others the less the more they
        differ (of log-normal ones the mean times exp(-2 sigma^2), but no less than half of their harmonic mean)."""
        harmonic_mean = 1 / self.inverse_work
        return harmonic_mean * max(harmonic_mean / self.work, SMALLEST_SHARE)

    @property
    def is_steady(self) -> bool:
        """Whether the next one is likely to be of that class."""
        return self.count >= STEADY_COUNT

    @property
    def may_be_known(self) -> bool:
        """Whether the answer to the next one may be known."""
        return self.drawn_count < STEADY_COUNT


class TenantHabits:
    """The habits of all tenants."""

    def __init__(self) -> None:
        self._habits: OrderedDict[str, Habit] = OrderedDict()

    def get(self, tenant: str) -> Habit | None:
        """A tenant's habit; None when nothing is known."""
        return self._habits.get(tenant)

    def see(self, request: Request) -> None:
        """A prepared request whose answer is not known."""
        habit = self._habits.get(request.tenant)
        if habit is None:
            habit = Habit(
                request.service_class, 0, request.cost, request.work, 1 / request.work, request.answer_token_count
            )
            self._habits[request.tenant] = habit
            if len(self._habits) > TENANT_LIMIT:
                self._habits.popitem(last=False)
        self._habits.move_to_end(request.tenant)
        habit.count = habit.count + 1 if habit.service_class is request.service_class else 1
        habit.service_class = request.service_class
        habit.drawn_count = 0 if request.answer_key else habit.drawn_count + 1
        habit.cost += NEWEST_WEIGHT * (request.cost - habit.cost)
        habit.work += NEWEST_WEIGHT * (request.work - habit.work)
        habit.inverse_work += NEWEST_WEIGHT * (1 / request.work - habit.inverse_work)
        habit.answer_token_count += NEWEST_WEIGHT * (request.answer_token_count - habit.answer_token_count)

    def see_known(self, tenant: str) -> None:
        """A request whose answer is known; it says nothing of those that are not."""
        habit = self._habits.get(tenant)
        if habit is not None:
            habit.drawn_count = 0
