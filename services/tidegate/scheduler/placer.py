"""Takes a credit for a request: which replicas may be asked, which of them is best, which credit is spent. Pure.

Candidates are the ready replicas whose breakers let a request through and that are not beyond their slow start. When
all breakers are open, the one that reopens first is the only candidate, whatever its breaker says: something must
serve. Invariant: while a replica is ready and has a plain credit, and no other one is a candidate, it is one.

Seconds are monotonic; randomness is an argument.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from tidegate.scheduler.breakers import Breakers, BreakerTerms, Result, State, size_of
from tidegate.scheduler.placement import Placement, Policy, Weights, choose, order
from tidegate.scheduler.prefixes import PrefixMemory
from tidegate.scheduler.replica_table import Replica, ReplicaTable
from tidegate.scheduler.slow_start import has_room, shares

FEWEST_STARTS: Final = 4
FEWEST_BATCH_STARTS: Final = 2
"""So many prompts may be computed at once on any replica."""

USUAL_STARTS: Final = 2.0
"""And so many times what is needed for as many to begin as end: where answers are short, many begin."""


class Placer:
    """Places requests on the replicas of a table.

    Args:
        alternative_count: how many next best replicas a placement names.
        random_index: draws a number from 0 to below its argument.
        slow_start_seconds: until a new replica may use all its slots; 0: at once.
        prefix_memory_blocks: block hashes remembered a replica, where the weights count prefixes.
        start_share: of a replica's slots, how many prompts may be computed at once; 1: all. Realtime ones may always.
        batch_start_share: how many there may be for one more batch request.
    """

    def __init__(
        self,
        table: ReplicaTable,
        weights: Weights,
        *,
        alternative_count: int,
        policy: Policy = Policy.SCORE,
        random_index: Callable[[int], int] = lambda count: 0,
        breaker_terms: BreakerTerms | None = None,
        slow_start_seconds: float = 0.0,
        prefix_memory_blocks: int = 0,
        start_share: float = 1.0,
        batch_start_share: float = 1.0,
    ) -> None:
        self._start_share = start_share
        self._batch_start_share = batch_start_share
        self.weights = weights
        self.breakers = Breakers(breaker_terms or BreakerTerms())
        self._table = table
        self._alternative_count = alternative_count
        self._policy = policy
        self._random_index = random_index
        self._slow_start_seconds = slow_start_seconds
        self._prefixes = PrefixMemory(prefix_memory_blocks if weights.prefix else 0)
        self._dispatch_count = 0

    @property
    def heeds_prefixes(self) -> bool:
        """Whether it matters where a prompt's beginning is: some replica reuses what it computed."""
        return bool(self.weights.prefix) and any(
            replica.load is not None and replica.load.reuses_prefixes for replica in self._table
        )

    def can_place(self, now: float, *, urgent: bool = False) -> bool:
        """Whether a request could be placed now, but for the prompts that are being computed."""
        if not self._table.has_credit(now, urgent=urgent):
            return False
        return any(replica.book.can_spend(now, urgent=urgent) for replica in self.candidates(now))

    def place(
        self,
        answer_token_count: int,
        now: float,
        *,
        urgent: bool = False,
        is_batch: bool = False,
        is_owed: bool = False,
        block_hashes: Sequence[int] = (),
    ) -> Placement | None:
        """Spends the best replica's credit on a request; None where none can be spent.

        Args:
            urgent: a realtime request, for which batch ones may be paused.
            is_batch: a batch request, which waits until few prompts are computed.
            is_owed: its class's floor covers it; then it does not wait for that, or it might for ever.
            block_hashes: of the prompt, first block first.
        """
        # Most calls of a full mesh end here, so it comes first.
        if not self._table.has_credit(now, urgent=urgent):
            return None
        candidates = self.candidates(now)
        if not (urgent or is_owed):
            candidates = [replica for replica in candidates if self._may_start(replica, now, is_batch=is_batch)]
        if not any(replica.book.can_spend(now, urgent=urgent) for replica in candidates):
            return None
        held = [self._prefixes.share(each.address, block_hashes) for each in candidates] if block_hashes else ()
        ordered = order(
            candidates,
            self.weights,
            answer_token_count,
            policy=self._policy,
            random_index=self._random_index,
            prefix_shares=held,
        )
        chosen = choose(ordered, now, urgent=urgent)
        assert chosen is not None
        self._dispatch_count += 1
        chosen.dispatch_number = self._dispatch_count
        credit_id = chosen.book.spend(now, urgent=urgent)
        chosen.on_the_way[credit_id] = now
        self.breakers.send(chosen.address, credit_id, now)
        if block_hashes:
            self._prefixes.remember(chosen.address, block_hashes)
        alternatives = [replica.address for replica in ordered if replica is not chosen]
        return Placement(chosen.address, credit_id, tuple(alternatives[: self._alternative_count]), is_owed)

    def put_back(self, placement: Placement) -> None:
        """Takes back the credit of a request that was placed and not sent."""
        replica = self._table.get(placement.address)
        if replica is not None:
            replica.book.put_back(placement.credit_id)
            replica.on_the_way.pop(placement.credit_id, None)
            self.breakers.unsend(placement.address, placement.credit_id)

    def note(
        self,
        address: str,
        credit_id: str,
        result: Result,
        now: float,
        *,
        seconds: float = 0.0,
        prompt_token_count: int = 0,
        answer_token_count: int = 0,
    ) -> None:
        """A request ended there; `seconds` is its time, 0 where that says nothing of the replica."""
        size = size_of(prompt_token_count, answer_token_count)
        self.breakers.note(address, credit_id, result, now, seconds=seconds, size=size)

    def tick(self, now: float) -> None:
        """Looks after what no message tells: replicas that are there or gone, and leases that end."""
        self._table.note_presence(now)
        for replica in self._table:
            replica.book.drop_expired(now)
        addresses = {replica.address for replica in self._table}
        self.breakers.keep(addresses)
        self._prefixes.keep(addresses)

    def candidates(self, now: float) -> list[Replica]:
        """The replicas that may be asked now, with or without a credit."""
        ready = self._table.ready(now)
        trusted = [replica for replica in ready if self.breakers.can_send(replica.address, now)]
        if not trusted and ready:
            return [min(ready, key=lambda replica: self._badness(replica, now))]
        return [
            replica for replica, share in zip(trusted, self._shares(trusted, now), strict=True)
            if has_room(replica.busy_count, replica.load.slot_count if replica.load else 0, share)
        ]  # fmt: skip

    def _may_start(self, replica: Replica, now: float, *, is_batch: bool) -> bool:
        """Whether one more prompt may be computed there: each makes the first tokens of all the others later."""
        slot_count = replica.load.slot_count if replica.load else 0
        if is_batch:
            share, least = self._batch_start_share, float(FEWEST_BATCH_STARTS)
        else:
            share, least = self._start_share, max(FEWEST_STARTS, USUAL_STARTS * replica.usual_starting_count(now))
        return share >= 1 or replica.starting_count(now) < max(least, share * slot_count)

    def slow_start_shares(self, now: float) -> dict[str, float]:
        """The share of its slots that each ready replica may use."""
        ready = self._table.ready(now)
        return {replica.address: share for replica, share in zip(ready, self._shares(ready, now), strict=True)}

    def _shares(self, replicas: Sequence[Replica], now: float) -> list[float]:
        sinces = [max(replica.ready_since, self.breakers.closed_at(replica.address)) for replica in replicas]
        return shares(sinces, self._slow_start_seconds, now)

    def _badness(self, replica: Replica, now: float) -> tuple[bool, float]:
        return self.breakers.state(replica.address, now) is State.OPEN, self.breakers.reopens_at(replica.address)
