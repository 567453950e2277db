from __future__ import annotations

import random

import pytest

from tidegate.scheduler.credits import CreditBook

MARGIN = 0.25


@pytest.fixture
def book():
    return CreditBook(MARGIN)


def test_a_granted_credit_is_spent_once(book):
    book.grant(["a"], 10, now=0)
    assert book.can_spend(0)
    assert book.spend(0) == "a"
    assert not book.can_spend(0)
    assert (book.count, book.in_flight_count) == (0, 1)


def test_a_credit_near_the_end_of_its_lease_is_not_spent(book):
    book.grant(["a"], 10, now=0)
    assert book.can_spend(10 - MARGIN - 0.01)
    assert not book.can_spend(10 - MARGIN)


def test_spending_skips_credits_that_are_too_old(book):
    book.grant(["old"], 1, now=0)
    book.grant(["new"], 10, now=0)
    assert book.spend(0.9) == "new"
    assert book.count == 0


def test_the_oldest_lease_is_spent_first(book):
    book.grant(["a", "b"], 10, now=0)
    book.grant(["a"], 10, now=5)
    assert book.spend(5) == "b"


def test_a_renewed_lease_counts_from_its_renewal(book):
    book.grant(["a"], 10, now=0)
    book.grant(["a"], 10, now=9)
    assert book.drop_expired(12) == 0
    assert book.spend(12) == "a"


def test_a_spent_credit_is_not_granted_again(book):
    book.grant(["a"], 10, now=0)
    book.spend(0)
    book.grant(["a"], 10, now=1)
    assert not book.can_spend(1)
    assert book.in_flight_count == 1


def test_revoked_credits_are_given_back_only_if_they_are_unspent(book):
    book.grant(["a", "b", "c"], 10, now=0)
    assert book.spend(0) == "a"
    assert book.revoke(["a", "b", "unknown"]) == ["b"]
    assert book.spend(0) == "c"
    assert not book.can_spend(0)


def test_a_credit_put_back_is_the_next_to_be_spent(book):
    book.grant(["a", "b"], 10, now=0)
    assert book.spend(0) == "a"
    assert book.put_back("a")
    assert book.in_flight_count == 0
    assert book.spend(0) == "a"


def test_a_credit_put_back_keeps_its_lease(book):
    book.grant(["a"], 10, now=0)
    book.spend(0)
    book.put_back("a")
    assert not book.can_spend(9.9)


def test_only_a_spent_credit_can_be_put_back_or_finished(book):
    book.grant(["a"], 10, now=0)
    assert not book.put_back("a")
    assert not book.finish("a")
    book.spend(0)
    assert book.finish("a")
    assert not book.finish("a")


def test_expired_credits_are_dropped(book):
    book.grant(["a"], 1, now=0)
    book.grant(["b"], 5, now=0)
    assert book.drop_expired(1) == 1
    assert book.count == 1


def test_spent_credits_whose_request_never_came_are_dropped_after_their_lease(book):
    book.grant(["a", "b", "c"], 10, now=0)
    for _ in range(3):
        book.spend(0)
    assert book.reconcile(busy_count=0, now=9) == 0
    assert book.reconcile(busy_count=1, now=10) == 2
    assert book.in_flight_count == 1
    assert book.reconcile(busy_count=1, now=100) == 0


@pytest.mark.parametrize("seed", range(8))
def test_random_runs_spend_nothing_twice_and_nothing_expired(seed):
    chance, book, now = random.Random(seed), CreditBook(MARGIN), 0.0
    ends: dict[str, float] = {}
    spent: set[str] = set()
    for number in range(2000):
        now += chance.random() * 0.2
        match chance.randrange(7):
            case 0 | 1:
                credit_id, lease = str(number), chance.uniform(0.1, 3)
                book.grant([credit_id], lease, now)
                ends[credit_id] = now + lease
            case 2 | 3 if book.can_spend(now):
                credit_id = book.spend(now)
                assert credit_id not in spent
                assert ends[credit_id] - now > MARGIN
                spent.add(credit_id)
            case 4:
                for credit_id in book.revoke(chance.sample(sorted(ends), min(2, len(ends)))):
                    assert credit_id not in spent
                    del ends[credit_id]
            case 5 if spent:
                credit_id = chance.choice(sorted(spent))
                if chance.random() < 0.3:
                    assert book.put_back(credit_id)
                else:
                    assert book.finish(credit_id)
                    del ends[credit_id]
                spent.discard(credit_id)
            case _:
                book.drop_expired(now)
                lefts = [end - now for key, end in ends.items() if key not in spent]
                assert sum(left > MARGIN for left in lefts) <= book.count <= sum(left > 0 for left in lefts)
        assert book.in_flight_count == len(spent)
