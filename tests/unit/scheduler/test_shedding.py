"""What is let through when more comes than can be decided."""

import random
from collections import deque

import pytest

from tidegate.scheduler.lanes import NO_FLOORS, Floors
from tidegate.scheduler.request import ServiceClass
from tidegate.scheduler.shedding import (
    KEPT_FACTOR,
    SMALLEST_SHARE,
    SOON_LATE_FEWEST,
    SOON_LATE_RUN,
    SOON_LATE_SECONDS,
    Shedder,
)

INTERVAL = 0.1
STEP = 0.01
REALTIME, STANDARD, BATCH = ServiceClass


class Mesh:
    """Envoy with its shares, a scheduler that decides so many a second, and the requests between them."""

    def __init__(
        self, decidable_rate: float, seed: int = 1, given_seconds: float | None = None, floors: Floors = NO_FLOORS
    ) -> None:
        self.given_seconds = given_seconds
        self.now = 0.0
        self.shedder = Shedder(late_seconds=0.5, drain_seconds=2.0, now=0.0, floors=floors)
        self.decidable_rate = decidable_rate
        self.waiting: deque[tuple[ServiceClass, float]] = deque()
        self.decided = dict.fromkeys(ServiceClass, 0)
        self.refused = dict.fromkeys(ServiceClass, 0)
        self.longest_delay = 0.0
        self.soon_late_count = 0
        self.accepted_share = dict.fromkeys(ServiceClass, 1.0)
        self._dice = random.Random(seed)
        self._budget = 0.0
        self._next_interval = INTERVAL

    def run(self, seconds: float, rates: dict[ServiceClass, float]) -> None:
        end = self.now + seconds
        while self.now < end:
            for service_class, rate in rates.items():
                for _ in range(self._count(rate * STEP)):
                    self.arrive(service_class)
            self._decide()
            self.now += STEP
            if self.now >= self._next_interval:
                self._next_interval += INTERVAL
                self.shedder.end_interval(self.now)

    def arrive(self, service_class: ServiceClass) -> None:
        if self._dice.random() < self.shedder.shares[service_class]:
            self.waiting.append((service_class, self.now))
        else:
            self.refused[service_class] += 1

    def _decide(self) -> None:
        self._budget = min(self._budget + self.decidable_rate * STEP, 10.0 + len(self.waiting))
        while self.waiting and self._budget >= 1:
            self._budget -= 1
            service_class, arrived_at = self.waiting.popleft()
            self.shedder.see(service_class, arrived_at, self.now, self.given_seconds)
            self.decided[service_class] += 1
            if self._dice.random() < self.accepted_share[service_class]:
                self.shedder.accept(service_class)
            self.longest_delay = max(self.longest_delay, self.now - arrived_at)
            self.soon_late_count += self.now - arrived_at > SOON_LATE_SECONDS

    def _count(self, expected: float) -> int:
        whole = int(expected)
        return whole + (self._dice.random() < expected - whole)


@pytest.mark.parametrize("load", [0.3, 0.8])
def test_nothing_is_refused_while_all_can_be_decided(load):
    mesh = Mesh(1000)
    mesh.run(20, {STANDARD: 1000 * load})
    assert sum(mesh.refused.values()) == 0


@pytest.mark.parametrize("load", [2, 5, 10])
def test_what_can_be_decided_is_decided_and_soon_however_much_comes(load):
    mesh = Mesh(400)
    mesh.run(5, {STANDARD: 400 * load})
    assert mesh.longest_delay < 7
    mesh.decided[STANDARD], mesh.longest_delay = 0, 0.0
    mesh.run(30, {STANDARD: 400 * load})
    assert mesh.decided[STANDARD] > 0.85 * 400 * 30
    mesh.longest_delay = 0.0
    mesh.run(20, {STANDARD: 400 * load})
    assert mesh.longest_delay < 2


@pytest.mark.parametrize("load", [2, 5, 10])
def test_where_clients_give_little_time_what_is_let_through_is_looked_at_at_once(load):
    mesh = Mesh(400, given_seconds=2.0)
    mesh.run(5, {STANDARD: 400 * load})
    mesh.decided[STANDARD], mesh.longest_delay = 0, 0.0
    mesh.run(30, {STANDARD: 400 * load})
    assert mesh.decided[STANDARD] > 0.85 * 400 * 30
    assert mesh.longest_delay < 0.5


def test_the_most_urgent_class_loses_nothing_that_the_others_can_lose():
    mesh = Mesh(400)
    mesh.run(10, {REALTIME: 100, STANDARD: 200, BATCH: 2000})
    mesh.refused = dict.fromkeys(ServiceClass, 0)
    mesh.run(20, {REALTIME: 100, STANDARD: 200, BATCH: 2000})
    assert mesh.refused[REALTIME] < 0.01 * 100 * 20
    assert mesh.refused[BATCH] > 0.9 * 2000 * 20
    assert mesh.refused[STANDARD] < 0.2 * 200 * 20


def test_a_class_is_never_shut_out_entirely():
    mesh = Mesh(100)
    mesh.run(30, {REALTIME: 1000, BATCH: 1000})
    assert mesh.shedder.shares[BATCH] >= SMALLEST_SHARE
    assert mesh.decided[BATCH] > 0


def test_each_class_has_its_floor_of_what_can_be_decided():
    mesh = Mesh(1000, floors={STANDARD: 0.3, BATCH: 0.1})
    rates = {REALTIME: 10_000, STANDARD: 1000, BATCH: 1000}
    mesh.run(30, rates)
    mesh.decided, mesh.longest_delay = dict.fromkeys(ServiceClass, 0), 0.0
    mesh.run(20, rates)
    total = sum(mesh.decided.values())
    assert total > 0.85 * 20 * 1000
    assert mesh.decided[STANDARD] / total == pytest.approx(0.3, abs=0.05)
    assert mesh.decided[BATCH] / total == pytest.approx(0.1, abs=0.05)
    assert mesh.longest_delay < 2


def test_what_a_class_does_not_use_of_its_floor_the_others_have():
    mesh = Mesh(1000, floors={STANDARD: 0.3, BATCH: 0.1})
    mesh.run(30, {REALTIME: 10_000, STANDARD: 100})
    mesh.decided, mesh.refused = dict.fromkeys(ServiceClass, 0), dict.fromkeys(ServiceClass, 0)
    mesh.run(20, {REALTIME: 10_000, STANDARD: 100})
    assert mesh.refused[STANDARD] < 0.1 * 20 * 100
    assert mesh.decided[REALTIME] > 0.7 * 20 * 1000


def test_after_the_load_has_ended_everything_is_let_through_again_soon():
    mesh = Mesh(400)
    mesh.run(20, {STANDARD: 4000})
    mesh.run(3, {})
    mesh.run(2, {STANDARD: 50})
    mesh.refused[STANDARD] = 0
    mesh.run(10, {STANDARD: 50})
    assert not mesh.shedder.is_shedding
    assert mesh.refused[STANDARD] == 0


def test_a_burst_that_is_decided_within_half_a_second_sheds_nothing():
    mesh = Mesh(1000)
    for _ in range(450):
        mesh.arrive(STANDARD)
    mesh.run(3, {STANDARD: 100})
    assert mesh.refused[STANDARD] == 0


class TestReplicas:
    """A scheduler that is in time before replicas that are not: they finish so many a second."""

    FINISHED_RATE = 200

    def run(self, shedder, begin, seconds, late_seconds, *, rate=1000):
        for number in range(round(seconds / INTERVAL)):
            now = begin + number * INTERVAL
            for _ in range(round(rate * INTERVAL * shedder.shares[STANDARD])):
                shedder.see(STANDARD, now, now, 2.0)
            for _ in range(round(self.FINISHED_RATE * INTERVAL)):
                shedder.see_end()
            shedder.end_interval(now + INTERVAL, late_seconds)

    def test_what_replicas_finish_is_what_can_be_taken(self):
        shedder = Shedder(late_seconds=0.5, drain_seconds=2.0, now=0.0)
        self.run(shedder, 0.0, 2.0, 0.01)
        assert not shedder.is_shedding
        self.run(shedder, 2.0, 1.0, 0.3)
        assert 0 < shedder.shares[STANDARD] < self.FINISHED_RATE / 1000
        self.run(shedder, 3.0, 20.0, 0.01)
        assert shedder.shares[STANDARD] > 0.8 * self.FINISHED_RATE / 1000

    def test_a_moment_of_it_is_nothing(self):
        shedder = Shedder(late_seconds=0.5, drain_seconds=2.0, now=0.0)
        for number in range(50):
            self.run(shedder, number * INTERVAL, INTERVAL, 0.3 * (number % 3 != 0))
        assert not shedder.is_shedding


def test_clocks_that_differ_do_not_count_as_lateness():
    shedder = Shedder(late_seconds=0.5, drain_seconds=2.0, now=0.0)
    for arrived_at in (-3600.0, 5.0):
        shedder.see(STANDARD, arrived_at, 0.05, None)
    assert not shedder.end_interval(0.1)
    assert not shedder.is_shedding


def test_what_would_be_refused_anyway_is_refused_as_soon_as_anything_is_a_little_late():
    mesh = Mesh(200, given_seconds=10.0)
    mesh.accepted_share |= {STANDARD: 0.1}
    mesh.run(5, {STANDARD: 250})
    mesh.longest_delay = 0.0
    mesh.run(20, {STANDARD: 250})
    assert mesh.longest_delay < 0.3
    assert mesh.decided[STANDARD] > KEPT_FACTOR * 0.1 * 25 * 250


def test_of_what_is_accepted_nothing_is_lost_because_something_is_a_little_late():
    mesh = Mesh(200, given_seconds=10.0)
    mesh.accepted_share |= {BATCH: 0.1}
    mesh.run(25, {REALTIME: 10, BATCH: 240})
    assert mesh.refused[REALTIME] == 0
    assert mesh.refused[BATCH] > 0
    mesh.longest_delay = 0.0
    mesh.run(20, {REALTIME: 10, BATCH: 240})
    assert mesh.longest_delay < 0.3


def test_what_is_much_too_late_is_refused_although_it_would_be_accepted():
    mesh = Mesh(200, given_seconds=10.0)
    mesh.run(20, {REALTIME: 800})
    mesh.longest_delay = 0.0
    mesh.run(20, {REALTIME: 800})
    assert mesh.longest_delay < 2.0
    assert mesh.decided[REALTIME] > 0.85 * 40 * 200


def looked_at(delays, accepted_count=0):
    """A shedder after one interval, in which requests were looked at with these delays in milliseconds."""
    shedder = Shedder(late_seconds=0.5, drain_seconds=2.0, now=0.0)
    for number, delay in enumerate(delays):
        now = INTERVAL * number / len(delays)
        shedder.see(STANDARD, now - delay / 1000, now, 10.0)
    for _ in range(accepted_count):
        shedder.accept(STANDARD)
    shedder.end_interval(INTERVAL)
    return shedder


def test_a_crowd_that_is_over_before_its_interval_is_reason_enough_to_refuse_what_would_be_refused_anyway():
    crowd = [1] * 20 + [20] * SOON_LATE_RUN + [1] * 20
    assert looked_at(crowd).is_shedding
    assert not looked_at(crowd, accepted_count=len(crowd)).is_shedding
    assert not looked_at([1, 20, 20, 20] * 2 * SOON_LATE_RUN).is_shedding


def test_a_burst_of_a_few_that_are_looked_at_a_little_late_and_not_decided_yet_sheds_nothing():
    assert not looked_at([1] + [40] * 12).is_shedding
    assert not looked_at([1] + [40] * (SOON_LATE_FEWEST - 2)).is_shedding
    assert looked_at([1] + [40] * (SOON_LATE_FEWEST - 1)).is_shedding


def test_clocks_that_differ_are_no_crowd():
    assert not looked_at([40] * 20 + [41] * 20).is_shedding
    assert looked_at([40] * 20 + [60] * 20).is_shedding


def test_a_crowd_takes_nothing_from_a_class_of_which_enough_is_accepted():
    shedder = Shedder(late_seconds=0.5, drain_seconds=2.0, now=0.0)
    shedder.see(REALTIME, 0.0, 0.001, 10.0)
    for number in range(60):
        shedder.see((REALTIME, STANDARD, BATCH)[number % 3], 0.0, 0.02, 10.0)
    for service_class, count in ((REALTIME, 0), (STANDARD, 4), (BATCH, 16)):
        for _ in range(count):
            shedder.accept(service_class)
    shedder.end_interval(0.04)
    shares = shedder.shares
    assert shares[REALTIME] < 1
    assert shares[STANDARD] == pytest.approx(KEPT_FACTOR * 0.2)
    assert shares[BATCH] == 1


def test_while_more_would_only_be_refused_hardly_more_is_let_through():
    mesh = Mesh(200, given_seconds=10.0)
    mesh.accepted_share |= {STANDARD: 0.1}
    mesh.run(10, {STANDARD: 400})
    mesh.decided[STANDARD] = mesh.soon_late_count = 0
    mesh.run(60, {STANDARD: 400})
    assert mesh.soon_late_count < 0.01 * mesh.decided[STANDARD]


def test_when_more_can_be_accepted_more_is_let_through_again():
    mesh = Mesh(200, given_seconds=10.0)
    mesh.accepted_share |= {STANDARD: 0.1}
    mesh.run(30, {STANDARD: 400})
    mesh.accepted_share |= {STANDARD: 1.0}
    mesh.run(10, {STANDARD: 400})
    mesh.decided[STANDARD] = 0
    mesh.run(10, {STANDARD: 400})
    assert mesh.decided[STANDARD] > 0.8 * 200 * 10


def test_what_was_refused_on_the_way_counts_among_what_came():
    shedder = Shedder(late_seconds=0.5, drain_seconds=2.0, now=0.0)
    assert shedder.see(STANDARD, 0.0, 0.01, None) == 1
    for number in range(100):
        shedder.see(STANDARD, number / 1000, 1.0, None)
    shedder.end_interval(1.0)
    share = shedder.shares[STANDARD]
    assert share < 1
    assert shedder.see(STANDARD, 0.9, 1.1, None) == 1
    assert shedder.see(STANDARD, 1.05, 1.1, None) == pytest.approx(1 / share)
