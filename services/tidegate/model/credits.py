"""Who may use the engine's slots: credits granted to schedulers, requests that run, and a bounded queue.

Owns three sets: credits that are granted and not spent, holders that run, holders that wait. Invariants, after
every call:

- granted + running never exceeds the slots, but for resumed requests (at most `overflow_slot_count` above) and
  for those that ran already when the engine's slots became fewer.
- A credit belongs to one live session, and is spent at most once.
- A holder runs or waits, never both; at most `queue_limit` holders wait.

A request with a live credit starts at once. One without (its scheduler died, or it was balanced by Envoy) takes
a free slot, or an unspent credit's slot, or waits, or is refused: this is what keeps the replica serving, and
bounded, with no scheduler at all. Credits are divided by demand with smooth weighted round robin (as in nginx),
so that a small demand is served in its turn; slots that nobody asks for are granted too, so that an idle mesh
dispatches without a round trip.

A credit lives for one lease. When half of it is over, an unspent one is replaced: it is revoked and a new one is
granted, so that a scheduler always has fresh ones, and a slot is never lost to a request that did not come. A
request that was on its way with the old id meanwhile spends the new one in its place.

Time comes in as an argument, in seconds of any monotonic clock. Nothing here waits or talks: `settle` returns
what must be told to whom.
"""

from __future__ import annotations

import enum
import math
from collections import deque
from collections.abc import Iterable

import msgspec


class Decision(enum.Enum):
    """What becomes of a request that asks for a slot."""

    START = enum.auto()
    WAIT = enum.auto()
    REFUSE = enum.auto()


class Granted(msgspec.Struct, frozen=True):
    """New credits for a session."""

    session: int
    credit_ids: list[str]
    lease_seconds: float


class Revoked(msgspec.Struct, frozen=True):
    """Credits of a session that are not valid any more."""

    session: int
    credit_ids: list[str]


class Admitted(msgspec.Struct, frozen=True):
    """A holder that waited and runs now."""

    holder: int


Action = Granted | Revoked | Admitted


class Terms(msgspec.Struct, frozen=True, kw_only=True):
    """The bounds that the ledger keeps."""

    lease_seconds: float
    """What a scheduler is told."""
    grace_seconds: float
    """How much longer a credit is honoured here, for the request that is on its way."""
    protected_seconds: float
    """A credit younger than this may be on its way with a request, so another session's demand does not revoke it."""
    queue_limit: int
    overflow_slot_count: int


class _Credit(msgspec.Struct, frozen=True):
    session: int
    held_since: float
    """When the slot was given to the session; a replacement keeps it."""
    leased_at: float


class _Replaced(msgspec.Struct, frozen=True):
    by: str
    honoured_until: float


class _Session(msgspec.Struct):
    demand: int = 0
    turn: float = 0.0
    credits: dict[str, None] = msgspec.field(default_factory=dict)


class Spent(msgspec.Struct, frozen=True):
    """The credit that a running holder spent."""

    session: int
    credit_id: str


class CreditLedger:
    """The slots of one engine and who has them.

    Args:
        terms: the bounds.
        id_prefix: begins every credit id; new at every start, so that ids of an earlier life mean nothing.
    """

    def __init__(self, terms: Terms, id_prefix: str) -> None:
        self._terms = terms
        self._id_prefix = id_prefix
        self._id_count = 0
        self._slot_count = 0
        self._can_start = False
        self._credits: dict[str, _Credit] = {}
        self._replaced: dict[str, _Replaced] = {}
        self._next_renewal = math.inf
        self._sessions: dict[int, _Session] = {}
        self._running: dict[int, Spent | None] = {}
        self._waiting: deque[int] = deque()
        self._resumed: set[int] = set()
        self._revoked: dict[int, list[str]] = {}

    @property
    def slot_count(self) -> int:
        """Sequences that the engine runs at once."""
        return self._slot_count

    @property
    def running_count(self) -> int:
        """Holders that have a slot."""
        return len(self._running)

    @property
    def waiting_count(self) -> int:
        """Holders that wait for one."""
        return len(self._waiting)

    @property
    def granted_count(self) -> int:
        """Credits that are out and not spent."""
        return len(self._credits)

    @property
    def free_count(self) -> int:
        """Slots that neither run nor are granted."""
        return max(0, self._slot_count - len(self._running) - len(self._credits))

    def set_capacity(self, slot_count: int, *, can_start: bool) -> None:
        """Says how many slots there are, and whether the engine would begin one more sequence now.

        While it would not (its own queue is not empty, for want of KV blocks), no slot is given that was not
        promised before.
        """
        self._slot_count = slot_count
        self._can_start = can_start

    def connect(self, session: int) -> None:
        """A scheduler came; it gets standing credits at the next `settle`."""
        assert session not in self._sessions
        self._sessions[session] = _Session()

    def disconnect(self, session: int) -> None:
        """A scheduler left; its unspent credits are free again."""
        for credit_id in self._sessions.pop(session).credits:
            del self._credits[credit_id]
        self._revoked.pop(session, None)

    def set_demand(self, session: int, waiting_request_count: int) -> None:
        """Says how many requests wait with a scheduler."""
        self._sessions[session].demand = waiting_request_count

    def give_back(self, session: int, credit_ids: Iterable[str]) -> None:
        """Frees credits that a scheduler will not use; ids that are not its own are ignored."""
        for credit_id in credit_ids:
            credit = self._credits.get(credit_id)
            if credit is not None and credit.session == session:
                self._drop(credit_id)

    def take(self, holder: int, credit_id: str, *, resumed: bool, now: float) -> Decision:
        """Asks for a slot for a new holder.

        Args:
            credit_id: what the request carries; empty or unknown when there is none.
            resumed: the answer began on another replica: it goes ahead of the queue, and a little over the bound.
        """
        assert holder not in self._running
        session = self._spend(credit_id, now)
        if session is not None:
            self._running[holder] = Spent(session=session, credit_id=credit_id)
            return Decision.START
        if resumed:
            self._resumed.add(holder)
        if (resumed or not self._waiting) and self._make_room(holder):
            self._running[holder] = None
            return Decision.START
        if len(self._waiting) >= self._terms.queue_limit:
            self._resumed.discard(holder)
            return Decision.REFUSE
        if resumed:
            self._waiting.appendleft(holder)
        else:
            self._waiting.append(holder)
        return Decision.WAIT

    def release(self, holder: int) -> None:
        """A holder ended, or gave up waiting."""
        self._resumed.discard(holder)
        if holder in self._running:
            del self._running[holder]
        else:
            self._waiting.remove(holder)

    def spent_by(self, holder: int) -> Spent | None:
        """The credit that a running holder spent; None when it runs without one."""
        return self._running[holder]

    def settle(self, now: float) -> list[Action]:
        """Brings the sets in order after any change, and says what is to be told."""
        actions: list[Action] = []
        while self._waiting and self._make_room(self._waiting[0]):
            holder = self._waiting.popleft()
            self._running[holder] = None
            actions.append(Admitted(holder))
        while self._credits and len(self._running) + len(self._credits) > self._slot_count:
            self._revoke_one()
        fresh = self._renew(now) if now >= self._next_renewal else {}
        self._grant(now, fresh)
        actions += [Revoked(session, ids) for session, ids in self._revoked.items()]
        for session, ids in fresh.items():
            live = [credit_id for credit_id in ids if credit_id in self._credits]
            actions += [Granted(session, live, self._terms.lease_seconds)] if live else []
        self._revoked = {}
        return actions

    def next_event_seconds(self, now: float) -> float | None:
        """From now, when `settle` has something to do without any other change; None when never."""
        times = [self._next_renewal]
        if any(self._is_short(session) for session in self._sessions.values()):
            times += [credit.held_since + self._terms.protected_seconds for credit in self._credits.values()]
        soonest = min((time for time in times if time > now), default=math.inf)
        return None if soonest == math.inf else soonest - now

    def _spend(self, credit_id: str, now: float) -> int | None:
        """Takes a live credit out, or the one that replaced it; None when there is neither."""
        if credit_id not in self._credits:
            replaced = self._replaced.get(credit_id)
            while replaced is not None and now < replaced.honoured_until and replaced.by not in self._credits:
                replaced = self._replaced.get(replaced.by)
            if replaced is None or now >= replaced.honoured_until:
                return None
            session = self._credits[replaced.by].session
            self._revoke(replaced.by)
            return session
        credit = self._credits[credit_id]
        if now >= self._end_of(credit):
            return None
        self._drop(credit_id)
        return credit.session

    def _make_room(self, holder: int) -> bool:
        """Whether the holder can start now; takes back an unspent credit for it if that is what it needs."""
        if not self._can_start:
            return False
        if self.free_count > 0:
            return True
        if self._credits and len(self._running) < self._slot_count:
            self._revoke_one()
            return True
        return holder in self._resumed and len(self._running) < self._slot_count + self._terms.overflow_slot_count

    def _grant(self, now: float, fresh: dict[int, list[str]]) -> None:
        if not self._sessions or not self._can_start or self._waiting:
            return
        while self.free_count > 0 or self._revoke_surplus(now):
            session = self._next_session()
            fresh.setdefault(session, []).append(self._issue(session, held_since=now, now=now))

    def _issue(self, session: int, *, held_since: float, now: float) -> str:
        credit_id = f"{self._id_prefix}-{self._id_count}"
        self._id_count += 1
        self._credits[credit_id] = _Credit(session=session, held_since=held_since, leased_at=now)
        self._sessions[session].credits[credit_id] = None
        self._next_renewal = min(self._next_renewal, now + self._terms.lease_seconds / 2)
        return credit_id

    def _next_session(self) -> int:
        """Whose turn the next slot is: by demand, and where nobody asks, to whoever has least."""
        short = {key: session for key, session in self._sessions.items() if self._is_short(session)}
        if not short:
            return min(self._sessions, key=lambda key: len(self._sessions[key].credits))
        total = sum(session.demand for session in short.values())
        for session in short.values():
            session.turn += session.demand / total
        chosen = max(short, key=lambda key: short[key].turn)
        short[chosen].turn -= 1
        return chosen

    def _revoke_surplus(self, now: float) -> bool:
        """Takes a credit from a session that holds more than it asks for, if another is short of one."""
        if not any(self._is_short(session) for session in self._sessions.values()):
            return False
        if len(self._running) + len(self._credits) > self._slot_count:
            return False
        oldest = now - self._terms.protected_seconds
        for session in self._sessions.values():
            if len(session.credits) > session.demand:
                credit_id = next(iter(session.credits))
                if self._credits[credit_id].held_since <= oldest:
                    self._revoke(credit_id)
                    return True
        return False

    def _revoke_one(self) -> None:
        """Takes the oldest credit of the session with the most to spare."""
        session = max(self._sessions.values(), key=lambda one: (len(one.credits) > 0, len(one.credits) - one.demand))
        self._revoke(next(iter(session.credits)))

    def _revoke(self, credit_id: str) -> None:
        self._revoked.setdefault(self._credits[credit_id].session, []).append(credit_id)
        self._drop(credit_id)

    def _renew(self, now: float) -> dict[int, list[str]]:
        """Replaces credits whose lease is half over, and forgets those whose lease has ended."""
        self._replaced = {key: one for key, one in self._replaced.items() if now < one.honoured_until}
        self._next_renewal = math.inf
        fresh: dict[int, list[str]] = {}
        for credit_id, credit in list(self._credits.items()):
            if now >= self._end_of(credit):
                self._drop(credit_id)
            elif now >= credit.leased_at + self._terms.lease_seconds / 2:
                self._revoke(credit_id)
                successor = self._issue(credit.session, held_since=credit.held_since, now=now)
                self._replaced[credit_id] = _Replaced(by=successor, honoured_until=self._end_of(credit))
                fresh.setdefault(credit.session, []).append(successor)
            else:
                self._next_renewal = min(self._next_renewal, credit.leased_at + self._terms.lease_seconds / 2)
        return fresh

    def _drop(self, credit_id: str) -> None:
        credit = self._credits.pop(credit_id)
        del self._sessions[credit.session].credits[credit_id]

    def _end_of(self, credit: _Credit) -> float:
        return credit.leased_at + self._terms.lease_seconds + self._terms.grace_seconds

    @staticmethod
    def _is_short(session: _Session) -> bool:
        return session.demand > len(session.credits)
