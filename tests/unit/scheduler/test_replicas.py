from __future__ import annotations

import asyncio
import os

import pytest

from tidegate.common import headers
from tidegate.v1 import replica_pb2


async def test_a_scheduler_says_who_it_is_and_what_waits(world):
    assert world.replica.hello == world.service.scheduler_id
    assert (await world.replica.hears("demand")).waiting_request_count == 0
    await world.exchange().begin({"grpc-timeout": "60S"})
    demand = await world.replica.hears("demand")
    assert (demand.waiting_request_count, demand.waiting_token_count) == (1, 7 + 16)


async def test_credits_stand_ready_before_a_request_comes(world):
    world.replica.grant("a", "b")
    await world.credits(2)
    assert world.decided(await world.exchange().run())[headers.CREDIT] == "a"
    snapshot = (await world.snapshot()).replicas[0]
    assert (snapshot.credit_count, snapshot.in_flight_count) == (1, 1)


async def test_revoked_credits_are_not_spent_and_unspent_ones_are_given_back(world):
    world.replica.grant("a", "b", "c")
    await world.credits(3)
    await world.exchange().run()
    world.replica.say(revoke=replica_pb2.CreditIds(credit_ids=["a", "b"]))
    assert list((await world.replica.hears("give_back")).credit_ids) == ["b"]
    assert world.decided(await world.exchange().run())[headers.CREDIT] == "c"


async def test_an_outcome_ends_what_is_in_flight(world):
    world.replica.grant("a")
    await world.exchange().run()
    world.replica.say(outcome=replica_pb2.Outcome(request_id="request-1", credit_id="a"))
    await world.until(lambda snapshot: snapshot.replicas[0].in_flight_count == 0)


async def test_a_load_drops_what_was_sent_and_never_came(start_world):
    world = await start_world(credit_margin_seconds=0.0)
    world.replica.grant("a", lease_seconds=0.3)
    await world.exchange().run()
    await asyncio.sleep(0.3)
    world.replica.say_load(running_request_count=0)
    await world.until(lambda snapshot: snapshot.replicas[0].in_flight_count == 0)


async def test_an_expired_credit_is_not_spent(world):
    world.replica.grant("a", lease_seconds=0.4)
    await world.credits(1)
    await world.credits(0)
    exchange = world.exchange()
    await exchange.begin()
    await world.replica.demand(1)
    world.replica.grant("b")
    assert world.decided(await exchange.receive())[headers.CREDIT] == "b"


async def test_a_stream_that_ends_takes_its_credits_along_and_comes_back(world):
    world.replica.grant("old")
    await world.credits(1)
    world.replica.connected.clear()
    world.replica.hang_up()
    await asyncio.wait_for(world.replica.connected.wait(), 5)
    await world.until(lambda snapshot: snapshot.replicas[0].connected)
    assert (await world.snapshot()).replicas[0].credit_count == 0
    exchange = world.exchange()
    await exchange.begin()
    await world.replica.demand(1)
    world.replica.grant("new")
    assert world.decided(await exchange.receive())[headers.CREDIT] == "new"


async def test_a_replica_that_falls_silent_gets_nothing_until_it_speaks(start_world):
    world = await start_world(replica_silence_seconds=0.3, tick_seconds=0.05)
    world.replica.grant("a")
    await world.credits(1)
    await asyncio.sleep(0.4)
    exchange = world.exchange()
    await exchange.begin()
    await world.replica.demand(1)
    world.replica.say_load()
    assert world.decided(await exchange.receive())[headers.CREDIT] == "a"


async def test_a_replica_that_is_ready_again_takes_what_waits_with_the_credits_in_hand(world):
    world.replica.grant("a")
    await world.credits(1)
    world.replica.say_load(ready=False, not_ready_reason="loading")
    await world.until(lambda snapshot: snapshot.replicas[0].load.not_ready_reason == "loading")
    exchange = world.exchange()
    await exchange.begin()
    await world.replica.demand(1)
    world.replica.say_load()
    assert world.decided(await exchange.receive())[headers.CREDIT] == "a"


async def test_a_replica_that_leaves_the_endpoints_is_forgotten(world, tmp_path):
    replacement = tmp_path / "new.yaml"
    replacement.write_text('{"resources": []}')
    os.replace(replacement, world.endpoints)
    await world.until(lambda snapshot: len(snapshot.replicas) == 0)


@pytest.mark.parametrize("count", [40])
async def test_a_burst_is_told_in_few_demands(world, count):
    exchanges = [world.exchange() for _ in range(count)]
    await asyncio.gather(*(exchange.begin() for exchange in exchanges))
    await world.replica.demand(count)
    assert world.replica.heard.qsize() == 0
