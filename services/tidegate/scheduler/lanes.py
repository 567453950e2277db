"""The lanes in which requests wait: one a class, the most urgent first, with a floor for each of the others.

A lane that waits is owed its floor's share of the cost of all that is dispatched meanwhile, and goes first as soon as
its next request is covered by what it is owed: no class can be starved. A lane in which nothing waits is owed
nothing, unless something of it was refused: who may not wait behind a flood of what is more urgent gets the floor all
the same, a few requests at a time. Inside a lane tenants are served fairly by cost (`fair_queue`), and inside a
tenant an ordering policy decides (`ordering`).

Invariants, after every call:
- a lane's counts of requests, tokens and bytes are the sums over what waits in it, and within its limits;
- a waiting request is in exactly one lane, and leaves it once.

Pure: no clock, no loop. When and whereto a request leaves is decided elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from tidegate.common.headers import DEFAULT_TENANT
from tidegate.scheduler.fair_queue import FairQueue
from tidegate.scheduler.ordering import ORDERS, Order
from tidegate.scheduler.request import ServiceClass

OWED_REQUESTS: Final = 4.0
"""A lane is owed so many usual requests of its own at most, or one that costs more: what could not be served for a
while does not go alone afterwards."""

UNUSED_KEPT: Final = 0.9999
"""Of what an empty lane is owed so much is left from one dispatch to the next."""

REFUSED_WEIGHT: Final = 0.05
"""What the newest refused request counts in what such requests cost on average."""

Floors = Mapping[ServiceClass, float]
"""Of classes the share that each gets at least; of one that is not named, none."""

NO_FLOORS: Final[Floors] = {}


@dataclass(frozen=True, slots=True)
class LaneLimits:
    """The bounds of one lane; a tenant's are a share of them.

    The default tenant is everybody where there are no API keys, and may use all of a lane.
    """

    request_limit: int
    token_limit: int
    byte_limit: int
    tenant_share: float = 1.0


@dataclass(slots=True, eq=False)
class Waiting:
    """A place in a lane; times in monotonic seconds.

    `deadline` is when the wait ends at the latest. `cost` is what the request counts between tenants, in tokens;
    `expected_seconds` how long it is expected to run.
    """

    request_id: str
    service_class: ServiceClass
    token_count: int
    answer_token_count: int
    byte_count: int
    since: float
    deadline: float
    tenant: str = DEFAULT_TENANT
    cost: float = 1.0
    expected_seconds: float = 0.0
    retry_count: int = 0
    block_hashes: tuple[int, ...] = ()


class Lane:
    """What waits of one class."""

    def __init__(self, limits: LaneLimits, order: Order, weight_of: Callable[[str], float]) -> None:
        self.limits = limits
        self.queue = FairQueue(order, weight_of)
        self.token_count = 0
        self.byte_count = 0
        self.cost = 0.0
        self.owed = 0.0
        self.most_owed = 0.0
        """A bound on it: a few of those that were refused. It fades while nothing waits here."""
        self._refused_cost = 0.0
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Waiting]:
        return self.queue.in_order()

    def __contains__(self, waiting: Waiting) -> bool:
        return waiting in self.queue

    @property
    def next(self) -> Waiting | None:
        """The one that leaves next."""
        return self.queue.head

    @property
    def oldest(self) -> Waiting | None:
        """The one that has waited longest, of those that are next in their tenants' queues."""
        heads = (tenant.head for _, tenant in self.queue.tenants())
        return min(heads, key=lambda waiting: waiting.since, default=None)

    def full_bound(self, token_count: int, byte_count: int, tenant: str = DEFAULT_TENANT) -> str:
        """The bound that one more request of this size would break, in words; empty when there is room."""
        limits = self.limits
        bound = broken_bound(1.0, limits, self._count, self.token_count + token_count, self.byte_count + byte_count)
        own = self.queue.tenant(tenant)
        if bound or own is None or tenant == DEFAULT_TENANT:
            return bound
        tokens, size = own.token_count + token_count, own.byte_count + byte_count
        bound = broken_bound(limits.tenant_share, limits, len(own), tokens, size)
        return f"{bound} of one tenant" if bound else ""

    def cost_before(self, tenant: str, cost: float) -> float:
        """At most so much of the lane is served before one more request of this tenant and cost.

        In fair turns each other tenant is served no more than what the tenant itself waits for.
        """
        own = self.queue.tenant(tenant)
        own_cost = 0.0 if own is None else own.cost
        others = self.queue.tenant_count - (own is not None)
        return min(self.cost, own_cost + (own_cost + cost) * others)

    def owe(self, cost: float) -> None:
        """Something was dispatched of which its floor is so much."""
        first = self.next
        if first is not None:
            most = max(self.most_owed, first.cost, OWED_REQUESTS * self.cost / self._count)
        else:
            self.owed *= UNUSED_KEPT
            most = self.most_owed = UNUSED_KEPT * self.most_owed
        if most > 0:
            # What one dispatch is worth is not cut, or cheap requests would not get their floor beside dear ones.
            self.owed = max(self.owed, min(max(most, OWED_REQUESTS * cost), self.owed + cost))

    def refuse(self, cost: float) -> None:
        """A request of this cost may not wait."""
        self._refused_cost += REFUSED_WEIGHT * (cost - self._refused_cost) if self._refused_cost else cost
        self.most_owed = max(cost, OWED_REQUESTS * self._refused_cost)

    def add(self, waiting: Waiting) -> None:
        """Lets one wait."""
        assert waiting not in self
        self.queue.add(waiting)
        self._change(waiting, 1)

    def remove(self, waiting: Waiting) -> None:
        """Takes one out, wherever it stands."""
        self.queue.remove(waiting)
        self._change(waiting, -1)
        if not self._count:
            self.owed = min(self.owed, self.most_owed)
            self.cost = 0.0

    def _change(self, waiting: Waiting, sign: int) -> None:
        self._count += sign
        self.token_count += sign * waiting.token_count
        self.byte_count += sign * waiting.byte_count
        self.cost += sign * waiting.cost


class Lanes:
    """All lanes of a scheduler.

    Args:
        floors: of all cost that is dispatched while a class waits, or is refused, what that class gets at least.
        order: inside a tenant.
        weights: of tenants; one that is not named has 1.
    """

    def __init__(
        self,
        limits: Mapping[ServiceClass, LaneLimits],
        *,
        floors: Floors = NO_FLOORS,
        order: str = "fcfs",
        weights: Mapping[str, float] | None = None,
    ) -> None:
        tenant_weights = dict(weights or {})

        def weight_of(tenant: str) -> float:
            return tenant_weights.get(tenant, 1.0)

        self.weight_of = weight_of
        self._floors = floors
        self._lanes = {one: Lane(limits[one], ORDERS[order], weight_of) for one in ServiceClass}
        self._by_request_id: dict[str, Waiting] = {}

    def __len__(self) -> int:
        return sum(len(lane) for lane in self._lanes.values())

    def __iter__(self) -> Iterator[Waiting]:
        """Everything that waits, the most urgent lane first."""
        for lane in self._lanes.values():
            yield from lane

    def __contains__(self, waiting: Waiting) -> bool:
        return waiting in self._lanes[waiting.service_class]

    def lane(self, service_class: ServiceClass) -> Lane:
        """The lane of a class."""
        return self._lanes[service_class]

    @property
    def token_count(self) -> int:
        """Tokens that wait in all lanes."""
        return sum(lane.token_count for lane in self._lanes.values())

    @property
    def next(self) -> Waiting | None:
        """The one that leaves next: of a lane that is owed it, else of the most urgent lane that is not empty."""
        first: Waiting | None = None
        owed: tuple[float, Waiting] | None = None
        for lane in self._lanes.values():
            waiting = lane.next if len(lane) else None
            if waiting is None:
                continue
            first = first or waiting
            if lane.owed >= waiting.cost and (owed is None or lane.owed > owed[0]):
                owed = (lane.owed, waiting)
        return first if owed is None else owed[1]

    def floor(self, service_class: ServiceClass) -> float:
        """The share that a class gets at least."""
        return self._floors.get(service_class, 0.0)

    def share(self, service_class: ServiceClass) -> float:
        """The share that a class gets at least when all are asked for: its floor, of the most urgent one the rest."""
        if service_class is min(ServiceClass):
            return 1.0 - sum(self._floors.values())
        return self.floor(service_class)

    def is_owed(self, waiting: Waiting) -> bool:
        """Whether its lane's floor covers it by now."""
        return self._lanes[waiting.service_class].owed >= waiting.cost

    def next_of(self, service_class: ServiceClass) -> Waiting | None:
        """The one of a class that leaves next."""
        return self._lanes[service_class].next

    def add(self, waiting: Waiting) -> None:
        """Lets one wait; the caller has asked the lane's `full_bound` first."""
        self._lanes[waiting.service_class].add(waiting)
        self._by_request_id[waiting.request_id] = waiting

    def take(self, waiting: Waiting) -> None:
        """Takes one out that is dispatched: its tenant is charged, and the lanes with a floor are owed more."""
        for service_class, floor in self._floors.items():
            if service_class is not waiting.service_class:
                self._lanes[service_class].owe(floor * waiting.cost)
        lane = self._lanes[waiting.service_class]
        lane.owed = max(0.0, lane.owed - (1 - self.floor(waiting.service_class)) * waiting.cost)
        self.remove(waiting)
        self.charge(waiting.service_class, waiting.tenant, waiting.cost)

    def refuse(self, service_class: ServiceClass, cost: float) -> None:
        """A request of this cost may not wait; its lane is owed the next ones even while nothing waits in it."""
        self._lanes[service_class].refuse(cost)

    def floor_cost(self, service_class: ServiceClass, tenant: str, cost: float) -> float:
        """What is dispatched of all lanes, at most, until one more request goes by its floor; infinite without one."""
        floor, lane = self.floor(service_class), self._lanes[service_class]
        if not floor:
            return math.inf
        before = lane.cost_before(tenant, cost)
        return max(before, (before + cost - lane.owed) / floor)

    def charge(self, service_class: ServiceClass, tenant: str, cost: float) -> None:
        """A tenant was served so much more than it was charged for (less, where negative)."""
        self._lanes[service_class].queue.charge(tenant, cost)

    def remove(self, waiting: Waiting) -> None:
        """Takes one out that is not dispatched."""
        self._lanes[waiting.service_class].remove(waiting)
        if self._by_request_id.get(waiting.request_id) is waiting:
            del self._by_request_id[waiting.request_id]

    def find(self, request_id: str) -> Waiting | None:
        """The waiting request of this id; of two with the same id, the later."""
        return self._by_request_id.get(request_id)

    def count_before(self, service_class: ServiceClass) -> int:
        """How many requests wait in this lane and in those more urgent."""
        return sum(len(lane) for other, lane in self._lanes.items() if other <= service_class)

    def cost_before(self, service_class: ServiceClass, tenant: str, cost: float) -> float:
        """What is served before one more request of this class, tenant and cost, of all that waits now."""
        urgent = sum(lane.cost for other, lane in self._lanes.items() if other < service_class)
        return urgent + self._lanes[service_class].cost_before(tenant, cost)

    def cost_until(self, waiting: Waiting, position: int) -> tuple[float, float]:
        """About what is served until one that waits has left: of more urgent lanes, and of its own, itself included.

        Its own lane's usual cost stands for each place in it.
        """
        own = self._lanes[waiting.service_class]
        urgent = [lane for other, lane in self._lanes.items() if other < waiting.service_class]
        # A position that was computed a moment ago may be too small for what is urgent now.
        place = max(1, position - sum(map(len, urgent)))
        return sum(lane.cost for lane in urgent), place * own.cost / max(1, len(own))

    def position(self, waiting: Waiting) -> int:
        """How many leave before it, and itself: 1 is next. An estimate between tenants; linear in what waits."""
        urgent = sum(len(lane) for other, lane in self._lanes.items() if other < waiting.service_class)
        return urgent + self._lanes[waiting.service_class].queue.place_of(waiting) + 1

    def positions(self) -> dict[Waiting, int]:
        """`position` of everything that waits, at once."""
        found: dict[Waiting, int] = {}
        for lane in self._lanes.values():
            urgent = len(found)
            found.update((waiting, urgent + place + 1) for waiting, place in lane.queue.places())
        return found


def broken_bound(share: float, limits: LaneLimits, requests: int, tokens: int, size: int) -> str:
    """Which bound one more would break, in words: `requests` wait, with it there are so many tokens and bytes."""
    if requests >= max(1, share * limits.request_limit):
        return "requests"
    if tokens > share * limits.token_limit:
        return "tokens"
    return "bytes" if size > share * limits.byte_limit else ""
