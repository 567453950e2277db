"""What each tenant may be admitted with, while more arrives than can be served. Pure.

Fair turns in a queue need a queue in which everybody stands; but under a flood the queue is kept short, and who gets
into it would be a matter of who asks most often. So tenants are told apart before it, by what they ask for: capacity
is divided by max-min fairness with weights (a tenant that asks for less than its share gets all of it, and what it
leaves is divided between the others), and a tenant that asks for more has a bucket that fills at its share.

Invariants: a tenant within its share is never refused here; the shares of those that ask for more add up to what
the others leave of the capacity.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

TENANT_LIMIT: Final = 1_000
"""Tenants whose demand is remembered; the one heard of longest ago is forgotten first."""

DEMAND_SECONDS: Final = 2.0
"""Over so long a time what a tenant asks for is averaged, exponentially."""

IDLE_SHARE: Final = 0.01
"""A tenant whose demand has faded to this share of the capacity is left out of the division."""

DIVIDE_SECONDS: Final = 0.1
"""The division is done anew after so long."""

BURST_SECONDS: Final = 1.0
"""A bucket holds what its tenant's share is in this time."""

ROOM: Final = 1.1
"""Shares are of a little more than the measured capacity, so that none of it is unused; the queue bounds the rest."""


@dataclass(slots=True)
class _Tenant:
    demand: float = 0.0
    at: float = 0.0
    share: float = math.inf
    bucket: float = 0.0


class FairShares:
    """The tenants of one class.

    Args:
        weight_of: a tenant's weight.
    """

    def __init__(self, weight_of: Callable[[str], float]) -> None:
        self._weight_of = weight_of
        self._tenants: OrderedDict[str, _Tenant] = OrderedDict()
        self._divided_at = -math.inf

    def ask(self, name: str, cost: float, now: float) -> None:
        """A tenant asks for so much, whatever becomes of it."""
        tenant = self._tenants.get(name)
        if tenant is None:
            tenant = self._tenants[name] = _Tenant(at=now)
            if len(self._tenants) > TENANT_LIMIT:
                self._tenants.popitem(last=False)
        self._tenants.move_to_end(name)
        tenant.demand = _faded(tenant, now) + cost / DEMAND_SECONDS
        if tenant.share < math.inf:
            tenant.bucket = min(tenant.share * BURST_SECONDS, tenant.bucket + tenant.share * (now - tenant.at))
        tenant.at = now

    def is_within(self, name: str, capacity: float | None, now: float) -> bool:
        """Whether a tenant, which has just asked, may have one more request.

        Args:
            capacity: cost per second for all tenants of the class; None when not known, and then all may.
        """
        if capacity is None or capacity <= 0:
            return True
        if now - self._divided_at >= DIVIDE_SECONDS:
            self._divide(capacity, now)
        tenant = self._tenants.get(name)
        return tenant is None or tenant.share == math.inf or tenant.bucket > 0

    def owed_share(self, name: str) -> float:
        """How far a tenant is behind what it may have, from 0 (it has all of it) to 1 (it asks for less than that)."""
        tenant = self._tenants.get(name)
        if tenant is None or len(self._tenants) < 2:
            return 0.0
        if tenant.share == math.inf:
            return 1.0
        return min(1.0, max(0.0, tenant.bucket / (tenant.share * BURST_SECONDS)))

    def admit(self, name: str, cost: float) -> None:
        """A request of a tenant is admitted; its bucket may fall below 0, and is waited for then."""
        tenant = self._tenants.get(name)
        if tenant is not None and tenant.share < math.inf:
            tenant.bucket -= cost

    def _divide(self, capacity: float, now: float) -> None:
        self._divided_at = now
        demands = {name: _faded(tenant, now) for name, tenant in self._tenants.items()}
        active = {name: demand for name, demand in demands.items() if demand > IDLE_SHARE * capacity}
        shares = max_min_shares(active, {name: self._weight_of(name) for name in active}, ROOM * capacity)
        for name, tenant in self._tenants.items():
            share = shares.get(name, math.inf) if len(active) > 1 else math.inf
            if share < math.inf and tenant.share == math.inf:
                tenant.bucket, tenant.at = share * BURST_SECONDS, now
            tenant.share = share


def max_min_shares(demands: Mapping[str, float], weights: Mapping[str, float], capacity: float) -> Mapping[str, float]:
    """The share of each tenant that asks for more than that; those that get all they ask for are infinite.

    Source: Bertsekas, Gallager, "Data Networks", 1992, 6.5.2 (max-min fair flow control), with weights.
    """
    shares: dict[str, float] = {}
    left, weight = capacity, sum(weights.values())
    for name in sorted(demands, key=lambda name: demands[name] / weights[name]):
        fair = left * weights[name] / weight
        shares[name] = math.inf if demands[name] <= fair else fair
        left -= min(demands[name], fair)
        weight -= weights[name]
    return shares


def _faded(tenant: _Tenant, now: float) -> float:
    return tenant.demand * math.exp(-max(0.0, now - tenant.at) / DEMAND_SECONDS)
