from __future__ import annotations

import random

import pytest

from tidegate.scheduler.lanes import LaneLimits, Lanes, Waiting
from tidegate.scheduler.request import CLASSES_BY_LABEL, ServiceClass

LIMITS = LaneLimits(request_limit=3, token_limit=100, byte_limit=1000)


def place(request_id="r", service_class=ServiceClass.STANDARD, tokens=1, byte_count=1, since=0.0, deadline=60.0):
    return Waiting(
        request_id=request_id,
        service_class=service_class,
        token_count=tokens,
        answer_token_count=1,
        byte_count=byte_count,
        since=since,
        deadline=deadline,
    )


def new_lanes(limits=LIMITS):
    return Lanes(dict.fromkeys(ServiceClass, limits))


# Each line does something, or asks (after `?`) for an answer (after `->`).
SCRIPTS = {
    "first come first served inside a lane": """
        add a standard
        add b standard
        ? next -> a
        take
        ? next -> b
    """,
    "strict order between lanes": """
        add b1 batch
        add s1 standard
        add r1 realtime
        add r2 realtime
        ? order -> r1 r2 s1 b1
        take
        take
        ? next -> s1
        add r3 realtime
        ? next -> r3
    """,
    "one that leaves from the middle frees its place": """
        add a standard 10 100
        add b standard 20 200
        add c standard 30 300
        ? full standard 1 1 -> requests
        leave b
        ? order -> a c
        ? counts standard -> 2 40 400
        ? full standard 1 1 ->
        ? position c -> 2
    """,
    "each bound is reached on its own": """
        add a standard 90 900
        ? full standard 10 100 ->
        ? full standard 11 100 -> tokens
        ? full standard 10 101 -> bytes
        ? full realtime 100 1000 ->
    """,
    "a position counts the more urgent lanes": """
        add b batch
        add s standard
        add r realtime
        ? position r -> 1
        ? position s -> 2
        ? position b -> 3
        ? before standard -> 2
        ? before realtime -> 1
    """,
    "a request is found by its id until it leaves": """
        add a standard
        ? find a -> a
        take
        ? find a ->
    """,
}


def run_script(script):
    lanes, places = new_lanes(), {}
    for line in filter(None, map(str.strip, script.splitlines())):
        if line.startswith("?"):
            question, _, expected = line[1:].partition("->")
            assert answer(lanes, places, question.split()) == expected.strip(), line
        else:
            act(lanes, places, line.split())


def act(lanes, places, words):
    match words:
        case ["add", name, label, *sizes]:
            tokens, byte_count = map(int, sizes) if sizes else (1, 1)
            places[name] = place(name, CLASSES_BY_LABEL[label], tokens, byte_count)
            lanes.add(places[name])
        case ["take"]:
            lanes.remove(lanes.next)
        case ["leave", name]:
            lanes.remove(places[name])
        case _:
            raise AssertionError(words)


def answer(lanes, places, words):
    match words:
        case ["next"]:
            return lanes.next.request_id if lanes.next else ""
        case ["order"]:
            return " ".join(waiting.request_id for waiting in lanes)
        case ["full", label, tokens, byte_count]:
            return lanes.lane(CLASSES_BY_LABEL[label]).full_bound(int(tokens), int(byte_count))
        case ["counts", label]:
            lane = lanes.lane(CLASSES_BY_LABEL[label])
            return f"{len(lane)} {lane.token_count} {lane.byte_count}"
        case ["position", name]:
            return str(lanes.position(places[name]))
        case ["before", label]:
            return str(lanes.count_before(CLASSES_BY_LABEL[label]))
        case ["find", name]:
            found = lanes.find(name)
            return found.request_id if found else ""
        case _:
            raise AssertionError(words)


@pytest.mark.parametrize("name", SCRIPTS)
def test_script(name):
    run_script(SCRIPTS[name])


def test_of_two_with_one_id_the_later_is_found_and_neither_loses_its_place():
    lanes, first, second = new_lanes(), place("same"), place("same")
    lanes.add(first)
    lanes.add(second)
    assert lanes.find("same") is second
    lanes.remove(first)
    assert lanes.find("same") is second
    lanes.remove(second)
    assert lanes.find("same") is None


@pytest.mark.parametrize("seed", range(5))
def test_counts_are_sums_and_order_holds_in_random_runs(seed):
    chance = random.Random(seed)
    lanes = new_lanes(LaneLimits(request_limit=20, token_limit=500, byte_limit=5000))
    model: list[tuple[int, int, Waiting]] = []
    for number in range(600):
        if chance.random() < 0.6:
            waiting = place(
                str(number), chance.choice(list(ServiceClass)), chance.randint(1, 100), chance.randint(1, 900)
            )
            if not lanes.lane(waiting.service_class).full_bound(waiting.token_count, waiting.byte_count):
                lanes.add(waiting)
                model.append((waiting.service_class, number, waiting))
        elif model:
            model.sort(key=lambda entry: entry[:2])
            entry = model[0] if chance.random() < 0.5 else chance.choice(model)
            model.remove(entry)
            lanes.remove(entry[2])
        model.sort(key=lambda entry: entry[:2])
        assert list(lanes) == [waiting for _, _, waiting in model]
        assert lanes.next is (model[0][2] if model else None)
        for service_class in ServiceClass:
            lane, expected = lanes.lane(service_class), [each[2] for each in model if each[0] == service_class]
            assert len(lane) == len(expected) <= lane.limits.request_limit
            assert lane.token_count == sum(each.token_count for each in expected) <= lane.limits.token_limit
            assert lane.byte_count == sum(each.byte_count for each in expected) <= lane.limits.byte_limit


@pytest.mark.parametrize("seed", range(5))
def test_all_positions_at_once_are_those_that_each_is_told_alone(seed):
    chance = random.Random(seed)
    lanes = new_lanes(LaneLimits(request_limit=1000, token_limit=10**6, byte_limit=10**6))
    for number in range(60):
        waiting = place(str(number), chance.choice(list(ServiceClass)))
        waiting.tenant = chance.choice("aab")
        lanes.add(waiting)
    assert lanes.positions() == {waiting: lanes.position(waiting) for waiting in lanes}
