"""The ledger of slots and credits: scripts, and seeded random runs that check its invariants after each step."""

from __future__ import annotations

import random

import pytest

from tidegate.model.credits import Admitted, CreditLedger, Decision, Granted, Revoked, Terms

LEASE, GRACE, PROTECTED = 5.0, 1.0, 0.25


def make_ledger(slots: int = 4, queue_limit: int = 3, overflow: int = 1) -> CreditLedger:
    terms = Terms(
        lease_seconds=LEASE,
        grace_seconds=GRACE,
        protected_seconds=PROTECTED,
        queue_limit=queue_limit,
        overflow_slot_count=overflow,
    )
    ledger = CreditLedger(terms, "life")
    ledger.set_capacity(slots, can_start=True)
    return ledger


def granted(actions, session: int) -> list[str]:
    return [
        i for action in actions if isinstance(action, Granted) and action.session == session for i in action.credit_ids
    ]


def revoked(actions, session: int) -> list[str]:
    return [
        i for action in actions if isinstance(action, Revoked) and action.session == session for i in action.credit_ids
    ]


def admitted(actions) -> list[int]:
    return [action.holder for action in actions if isinstance(action, Admitted)]


def test_an_idle_replica_grants_all_free_slots_to_its_scheduler():
    ledger = make_ledger()
    ledger.connect(1)
    assert len(granted(ledger.settle(0.0), 1)) == 4
    assert ledger.free_count == 0


def test_idle_slots_are_divided_evenly():
    ledger = make_ledger()
    ledger.connect(1)
    ledger.connect(2)
    actions = ledger.settle(0.0)
    assert [len(granted(actions, 1)), len(granted(actions, 2))] == [2, 2]


def test_a_credit_starts_a_request_at_once_and_only_one():
    ledger = make_ledger(slots=1)
    ledger.connect(1)
    (credit,) = granted(ledger.settle(0.0), 1)
    assert ledger.take(10, credit, resumed=False, now=0.1) is Decision.START
    assert ledger.take(11, credit, resumed=False, now=0.1) is Decision.WAIT
    assert ledger.spent_by(10).credit_id == credit


def test_the_slot_of_a_request_that_ended_is_granted_again():
    ledger = make_ledger(slots=1)
    ledger.connect(1)
    (first,) = granted(ledger.settle(0.0), 1)
    ledger.take(10, first, resumed=False, now=0.0)
    assert ledger.settle(0.0) == []
    ledger.release(10)
    (second,) = granted(ledger.settle(0.1), 1)
    assert second != first


def test_a_credit_whose_request_never_came_is_replaced_after_half_its_lease():
    ledger = make_ledger(slots=1)
    ledger.connect(1)
    (lost,) = granted(ledger.settle(0.0), 1)
    assert ledger.next_event_seconds(0.0) == LEASE / 2
    actions = ledger.settle(LEASE / 2)
    assert revoked(actions, 1) == [lost]
    assert len(granted(actions, 1)) == 1


def test_a_request_on_its_way_with_a_replaced_credit_still_starts():
    ledger = make_ledger(slots=1)
    ledger.connect(1)
    (old,) = granted(ledger.settle(0.0), 1)
    (new,) = granted(ledger.settle(LEASE / 2), 1)
    assert ledger.take(10, old, resumed=False, now=LEASE / 2 + 0.01) is Decision.START
    assert revoked(ledger.settle(LEASE / 2 + 0.01), 1) == [new]
    assert ledger.take(11, new, resumed=False, now=LEASE / 2 + 0.02) is Decision.WAIT


def test_a_credit_is_not_honoured_after_lease_and_grace():
    ledger = make_ledger(slots=1)
    ledger.connect(1)
    (old,) = granted(ledger.settle(0.0), 1)
    ledger.settle(LEASE / 2)
    ledger.settle(LEASE)
    ledger.take(9, "", resumed=False, now=LEASE)
    assert ledger.take(10, old, resumed=False, now=LEASE + GRACE + 0.01) is Decision.WAIT


def test_the_credits_of_a_scheduler_that_left_are_free():
    ledger = make_ledger()
    ledger.connect(1)
    ids = granted(ledger.settle(0.0), 1)
    ledger.disconnect(1)
    assert ledger.free_count == 4
    assert ledger.take(10, ids[0], resumed=False, now=0.0) is Decision.START
    assert ledger.spent_by(10) is None


def test_a_given_back_credit_is_free_and_another_schedulers_is_not_touched():
    ledger = make_ledger(slots=2)
    ledger.connect(1)
    ledger.connect(2)
    actions = ledger.settle(0.0)
    ledger.give_back(1, [*granted(actions, 1), *granted(actions, 2), "unknown"])
    assert ledger.granted_count == 1


def test_a_request_without_a_credit_takes_back_an_unspent_one():
    ledger = make_ledger(slots=1)
    ledger.connect(1)
    (credit,) = granted(ledger.settle(0.0), 1)
    assert ledger.take(10, "", resumed=False, now=0.0) is Decision.START
    assert revoked(ledger.settle(0.0), 1) == [credit]


def test_requests_without_credits_wait_in_order_and_past_the_bound_are_refused():
    ledger = make_ledger(slots=1, queue_limit=2)
    decisions = [ledger.take(holder, "", resumed=False, now=0.0) for holder in range(4)]
    assert decisions == [Decision.START, Decision.WAIT, Decision.WAIT, Decision.REFUSE]
    ledger.release(0)
    assert admitted(ledger.settle(1.0)) == [1]
    ledger.release(2)
    ledger.release(1)
    assert admitted(ledger.settle(2.0)) == []
    assert ledger.running_count == 0


def test_nobody_is_granted_a_slot_while_somebody_waits_for_one():
    ledger = make_ledger(slots=1)
    ledger.take(1, "", resumed=False, now=0.0)
    ledger.take(2, "", resumed=False, now=0.0)
    ledger.connect(1)
    ledger.set_demand(1, 5)
    ledger.release(1)
    actions = ledger.settle(0.0)
    assert admitted(actions) == [2]
    assert granted(actions, 1) == []


def test_a_resumed_request_goes_a_little_over_the_slots_and_ahead_of_the_queue():
    ledger = make_ledger(slots=1, overflow=1)
    ledger.take(1, "", resumed=False, now=0.0)
    ledger.take(2, "", resumed=False, now=0.0)
    assert ledger.take(3, "", resumed=True, now=0.0) is Decision.START
    assert ledger.take(4, "", resumed=True, now=0.0) is Decision.WAIT
    ledger.release(1)
    assert admitted(ledger.settle(0.0)) == [4]


def test_while_the_engine_cannot_start_more_only_promised_slots_are_given():
    ledger = make_ledger(slots=2)
    ledger.connect(1)
    credit = granted(ledger.settle(0.0), 1)[0]
    ledger.set_capacity(2, can_start=False)
    assert ledger.take(1, "", resumed=False, now=0.0) is Decision.WAIT
    assert ledger.take(2, credit, resumed=False, now=0.0) is Decision.START
    ledger.set_capacity(2, can_start=True)
    assert admitted(ledger.settle(0.0)) == [1]


def test_fewer_slots_take_back_what_was_granted_too_much():
    ledger = make_ledger(slots=4)
    ledger.connect(1)
    ledger.settle(0.0)
    ledger.set_capacity(1, can_start=True)
    assert len(revoked(ledger.settle(0.1), 1)) == 3


def test_a_scheduler_with_demand_gets_what_an_idle_one_holds_once_it_is_not_on_its_way():
    ledger = make_ledger(slots=2)
    ledger.connect(1)
    ledger.settle(0.0)
    ledger.connect(2)
    ledger.set_demand(2, 5)
    assert ledger.settle(0.1) == []
    assert ledger.next_event_seconds(0.1) == pytest.approx(PROTECTED - 0.1)
    actions = ledger.settle(PROTECTED)
    assert len(revoked(actions, 1)) == 2
    assert len(granted(actions, 2)) == 2


def test_slots_that_come_one_by_one_are_divided_by_demand_and_nobody_starves():
    ledger = make_ledger(slots=1)
    ledger.connect(1)
    ledger.connect(2)
    ledger.set_demand(1, 90)
    ledger.set_demand(2, 10)
    counts = {1: 0, 2: 0}
    for turn in range(100):
        actions = ledger.settle(float(turn) / 100)
        for session in counts:
            for credit in granted(actions, session):
                counts[session] += 1
                assert ledger.take(turn, credit, resumed=False, now=float(turn) / 100) is Decision.START
        ledger.release(turn)
    assert counts == {1: 90, 2: 10}


@pytest.mark.parametrize("seed", range(20))
def test_invariants_hold_in_random_runs(seed):
    dice = random.Random(seed)
    overflow, queue_limit = dice.randrange(3), dice.randrange(1, 5)
    ledger = make_ledger(slots=0, queue_limit=queue_limit, overflow=overflow)
    now, next_key, slots = 0.0, 1, 0
    hands: dict[int, set[str]] = {}
    running: set[int] = set()
    waiting: set[int] = set()
    spent: set[str] = set()
    for _ in range(600):
        now += dice.choice([0.0, 0.01, 0.1, 1.0])
        step = dice.randrange(9)
        if step == 0:
            slots = dice.randrange(8)
            ledger.set_capacity(slots, can_start=dice.random() < 0.8)
        elif step == 1 and len(hands) < 4:
            ledger.connect(next_key)
            hands[next_key] = set()
            next_key += 1
        elif step == 2 and hands:
            session = dice.choice(list(hands))
            if dice.random() < 0.3:
                ledger.disconnect(session)
                del hands[session]
            else:
                ledger.set_demand(session, dice.randrange(10))
        elif step == 3 and hands:
            session = dice.choice(list(hands))
            back = set(list(hands[session])[:2])
            hands[session] -= back
            ledger.give_back(session, back)
        elif step in (4, 5, 6):
            session = dice.choice(list(hands)) if hands else None
            has_credit = session is not None and hands[session] and dice.random() < 0.7
            credit = hands[session].pop() if has_credit else ""
            decision = ledger.take(next_key, credit, resumed=dice.random() < 0.2, now=now)
            if has_credit:
                # Within its lease, what a scheduler holds is always good for a start.
                assert decision is Decision.START
                assert credit not in spent
                spent.add(credit)
            if decision is Decision.START:
                running.add(next_key)
                assert len(running) <= slots + overflow
            elif decision is Decision.WAIT:
                waiting.add(next_key)
            next_key += 1
        elif running | waiting:
            holder = dice.choice(sorted(running | waiting))
            ledger.release(holder)
            running.discard(holder)
            waiting.discard(holder)
        for action in ledger.settle(now):
            match action:
                case Granted(session, ids, lease_seconds):
                    assert lease_seconds == LEASE
                    assert not hands[session] & set(ids)
                    hands[session] |= set(ids)
                case Revoked(session, ids):
                    hands.get(session, set()).difference_update(ids)
                case Admitted(holder):
                    waiting.remove(holder)
                    running.add(holder)
        assert ledger.running_count == len(running)
        assert ledger.waiting_count == len(waiting) <= queue_limit
        assert ledger.granted_count == sum(map(len, hands.values()))

        if len(running) <= slots:
            assert ledger.granted_count + len(running) <= slots
        else:
            assert ledger.granted_count == 0


def test_a_credit_that_no_request_will_spend_any_more_is_free_at_once():
    ledger = make_ledger(slots=1)
    ledger.connect(1)
    (credit,) = granted(ledger.settle(0.0), 1)
    assert ledger.forfeit(credit, 0.1) == 1
    assert ledger.free_count == 1
    assert ledger.forfeit(credit, 0.2) is None
    assert granted(ledger.settle(0.2), 1)


def test_one_that_was_replaced_meanwhile_leaves_its_successor_in_the_hand():
    ledger = make_ledger(slots=1)
    ledger.connect(1)
    (credit,) = granted(ledger.settle(0.0), 1)
    (successor,) = granted(ledger.settle(LEASE / 2), 1)
    assert ledger.forfeit(credit, LEASE / 2 + 0.1) == 1
    assert ledger.granted_count == 1
    assert ledger.take(7, successor, resumed=False, now=LEASE / 2 + 0.2) is Decision.START
