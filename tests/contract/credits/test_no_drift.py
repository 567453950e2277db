"""Ledgers and books joined by messages that are late, doubled or lost: no slot and no credit is lost for good."""

from __future__ import annotations

import heapq
import itertools
import random
from collections import deque

import pytest

from tidegate.model.credits import Admitted, CreditLedger, Decision, Granted, Revoked, Terms, Urgency
from tidegate.scheduler.credits import CreditBook

SLOTS, LEASE = 32, 5.0


class World:
    """One replica and its schedulers in simulated time; seconds.

    Args:
        lost_share: of the requests on their way, and of the outcomes, that never arrive.
    """

    def __init__(self, seed: int, scheduler_count: int, *, lost_share: float = 0.0) -> None:
        self.now = 0.0
        self.dice = random.Random(seed)
        terms = Terms(
            lease_seconds=LEASE,
            grace_seconds=1.0,
            protected_seconds=0.25,
            queue_limit=64,
            overflow_slot_count=0,
            preempting_share=0.5,
        )
        self.ledger = CreditLedger(terms, "life")
        self.ledger.set_capacity(SLOTS, can_start=True)
        self.books = {key: CreditBook(0.25) for key in range(1, scheduler_count + 1)}
        self.waiting: dict[int, deque[Urgency]] = {key: deque() for key in self.books}
        self.realtime_waiting = dict.fromkeys(self.books, 0)
        self.served = dict.fromkeys(self.books, 0)
        self.spent: set[str] = set()
        self.asked_count = 0
        self._told: dict[int, tuple[int, int]] = {}
        self._lost_share = lost_share
        self._events: list[tuple[float, int, object]] = []
        self._numbers = itertools.count(1000)
        for key in self.books:
            self.ledger.connect(key)
        self.settle()

    def after(self, seconds: float, act) -> None:
        heapq.heappush(self._events, (self.now + seconds, next(self._numbers), act))

    def run(self, until: float) -> None:
        while self._events and self._events[0][0] <= until:
            self.now, _, act = heapq.heappop(self._events)
            act()
        self.now = until

    def ask(self, key: int, urgency: Urgency) -> None:
        self.asked_count += 1
        self.waiting[key].append(urgency)
        self.realtime_waiting[key] += urgency is Urgency.REALTIME
        self.match(key)

    def match(self, key: int) -> None:
        book, lane = self.books[key], self.waiting[key]
        while lane and book.can_spend(self.now, urgent=lane[0] is Urgency.REALTIME):
            urgency = lane.popleft()
            self.realtime_waiting[key] -= urgency is Urgency.REALTIME
            credit_id = book.spend(self.now, urgent=urgency is Urgency.REALTIME)
            assert credit_id not in self.spent
            self.spent.add(credit_id)
            if self.dice.random() >= self._lost_share:
                self.after(self.dice.uniform(0.001, 0.02), lambda u=urgency, c=credit_id: self.arrive(key, u, c))
        demand = (len(lane), self.realtime_waiting[key])
        if demand != self._told.get(key):
            self._told[key] = demand
            self.after(0.002, lambda: (self.ledger.set_demand(key, *demand), self.settle()))

    def arrive(self, key: int, urgency: Urgency, credit_id: str) -> None:
        holder = next(self._numbers)
        if self.ledger.take(holder, credit_id, resumed=False, now=self.now, urgency=urgency) is not Decision.REFUSE:
            leaves_early = self.dice.random() < 1 / 3
            seconds = self.dice.uniform(0.0, 0.1) if leaves_early else 0.1
            self.after(seconds, lambda: self.end(key, holder, credit_id))
        self.settle()

    def end(self, key: int, holder: int, credit_id: str) -> None:
        self.ledger.release(holder)
        self.served[key] += 1
        for _ in range(self.dice.choice([1, 1, 2])):  # Some outcomes come twice.
            if self.dice.random() >= self._lost_share:
                self.after(0.002, lambda: self.books[key].finish(credit_id))
        self.settle()

    def settle(self) -> None:
        for action in self.ledger.settle(self.now):
            match action:
                case Granted(key, ids, lease, preempting):
                    self.after(0.002, lambda k=key, i=ids, le=lease, p=preempting: self.hear_grant(k, i, le, p))
                case Revoked(key, ids):
                    self.after(0.002, lambda k=key, i=ids: self.books[k].revoke(i))
                case Admitted():
                    pass

    def hear_grant(self, key: int, ids: list[str], lease: float, preempting: bool) -> None:
        self.books[key].grant(ids, lease, self.now, preempting=preempting)
        self.match(key)

    def tick(self, until: float) -> None:
        """Time passes for the ledger and the books, as their services let it."""
        for step in range(int((until - self.now) / 0.25)):
            self.after(step * 0.25, self._look)

    def _look(self) -> None:
        self.settle()
        busy_count = self.ledger.engine_count + self.ledger.waiting_count
        for key, book in self.books.items():
            book.drop_expired(self.now)
            book.reconcile(busy_count, self.now)
            self.match(key)


def offer(world: World, count: int, per_second: float) -> float:
    """So many requests, between all schedulers; returns when the last one comes."""
    at = 0.0
    for _ in range(count):
        at += world.dice.expovariate(per_second)
        key, urgency = world.dice.choice(list(world.books)), world.dice.choice(list(Urgency))
        world.after(at, lambda k=key, u=urgency: world.ask(k, u))
    return at


def is_at_rest(world: World) -> None:
    ledger = world.ledger
    assert (ledger.running_count, ledger.paused_count, ledger.waiting_count) == (0, 0, 0)
    assert [book.in_flight_count for book in world.books.values()] == [0] * len(world.books)
    assert sum(book.count for book in world.books.values()) == ledger.granted_count == SLOTS


def test_nothing_drifts_in_100_000_requests_of_which_a_third_leave_early():
    world = World(1, 2)
    end = offer(world, 100_000, per_second=400)
    world.tick(end + 60)
    world.run(end + 59)
    assert sum(world.served.values()) == world.asked_count == 100_000
    is_at_rest(world)


@pytest.mark.parametrize("seed", range(3))
def test_lost_requests_and_outcomes_cost_a_slot_for_a_lease_at_most(seed):
    world = World(seed, 3, lost_share=0.02)
    end = offer(world, 10_000, per_second=200)
    world.tick(end + 60)
    world.run(end + 59)
    assert sum(world.served.values()) > 9_500
    is_at_rest(world)


def test_the_share_of_an_idle_scheduler_is_the_busy_ones_within_a_second():
    world = World(2, 2)
    world.tick(10)
    world.run(5.0)
    for _ in range(2_000):
        world.ask(1, Urgency.STANDARD)
    world.run(6.0)
    assert world.books[1].in_flight_count >= SLOTS - 2
    assert world.books[2].count == 0


def test_two_busy_schedulers_share_by_their_demand():
    world = World(3, 2)
    world.tick(20)
    for _ in range(6_000):
        world.ask(1, Urgency.STANDARD)
    for _ in range(2_000):
        world.ask(2, Urgency.STANDARD)
    world.run(10.0)
    assert 2.5 < world.served[1] / world.served[2] < 3.5
