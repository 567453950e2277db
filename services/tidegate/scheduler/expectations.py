"""All that the scheduler learns from what passes, and what it expects of the next request by it. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from tidegate.scheduler.brownout import Brownout
from tidegate.scheduler.observations import Observations, cost_of
from tidegate.scheduler.outlook import Outlook
from tidegate.scheduler.request import Request, ServiceClass
from tidegate.scheduler.tenant_habits import TenantHabits

USUAL_QUANTILE: Final = 0.5
"""What a request counts between tenants follows from the usual length of answers, and is corrected by what came."""

LONGEST_QUANTILE: Final = 0.95
"""What a request may take of replicas follows from how long answers are at most, hardly any excepted."""

OUTPUT_TOKEN_WORK: Final = 5.0
"""An output token takes as much of an engine as about so many prompt tokens: of a 70B model on an H200 4.9, by the
simulated engine's preset. What it counts between tenants is a matter of agreement instead."""


@dataclass(frozen=True, slots=True)
class Expectations:
    """What is known, and by whom.

    Args:
        answer_quantile: an answer is expected to be no longer than this share of the tenant's of that model were.
    """

    outlook: Outlook
    observations: Observations
    habits: TenantHabits
    brownout: Brownout
    answer_quantile: float

    def expect(self, request: Request, now: float) -> None:
        """Works out what a prepared request will take."""
        lengths = self.observations.lengths
        request.answer_token_count = self._answer_token_count(request, request.model, self.answer_quantile)
        usual = self._answer_token_count(request, request.model, USUAL_QUANTILE)
        request.cost = cost_of(request.prompt_token_count, usual)
        longest = self._answer_token_count(request, request.model, LONGEST_QUANTILE)
        request.work = max(1.0, request.prompt_token_count + OUTPUT_TOKEN_WORK * longest)
        self.outlook.expect(request.cost, usual, now)
        # A length that nobody has seen yet is no reason to refuse: then nobody ever would.
        counted = request.answer_token_count if lengths.is_known(request.tenant, request.model) else 1
        request.expected_seconds = self.outlook.service_seconds(counted, now)

    def answer_token_count(self, request: Request, model: str) -> int:
        """The tokens that a prepared request's answer has at most, as expected of this model."""
        return self._answer_token_count(request, model, self.answer_quantile)

    def _answer_token_count(self, request: Request, model: str, quantile: float) -> int:
        lengths = self.observations.lengths
        return lengths.expected(request.tenant, model, request.max_tokens or lengths.default_token_count, quantile)

    def count(self, request: Request, now: float) -> None:
        """Counts a request among what comes for the replicas, after `expect`."""
        self.habits.see(request)
        self._count(request, request.service_class, request.cost, now)

    def count_unread(self, request: Request, now: float) -> None:
        """Counts a request that was refused from its headers for what its tenant's usually are."""
        habit = self.habits.get(request.tenant)
        service_class = request.named_class or (ServiceClass.STANDARD if habit is None else habit.service_class)
        self._count(request, service_class, request.cost if habit is None else habit.cost, now)

    def _count(self, request: Request, service_class: ServiceClass, cost: float, now: float) -> None:
        """What Envoy refuses for the scheduler presses, too."""
        self.outlook.ask(service_class, request.tenant, request.offered_count * cost, now)
