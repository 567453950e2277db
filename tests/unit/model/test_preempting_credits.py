"""Credits that pause batch holders, and credits ahead of the slots."""

from __future__ import annotations

import random

import pytest

from tidegate.model.credits import Admitted, CreditLedger, Decision, Granted, Revoked, Terms, Urgency

REALTIME, STANDARD, BATCH = Urgency.REALTIME, Urgency.STANDARD, Urgency.BATCH


def make_ledger(slots: int = 4, share: float = 0.5, ahead: int = 0) -> CreditLedger:
    terms = Terms(
        lease_seconds=5.0,
        grace_seconds=1.0,
        protected_seconds=0.25,
        queue_limit=8,
        overflow_slot_count=0,
        preempting_share=share,
    )
    ledger = CreditLedger(terms, "life")
    ledger.set_capacity(slots, can_start=True, ahead=ahead)
    return ledger


def granted(actions, session: int, *, preempting: bool = False) -> list[str]:
    return [
        credit_id
        for action in actions
        if isinstance(action, Granted) and action.session == session and action.preempting == preempting
        for credit_id in action.credit_ids
    ]


def fill(ledger: CreditLedger, urgencies: list[Urgency]) -> list[str]:
    """Gives all slots to holders 1, 2, ...; returns the preempting credits that stand then."""
    ledger.connect(1)
    credit_ids = granted(ledger.settle(0.0), 1)
    for holder, (credit_id, urgency) in enumerate(zip(credit_ids, urgencies, strict=True), start=1):
        assert ledger.take(holder, credit_id, resumed=False, now=0.0, urgency=urgency) is Decision.START
    return granted(ledger.settle(0.0), 1, preempting=True)


def test_no_preempting_credit_is_granted_where_no_batch_runs():
    assert fill(make_ledger(), [STANDARD, REALTIME, STANDARD, STANDARD]) == []


def test_a_preempting_credit_stands_for_each_batch_holder_up_to_the_share():
    assert len(fill(make_ledger(), [STANDARD, BATCH, STANDARD, STANDARD])) == 1
    assert len(fill(make_ledger(), [BATCH, BATCH, BATCH, BATCH])) == 2
    assert fill(make_ledger(share=0.0), [BATCH, BATCH, BATCH, BATCH]) == []


def test_none_is_granted_while_nothing_was_promised_of_a_free_slot():
    ledger = make_ledger(slots=2)
    ledger.connect(1)
    first, second = granted(ledger.settle(0.0), 1)
    ledger.take(1, first, resumed=False, now=0.0, urgency=BATCH)
    ledger.set_capacity(2, can_start=False)
    ledger.give_back(1, [second])
    ledger.settle(0.0)
    assert (ledger.free_count, ledger.preempting_count) == (1, 0)


def test_a_realtime_request_pauses_the_batch_holder_that_began_last():
    ledger = make_ledger()
    first, _ = fill(ledger, [BATCH, STANDARD, BATCH, BATCH])
    assert ledger.take(5, first, resumed=False, now=0.1, urgency=REALTIME) is Decision.START
    ledger.settle(0.1)
    assert (ledger.running_count, ledger.paused_count, ledger.engine_count) == (4, 1, 5)
    ledger.release(4)
    assert ledger.paused_count == 0


def test_a_freed_slot_goes_to_the_paused_before_any_new_credit():
    ledger = make_ledger()
    first, _ = fill(ledger, [BATCH, BATCH, BATCH, BATCH])
    ledger.set_demand(1, 9)
    ledger.take(5, first, resumed=False, now=0.1, urgency=REALTIME)
    ledger.settle(0.1)
    ledger.release(5)
    assert granted(ledger.settle(0.2), 1) == []
    assert (ledger.running_count, ledger.paused_count) == (4, 0)
    assert ledger.spent_by(4).was_paused
    ledger.release(1)
    assert len(granted(ledger.settle(0.3), 1)) == 1


@pytest.mark.parametrize("urgency", [STANDARD, BATCH])
def test_a_preempting_credit_is_good_for_realtime_only(urgency):
    ledger = make_ledger()
    first, _ = fill(ledger, [BATCH, BATCH, BATCH, BATCH])
    assert ledger.take(5, first, resumed=False, now=0.1, urgency=urgency) is Decision.WAIT
    assert ledger.paused_count == 0


def test_preempting_credits_are_revoked_when_their_batch_holders_end():
    ledger = make_ledger()
    fill(ledger, [STANDARD, STANDARD, BATCH, BATCH])
    ledger.release(3)
    ledger.release(4)
    revoked = [action for action in ledger.settle(0.1) if isinstance(action, Revoked)]
    assert len(revoked[0].credit_ids) == 2
    assert ledger.preempting_count == 0


def test_realtime_without_a_credit_pauses_too_and_within_the_same_bound():
    ledger = make_ledger(slots=2)
    for holder in (1, 2):
        ledger.take(holder, "", resumed=False, now=0.0, urgency=BATCH)
    assert ledger.take(3, "", resumed=False, now=0.0, urgency=REALTIME) is Decision.START
    assert ledger.take(4, "", resumed=False, now=0.0, urgency=REALTIME) is Decision.WAIT
    assert ledger.paused_count == 1


def test_preempting_credits_go_to_the_scheduler_with_realtime_requests():
    ledger = make_ledger()
    for holder in (1, 2, 3, 4):
        ledger.take(holder, "", resumed=False, now=0.0, urgency=BATCH)
    ledger.connect(1)
    ledger.connect(2)
    ledger.set_demand(2, 5, 5)
    actions = ledger.settle(0.0)
    assert [len(granted(actions, session, preempting=True)) for session in (1, 2)] == [0, 2]


def test_credits_ahead_come_only_with_demand_and_only_so_many():
    ledger = make_ledger(slots=2, ahead=2)
    ledger.connect(1)
    assert len(granted(ledger.settle(0.0), 1)) == 2
    ledger.set_demand(1, 9)
    assert len(granted(ledger.settle(0.1), 1)) == 2
    assert granted(ledger.settle(0.2), 1) == []


def test_a_request_without_a_credit_gets_no_slot_that_is_only_ahead():
    ledger = make_ledger(slots=1, ahead=1)
    ledger.take(1, "", resumed=False, now=0.0)
    assert ledger.take(2, "", resumed=False, now=0.0) is Decision.WAIT


def test_the_gap_is_told_for_credits_that_requests_waited_for():
    ledger = make_ledger(slots=1)
    ledger.connect(1)
    (standing,) = granted(ledger.settle(0.0), 1)
    ledger.take(1, standing, resumed=False, now=3.0)
    assert ledger.spent_by(1).gap_seconds is None
    ledger.set_demand(1, 1)
    ledger.release(1)
    (wanted,) = granted(ledger.settle(3.0), 1)
    ledger.take(2, wanted, resumed=False, now=3.5)
    assert ledger.spent_by(2).gap_seconds == 0.5


def check_bounds(ledger: CreditLedger, running: set[int], engine: dict[int, Urgency], slots: int, ahead: int) -> None:
    assert ledger.engine_count == len(engine)
    batch_running = sum(urgency is BATCH for urgency in engine.values()) - ledger.paused_count
    assert batch_running >= 0
    assert ledger.preempting_count <= min(batch_running, max(0, slots // 2 - ledger.paused_count))
    if ledger.granted_count:
        assert ledger.granted_count + ledger.running_count <= slots + ahead
    if ledger.paused_count:
        assert ledger.free_count == 0


@pytest.mark.parametrize("seed", range(20))
def test_invariants_hold_in_random_runs(seed):
    dice = random.Random(seed)
    slots, ahead = dice.randrange(1, 9), dice.randrange(3)
    ledger = make_ledger(slots, ahead=ahead)
    now, next_key = 0.0, 1
    hands: dict[int, dict[bool, set[str]]] = {}
    engine: dict[int, Urgency] = {}
    waiting: dict[int, Urgency] = {}
    for _ in range(800):
        now += dice.choice([0.0, 0.01, 0.1, 1.0])
        step = dice.randrange(10)
        if step == 0:
            slots, ahead = dice.randrange(1, 9), dice.randrange(3)
            ledger.set_capacity(slots, can_start=dice.random() < 0.8, ahead=ahead)
        elif step == 1 and len(hands) < 3:
            ledger.connect(next_key)
            hands[next_key] = {False: set(), True: set()}
            next_key += 1
        elif step == 2 and hands:
            session = dice.choice(list(hands))
            if dice.random() < 0.2:
                ledger.disconnect(session)
                del hands[session]
            else:
                ledger.set_demand(session, dice.randrange(10), dice.randrange(5))
        elif step in (3, 4, 5, 6):
            urgency = dice.choice(list(Urgency))
            hand = hands[dice.choice(list(hands))][urgency is REALTIME and dice.random() < 0.5] if hands else set()
            credit_id = hand.pop() if hand and dice.random() < 0.8 else ""
            decision = ledger.take(next_key, credit_id, resumed=False, now=now, urgency=urgency)
            if credit_id:
                assert decision is Decision.START
            if decision is not Decision.REFUSE:
                (engine if decision is Decision.START else waiting)[next_key] = urgency
            next_key += 1
        elif engine or waiting:
            holder = dice.choice(sorted([*engine, *waiting]))
            ledger.release(holder)
            engine.pop(holder, None)
            waiting.pop(holder, None)
        for action in ledger.settle(now):
            match action:
                case Granted(session, ids, _, preempting):
                    hands[session][preempting] |= set(ids)
                case Revoked(session, ids):
                    for hand in hands.get(session, {}).values():
                        hand.difference_update(ids)
                case Admitted(holder):
                    engine[holder] = waiting.pop(holder)
        assert ledger.granted_count == sum(len(hand[False]) for hand in hands.values())
        assert ledger.preempting_count == sum(len(hand[True]) for hand in hands.values())
        check_bounds(ledger, set(engine), engine, slots, ahead)
