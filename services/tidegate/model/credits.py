"""Who may use the engine's slots: credits granted to schedulers, requests that run, and a bounded queue.

Owns four sets: credits that are granted and not spent, holders that run, holders that are paused, holders that
wait. Invariants, after every call of `settle`:

- granted + running never exceeds the slots and `ahead`, but for resumed requests (at most `overflow_slot_count`
  above) and for those that ran already when the engine's slots became fewer. Without demand it is the slots alone.
- A credit belongs to one live session, and is spent at most once.
- A holder runs, is paused, or waits: one of them; at most `queue_limit` holders wait.
- Only batch holders are paused, and for realtime ones only. While one is paused no slot is free.
- Preempting credits stand outside the slots. They and the paused are at most `preempting_share` of the slots, and
  there are no more of them than batch holders run.

A request with a live credit starts at once. One without (its scheduler died, or it was balanced by Envoy) takes
a free slot, or an unspent credit's slot, or waits, or is refused: this is what keeps the replica serving, and
bounded, with no scheduler at all. Credits are divided by demand with smooth weighted round robin (as in nginx),
so that a small demand is served in its turn; slots that nobody asks for are granted too, so that an idle mesh
dispatches without a round trip.

A preempting credit lets a realtime request start although no slot is free: the batch holder that began last is
paused in its favour, and is the first to get a slot that is freed. The engine does the same by its own priorities;
this is the account of it. Where no batch holder runs any more the request is treated like one without a credit.

`ahead` credits above the slots, for schedulers where requests wait, keep a slot from standing empty between two
requests: the next one waits in the engine already (see `look_ahead`).

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


class Urgency(enum.IntEnum):
    """What a holder's class means for the slots; more urgent is less."""

    REALTIME = 0
    STANDARD = 1
    BATCH = 2


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
    preempting: bool = False


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
    preempting_share: float = 0.0
    """The most of the slots' holders that may be paused, with those that a credit allows to pause; 0 to 1."""


class _Credit(msgspec.Struct, frozen=True):
    session: int
    held_since: float
    """When the slot was given to the session; a replacement keeps it."""
    leased_at: float
    preempting: bool = False


class _Replaced(msgspec.Struct, frozen=True):
    by: str
    honoured_until: float


class _Session(msgspec.Struct):
    demand: int = 0
    realtime_demand: int = 0
    turn: float = 0.0
    credits: dict[str, None] = msgspec.field(default_factory=dict)
    preempting: dict[str, None] = msgspec.field(default_factory=dict)


class Spent(msgspec.Struct):
    """The credit that a running holder spent."""

    session: int
    credit_id: str
    was_paused: bool = False
    """Whether the holder has been paused, so that its time says little about the replica."""
    gap_seconds: float | None = None
    """From the grant to the request, where requests waited for the credit; None where it stood ready."""


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
        self._ahead = 0
        self._can_start = False
        self._credits: dict[str, _Credit] = {}
        self._replaced: dict[str, _Replaced] = {}
        self._next_renewal = math.inf
        self._sessions: dict[int, _Session] = {}
        self._running: dict[int, Spent | None] = {}
        self._paused: dict[int, Spent | None] = {}
        self._urgencies: dict[int, Urgency] = {}
        self._pausable: dict[int, None] = {}
        self._wanted: set[str] = set()
        self._preempting_count = 0
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
    def paused_count(self) -> int:
        """Batch holders that gave their slots to realtime ones."""
        return len(self._paused)

    @property
    def engine_count(self) -> int:
        """Holders that the engine has: running or paused."""
        return len(self._running) + len(self._paused)

    @property
    def scheduler_count(self) -> int:
        """Schedulers that are there."""
        return len(self._sessions)

    @property
    def granted_count(self) -> int:
        """Credits for slots that are out and not spent."""
        return len(self._credits) - self._preempting_count

    @property
    def preempting_count(self) -> int:
        """Preempting credits that are out and not spent."""
        return self._preempting_count

    @property
    def free_count(self) -> int:
        """Slots that neither run nor are granted."""
        return max(0, self._slot_count - len(self._running) - self.granted_count)

    def set_capacity(self, slot_count: int, *, can_start: bool, ahead: int = 0) -> None:
        """Says how many slots there are, and whether the engine would begin one more sequence now.

        While it would not (its own queue is not empty, for want of KV blocks), no slot is given that was not
        promised before.

        Args:
            ahead: credits above the slots that may be out, or wait in the engine, while requests wait elsewhere.
        """
        self._slot_count = slot_count
        self._ahead = ahead
        self._can_start = can_start

    def connect(self, session: int) -> None:
        """A scheduler came; it gets standing credits at the next `settle`."""
        assert session not in self._sessions
        self._sessions[session] = _Session()

    def disconnect(self, session: int) -> None:
        """A scheduler left; its unspent credits are free again."""
        gone = self._sessions[session]
        for credit_id in [*gone.credits, *gone.preempting]:
            self._drop(credit_id)
        del self._sessions[session]
        self._revoked.pop(session, None)

    def set_demand(self, session: int, waiting_request_count: int, realtime_request_count: int = 0) -> None:
        """Says how many requests wait with a scheduler, and how many of them are realtime."""
        self._sessions[session].demand = waiting_request_count
        self._sessions[session].realtime_demand = realtime_request_count

    def give_back(self, session: int, credit_ids: Iterable[str]) -> None:
        """Frees credits that a scheduler will not use; ids that are not its own are ignored."""
        for credit_id in credit_ids:
            credit = self._credits.get(credit_id)
            if credit is not None and credit.session == session:
                self._drop(credit_id)

    def take(
        self, holder: int, credit_id: str, *, resumed: bool, now: float, urgency: Urgency = Urgency.STANDARD
    ) -> Decision:
        """Asks for a slot for a new holder.

        Args:
            credit_id: what the request carries; empty or unknown when there is none.
            resumed: the answer began on another replica: it goes ahead of the queue, and a little over the bound.
        """
        assert holder not in self._urgencies
        self._urgencies[holder] = urgency
        spent = self._spend(credit_id, urgency, now)
        if spent is not None:
            self._start(holder, spent)
            return Decision.START
        if resumed:
            self._resumed.add(holder)
        if (resumed or not self._waiting) and self._make_room(holder):
            self._start(holder, None)
            return Decision.START
        if len(self._waiting) >= self._terms.queue_limit:
            self._resumed.discard(holder)
            del self._urgencies[holder]
            return Decision.REFUSE
        if resumed:
            self._waiting.appendleft(holder)
        else:
            self._waiting.append(holder)
        return Decision.WAIT

    def forfeit(self, credit_id: str, now: float) -> int | None:
        """Frees the credit of a request that ended before it took a slot; gives the session, None when not known."""
        live_id = self._live_id(credit_id, now)
        if live_id is None:
            return None
        session = self._credits[live_id].session
        # One that was replaced meanwhile stands in the scheduler's hand by its new name.
        if live_id == credit_id:
            self._drop(credit_id)
        return session

    def owns(self, credit_id: str) -> bool:
        """Whether the id is one of this life's."""
        return credit_id.startswith(f"{self._id_prefix}-")

    def release(self, holder: int) -> None:
        """A holder ended, or gave up waiting."""
        self._resumed.discard(holder)
        del self._urgencies[holder]
        if holder in self._running:
            del self._running[holder]
            self._pausable.pop(holder, None)
        elif holder in self._paused:
            del self._paused[holder]
        else:
            self._waiting.remove(holder)

    def spent_by(self, holder: int) -> Spent | None:
        """The credit that a holder with a slot spent, paused or not; None when it has its slot without one."""
        return self._paused[holder] if holder in self._paused else self._running[holder]

    def settle(self, now: float) -> list[Action]:
        """Brings the sets in order after any change, and says what is to be told."""
        actions: list[Action] = []
        self._resume_paused()
        while self._waiting and self._make_room(self._waiting[0]):
            holder = self._waiting.popleft()
            self._start(holder, None)
            actions.append(Admitted(holder))
        while self.granted_count and len(self._running) + self.granted_count > self._slot_count + self._ahead:
            self._revoke_one()
        self._resume_paused()
        fresh = self._renew(now) if now >= self._next_renewal else {}
        self._grant(now, fresh)
        self._grant_preempting(now, fresh)
        actions += [Revoked(session, ids) for session, ids in self._revoked.items()]
        for session, ids in fresh.items():
            actions += self._told(session, ids)
        self._revoked = {}
        return actions

    def _told(self, session: int, credit_ids: list[str]) -> list[Action]:
        live = [credit_id for credit_id in credit_ids if credit_id in self._credits]
        by_kind = {
            preempting: [credit_id for credit_id in live if self._credits[credit_id].preempting == preempting]
            for preempting in (False, True)
        }
        return [
            Granted(session, ids, self._terms.lease_seconds, preempting) for preempting, ids in by_kind.items() if ids
        ]

    def _start(self, holder: int, spent: Spent | None) -> None:
        self._running[holder] = spent
        if self._urgencies[holder] is Urgency.BATCH:
            self._pausable[holder] = None

    def _pause_one(self) -> None:
        """Takes the slot of the batch holder that began last: it has the least to do again."""
        holder, _ = self._pausable.popitem()
        spent = self._running.pop(holder)
        if spent is not None:
            spent.was_paused = True
        self._paused[holder] = spent

    def _resume_paused(self) -> None:
        """Gives free slots to the paused, the one first that was paused first. The engine does it by itself."""
        while self._paused and self.free_count > 0:
            holder = next(iter(self._paused))
            self._start(holder, self._paused.pop(holder))

    @property
    def _can_pause(self) -> bool:
        return bool(self._pausable) and len(self._paused) < self._preempting_limit

    @property
    def _preempting_limit(self) -> int:
        return int(self._slot_count * self._terms.preempting_share)

    def next_event_seconds(self, now: float) -> float | None:
        """From now, when `settle` has something to do without any other change; None when never."""
        times = [self._next_renewal]
        if any(self._is_short(session) for session in self._sessions.values()):
            times += [
                credit.held_since + self._terms.protected_seconds
                for credit in self._credits.values()
                if not credit.preempting
            ]
        soonest = min((time for time in times if time > now), default=math.inf)
        return None if soonest == math.inf else soonest - now

    def _spend(self, credit_id: str, urgency: Urgency, now: float) -> Spent | None:
        """Takes a live credit out, or the one that replaced it; None when there is neither."""
        live_id = self._live_id(credit_id, now)
        if live_id is None:
            return None
        credit = self._credits[live_id]
        if credit.preempting:
            if urgency is not Urgency.REALTIME:
                return None
            if self.free_count == 0:
                if not self._pausable:
                    return None
                self._pause_one()
        gap_seconds = now - credit.leased_at if live_id in self._wanted and live_id == credit_id else None
        if live_id == credit_id:
            self._drop(live_id)
        else:
            self._revoke(live_id)
        return Spent(credit.session, credit_id, gap_seconds=gap_seconds)

    def _live_id(self, credit_id: str, now: float) -> str | None:
        if credit_id in self._credits:
            return credit_id if now < self._end_of(self._credits[credit_id]) else None
        replaced = self._replaced.get(credit_id)
        while replaced is not None and now < replaced.honoured_until and replaced.by not in self._credits:
            replaced = self._replaced.get(replaced.by)
        return None if replaced is None or now >= replaced.honoured_until else replaced.by

    def _make_room(self, holder: int) -> bool:
        """Whether the holder can start now; takes back an unspent credit for it if that is what it needs."""
        if not self._can_start:
            return False
        if self.free_count > 0:
            return True
        if self.granted_count and len(self._running) < self._slot_count:
            self._revoke_one()
            return True
        if self._urgencies[holder] is Urgency.REALTIME and self._can_pause:
            self._pause_one()
            return True
        return holder in self._resumed and len(self._running) < self._slot_count + self._terms.overflow_slot_count

    def _grant(self, now: float, fresh: dict[int, list[str]]) -> None:
        if not self._sessions or not self._can_start or self._waiting or self._paused:
            return
        while self.free_count > 0 or self._may_grant_ahead() or self._revoke_surplus(now):
            session = self._next_session()
            is_wanted = self._is_short(self._sessions[session])
            credit_id = self._issue(session, held_since=now, now=now)
            if is_wanted:
                self._wanted.add(credit_id)
            fresh.setdefault(session, []).append(credit_id)

    def _may_grant_ahead(self) -> bool:
        """Whether requests wait, and fewer than `ahead` credits stand above the slots for them."""
        return len(self._running) + self.granted_count < self._slot_count + self._ahead and any(
            self._is_short(session) for session in self._sessions.values()
        )

    def _grant_preempting(self, now: float, fresh: dict[int, list[str]]) -> None:
        """Keeps as many preempting credits out as batch holders may be paused; they cost no slot while unspent."""
        wanted = min(len(self._pausable), max(0, self._preempting_limit - len(self._paused)))
        while self._preempting_count > wanted:
            holding = [session for session in self._sessions.values() if session.preempting]
            richest = max(holding, key=lambda one: len(one.preempting) - one.realtime_demand)
            self._revoke(next(iter(richest.preempting)))
        # They stand ready once nothing else is free, for what is realtime then needs them at once.
        if not self._sessions or not self._can_start or self._waiting or self.free_count > 0:
            return
        while self._preempting_count < wanted:
            session = min(
                self._sessions,
                key=lambda key: len(self._sessions[key].preempting) - self._sessions[key].realtime_demand,
            )
            fresh.setdefault(session, []).append(self._issue(session, held_since=now, now=now, preempting=True))

    def _issue(self, session: int, *, held_since: float, now: float, preempting: bool = False) -> str:
        credit_id = f"{self._id_prefix}-{self._id_count}"
        self._id_count += 1
        self._credits[credit_id] = _Credit(session, held_since, now, preempting)
        self._hand_of(self._credits[credit_id])[credit_id] = None
        self._preempting_count += preempting
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
        if len(self._running) + self.granted_count > self._slot_count + self._ahead:
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
            elif credit.preempting and now >= credit.leased_at + self._terms.lease_seconds / 2:
                # Whoever needs it most gets its successor; see `_grant_preempting`.
                self._revoke(credit_id)
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
        self._wanted.discard(credit_id)
        self._preempting_count -= credit.preempting
        del self._hand_of(credit)[credit_id]

    def _hand_of(self, credit: _Credit) -> dict[str, None]:
        session = self._sessions[credit.session]
        return session.preempting if credit.preempting else session.credits

    def _end_of(self, credit: _Credit) -> float:
        return credit.leased_at + self._terms.lease_seconds + self._terms.grace_seconds

    @staticmethod
    def _is_short(session: _Session) -> bool:
        return session.demand > len(session.credits)
