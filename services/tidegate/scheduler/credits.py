"""The credits of one replica, as this scheduler holds them. Pure; seconds are monotonic.

A credit is *in hand* from its grant until it is spent, revoked, or its lease is about to end. A *spent* one is in
flight until its outcome comes. Invariants:
- no id is in hand and spent at once, so none is spent twice;
- a credit with less than `margin_seconds` left of its lease is never spent;
- a preempting credit is spent only for an urgent (realtime) request, and only when no plain one can be.

A spent credit whose request never reached the replica (the client left on the way, or Envoy retried elsewhere) has
no outcome. `reconcile` drops those by what the replica says of itself, so counts cannot drift.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable


class CreditBook:
    """The book of one credit stream; a new stream starts with an empty one."""

    def __init__(self, margin_seconds: float) -> None:
        self._margin_seconds = margin_seconds
        # Both map ids to the end of the lease, oldest entry first.
        self._in_hand: OrderedDict[str, float] = OrderedDict()
        self._spent: OrderedDict[str, float] = OrderedDict()
        # Those of `_in_hand` and `_spent` that pause a batch sequence.
        self._preempting: OrderedDict[str, float] = OrderedDict()
        self._spent_preempting: set[str] = set()

    @property
    def count(self) -> int:
        """Plain credits in hand, some of which may be too near their end to be spent."""
        return len(self._in_hand)

    @property
    def preempting_count(self) -> int:
        """Preempting credits in hand."""
        return len(self._preempting)

    @property
    def in_flight_count(self) -> int:
        """Credits spent, without an outcome yet."""
        return len(self._spent)

    def grant(self, credit_ids: Iterable[str], lease_seconds: float, now: float, *, preempting: bool = False) -> None:
        """Takes new credits, or renews the lease of those in hand. One that is spent stays spent."""
        hand = self._preempting if preempting else self._in_hand
        for credit_id in credit_ids:
            if credit_id in self._spent:
                continue
            hand[credit_id] = now + lease_seconds
            hand.move_to_end(credit_id)

    def can_spend(self, now: float, *, urgent: bool = False) -> bool:
        """Whether a credit in hand, for an urgent request also a preempting one, has enough of its lease left."""
        return self._has_fresh(self._in_hand, now) or (urgent and self._has_fresh(self._preempting, now))

    def spend(self, now: float, *, urgent: bool = False) -> str:
        """Spends the credit whose lease was given first, a plain one before one that preempts; the caller has asked
        `can_spend`."""
        preempting = not self._has_fresh(self._in_hand, now)
        assert urgent or not preempting
        hand = self._preempting if preempting else self._in_hand
        while True:
            credit_id, end = hand.popitem(last=False)
            if end - now > self._margin_seconds:
                self._spent[credit_id] = end
                if preempting:
                    self._spent_preempting.add(credit_id)
                return credit_id

    def put_back(self, credit_id: str) -> bool:
        """Takes back a credit whose request was not sent after all. False: it is no longer this book's."""
        end = self._spent.pop(credit_id, None)
        if end is None:
            return False
        hand = self._preempting if credit_id in self._spent_preempting else self._in_hand
        self._spent_preempting.discard(credit_id)
        hand[credit_id] = end
        hand.move_to_end(credit_id, last=False)
        return True

    def revoke(self, credit_ids: Iterable[str]) -> list[str]:
        """Gives up these credits; returns those that were indeed unspent, which the replica may use again."""
        return [credit_id for credit_id in credit_ids if self._pop_in_hand(credit_id) is not None]

    def finish(self, credit_id: str) -> bool:
        """Ends a spent credit by its outcome. False: it was not in flight (any more)."""
        self._spent_preempting.discard(credit_id)
        return self._spent.pop(credit_id, None) is not None

    def drop_expired(self, now: float) -> int:
        """Forgets credits in hand whose lease has ended; returns how many."""
        expired = [
            credit_id for hand in (self._in_hand, self._preempting) for credit_id, end in hand.items() if end <= now
        ]
        for credit_id in expired:
            self._pop_in_hand(credit_id)
        return len(expired)

    def _pop_in_hand(self, credit_id: str) -> float | None:
        return self._in_hand.pop(credit_id, None) or self._preempting.pop(credit_id, None)

    def _has_fresh(self, hand: OrderedDict[str, float], now: float) -> bool:
        return bool(hand) and any(end - now > self._margin_seconds for end in hand.values())

    def reconcile(self, busy_count: int, now: float) -> int:
        """Drops spent credits that cannot be with the replica; returns how many.

        Once its lease has ended, a spent credit's request has arrived or never will. So of these no more can be
        alive than the replica says it runs and lets wait.

        Args:
            busy_count: running and waiting requests of the replica's last load.
        """
        ended = [credit_id for credit_id, end in self._spent.items() if end <= now]
        lost = ended[: max(0, len(ended) - busy_count)]
        for credit_id in lost:
            self.finish(credit_id)
        return len(lost)
