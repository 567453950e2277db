from __future__ import annotations

import pytest

from tidegate.scheduler.tenant_limits import LEAST_RATE, MOST_LIMITS, MOST_TENANTS, ROOM_FACTOR, Key, TenantLimits

LOUD = Key("loud", "batch")


class Traffic:
    """One second after the other, of which each limit lets through what it says."""

    def __init__(self, scheduler_count=1):
        self.scheduler_count = scheduler_count
        self.limits = TenantLimits(0.0)
        self.now = 0.0
        self.changes = 0

    def second(self, **asked_and_accepted):
        for name, (asked, accepted) in asked_and_accepted.items():
            key = Key(name, "batch")
            seen = min(asked, self.limits.limits.get(key, asked))
            # This scheduler's part; what is accepted, too, is a part of all.
            for number in range(seen // self.scheduler_count):
                self.limits.see(key)
                if number < accepted // self.scheduler_count:
                    self.limits.accept(key)
        self.now += 1.0
        self.changes += self.limits.end_interval(self.now, self.scheduler_count)

    def seconds(self, count, **asked_and_accepted):
        for _ in range(count):
            self.second(**asked_and_accepted)
        return dict(self.limits.limits)


def test_who_gets_what_it_asks_for_has_no_limit_however_much_it_is():
    assert Traffic().seconds(20, loud=(1000, 900)) == {}


def test_who_is_refused_but_asks_seldom_has_no_limit():
    assert Traffic().seconds(20, loud=(40, 0)) == {}


def test_who_is_nearly_always_refused_is_limited_to_some_times_of_what_it_gets():
    traffic = Traffic()
    limits = traffic.seconds(20, loud=(1000, 30), quiet=(3, 3))
    assert limits == {LOUD: pytest.approx(ROOM_FACTOR * 30, rel=0.3)}
    assert traffic.changes == 1


@pytest.mark.parametrize("scheduler_count", [2, 4])
def test_of_several_schedulers_each_sees_a_part_and_all_have_room(scheduler_count):
    traffic = Traffic(scheduler_count)
    assert traffic.seconds(20, loud=(1000, 40)) == {LOUD: pytest.approx(ROOM_FACTOR * 40, rel=0.3)}
    assert traffic.changes == 1


def test_a_scheduler_that_joins_changes_no_limit():
    traffic = Traffic()
    before = traffic.seconds(20, loud=(1000, 40))
    traffic.scheduler_count = 2
    assert traffic.seconds(20, loud=(1000, 40)) == before
    assert traffic.changes == 1


def test_who_gets_nothing_is_still_looked_at():
    assert Traffic().seconds(20, loud=(1000, 0)) == {LOUD: LEAST_RATE}


def test_the_limit_follows_what_is_accepted():
    traffic = Traffic()
    traffic.seconds(10, loud=(1000, 10))
    assert traffic.seconds(10, loud=(1000, 100))[LOUD] == pytest.approx(ROOM_FACTOR * 100, rel=0.3)
    assert traffic.seconds(20, loud=(1000, 10))[LOUD] == pytest.approx(ROOM_FACTOR * 10, rel=0.3)


def test_a_limit_is_never_in_the_way_of_what_can_be_served():
    traffic = Traffic()
    traffic.seconds(10, loud=(1000, 10))
    for _ in range(10):
        traffic.second(loud=(1000, 1000))
    assert traffic.limits.limits == {}


def test_a_load_that_ends_takes_its_limit_with_it():
    traffic = Traffic()
    assert traffic.seconds(10, loud=(1000, 10))
    assert traffic.seconds(4, loud=(5, 5)) == {}
    assert traffic.seconds(10, loud=(1000, 10))
    assert traffic.seconds(6) == {}


def test_classes_are_limited_apart():
    limits = TenantLimits(0.0)
    for second in range(1, 5):
        for _ in range(200):
            limits.see(LOUD)
            limits.see(Key("loud", "realtime"))
            limits.accept(Key("loud", "realtime"))
        limits.end_interval(float(second))
    assert set(limits.limits) == {LOUD}


def test_what_is_counted_and_what_is_limited_has_a_bound():
    limits = TenantLimits(0.0)
    for number in range(MOST_TENANTS + 500):
        for _ in range(60):
            limits.see(Key(str(number), ""))
    limits.end_interval(1.0)
    assert len(limits.limits) == MOST_LIMITS
    assert Key(str(MOST_TENANTS + 1), "") not in limits.limits
