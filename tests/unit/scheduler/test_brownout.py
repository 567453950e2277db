"""The brownout in a whole scheduler: what a step does to requests, where it is told, and that it goes by itself."""

from __future__ import annotations

from itertools import pairwise

import pytest
from prometheus_client import CollectorRegistry
from structlog.testing import capture_logs

from tidegate.common import headers
from tidegate.scheduler.answer_lengths import AnswerLengths
from tidegate.scheduler.brownout import LAST_STEP, Signs
from tidegate.scheduler.lanes import LaneLimits, Lanes, Waiting
from tidegate.scheduler.observations import Ended, Observations
from tidegate.scheduler.request import CLASSES_BY_LABEL, Request, ServiceClass
from tidegate.scheduler.service import signs_of
from tidegate.scheduler.tenant_habits import STEADY_COUNT
from tidegate.v1 import inference_pb2, replica_pb2

HELD = {"tick_seconds": 10.0}
"""Nobody looks at the brownout while such a test runs: the step stays where the test puts it."""

QUICK = {"tick_seconds": 0.01, "brownout_queue_delay_seconds": 0.02, "brownout_up_seconds": 0.05}

LADDER = [0, 1, 2, 3, 5]
"""The steps of a mesh without a lite model."""


def shown_on_the_metrics_page(world) -> float | None:
    registry = CollectorRegistry()
    world.service.gauges.register(registry)
    return registry.get_sample_value("tidegate_brownout_step")


@pytest.mark.parametrize(
    ("step", "service_class", "is_shortened"),
    [
        (1, "batch", False),
        (2, "batch", True),
        (2, "standard", False),
        (3, "standard", True),
        (5, "realtime", False),
    ],
)
async def test_an_answer_is_shortened_by_headers_that_name_the_bound_and_the_step(
    start_world, step, service_class, is_shortened
):
    world = await start_world(brownout_max_tokens=99, **HELD)
    world.service.expectations.brownout.step = step
    world.replica.grant("c")
    await world.credits(1)
    fields = world.decided(await world.exchange().run({headers.SERVICE_CLASS: service_class}))
    assert fields[headers.CREDIT] == "c"
    told = fields.get(headers.MAX_TOKENS), fields.get(headers.BROWNOUT)
    assert told == (("99", str(step)) if is_shortened else (None, None))


@pytest.mark.parametrize(
    ("down_seconds", "is_idle"), [(0.05, False), (1000.0, True)], ids=["fares well again", "has nothing to do"]
)
async def test_steps_are_taken_told_and_taken_back_by_themselves(start_world, down_seconds, is_idle):
    with capture_logs() as logs:
        world = await start_world(brownout_down_seconds=down_seconds, **QUICK)
        assert shown_on_the_metrics_page(world) == 0
        waiting = world.exchange()
        await waiting.begin({headers.SERVICE_CLASS: "realtime"})
        await world.until(lambda snapshot: snapshot.brownout_step == LAST_STEP)
        assert shown_on_the_metrics_page(world) == LAST_STEP
        world.replica.grant("c")
        assert world.decided(await waiting.receive())[headers.CREDIT] == "c"
        if is_idle:
            outcome = replica_pb2.Outcome(credit_id="c", outcome=replica_pb2.REQUEST_OUTCOME_COMPLETED)
            world.replica.say(outcome=outcome)
        await world.until(lambda snapshot: snapshot.brownout_step == 0)
        assert shown_on_the_metrics_page(world) == 0
    told = [(entry["before"], entry["step"]) for entry in logs if entry["event"] == "brownout"]
    up = list(pairwise(LADDER))
    assert told == up + [(after, before) for before, after in reversed(up)]


@pytest.mark.parametrize("is_known_from_headers", [True, False])
@pytest.mark.parametrize(
    "surface",
    [{}, {":path": "/tidegate.v1.Inference/Generate", "content-type": "application/grpc"}],
    ids=["http", "grpc"],
)
async def test_a_refusal_carries_the_step(start_world, surface, is_known_from_headers):
    world = await start_world(batch_floor=0.0, **HELD)
    world.service.expectations.brownout.step = 1
    exchange = world.exchange()
    if is_known_from_headers:
        await exchange.send_headers({**surface, headers.SERVICE_CLASS: "batch"})
        response = await exchange.receive()
    else:
        world.preprocess.answer = lambda request: world.prepared(
            request, service_class=inference_pb2.SERVICE_CLASS_BATCH
        )
        response = await exchange.run(surface, b"\0\0\0\0\0" if surface else b"{}")
    fields = {item.header.key: item.header.raw_value for item in response.immediate_response.headers.set_headers}
    assert (fields[headers.REASON], fields[headers.BROWNOUT]) == (b"SERVER_IS_OVERLOADED", b"1")


async def test_what_is_refused_for_another_reason_carries_no_step(start_world):
    world = await start_world(standard_request_limit=1, **HELD)
    world.service.expectations.brownout.step = 1
    await world.exchange().begin()
    await world.replica.demand(1)
    status, fields, _ = world.refused(await world.exchange().run())
    assert (status, headers.BROWNOUT in fields) == (503, False)


KEY = b"k" * 32
STANDARD = {headers.SERVICE_CLASS: "standard"}


@pytest.fixture
async def last_step(start_world):
    """A scheduler at the last step, before a cache that may know the answer to all that is asked."""

    async def begin(**settings):
        world = await start_world(standard_floor=0.0, batch_floor=0.0, **{**HELD, **settings})
        world.preprocess.answer = lambda request: world.prepared(request, answer_key=KEY)
        world.service.expectations.brownout.step = LAST_STEP
        return world

    return begin


async def is_refused_from_headers(world, fields) -> bool:
    exchange = world.exchange()
    await exchange.send_headers(fields)
    return (await exchange.receive()).HasField("immediate_response")


@pytest.mark.parametrize("service_class", ["standard", "batch"])
async def test_at_the_last_step_a_known_answer_is_given(last_step, service_class):
    world = await last_step(**{f"{service_class}_request_limit": 1})
    waiting = Waiting("w", CLASSES_BY_LABEL[service_class], 1, 1, 1, since=0.0, deadline=1e12)
    world.service.dispatcher.add(waiting)  # A full lane is none of its business.
    world.cache.known.add(KEY)
    fields = world.decided(await world.exchange().run({headers.SERVICE_CLASS: service_class}))
    assert (fields[headers.ROUTE], fields[headers.ANSWER_KEY]) == ("cache", KEY.hex())


async def test_at_the_last_step_an_answer_that_is_not_known_is_refused_with_the_step(last_step):
    world = await last_step()
    status, fields, _ = world.refused(await world.exchange().run(STANDARD))
    assert (status, fields[headers.BROWNOUT]) == (503, str(LAST_STEP))
    assert len(world.cache.lookups) == 1


async def test_before_the_last_step_batch_is_refused_from_its_headers(last_step):
    world = await last_step()
    world.service.expectations.brownout.step = LAST_STEP - 1
    assert await is_refused_from_headers(world, {headers.SERVICE_CLASS: "batch"})


async def test_with_the_cache_out_of_reach_headers_are_refused_at_the_last_step(last_step):
    world = await last_step(cache_timeout_seconds=0.05, dependency_failure_limit=1, dependency_pause_seconds=60.0)
    world.cache.delay_seconds = 5.0
    assert not await is_refused_from_headers(world, STANDARD)
    await world.exchange().run(STANDARD)
    assert await is_refused_from_headers(world, STANDARD)


async def test_a_tenant_whose_answers_are_drawn_by_lot_is_refused_from_its_headers_at_the_last_step(last_step):
    world = await last_step()
    world.preprocess.answer = world.prepared
    for _ in range(STEADY_COUNT):
        assert not await is_refused_from_headers(world, STANDARD)
        await world.exchange().run(STANDARD)
    assert await is_refused_from_headers(world, STANDARD)
    assert not await is_refused_from_headers(world, {**STANDARD, headers.TENANT: "other"})
    # Who names no class is read anyway, and what is then known counts for all.
    world.preprocess.answer = lambda request: world.prepared(request, answer_key=KEY)
    world.cache.known.add(KEY)
    assert world.decided(await world.exchange().run())[headers.ROUTE] == "cache"
    assert not await is_refused_from_headers(world, STANDARD)


def test_a_class_fares_as_its_oldest_wait_and_its_first_tokens_say():
    lanes = Lanes(dict.fromkeys(ServiceClass, LaneLimits(10, 1_000, 1_000)))
    observations = Observations(lanes, AnswerLengths(256))
    lanes.add(Waiting("w", ServiceClass.STANDARD, 1, 1, 1, since=7.0, deadline=60.0))
    request = Request("r", "/", "", False, "t", 0.0, 0.0, queue_seconds=1.0)
    observations.dispatch(request, "c", 1)
    observations.end(Ended("c", True, 0.5, 1.0, 1, 1), 9.0)
    assert signs_of(ServiceClass.STANDARD, lanes, observations, 10.0) == Signs(3.0, 1.5, 0.5)
    assert signs_of(ServiceClass.REALTIME, lanes, observations, 10.0) == Signs(0.0, None, 0.5)
