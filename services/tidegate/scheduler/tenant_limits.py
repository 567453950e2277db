"""How many requests a second of a tenant are still looked at, where nearly all of them are refused anyway. Pure.

A refusal costs the scheduler and what stands before it a millisecond or two of processor time, which whoever is served
on the same machine must wait for. So a tenant that asks for many times of what it gets is told so by Envoy: it lets
through some times of what the tenant gets, so that nothing that could be served is lost and the pressure is seen, and
refuses the rest by itself. Tenants that get most of what they ask for, and those that ask seldom, have no limit.

Invariants: a limit is at least `LEAST_RATE` and `ROOM_FACTOR` times of what was accepted lately; a limit that does not
bind any more is gone within `FORGET_INTERVALS`; at most `MOST_LIMITS` stand at once. Times are seconds of one clock.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, NamedTuple

LEAST_RATE: Final = 20
"""Requests per second that are always looked at."""

NOISY_RATE: Final = 50.0
"""Who sends fewer a second costs too little to be limited."""

NOISY_ACCEPTED_SHARE: Final = 0.25
"""Who has more than this share accepted is not limited."""

ROOM_FACTOR: Final = 4.0
"""So many times of what is accepted is looked at: as many as admission tells apart (`admission.FULL_PRESSURE`)."""

CHANGE_FACTOR: Final = 1.5
"""A limit is changed only by this factor: each change is a file that Envoy reads."""

BINDING_SHARE: Final = 0.8
"""A limit of which less than this comes through does not bind."""

FORGET_INTERVALS: Final = 2
"""After so many intervals in which it did not bind, a limit is gone."""

NEWEST_WEIGHT: Final = 0.5
"""What the newest interval counts in the rates."""

MOST_LIMITS: Final = 64
MOST_TENANTS: Final = 1_000
"""Tenants and classes that are counted in one interval; those that come later are not limited."""


class Key(NamedTuple):
    """Whose requests: the tenant, and the class that the headers name, empty for none."""

    tenant: str
    class_name: str


@dataclass(slots=True)
class _Counts:
    seen: int = 0
    accepted: int = 0


@dataclass(slots=True)
class _Rates:
    """Requests per second of all schedulers together, and for how many intervals a limit did not bind."""

    seen: float
    accepted: float
    loose_count: int = 0


class TenantLimits:
    """Counts what is seen and accepted, and says anew after each interval who is limited to what."""

    def __init__(self, now: float) -> None:
        self._counts: dict[Key, _Counts] = {}
        self._rates: dict[Key, _Rates] = {}
        self._began_at = now
        self._limits: dict[Key, int] = {}

    @property
    def limits(self) -> Mapping[Key, int]:
        """Requests per second."""
        return self._limits

    def see(self, key: Key) -> None:
        """A request is looked at."""
        counts = self._counts.get(key)
        if counts is None:
            if len(self._counts) >= MOST_TENANTS:
                return
            counts = self._counts[key] = _Counts()
        counts.seen += 1

    def accept(self, key: Key) -> None:
        """A request that was seen has its place in the queue, or its answer."""
        counts = self._counts.get(key)
        if counts is not None:
            counts.accepted += 1

    def end_interval(self, now: float, scheduler_count: int = 1) -> bool:
        """Sets the limits by what was seen since the last call; whether they have changed.

        Args:
            scheduler_count: how many there are, each of which sees its part of what a limit lets through.
        """
        seconds, self._began_at = now - self._began_at, now
        counts, self._counts = self._counts, {}
        if seconds <= 0:
            return False
        # All schedulers together see as many in this time.
        all_seconds = seconds / scheduler_count
        self._rates = {
            key: self._smoothed(key, counts.get(key, _Counts()), all_seconds)
            for key in counts.keys() | self._limits.keys()
        }
        before = self._limits
        self._limits = {
            key: limit for key, rates in self._rates.items() if (limit := self._limit(key, rates)) is not None
        }
        if len(self._limits) > MOST_LIMITS:
            # Who sends most costs most.
            most = sorted(self._limits, key=lambda key: self._rates[key].seen, reverse=True)[:MOST_LIMITS]
            self._limits = {key: self._limits[key] for key in most}
        return self._limits != before

    def _smoothed(self, key: Key, counts: _Counts, seconds: float) -> _Rates:
        seen, accepted = counts.seen / seconds, counts.accepted / seconds
        old = self._rates.get(key)
        if old is None:
            return _Rates(seen, accepted)
        old.seen += NEWEST_WEIGHT * (seen - old.seen)
        old.accepted += NEWEST_WEIGHT * (accepted - old.accepted)
        return old

    def _limit(self, key: Key, rates: _Rates) -> int | None:
        limit = self._limits.get(key)
        wanted = max(LEAST_RATE, round(ROOM_FACTOR * rates.accepted))
        if limit is None:
            is_noisy = rates.seen >= NOISY_RATE and rates.accepted < NOISY_ACCEPTED_SHARE * rates.seen
            return wanted if is_noisy and wanted < rates.seen else None
        rates.loose_count = rates.loose_count + 1 if rates.seen < BINDING_SHARE * limit else 0
        if rates.loose_count >= FORGET_INTERVALS:
            return None
        return wanted if max(wanted / limit, limit / wanted) >= CHANGE_FACTOR else limit
