"""Where waiting requests stand, and how they left: for those that ask, by the mesh's id or by the client's own name.

Invariants:
- a request is found while it waits, and by nobody but its own tenant (and by whoever calls without one: the mesh's
  own operator, for Envoy names a tenant on every call that passes it);
- whoever follows a request is told how it left, once.

Positions of all that waits are computed together, because one takes time in the length of the queue, and thousands
may ask. They may be the older, the longer the queue is, so that they never cost more than a small share of the time.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
from collections.abc import AsyncGenerator, Callable, Iterator
from dataclasses import dataclass, field
from typing import Final

import structlog
from prometheus_client import Histogram

from tidegate.common.errors import Reason, TidegateError
from tidegate.common.metrics import REQUEST_BUCKETS
from tidegate.scheduler.dispatch import Dispatcher
from tidegate.scheduler.lanes import Waiting
from tidegate.scheduler.request import Request, ServiceClass

log = structlog.get_logger()

POSITION_SECONDS: Final = 0.000_05
"""How old positions may be, for each request that waits: 0.5 s for 10,000. To compute one takes a small share of it."""

FOLLOWER_LIMIT: Final = 4_096
"""The most that follow a request at once."""

FOLLOWER_RETRY_SECONDS: Final = 5.0

ETA_ERROR = Histogram(
    "tidegate_queue_eta_error_seconds",
    "By how much the wait that came differed from the one that was first told; late: it was longer.",
    ["class", "direction"],
    buckets=REQUEST_BUCKETS,
)


class State(enum.Enum):
    """Whether a request waits, or how it left."""

    WAITING = "waiting"
    DISPATCHED = "dispatched"
    REFUSED = "refused"
    LEFT = "left"


@dataclass(frozen=True, slots=True)
class Status:
    """Where a request stands at one moment; seconds. `reason` is the word of a refusal."""

    request_id: str
    service_class: ServiceClass
    position: int
    waited_seconds: float
    expected_wait_seconds: float | None
    state: State
    reason: str = ""


@dataclass(slots=True, eq=False)
class _Place:
    tenant: str
    waiting: Waiting
    state: State = State.WAITING
    reason: str = ""
    left_at: float = 0.0
    told_at: float = 0.0
    told_wait_seconds: float | None = None
    left: asyncio.Event = field(default_factory=asyncio.Event)


class QueueStatuses:
    """All that waits with one scheduler, as those who ask see it.

    Args:
        clock: monotonic seconds.
    """

    def __init__(self, dispatcher: Dispatcher, clock: Callable[[], float]) -> None:
        self._dispatcher = dispatcher
        self._clock = clock
        self._places: dict[str, list[_Place]] = {}
        self._expected: dict[str, set[asyncio.Event]] = {}
        self._follower_count = 0
        self._positions: dict[Waiting, int] = {}
        self._positions_until = float("-inf")

    @property
    def is_idle(self) -> bool:
        """Whether nobody follows a request."""
        return not self._follower_count

    @contextlib.contextmanager
    def following(self, request: Request, waiting: Waiting) -> Iterator[None]:
        """Within, the request can be found; the way in which the block ends is how the request left."""
        place = _Place(request.tenant, waiting)
        names = {name for name in (request.request_id, request.client_request_id) if name}
        for name in names:
            self._places.setdefault(name, []).append(place)
            for expecting in self._expected.get(name, ()):
                expecting.set()
        try:
            yield
            place.state = State.DISPATCHED
        except TidegateError as error:
            place.state, place.reason = State.REFUSED, error.reason.name
            raise
        except BaseException:
            place.state = State.LEFT
            raise
        finally:
            self._end(place, names)

    def status(self, request_id: str, tenant: str | None) -> Status | None:
        """Where a request stands; None when it does not wait here, or is another tenant's. None as tenant is any."""
        place = self._find(request_id, tenant)
        return None if place is None else self._status(place)

    async def follow(
        self, request_id: str, tenant: str | None, *, interval_seconds: float, patience_seconds: float
    ) -> AsyncGenerator[Status, None]:
        """Statuses of a request, one each interval and one when it has left, which is the last.

        Raises:
            TidegateError: NOT_FOUND, it did not come within the patience; SERVER_IS_OVERLOADED, too many
                follow.
        """
        if self._follower_count >= FOLLOWER_LIMIT:
            message = f"{FOLLOWER_LIMIT} follow their requests already"
            raise TidegateError(Reason.SERVER_IS_OVERLOADED, message, retry_after_seconds=FOLLOWER_RETRY_SECONDS)
        self._follower_count += 1
        try:
            place = await self._found(request_id, tenant, patience_seconds)
            while place.state is State.WAITING:
                yield self._status(place)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(interval_seconds):
                        await place.left.wait()
            yield self._status(place)
        finally:
            self._follower_count -= 1

    async def _found(self, request_id: str, tenant: str | None, patience_seconds: float) -> _Place:
        came = asyncio.Event()
        expecting = self._expected.setdefault(request_id, set())
        expecting.add(came)
        try:
            async with asyncio.timeout(patience_seconds):
                while (place := self._find(request_id, tenant)) is None:
                    await came.wait()
                    came.clear()
            return place
        except TimeoutError:
            raise not_found(request_id) from None
        finally:
            expecting.discard(came)
            if not expecting and self._expected.get(request_id) is expecting:
                del self._expected[request_id]

    def _find(self, request_id: str, tenant: str | None) -> _Place | None:
        places = reversed(self._places.get(request_id, ()))
        return next((place for place in places if tenant in {None, place.tenant}), None)

    def _status(self, place: _Place) -> Status:
        waiting, now = place.waiting, self._clock()
        is_waiting = place.state is State.WAITING and waiting in self._dispatcher.lanes
        position, expected = 0, None
        if is_waiting:
            position = self._position(waiting, now)
            expected = self._dispatcher.expected_wait(waiting, now, position=position)
            # Infinite is as good as not known: nothing has left for long.
            expected = None if expected == float("inf") else expected
            if place.told_wait_seconds is None and expected is not None:
                place.told_at, place.told_wait_seconds = now, expected
        return Status(
            request_id=waiting.request_id,
            service_class=waiting.service_class,
            position=position,
            waited_seconds=(place.left_at if place.left.is_set() else now) - waiting.since,
            expected_wait_seconds=expected,
            state=place.state,
            reason=place.reason,
        )

    def _position(self, waiting: Waiting, now: float) -> int:
        lanes = self._dispatcher.lanes
        if now >= self._positions_until:
            self._positions = lanes.positions()
            self._positions_until = now + len(lanes) * POSITION_SECONDS
        # One that came since stands behind all others of its class.
        return self._positions.get(waiting) or lanes.count_before(waiting.service_class)

    def _end(self, place: _Place, names: set[str]) -> None:
        place.left_at = self._clock()
        place.left.set()
        for name in names:
            self._places[name].remove(place)
            if not self._places[name]:
                del self._places[name]
        # Nothing that has left is kept alive by old positions.
        self._positions.pop(place.waiting, None)
        if place.state is State.DISPATCHED and place.told_wait_seconds is not None:
            self._compare(place, place.told_wait_seconds)

    def _compare(self, place: _Place, told_seconds: float) -> None:
        waited_seconds = place.left_at - place.told_at
        service_class = place.waiting.service_class.label
        direction = "late" if waited_seconds > told_seconds else "early"
        ETA_ERROR.labels(service_class, direction).observe(abs(waited_seconds - told_seconds))
        log.debug(
            "queue_eta_compared",
            request_id=place.waiting.request_id,
            service_class=service_class,
            told_seconds=round(told_seconds, 3),
            waited_seconds=round(waited_seconds, 3),
        )


def not_found(request_id: str) -> TidegateError:
    """What is said of a request that does not wait here, whether it ever did or is another tenant's."""
    return TidegateError(Reason.NOT_FOUND, f"Request '{request_id}' does not wait here.", field="request_id")
