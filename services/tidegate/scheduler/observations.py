"""What became of the requests that were dispatched, and what that says of those to come. Pure.

Each dispatched request is remembered by its credit until the replica tells its outcome. From outcomes come the
expected length of answers, the times of an answer, and the corrections of what tenants were charged.
"""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from dataclasses import dataclass
from typing import Final

from tidegate.scheduler.answer_lengths import FEWEST_ANSWERS, AnswerLengths
from tidegate.scheduler.lanes import Lanes
from tidegate.scheduler.request import Request, ServiceClass

DISPATCHED_LIMIT: Final = 100_000
"""Requests without an outcome that are remembered; the oldest are forgotten first."""

WINDOW_SECONDS: Final = 5.0
"""For so long a time to first token counts in the percentile."""

WINDOW_LIMIT: Final = 2_000
"""So many of them count at most, of each class."""

MEMORY_SECONDS: Final = 5.0
"""Times of answers that ended longer ago say nothing of the next one."""

NEWEST_WEIGHT: Final = 0.1
"""What the newest outcome counts in the averages."""

OUTPUT_TOKEN_COST: Final = 2.0
"""An output token counts as much as so many prompt tokens (Sheng et al., OSDI 2024)."""


def cost_of(prompt_token_count: float, answer_token_count: float) -> float:
    """What a request counts between tenants."""
    return max(1.0, prompt_token_count + OUTPUT_TOKEN_COST * answer_token_count)


@dataclass(frozen=True, slots=True)
class Ended:
    """The outcome of a request, as its replica told it; seconds from the arrival at the replica.

    `cached_token_count` is what of the prompt's tokens the replica did not compute.
    """

    credit_id: str
    is_completed: bool
    first_token_seconds: float | None
    duration_seconds: float
    prompt_token_count: int
    completion_token_count: int
    cached_token_count: int = 0


@dataclass(frozen=True, slots=True)
class _Dispatched:
    tenant: str
    model: str
    service_class: ServiceClass
    cost: float
    queue_seconds: float
    is_lite: bool


class Observations:
    """What is known from outcomes.

    Args:
        lanes: whose tenants' charges are corrected.
    """

    def __init__(self, lanes: Lanes, lengths: AnswerLengths) -> None:
        self.lengths = lengths
        self._lanes = lanes
        self._dispatched: OrderedDict[str, _Dispatched] = OrderedDict()
        self._first_token = Average()
        self._per_token = Average()
        self._duration = Average()
        self._cost = Average()
        self._completed_at = -math.inf
        self._completed_count = 0
        self._windows: dict[ServiceClass, deque[tuple[float, float]]] = {
            one: deque(maxlen=WINDOW_LIMIT) for one in ServiceClass
        }

    def dispatch(self, request: Request, credit_id: str, cost: float) -> None:
        """A request goes to a replica."""
        self._remember(
            credit_id,
            _Dispatched(request.tenant, request.model, request.service_class, cost, request.queue_seconds, False),
        )

    def dispatch_to_lite(self, request: Request, credit_id: str, model: str) -> None:
        """A request goes to a replica of the lite model.

        Nothing was charged for it, and its times say nothing of the other replicas: it tells the length of its answer.
        """
        self._remember(credit_id, _Dispatched(request.tenant, model, request.service_class, 0.0, 0.0, True))

    def _remember(self, credit_id: str, dispatched: _Dispatched) -> None:
        self._dispatched[credit_id] = dispatched
        if len(self._dispatched) > DISPATCHED_LIMIT:
            self._dispatched.popitem(last=False)

    def forget(self, credit_id: str) -> None:
        """A request did not go to a replica after all: its tenant gets back what it was charged."""
        dispatched = self._dispatched.pop(credit_id, None)
        if dispatched is not None and not dispatched.is_lite:
            self._lanes.charge(dispatched.service_class, dispatched.tenant, -dispatched.cost)

    def end(self, ended: Ended, now: float) -> None:
        """A replica told an outcome."""
        dispatched = self._dispatched.pop(ended.credit_id, None)
        if dispatched is None:
            return
        is_whole = ended.is_completed and ended.first_token_seconds is not None
        if is_whole:
            self.lengths.see(dispatched.tenant, dispatched.model, ended.completion_token_count)
        if dispatched.is_lite:
            return
        actual = cost_of(ended.prompt_token_count, ended.completion_token_count)
        # Between tenants only what was computed counts. What a slot serves is told in whole prompts, as what waits is.
        computed = cost_of(ended.prompt_token_count - ended.cached_token_count, ended.completion_token_count)
        self._lanes.charge(dispatched.service_class, dispatched.tenant, computed - dispatched.cost)
        if ended.first_token_seconds is not None:
            waited = dispatched.queue_seconds + ended.first_token_seconds
            self._windows[dispatched.service_class].append((now, waited))
        if ended.first_token_seconds is None or not is_whole:
            return
        self._completed_at = now
        self._completed_count += 1
        self._first_token.add(ended.first_token_seconds)
        self._duration.add(ended.duration_seconds)
        self._cost.add(actual)
        if ended.completion_token_count > 1:
            decode_seconds = ended.duration_seconds - ended.first_token_seconds
            self._per_token.add(decode_seconds / (ended.completion_token_count - 1))

    @property
    def first_token_seconds(self) -> float | None:
        """From a request's arrival at a replica to its first token, on average; None when not known."""
        return self._first_token.value

    @property
    def usual_cost(self) -> float | None:
        """What an answer costs on average; None when not known."""
        return self._cost.value

    @property
    def cost_per_second_of_a_slot(self) -> float | None:
        """What one slot serves in a second, on average; None when not known.

        The first answers that end are the short ones, and they alone say too much.
        """
        if self._completed_count < FEWEST_ANSWERS or self._duration.value is None or self._cost.value is None:
            return None
        return self._cost.value / max(1e-6, self._duration.value)

    def service_seconds(self, answer_token_count: int, now: float) -> float:
        """How long an answer of this length takes on a replica; 0 when not known, or not any more.

        What was once slow must not be believed for ever: those who are refused for it could never tell otherwise.
        """
        if now - self._completed_at > MEMORY_SECONDS:
            return 0.0
        return (self._first_token.value or 0.0) + answer_token_count * (self._per_token.value or 0.0)

    def first_token_percentile(self, service_class: ServiceClass, share: float, now: float) -> float | None:
        """The time to first token, queue included, within which this share of the last few seconds' came."""
        window = self._windows[service_class]
        while window and window[0][0] < now - WINDOW_SECONDS:
            window.popleft()
        if not window:
            return None
        seconds = sorted(value for _, value in window)
        return seconds[min(len(seconds) - 1, int(share * len(seconds)))]


class Average:
    """An average in which the past fades."""

    def __init__(self) -> None:
        self.value: float | None = None

    def add(self, value: float) -> None:
        self.value = value if self.value is None else self.value + NEWEST_WEIGHT * (value - self.value)
