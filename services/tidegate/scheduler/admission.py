"""Whether a request may wait, and when a refused one should come back. Pure: time and randomness come in.

A request is refused, in this order: its deadline has passed; no replica has been there for a while; the mesh is in a
brownout that leaves its class out; its lane is full; it could not be finished by its deadline, given what waits before
it and how long answers take. With nothing measured nothing is refused for its deadline: an honest "not known" is no
reason.

How long a request may wait follows from its slack, the time that its deadline leaves beside the answer itself. While no
more arrives than leaves, all of the slack may be used: a queue is what makes use of a lull. When more arrives than
leaves, a long queue makes all that pass it late and serves nobody more (CoDel, Nichols and Jacobson, ACM Queue 2012),
so the allowed wait shrinks, from all of the slack at the capacity to the pauses between arrivals at four times of it.
Batch requests, those without a deadline of their client's, and those whose deadline is far, are patient: theirs is a
place in the queue.

Where most are refused, the time of a slot is worth what it answers: of a tenant's requests each is taken with a chance
inverse to what it takes, so that as many tokens of short ones as of long ones are served, and more requests in all.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from typing import Final

from tidegate.common.errors import RETRY_JITTER, Reason, TidegateError
from tidegate.common.headers import DEFAULT_TENANT
from tidegate.scheduler.brownout import Brownout
from tidegate.scheduler.forecast import expected_wait
from tidegate.scheduler.lanes import Lane, LaneLimits, Lanes, broken_bound
from tidegate.scheduler.outlook import Outlook
from tidegate.scheduler.request import Request, ServiceClass
from tidegate.scheduler.tenant_habits import TenantHabits

SHORTEST_RETRY_SECONDS: Final = 1.0
LONGEST_RETRY_SECONDS: Final = 3600.0

FULL_PRESSURE: Final = 4.0
"""At so many times of what can be served the allowed wait is the shortest."""

CHOOSING_PRESSURE: Final = 2.0
"""From here on small requests are chosen; below, the wait that each one's slack allows does as much. Not of a tenant
that has had nothing of its share."""

PATIENT_SLACK_SECONDS: Final = 30.0
"""Who leaves this much time beside the answer itself wants a place in the queue rather than a quick refusal."""

PATIENT_SHARE: Final = 0.5
"""A patient request may wait for this share of its slack whatever presses; the rest is for what nobody can foresee."""

SHARING_PRESSURE: Final = 1.1
"""From here on tenants are held to their shares."""

OWED_DISCOUNT: Final = 0.5
"""A tenant that has had nothing of its share has the pressure counted by so much less; in between, in proportion."""

SHORTEST_WAIT_SECONDS: Final = 0.03
"""The shortest allowed wait, where what comes makes no longer pauses: what waits is there so that no slot is idle until
the next one comes and is decided about."""

SMALL_SHARE: Final = 0.5
"""A request that is judged by its headers is taken to have so much of the length that its tenant's usually have."""

LATE_SERVICE_SHARE: Final = 0.8
"""A request that has less than this share of its answer's time left is not sent to a replica any more."""

UNBOUNDED: Final = LaneLimits(sys.maxsize, sys.maxsize, sys.maxsize)

RETRY_ROOM_SHARE: Final = 0.1
"""Those refused by a full lane are told the time in which this share of it drains."""


@dataclass(frozen=True, slots=True)
class Conditions:
    """What admission must know of the moment.

    Args:
        now: monotonic seconds.
        drain_rate: requests per second; None when not known.
        absence_seconds: for how long there has been no ready replica; 0 while there is one.
        held_request_count: requests in any stage with this scheduler, the one that is asked about included.
        random_share: uniform in [0, 1), for the jitter.
        outlook: what is to be expected for one more request; None: the drain rate is all that is known.
        has_cache: whether there is a cache to ask for known answers.
        lot: uniform in [0, 1), for who is taken where not all can be; 0 is always taken.
    """

    now: float
    drain_rate: float | None
    absence_seconds: float
    held_request_count: int
    random_share: float
    outlook: Outlook | None = None
    has_cache: bool = False
    lot: float = 0.0


class Admission:
    """The rules, with their bounds.

    Args:
        replica_grace_seconds: after so long without a replica, requests are refused.
        held_request_limit: past so many requests in all stages, headers are refused.
        default_retry_seconds: when to come back, as long as no drain rate is known.
        total_limits: on what waits in all lanes together.
        habits: of tenants, to judge by headers alone.
        brownout: whose step may leave a class out; None: never.
    """

    def __init__(
        self,
        lanes: Lanes,
        *,
        replica_grace_seconds: float,
        held_request_limit: int,
        default_retry_seconds: float,
        total_limits: LaneLimits = UNBOUNDED,
        habits: TenantHabits | None = None,
        brownout: Brownout | None = None,
    ) -> None:
        self._lanes = lanes
        self._total_limits = total_limits
        self._habits = habits or TenantHabits()
        self._brownout = brownout
        self._replica_grace_seconds = replica_grace_seconds
        self._held_request_limit = held_request_limit
        self._default_retry_seconds = default_retry_seconds

    def refusal_of_headers(self, request: Request, conditions: Conditions) -> TidegateError | None:
        """Why a request can be refused before its body is read; None when it cannot.

        The class is often known from the body only, so a full lane counts here where the mesh named the class, or
        where all lanes are full. Whether its answer is known, too, the body alone can tell: what a brownout leaves
        nothing else goes on to the cache.
        """
        if conditions.held_request_count > self._held_request_limit:
            message = f"The scheduler is at its limit of {self._held_request_limit} requests"
            return self._overloaded(message, conditions)
        if self._may_be_known(request, conditions):
            return self._refusal_of_any(request, conditions)
        if request.named_class is not None:
            full = self._full(request.named_class, conditions)
            if full is not None:
                return full
        elif all(self._full(service_class, conditions) for service_class in ServiceClass):
            return self._overloaded(f"All queues are full; {len(self._lanes)} requests wait in them", conditions)
        refused = self._refusal_of_any(request, conditions)
        if refused is None and request.named_class is not None:
            refused = self._left_out(request.named_class, conditions)
        return refused or self._refusal_by_habit(request, conditions)

    def refusal(self, request: Request, conditions: Conditions) -> TidegateError | None:
        """Why a prepared request may not wait; None when it may. Its deadline is set by now."""
        assert request.deadline is not None
        refused = self._refusal_of_any(request, conditions)
        if refused is not None:
            return refused
        refused = self._left_out(request.service_class, conditions)
        if refused is not None:
            return refused
        size = (request.token_count, request.body_byte_count)
        full = self._full(request.service_class, conditions, *size, tenant=request.tenant)
        return full or self._late(request, conditions)

    def _late(self, request: Request, conditions: Conditions) -> TidegateError | None:
        """Why a request could not be finished by its deadline; None when it could, or when that is not known."""
        assert request.deadline is not None
        if not self._is_within_share(request, conditions):
            return self._overloaded(
                "This tenant asks for more than its share, and more is asked for than can be answered", conditions
            )
        wait = self._wait_seconds(request, conditions)
        left = request.deadline - conditions.now
        allowed = self._allowed_wait(request, left, conditions)
        if wait is None or wait <= allowed:
            if conditions.lot < self._chance(request, left - request.expected_seconds, conditions):
                return None
            return self._overloaded("More is asked for than can be answered, and shorter requests go first", conditions)
        if allowed < 0:
            return TidegateError(
                Reason.SERVER_IS_OVERLOADED,
                f"The answer would take about {request.expected_seconds:.1f} s, and its deadline is in {left:.1f} s;"
                " what has no deadline can go to /v1/batches",
                retry_after_seconds=_retry_seconds(self._default_retry_seconds, conditions),
            )
        self._lanes.refuse(request.service_class, request.cost)
        before = self._lanes.count_before(request.service_class)
        return TidegateError(
            Reason.SERVER_IS_OVERLOADED,
            f"{before} requests wait before this one, for about {_seconds(wait)}, and its deadline is in {left:.1f} s",
            retry_after_seconds=_retry_seconds(wait - allowed, conditions),
        )

    def _is_within_share(self, request: Request, conditions: Conditions) -> bool:
        """Whether the tenant may have one more request that has a deadline; patient ones take turns in the queue."""
        outlook, now = conditions.outlook, conditions.now
        if outlook is None or request.client_deadline is None:
            return True
        if _is_patient(request, request.client_deadline - now - request.expected_seconds):
            return True
        if outlook.pressure(request.service_class, now) < SHARING_PRESSURE:
            return True
        capacity = outlook.lane_capacity(request.service_class, now)
        return outlook.shares[request.service_class].is_within(request.tenant, capacity, now)

    def _wait_seconds(self, request: Request, conditions: Conditions) -> float | None:
        if conditions.outlook is None:
            return expected_wait(self._lanes.count_before(request.service_class), conditions.drain_rate)
        return conditions.outlook.wait_seconds(request.service_class, request.tenant, request.cost, conditions.now)

    def _allowed_wait(self, request: Request, left: float, conditions: Conditions) -> float:
        """How long the request may wait, in seconds; below 0 where it would be late without waiting."""
        if request.client_deadline is None or conditions.outlook is None:
            return left
        slack = left - request.expected_seconds
        if slack <= 0:
            return slack
        if _is_patient(request, slack):
            return PATIENT_SHARE * slack
        lull = conditions.outlook.lull_seconds(request.service_class, conditions.now)
        shortest = min(slack, max(SHORTEST_WAIT_SECONDS, lull))
        pressed = _pressed(request, conditions.outlook, conditions.now, 1.0, OWED_DISCOUNT)
        return float(slack ** (1 - pressed) * shortest**pressed)

    def _chance(self, request: Request, slack: float, conditions: Conditions) -> float:
        """That the request is taken, by what it takes of the replicas beside its tenant's others."""
        outlook, habit = conditions.outlook, self._habits.get(request.tenant)
        if outlook is None or habit is None or request.client_deadline is None or _is_patient(request, slack):
            return 1.0
        small_work = habit.small_work
        if request.work <= small_work or outlook.has_idle_slots(conditions.now):
            return 1.0
        return float((small_work / request.work) ** _pressed(request, outlook, conditions.now, CHOOSING_PRESSURE, 1.0))

    def _refusal_by_habit(self, request: Request, conditions: Conditions) -> TidegateError | None:
        """Refuses a request whose like would be refused, without reading it, where its tenant's are all alike."""
        habit = self._habits.get(request.tenant)
        outlook = conditions.outlook
        if habit is None or outlook is None or request.client_deadline is None or not habit.is_steady:
            return None
        if request.named_class not in (None, habit.service_class):
            return None
        small = replace(
            request,
            service_class=habit.service_class,
            cost=habit.cost,
            work=SMALL_SHARE * habit.small_work,
            expected_seconds=outlook.service_seconds(int(SMALL_SHARE * habit.answer_token_count), conditions.now),
        )
        return self._late(small, conditions)

    def _may_be_known(self, request: Request, conditions: Conditions) -> bool:
        """Whether nothing but a known answer is left for a request, and it may have one."""
        if self._brownout is None or request.named_class is None or not conditions.has_cache:
            return False
        habit = self._habits.get(request.tenant)
        is_left = self._brownout.leaves_known_answers(request.named_class)
        return is_left and (habit is None or habit.may_be_known)

    def _left_out(self, service_class: ServiceClass, conditions: Conditions) -> TidegateError | None:
        if self._brownout is None or not self._brownout.refuses(service_class):
            return None
        lane = self._lanes.lane(service_class)
        if self._lanes.floor(service_class) > 0 and lane.owed >= lane.cost:
            return None  # A floor is what no brownout takes, and one that it has not paid for yet is enough to use it.
        self._lanes.refuse(service_class, lane.cost / max(1, len(lane)))
        message = f"No {service_class.label} requests are taken while more urgent ones wait too long"
        step = self._brownout.step
        return self._overloaded(f"{message} (brownout step {step})", conditions, brownout_step=step)

    def _full(
        self,
        service_class: ServiceClass,
        conditions: Conditions,
        token_count: int = 0,
        byte_count: int = 0,
        *,
        tenant: str = DEFAULT_TENANT,
    ) -> TidegateError | None:
        """Why one more request of this size has no room in its lane, or beside what waits in all of them."""
        lane = self._lanes.lane(service_class)
        bound = lane.full_bound(token_count, byte_count, tenant)
        if bound:
            message = f"The {service_class.label} queue is full by {bound}; {len(lane)} requests wait in it"
            return self._overloaded(message, conditions)
        bound = self._total_bound(service_class, token_count, byte_count)
        if bound:
            return self._overloaded(f"The queues are full by {bound}; {len(self._lanes)} requests wait", conditions)
        return None

    def _total_bound(self, service_class: ServiceClass, token_count: int, byte_count: int) -> str:
        """The bound on all lanes that one more request would break; a lane's share of it no other one takes."""

        def broken(share: float, lanes: list[Lane]) -> str:
            tokens = sum(lane.token_count for lane in lanes) + token_count
            size = sum(lane.byte_count for lane in lanes) + byte_count
            return broken_bound(share, self._total_limits, sum(map(len, lanes)), tokens, size)

        if not broken(self._lanes.share(service_class), [self._lanes.lane(service_class)]):
            return ""
        return broken(1.0, [self._lanes.lane(one) for one in ServiceClass])

    def _refusal_of_any(self, request: Request, conditions: Conditions) -> TidegateError | None:
        if request.deadline is not None and request.deadline <= conditions.now:
            return deadline_passed(request, conditions.now)
        if conditions.absence_seconds > self._replica_grace_seconds:
            return self.no_replica(conditions)
        return None

    def no_replica(self, conditions: Conditions) -> TidegateError:
        """The refusal of a request that nobody could answer now."""
        return TidegateError(
            Reason.REPLICA_UNAVAILABLE,
            f"No replica has been ready for {conditions.absence_seconds:.1f} s",
            retry_after_seconds=_retry_seconds(self._default_retry_seconds, conditions),
        )

    def looked_at_late(self, late_seconds: float, conditions: Conditions) -> TidegateError:
        """The refusal of a request that has lain so long before anybody looked at it."""
        return self._overloaded(f"The request was not looked at for {late_seconds:.1f} s", conditions)

    def _overloaded(self, message: str, conditions: Conditions, *, brownout_step: int = 0) -> TidegateError:
        return TidegateError(
            Reason.SERVER_IS_OVERLOADED,
            message,
            retry_after_seconds=_retry_seconds(self.room_seconds(conditions.drain_rate), conditions),
            brownout_step=brownout_step,
        )

    def room_seconds(self, drain_rate: float | None) -> float:
        """Until enough of what waits has left that who is refused now has a chance; drain_rate: requests a second."""
        leaving = max(1, round(len(self._lanes) * RETRY_ROOM_SHARE))
        seconds = expected_wait(leaving, drain_rate)
        return self._default_retry_seconds if seconds is None else seconds


def _is_patient(request: Request, slack: float) -> bool:
    """Whether a request would rather wait than be refused.

    Nobody watches a batch request come.
    """
    return request.service_class is ServiceClass.BATCH or slack >= PATIENT_SLACK_SECONDS


def _pressed(request: Request, outlook: Outlook, now: float, least: float, discount: float) -> float:
    """From 0, at the least pressure, to 1, at `FULL_PRESSURE`; less by `discount` for who has nothing of its share."""
    pressure = outlook.pressure(request.service_class, now)
    owed = outlook.shares[request.service_class].owed_share(request.tenant)
    return min(1.0, max(0.0, (pressure - least) / (FULL_PRESSURE - least))) * (1 - discount * owed)


def latest_start(request: Request, now: float) -> float:
    """When a request must go to a replica at the latest: with a client's deadline, while it can still be answered."""
    assert request.deadline is not None
    if request.client_deadline is None:
        return request.deadline
    return max(now, request.deadline - LATE_SERVICE_SHARE * request.expected_seconds)


def deadline_passed(request: Request, now: float) -> TidegateError:
    """The refusal of a request whose deadline passed before a replica took it."""
    return TidegateError(
        Reason.DEADLINE_EXCEEDED, f"The deadline passed after {now - request.arrived_at:.1f} s in the queue"
    )


def _retry_seconds(seconds: float, conditions: Conditions) -> float:
    bounded = min(max(seconds, SHORTEST_RETRY_SECONDS), LONGEST_RETRY_SECONDS)
    return bounded * (1 + RETRY_JITTER * conditions.random_share)


def _seconds(seconds: float) -> str:
    return "an unknown time" if seconds == float("inf") else f"{seconds:.1f} s"
