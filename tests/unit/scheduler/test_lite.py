"""What goes to the lite model, and what does not."""

from __future__ import annotations

import pytest

from tidegate.common import headers
from tidegate.scheduler.config import Settings
from tidegate.v1 import inference_pb2, replica_pb2, tensor_pb2

TOKENS = tensor_pb2.Tensor(data_type=tensor_pb2.DATA_TYPE_INT32, shape=[7])
TOKENS.shared_memory.lease_id = 9
NO_REASON_TO_WAIT = {"standard_request_limit": 1}


@pytest.fixture
async def start(start_world):
    """A mesh whose lite model is `small`; each prompt is a text of 7 tokens that asks for `m`."""

    async def begin(*, context: int = 1000, credit: bool = True, **settings):
        world = await start_world(lite_model_name="small", **settings)
        world.preprocess.answer = lambda request: world.prepared(
            request, is_portable=True, tokens=TOKENS, answer_key=b"k" * 32
        )
        world.lite.say_load(max_context_tokens=context)
        if credit:
            world.lite.grant("lite-credit")
        await world.until(
            lambda snapshot: (
                snapshot.replicas[1].load.max_context_tokens == context and snapshot.replicas[1].credit_count == credit
            )
        )
        return world

    return begin


async def fill(world):
    """Lets as many wait as may."""
    await world.exchange().begin()
    await world.replica.demand(1)


async def test_a_request_that_would_be_refused_goes_there(start):
    world = await start(**NO_REASON_TO_WAIT)
    await fill(world)
    response = await world.exchange().run()
    fields = world.decided(response)
    assert response.request_body.response.clear_route_cache
    assert (fields[headers.ROUTE], fields[headers.LITE]) == ("lite", "load")
    assert (fields[headers.REPLICA], fields[headers.CREDIT]) == (world.lite.address, "lite-credit")
    # Both are the other model's.
    assert not {headers.TENSOR, headers.ANSWER_KEY} & fields.keys()
    await world.preprocess.released(9)
    totals = (await world.snapshot()).totals
    assert (totals.dispatched, totals.dispatched_to_lite) == (1, 1)


async def test_without_a_credit_there_it_is_refused_as_usual(start):
    world = await start(credit=False, **NO_REASON_TO_WAIT)
    await fill(world)
    status, fields, _ = world.refused(await world.exchange().run())
    assert (status, fields[headers.REASON]) == (503, "SERVER_IS_OVERLOADED")


@pytest.mark.parametrize(
    ("prepared", "context"),
    [
        ({"is_portable": False}, 1000),
        ({"is_portable": True, "service_class": inference_pb2.SERVICE_CLASS_REALTIME}, 1000),
        ({"is_portable": True, "service_class": inference_pb2.SERVICE_CLASS_BATCH}, 1000),
        ({"is_portable": True, "prompt_token_count": 700}, 1000),
        ({"is_portable": True}, 0),
    ],
    ids=["tokens", "realtime", "batch", "long", "unknown context"],
)
async def test_what_it_cannot_or_should_not_answer_does_not_go_there(start, prepared, context):
    limits = dict.fromkeys(("realtime_request_limit", "batch_request_limit"), 1)
    world = await start(context=context, **NO_REASON_TO_WAIT, **limits)
    world.preprocess.answer = lambda request: world.prepared(request, **prepared)
    await fill(world)
    status, _, _ = world.refused(await world.exchange().run())
    assert status == 503


async def test_with_nothing_to_do_the_usual_model_answers(start):
    world = await start()
    world.replica.grant("credit-1")
    await world.credits(1)
    fields = world.decided(await world.exchange().run())
    assert fields[headers.CREDIT] == "credit-1"
    assert headers.ROUTE not in fields


@pytest.mark.parametrize(("limit", "goes"), [(7, True), (6, False)])
async def test_a_short_prompt_may_prefer_it_always(start, limit, goes):
    world = await start(lite_prompt_token_limit=limit)
    world.replica.grant("credit-1")
    await world.credits(1)
    fields = world.decided(await world.exchange().run())
    assert fields.get(headers.LITE) == ("prompt" if goes else None)


async def test_a_brownouts_step_sends_standard_requests_there(start):
    world = await start(brownout_max_tokens=99)
    world.replica.grant("credit-1")
    await world.credits(1)
    world.service.expectations.brownout.step = 4
    fields = world.decided(await world.exchange().run())
    assert [fields[name] for name in (headers.LITE, headers.BROWNOUT, headers.MAX_TOKENS)] == ["load", "4", "99"]
    # Its one credit is spent.
    assert world.decided(await world.exchange().run())[headers.CREDIT] == "credit-1"


@pytest.mark.parametrize("grace_seconds", [0.0, 60.0])
async def test_while_no_other_replica_is_there_it_answers(start, grace_seconds):
    world = await start(replica_grace_seconds=grace_seconds)
    world.replica.say_load(ready=False)
    await world.until(lambda snapshot: not snapshot.replicas[0].load.ready)
    assert world.decided(await world.exchange().run())[headers.LITE] == "load"
    if grace_seconds:
        return
    exchange = world.exchange()
    await exchange.send_headers()
    status, fields, _ = world.refused(await exchange.receive())
    assert (status, fields[headers.REASON]) == (503, "REPLICA_UNAVAILABLE")


async def test_who_asks_for_it_by_name_gets_it_with_the_tokens_that_are_its_own(start):
    world = await start()
    world.preprocess.answer = lambda request: world.prepared(
        request, model="small", tokens=TOKENS, answer_key=b"k" * 32, service_class=inference_pb2.SERVICE_CLASS_REALTIME
    )
    fields = world.decided(await world.exchange().run())
    assert (fields[headers.ROUTE], fields[headers.LITE]) == ("lite", "name")
    assert fields[headers.CREDIT] == "lite-credit"
    assert {headers.TENSOR, headers.ANSWER_KEY} <= fields.keys()
    # Without a credit its replicas decide; nothing waits for it here.
    fields = world.decided(await world.exchange().run())
    assert (fields[headers.ROUTE], fields[headers.LITE]) == ("lite", "name")
    assert not {headers.REPLICA, headers.CREDIT, headers.TENSOR} & fields.keys()
    await world.preprocess.released(9)
    totals = (await world.snapshot()).totals
    assert (totals.dispatched, totals.dispatched_to_lite, totals.passed_through) == (1, 1, 1)


async def test_a_credit_whose_request_left_in_time_is_there_for_the_next(start):
    world = await start(lite_prompt_token_limit=10)
    pipeline = world.service.pipeline
    placed = []
    to_lite = pipeline._to_lite
    pipeline._to_lite = lambda *arguments: placed.append(to_lite(*arguments)) or placed[-1]
    await world.exchange().run()
    assert (await world.snapshot()).replicas[1].credit_count == 0
    pipeline.undo(placed[0])
    assert (await world.snapshot()).replicas[1].credit_count == 1


async def test_what_ended_there_ends_here(start):
    world = await start(lite_prompt_token_limit=10)
    await world.exchange().run()
    assert (await world.snapshot()).replicas[1].in_flight_count == 1
    world.lite.say(outcome=replica_pb2.Outcome(credit_id="lite-credit", outcome=replica_pb2.REQUEST_OUTCOME_COMPLETED))
    await world.until(lambda snapshot: snapshot.replicas[1].in_flight_count == 0)


async def test_how_long_its_answers_are_is_learnt_apart(start):
    world = await start(lite_prompt_token_limit=10)
    lengths = world.service.expectations.observations.lengths
    for number in range(30):
        world.lite.grant(f"credit-{number}")
        await world.until(lambda snapshot: snapshot.replicas[1].credit_count > 0)
        credit = world.decided(await world.exchange().run())[headers.CREDIT]
        outcome = replica_pb2.Outcome(
            credit_id=credit, outcome=replica_pb2.REQUEST_OUTCOME_COMPLETED, completion_token_count=3
        )
        outcome.time_to_first_token.FromMilliseconds(10)
        world.lite.say(outcome=outcome)
    await world.until(lambda snapshot: snapshot.replicas[1].in_flight_count == 0)
    assert lengths.expected("acme", "small", 16, 0.5) <= 4
    assert [list(models) for models in lengths._tenants.values()] == [["small"]]


def test_a_name_without_replicas_is_refused():
    with pytest.raises(ValueError, match="lite_endpoints_file and lite_model_name"):
        Settings(lite_model_name="small")
