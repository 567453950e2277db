"""The replicas as this scheduler knows them. Pure; seconds are monotonic.

Invariant: a replica whose credit stream is down has no credits, nothing in flight and no load: what is still there
of its requests, its first load on the next stream tells.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

from tidegate.scheduler.credits import CreditBook

ON_ITS_WAY_SECONDS: Final = 0.5
"""A request that was sent longer ago will not arrive any more."""


TURNOVER_SECONDS: Final = 1.0
"""Over so long it is counted how many requests end."""

TURNOVER_LIMIT: Final = 8192
"""The most that are counted."""


@dataclass(frozen=True, slots=True)
class ReplicaLoad:
    """What a replica last said of itself; the fields of tidegate.v1.Load that decisions need."""

    is_ready: bool
    running_request_count: int
    waiting_request_count: int
    slot_count: int
    seconds_per_output_token: float
    time_to_first_token_seconds: float
    reuses_prefixes: bool = False
    starting_request_count: int = 0
    late_seconds: float = 0.0
    max_context_tokens: int = 0
    arrived_credit_ids: Sequence[str] = ()
    """With which requests have come since what it said before."""
    scheduler_count: int = 1

    @property
    def busy_count(self) -> int:
        """Requests that it runs or lets wait."""
        return self.running_request_count + self.waiting_request_count


@dataclass(slots=True, eq=False)
class Replica:
    """One replica. `address` is host:port as it stands in the endpoints, and in x-tidegate-replica."""

    address: str
    book: CreditBook
    is_connected: bool = False
    load: ReplicaLoad | None = None
    heard_at: float = 0.0
    ready_since: float = 0.0
    dispatch_number: int = 0
    on_the_way: dict[str, float] = field(default_factory=dict)
    """When requests were sent that it has not yet said to have, by credit; the oldest first."""
    ended_at: deque[float] = field(default_factory=lambda: deque(maxlen=TURNOVER_LIMIT))
    """When the last requests ended there, as it told."""
    last_error: str = field(default="not connected yet")

    @property
    def busy_count(self) -> int:
        """Requests there: what it said, or what was sent since if that is more."""
        return max(self.load.busy_count if self.load else 0, self.book.in_flight_count)

    def note_end(self, credit_id: str, now: float) -> None:
        """A request ended there."""
        self.book.finish(credit_id)
        self.on_the_way.pop(credit_id, None)
        self.ended_at.append(now)

    def usual_starting_count(self, now: float) -> float:
        """Requests there without a token yet, where as many begin as end: their rate times their time (Little)."""
        while self.ended_at and self.ended_at[0] < now - TURNOVER_SECONDS:
            self.ended_at.popleft()
        first_token_seconds = self.load.time_to_first_token_seconds if self.load else 0.0
        return len(self.ended_at) / TURNOVER_SECONDS * first_token_seconds

    def starting_count(self, now: float) -> int:
        """Requests there without a token yet: what it said, and what may still be on its way."""
        while self.on_the_way:
            credit_id, sent_at = next(iter(self.on_the_way.items()))
            if sent_at >= now - ON_ITS_WAY_SECONDS:
                break
            del self.on_the_way[credit_id]
        return len(self.on_the_way) + (self.load.starting_request_count if self.load else 0)


class ReplicaTable:
    """All replicas of the endpoints.

    Args:
        margin_seconds: of each credit book.
        silence_seconds: a replica that has said nothing for so long is not ready.
        now: since when it is watched for how long no replica has been ready.
    """

    def __init__(self, *, margin_seconds: float, silence_seconds: float, now: float) -> None:
        self._margin_seconds = margin_seconds
        self._silence_seconds = silence_seconds
        self._replicas: dict[str, Replica] = {}
        self._last_ready_at = now

    def __iter__(self) -> Iterator[Replica]:
        return iter(self._replicas.values())

    def __len__(self) -> int:
        return len(self._replicas)

    def has_credit(self, now: float, *, urgent: bool = False) -> bool:
        """Whether any replica's credit could be spent, however that replica is."""
        # Each message asks this, and most replicas of a full mesh have nothing in hand.
        books = (replica.book for replica in self._replicas.values())
        return any(
            book.can_spend(now, urgent=urgent) for book in books if book.count or (urgent and book.preempting_count)
        )

    @property
    def credit_count(self) -> int:
        """Credits in hand that take nobody's slot."""
        return sum(replica.book.count for replica in self._replicas.values())

    def get(self, address: str) -> Replica | None:
        """The replica of this address, if it is in the endpoints."""
        return self._replicas.get(address)

    def set_addresses(self, addresses: Iterable[str]) -> tuple[list[str], list[str]]:
        """Makes the table hold exactly these; returns the added and the removed ones."""
        wanted = dict.fromkeys(addresses)
        removed = [address for address in self._replicas if address not in wanted]
        added = [address for address in wanted if address not in self._replicas]
        for address in removed:
            del self._replicas[address]
        for address in added:
            self._replicas[address] = Replica(address, CreditBook(self._margin_seconds))
        return added, removed

    def connect(self, replica: Replica, now: float) -> None:
        """Its credit stream is up."""
        replica.book = CreditBook(self._margin_seconds)
        replica.is_connected = True
        replica.heard_at = now
        replica.last_error = ""

    def disconnect(self, replica: Replica, error: str) -> None:
        """Its credit stream is down; its credits are its own again."""
        replica.book = CreditBook(self._margin_seconds)
        replica.on_the_way.clear()
        replica.is_connected = False
        replica.load = None
        replica.last_error = error

    def hear(self, replica: Replica, load: ReplicaLoad, now: float) -> None:
        """It said how it is."""
        if not self.is_ready(replica, now):
            replica.ready_since = now
        replica.load = load
        replica.heard_at = now
        for credit_id in load.arrived_credit_ids:
            replica.on_the_way.pop(credit_id, None)
        replica.book.reconcile(load.busy_count, now)

    def is_ready(self, replica: Replica, now: float) -> bool:
        """Whether new requests may go there."""
        return (
            replica.is_connected
            and replica.load is not None
            and replica.load.is_ready
            and now - replica.heard_at <= self._silence_seconds
        )

    def ready(self, now: float) -> list[Replica]:
        """All to which new requests may go."""
        return [replica for replica in self._replicas.values() if self.is_ready(replica, now)]

    def late_seconds(self, now: float) -> float:
        """How late the one looks at what is sent that does so soonest; 0 where none is ready."""
        return min((replica.load.late_seconds for replica in self.ready(now) if replica.load), default=0.0)

    def scheduler_count(self, now: float) -> int:
        """How many schedulers the replicas know, this one included."""
        return max((replica.load.scheduler_count for replica in self.ready(now) if replica.load), default=1)

    def note_presence(self, now: float) -> None:
        """Remembers that a replica is ready, if one is; called every now and then."""
        if self._is_any_ready(now):
            self._last_ready_at = now

    def absence_seconds(self, now: float) -> float:
        """For how long no replica has been ready, to the last `note_presence`; 0 while one is."""
        return 0.0 if self._is_any_ready(now) else now - self._last_ready_at

    def _is_any_ready(self, now: float) -> bool:
        return any(self.is_ready(replica, now) for replica in self._replicas.values())
