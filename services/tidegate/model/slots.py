"""The door to the engine's slots for everything that runs in the event loop.

Wraps the credit ledger with what it must not have: a clock, futures for those who wait, outboxes for the
schedulers. Every change ends in `update`, which delivers what the ledger decided. All decisions are the ledger's.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import time
from collections.abc import Callable
from typing import Final

from tidegate.common.errors import Reason, TidegateError
from tidegate.model.credits import Admitted, CreditLedger, Decision, Granted, Revoked, Spent, Urgency
from tidegate.model.moving_averages import MovingAverage
from tidegate.v1 import replica_pb2

OUTBOX_LIMIT: Final = 10_000
"""Messages that may wait for one scheduler; past it the scheduler is too slow to keep and its stream is ended."""

LONGEST_SLEEP_SECONDS: Final = 0.25

HELD_HALF_LIFE_SECONDS: Final = 60.0
FEWEST_HELD: Final = 8
"""After fewer freed slots nothing is said of how fast the queue moves."""


class SchedulerSession:
    """What is to be said to one connected scheduler."""

    def __init__(self, key: int, scheduler_id: str) -> None:
        self.key = key
        self.scheduler_id = scheduler_id
        self.wake = asyncio.Event()
        self.overrun = False
        self._outbox: list[replica_pb2.ReplicaMessage] = []
        self._arrived: list[str] = []

    def put(self, message: replica_pb2.ReplicaMessage) -> None:
        """Queues a message for the stream's writer."""
        self.overrun = self.overrun or len(self._outbox) >= OUTBOX_LIMIT
        if not self.overrun:
            self._outbox.append(message)
        self.wake.set()

    def take(self) -> list[replica_pb2.ReplicaMessage]:
        """All that waits."""
        messages, self._outbox = self._outbox, []
        return messages

    @property
    def has_arrived(self) -> bool:
        """Whether a request came since the last `take_arrived`."""
        return bool(self._arrived)

    def note_arrival(self, credit_id: str) -> None:
        """A request came with one of its credits."""
        self._arrived.append(credit_id)

    def take_arrived(self) -> list[str]:
        """The credits with which requests came since the last call: no more than were out in that time."""
        arrived, self._arrived = self._arrived, []
        return arrived


class Slot:
    """One slot in use. `start` and `release` may be called more than once."""

    def __init__(self, slots: Slots, holder: int, spent: Spent | None) -> None:
        self._slots = slots
        self._holder = holder
        self._held = True
        self._began_at = slots.now()
        self._is_starting = True
        self.spent = spent

    def start(self) -> None:
        """The first token is there: the prompt is computed."""
        if self._is_starting:
            self._is_starting = False
            self._slots.note_start()

    def release(self) -> None:
        """Gives the slot back at once."""
        self.start()
        if self._held:
            self._held = False
            self._slots.free(self._holder, self._slots.now() - self._began_at)


class Slots:
    """The slots of this replica's engine.

    Args:
        retry_after_seconds: asked when a request is refused, for when to come back.
        refuses_late: whether a request is refused that would have its answer only after its deadline.
    """

    def __init__(
        self,
        ledger: CreditLedger,
        retry_after_seconds: Callable[[], float],
        clock: Callable[[], float] = time.monotonic,
        *,
        refuses_late: bool = True,
    ) -> None:
        self.ledger = ledger
        self._refuses_late = refuses_late
        self._retry_after_seconds = retry_after_seconds
        self._clock = clock
        self._keys = itertools.count(1)
        self._sessions: dict[int, SchedulerSession] = {}
        self._waiters: dict[int, asyncio.Future[None]] = {}
        self._held = MovingAverage(HELD_HALF_LIFE_SECONDS)
        self._held_count = 0
        self.starting_count = 0
        """Requests that have a slot and no token yet."""
        self.on_gap: Callable[[float], None] = lambda seconds: None
        """Called with the time from a wanted credit to the request that spent it."""
        self.on_turnover: Callable[[], None] = lambda: None
        """Called when a slot was freed."""

    async def take(
        self,
        *,
        credit_id: str,
        resumed: bool,
        urgency: Urgency = Urgency.STANDARD,
        seconds_left: float = math.inf,
    ) -> Slot:
        """Takes a slot, waiting in the bounded queue where there is none.

        Args:
            seconds_left: until the request's deadline.

        Raises:
            TidegateError: SERVER_IS_OVERLOADED when the queue is full, or too long for the deadline.
        """
        holder = next(self._keys)
        decision = self.ledger.take(holder, credit_id, resumed=resumed, now=self._clock(), urgency=urgency)
        if decision is Decision.REFUSE:
            raise TidegateError(
                Reason.SERVER_IS_OVERLOADED,
                f"All {self.ledger.slot_count} slots of the replica are taken and {self.ledger.waiting_count} wait.",
                retry_after_seconds=self._retry_after_seconds(),
            )
        if decision is Decision.WAIT:
            seconds = self._seconds_to_answer() if self._refuses_late and not resumed else None
            if seconds is not None and seconds_left < seconds:
                self.release(holder)
                raise TidegateError(
                    Reason.SERVER_IS_OVERLOADED,
                    f"An answer would take about {seconds:.1f} s behind the {self.ledger.waiting_count} requests that"
                    f" wait for the replica, and its deadline is in {max(0.0, seconds_left):.1f} s.",
                    retry_after_seconds=self._retry_after_seconds(),
                )
            await self._wait(holder)
        else:
            self.update()
        spent = self.ledger.spent_by(holder)
        if spent is not None and spent.gap_seconds is not None:
            self.on_gap(spent.gap_seconds)
        if spent is not None and spent.session in self._sessions:
            self._sessions[spent.session].note_arrival(spent.credit_id)
        self.starting_count += 1
        return Slot(self, holder, spent)

    def now(self) -> float:
        """Seconds of its clock."""
        return self._clock()

    def note_start(self) -> None:
        """One prompt less is computed; schedulers that wait with the next ones hear of it."""
        self.starting_count -= 1
        for session in self._sessions.values():
            session.wake.set()

    async def _wait(self, holder: int) -> None:
        future = asyncio.get_running_loop().create_future()
        self._waiters[holder] = future
        self.update()
        try:
            await future
        except asyncio.CancelledError:
            # Whose wait was failed in the same turn of the event loop has given its place up already.
            if future.cancelled() or future.exception() is None:
                self.release(holder)
            raise
        finally:
            self._waiters.pop(holder, None)

    def release(self, holder: int) -> None:
        """Gives back what a holder has: its slot or its place in the queue."""
        self.ledger.release(holder)
        self.update()

    def free(self, holder: int, held_seconds: float) -> None:
        """Gives a holder's slot back."""
        self._held.add(held_seconds, 1, self._clock())
        self._held_count += 1
        self.on_turnover()
        self.release(holder)

    @property
    def turn_seconds(self) -> float | None:
        """From one freed slot to the next while all are in use, on average; None when not known."""
        held_seconds = None if self._held_count < FEWEST_HELD else self._held.value(self._clock())
        return None if held_seconds is None else held_seconds / max(1, self.ledger.slot_count)

    def _seconds_to_answer(self) -> float | None:
        """Until the last one in the queue has its answer; None when not known."""
        turn_seconds = self.turn_seconds
        return None if turn_seconds is None else (self.ledger.waiting_count + self.ledger.slot_count) * turn_seconds

    def set_capacity(self, slot_count: int, *, can_start: bool, ahead: int = 0) -> None:
        """Passes on what the engine says."""
        self.ledger.set_capacity(slot_count, can_start=can_start, ahead=ahead)
        self.update()

    def fail_waiting(self, error: TidegateError) -> None:
        """Ends the wait of all who wait, because the engine went away."""
        for holder, future in list(self._waiters.items()):
            if not future.done():
                self.ledger.release(holder)
                future.set_exception(error)

    @property
    def sessions(self) -> list[SchedulerSession]:
        """The connected schedulers."""
        return list(self._sessions.values())

    def connect(self, scheduler_id: str) -> SchedulerSession:
        """A scheduler's stream is open; credits follow with the next `update`."""
        session = SchedulerSession(next(self._keys), scheduler_id)
        self._sessions[session.key] = session
        self.ledger.connect(session.key)
        return session

    def disconnect(self, session: SchedulerSession) -> None:
        """A scheduler's stream has ended."""
        del self._sessions[session.key]
        self.ledger.disconnect(session.key)
        self.update()

    def report(self, credit_id: str, spent: Spent | None, outcome: replica_pb2.Outcome) -> None:
        """Tells the scheduler how a request ended, if it is still there.

        Args:
            credit_id: what the request carried; empty for none.
            spent: the credit that it spent. None: it ended before, or ran without one, and its scheduler counts it as
                under way all the same.
        """
        if spent is not None:
            outcome.credit_id, outcome.paused = spent.credit_id, spent.was_paused
            keys = [spent.session]
        elif self.ledger.owns(credit_id):
            outcome.credit_id = credit_id
            session = self.ledger.forfeit(credit_id, self._clock())
            # Whose a revoked one was is not known any more; to all others it says only how the replica fares.
            keys = list(self._sessions) if session is None else [session]
            self.update()
        else:
            return
        for key in keys:
            if key in self._sessions:
                self._sessions[key].put(replica_pb2.ReplicaMessage(outcome=outcome))

    def update(self) -> None:
        """Delivers what follows from the last changes."""
        for action in self.ledger.settle(self._clock()):
            match action:
                case Admitted(holder):
                    self._admit(holder)
                case Granted(key, credit_ids, lease_seconds, preempting):
                    grant = replica_pb2.Grant(credit_ids=credit_ids, preempting=preempting)
                    grant.lease.FromNanoseconds(int(lease_seconds * 1e9))
                    self._sessions[key].put(replica_pb2.ReplicaMessage(grant=grant))
                case Revoked(key, credit_ids):
                    revoke = replica_pb2.CreditIds(credit_ids=credit_ids)
                    self._sessions[key].put(replica_pb2.ReplicaMessage(revoke=revoke))
        for session in self._sessions.values():
            session.wake.set()

    def _admit(self, holder: int) -> None:
        future = self._waiters[holder]
        if not future.done():
            future.set_result(None)

    async def run(self) -> None:
        """Lets time pass for the ledger: renewals, and credits that may be revoked now."""
        while True:
            seconds = self.ledger.next_event_seconds(self._clock())
            await asyncio.sleep(min(seconds or LONGEST_SLEEP_SECONDS, LONGEST_SLEEP_SECONDS))
            self.update()
