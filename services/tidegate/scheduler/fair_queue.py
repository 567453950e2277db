"""One lane's waiting requests, fair between tenants by what they cost. Pure.

The virtual token counter (Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024): each tenant has a
counter of the cost that it was served, divided by its weight, and the tenant with the smallest counter is next. A
tenant that comes back from idleness begins at the smallest counter of those that wait, so that idle time earns
nothing. Cost is charged when a request is dispatched, by what is expected, and corrected when it has ended.

Invariants: a tenant has a queue here exactly while something of it waits; at most COUNTER_LIMIT counters are
remembered. Every operation takes logarithmic time in what waits, but for `in_order` and `place_of`.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Final

from tidegate.scheduler.ordering import Order

if TYPE_CHECKING:
    from tidegate.scheduler.lanes import Waiting

COUNTER_LIMIT: Final = 10_000
"""Tenants whose counters are remembered; the one served longest ago is forgotten first."""

STALE_SHARE: Final = 2
"""A heap is made anew when it is so many times as long as what is alive in it."""

SMALLEST_HEAP: Final = 64


class FairQueue:
    """The requests of one lane.

    Args:
        order: in which those of one tenant leave.
        weight_of: a tenant's weight; with twice the weight of another it is served twice as much.
    """

    def __init__(self, order: Order, weight_of: Callable[[str], float]) -> None:
        self._order = order
        self._weight_of = weight_of
        self._tenants: dict[str, _TenantQueue] = {}
        self._counters: OrderedDict[str, float] = OrderedDict()
        self._turns: list[tuple[float, int, str]] = []
        self._turn_count = 0
        self._lift = 0.0

    def __len__(self) -> int:
        return sum(map(len, self._tenants.values()))

    def __contains__(self, waiting: Waiting) -> bool:
        tenant = self._tenants.get(waiting.tenant)
        return tenant is not None and waiting in tenant

    @property
    def tenant_count(self) -> int:
        """Tenants of which something waits."""
        return len(self._tenants)

    def tenant(self, name: str) -> _TenantQueue | None:
        """What waits of a tenant; None for nothing."""
        return self._tenants.get(name)

    def tenants(self) -> Iterator[tuple[str, _TenantQueue]]:
        """All tenants of which something waits."""
        yield from self._tenants.items()

    @property
    def head(self) -> Waiting | None:
        """The one that leaves next."""
        while self._turns:
            counter, number, name = self._turns[0]
            tenant = self._tenants.get(name)
            if tenant is not None and tenant.turn == number:
                self._lift = max(self._lift, counter)
                return tenant.head
            heapq.heappop(self._turns)
        return None

    def add(self, waiting: Waiting) -> None:
        """Lets one wait."""
        tenant = self._tenants.get(waiting.tenant)
        if tenant is None:
            tenant = self._tenants[waiting.tenant] = _TenantQueue(self._order)
            smallest = self._turns[0][0] if self.head is not None else self._lift
            self._set_counter(waiting.tenant, max(self._counters.get(waiting.tenant, 0.0), smallest))
        tenant.add(waiting)

    def remove(self, waiting: Waiting) -> None:
        """Takes one out, wherever it stands."""
        tenant = self._tenants[waiting.tenant]
        tenant.remove(waiting)
        if not len(tenant):
            del self._tenants[waiting.tenant]

    def charge(self, tenant: str, cost: float) -> None:
        """A tenant was served so much more, or less where an expectation was too high."""
        self._set_counter(tenant, max(0.0, self._counters.get(tenant, self._lift) + cost / self._weight_of(tenant)))

    def in_order(self) -> Iterator[Waiting]:
        """Everything that waits; inside a tenant in the order in which it leaves, the tenants by their counters."""
        for name in sorted(self._tenants, key=lambda name: self._counters[name]):
            yield from self._tenants[name].in_order()

    def place_of(self, waiting: Waiting) -> int:
        """About how many leave before it: those before it in its tenant's queue, and as many of each other tenant."""
        own = self._tenants[waiting.tenant]
        before = sum(1 for _ in own.before(waiting))
        return before + sum(min(len(other), before + 1) for other in self._tenants.values() if other is not own)

    def places(self) -> Iterator[tuple[Waiting, int]]:
        """`place_of` everything that waits, in about the time of a few of them.

        Whoever has n before it in its own queue leaves in round n + 1, in which each tenant that has so many takes a
        turn.
        """
        queues = [tenant.in_order() for tenant in self._tenants.values()]
        index = round_end = 0
        while queues := [queue for queue in queues if len(queue) > index]:
            round_end += len(queues)
            yield from ((queue[index], round_end - 1) for queue in queues)
            index += 1

    def _set_counter(self, tenant: str, counter: float) -> None:
        self._counters[tenant] = counter
        self._counters.move_to_end(tenant)
        waiting = self._tenants.get(tenant)
        if waiting is not None:
            self._turn_count += 1
            waiting.turn = self._turn_count
            heapq.heappush(self._turns, (counter, waiting.turn, tenant))
        self._forget()

    def _forget(self) -> None:
        while len(self._counters) > COUNTER_LIMIT:
            name = next((name for name in self._counters if name not in self._tenants), None)
            if name is None:
                break
            del self._counters[name]
        if len(self._turns) > max(SMALLEST_HEAP, STALE_SHARE * len(self._tenants)):
            self._turns = [(self._counters[name], one.turn, name) for name, one in self._tenants.items()]
            heapq.heapify(self._turns)


class _TenantQueue:
    """What waits of one tenant, with its sums; `turn` is the number of its valid entry among the turns."""

    def __init__(self, order: Order) -> None:
        self._order = order
        self._alive: dict[Waiting, tuple[float, int]] = {}
        self._heap: list[tuple[float, int, Waiting]] = []
        self._count = 0
        self.turn = 0
        self.cost = 0.0
        self.token_count = 0
        self.byte_count = 0

    def __len__(self) -> int:
        return len(self._alive)

    def __contains__(self, waiting: Waiting) -> bool:
        return waiting in self._alive

    @property
    def head(self) -> Waiting:
        while self._heap[0][2] not in self._alive:
            heapq.heappop(self._heap)
        return self._heap[0][2]

    def add(self, waiting: Waiting) -> None:
        self._count += 1
        key = (self._order(waiting), self._count)
        self._alive[waiting] = key
        heapq.heappush(self._heap, (*key, waiting))
        self._change(waiting, 1)

    def remove(self, waiting: Waiting) -> None:
        del self._alive[waiting]
        self._change(waiting, -1)
        if len(self._heap) > max(SMALLEST_HEAP, STALE_SHARE * len(self._alive)):
            self._heap = [(*key, one) for one, key in self._alive.items()]
            heapq.heapify(self._heap)

    def in_order(self) -> list[Waiting]:
        return sorted(self._alive, key=self._alive.__getitem__)

    def before(self, waiting: Waiting) -> Iterator[Waiting]:
        """Those that leave before it."""
        key = self._alive[waiting]
        return (other for other, its_key in self._alive.items() if its_key < key)

    def _change(self, waiting: Waiting, sign: int) -> None:
        self.cost += sign * waiting.cost
        self.token_count += sign * waiting.token_count
        self.byte_count += sign * waiting.byte_count
