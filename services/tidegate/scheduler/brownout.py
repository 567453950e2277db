"""Steps in which the mesh does less for the less urgent, so that the more urgent keep their times. Pure.

| step | what it means |
| --- | --- |
| 0 | everything as usual |
| 1 | no new batch requests |
| 2 | answers to batch requests that are under way towards a replica are kept short |
| 3 | answers to standard requests, too |
| 4 | standard requests go to the lite model while it has room; left out where there is none |
| 5 | realtime requests and cached answers only |

A class is never cut down for its own sake: what drives steps 1 and 2 is how realtime and standard requests fare, and
the others how realtime ones do. A flood of one class alone is admission's business, and gets the whole machine.

A class fares badly while its queue delay is above the target, or while the 95th percentile of its time to first token
is above the target and above what the engine does anyway. What that says is learnt when answers end, which may be
long after their first tokens: it counts only while something of the class has waited of late. One step up after
`up_seconds` of that without a break, one step down after `down_seconds` without it. No evidence counts as faring
well, so no step can stick. A mesh with nothing to do fares well whatever was seen a moment ago, and steps down as
fast as it may.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from tidegate.scheduler.request import ServiceClass

UNLOADED_FACTOR: Final = 3.0
"""A time to first token counts as bad only past so many times of what it is on a replica, without the queue."""

RECENT_SECONDS: Final = 1.0
"""Where nothing of a class has waited for so long, its times to first token are of a load that is gone."""

LITE_STEP: Final = 4
LAST_STEP: Final = 5

IDLE_DOWN_SECONDS: Final = 0.2
"""So long a mesh with nothing to do stays on a step; longer than the gaps of a load that comes and goes."""

DRIVERS: Final[Mapping[int, tuple[ServiceClass, ...]]] = {
    1: (ServiceClass.REALTIME, ServiceClass.STANDARD),
    2: (ServiceClass.REALTIME, ServiceClass.STANDARD),
    3: (ServiceClass.REALTIME,),
    4: (ServiceClass.REALTIME,),
    5: (ServiceClass.REALTIME,),
}
"""Who must fare badly for the step to be taken, one of them."""


@dataclass(frozen=True, slots=True)
class Signs:
    """How a class fares.

    Args:
        queue_delay_seconds: how long the one that has waited longest waits; 0 for none.
        first_token_seconds: the 95th percentile of the last seconds, queue included; None for none.
        unloaded_seconds: the average on a replica, without the queue; None when not known.
    """

    queue_delay_seconds: float = 0.0
    first_token_seconds: float | None = None
    unloaded_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class Terms:
    """When a step is taken, in seconds."""

    queue_delay_seconds: float
    first_token_seconds: float
    up_seconds: float
    down_seconds: float


class Brownout:
    """The step, and when it changes; `look` is called every now and then.

    Args:
        has_lite: whether there is a lite model, and the step for it.
    """

    def __init__(self, terms: Terms, now: float, *, has_lite: bool = False) -> None:
        self._terms = terms
        self._has_lite = has_lite
        self._bad_since: float | None = None
        self._good_since: float | None = now
        self._idle_since: float | None = None
        self._waited_at: dict[ServiceClass, float] = {}
        self.step = 0

    def refuses(self, service_class: ServiceClass) -> bool:
        """Whether new requests of a class are refused."""
        if service_class is ServiceClass.BATCH:
            return self.step >= 1
        return service_class is ServiceClass.STANDARD and self.step >= LAST_STEP

    def leaves_known_answers(self, service_class: ServiceClass) -> bool:
        """Whether of a class known answers alone are still given."""
        return self.step >= LAST_STEP and self.refuses(service_class)

    def shortens(self, service_class: ServiceClass) -> bool:
        """Whether answers of a class are kept short."""
        if service_class is ServiceClass.BATCH:
            return self.step >= 2
        return service_class is ServiceClass.STANDARD and self.step >= 3

    def prefers_lite(self, service_class: ServiceClass) -> bool:
        """Whether requests of a class go to the lite model first."""
        return self._has_lite and service_class is ServiceClass.STANDARD and self.step >= LITE_STEP

    def look(self, signs: Mapping[ServiceClass, Signs], now: float, *, is_idle: bool = False) -> bool:
        """Takes a step, up or down, where it is time to; whether it did.

        Args:
            is_idle: nothing waits and nothing is under way.
        """
        self._idle_since = _begin(self._idle_since, now) if is_idle else None
        if self._idle_since is not None:
            signs = {}
        self._waited_at |= {one: now for one, sign in signs.items() if sign.queue_delay_seconds > 0}
        recent = {one for one, waited_at in self._waited_at.items() if now - waited_at <= RECENT_SECONDS}
        bad = {one for one, sign in signs.items() if self._is_bad(sign, has_waited=one in recent)}
        wanted = min(self.step + 1, LAST_STEP)
        self._note(not bad.isdisjoint(DRIVERS[wanted]), not bad.isdisjoint(DRIVERS[max(1, self.step)]), now)
        if self._bad_since is not None and self.step < LAST_STEP:
            return self._take(1) if now - self._bad_since >= self._terms.up_seconds else False
        if self.step == 0:
            return False
        if self._idle_since is not None and now - self._idle_since >= IDLE_DOWN_SECONDS:
            self._idle_since = now
            return self._take(-1)
        if self._good_since is not None:
            return self._take(-1) if now - self._good_since >= self._terms.down_seconds else False
        return False

    def _note(self, is_bad_for_more: bool, is_bad_for_this: bool, now: float) -> None:
        self._bad_since = _begin(self._bad_since, now) if is_bad_for_more else None
        self._good_since = None if is_bad_for_this else _begin(self._good_since, now)

    def _take(self, change: int) -> bool:
        self.step += change
        if self.step == LITE_STEP and not self._has_lite:
            self.step += change
        self._bad_since, self._good_since = None, None
        return True

    def _is_bad(self, signs: Signs, *, has_waited: bool) -> bool:
        if signs.queue_delay_seconds > self._terms.queue_delay_seconds:
            return True
        first_token = signs.first_token_seconds
        if first_token is None or first_token <= self._terms.first_token_seconds or not has_waited:
            return False
        return signs.unloaded_seconds is None or first_token > UNLOADED_FACTOR * signs.unloaded_seconds


def _begin(since: float | None, now: float) -> float:
    return now if since is None else since
