"""Whose line is next, when there is room for one: fair between tenants by lines in flight. Pure."""

from __future__ import annotations

from collections import Counter


class Turns:
    """The tenants that have lines to send, and what each has in flight."""

    def __init__(self) -> None:
        self._wanting: Counter[str] = Counter()
        self._in_flight: Counter[str] = Counter()
        self._last_begun: dict[str, int] = {}
        self._begun_count = 0

    @property
    def in_flight(self) -> int:
        """Lines in flight, of all tenants."""
        return self._in_flight.total()

    @property
    def is_wanted(self) -> bool:
        """Whether somebody waits for a turn."""
        return self._wanting.total() > 0

    def want(self, tenant: str) -> None:
        """One more line of the tenant waits."""
        self._wanting[tenant] += 1

    def unwant(self, tenant: str) -> None:
        """One line less waits."""
        _less(self._wanting, tenant)
        self._forget(tenant)

    def next(self, *, without: frozenset[str] = frozenset()) -> str | None:
        """The tenant with the fewest lines in flight; among equals, the one whose last turn is longest ago."""
        candidates = [tenant for tenant in self._wanting if tenant not in without]
        return min(candidates, key=self._rank, default=None)

    def begin(self, tenant: str) -> None:
        """A waiting line of the tenant is in flight."""
        _less(self._wanting, tenant)
        self._in_flight[tenant] += 1
        self._begun_count += 1
        self._last_begun[tenant] = self._begun_count

    def end(self, tenant: str) -> None:
        """A line in flight has ended."""
        _less(self._in_flight, tenant)
        self._forget(tenant)

    def _rank(self, tenant: str) -> tuple[int, int, str]:
        return self._in_flight[tenant], self._last_begun.get(tenant, 0), tenant

    def _forget(self, tenant: str) -> None:
        """A tenant that neither waits nor has anything in flight leaves nothing behind."""
        if not self._wanting[tenant] and not self._in_flight[tenant]:
            for kept in (self._wanting, self._in_flight, self._last_begun):
                kept.pop(tenant, None)


def _less(counter: Counter[str], tenant: str) -> None:
    assert counter[tenant] > 0, tenant
    counter[tenant] -= 1
    if not counter[tenant]:
        del counter[tenant]
