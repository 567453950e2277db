"""The credit stream over real gRPC."""

from __future__ import annotations

import asyncio
import time

import grpc
import pytest
from prometheus_client import generate_latest

from tidegate.common import headers
from tidegate.model.load import LATENESS_WINDOW_SECONDS
from tidegate.v1 import inference_pb2, inference_pb2_grpc, replica_pb2, replica_pb2_grpc

Message = replica_pb2.SchedulerMessage


class Scheduler:
    """One end of a credit stream, as a scheduler has it."""

    def __init__(self, channel) -> None:
        self.stream = replica_pb2_grpc.ReplicaStub(channel).Credits()
        self.credits: list[str] = []
        self.outcomes: list[replica_pb2.Outcome] = []
        self.loads: list[replica_pb2.Load] = []

    async def open(self) -> Scheduler:
        await self.stream.write(Message(hello={"scheduler_id": "s1"}))
        return self

    async def read_until(self, condition, seconds: float = 3.0) -> None:
        async with asyncio.timeout(seconds):
            while not condition():
                message = await self.stream.read()
                assert message is not grpc.aio.EOF
                match message.WhichOneof("message"):
                    case "load":
                        self.loads.append(message.load)
                    case "grant":
                        self.credits += message.grant.credit_ids
                    case "revoke":
                        self.credits = [credit for credit in self.credits if credit not in message.revoke.credit_ids]
                    case "outcome":
                        self.outcomes.append(message.outcome)


def ask(**fields) -> inference_pb2.GenerateRequest:
    return inference_pb2.GenerateRequest(text="hello", **fields)


async def collect(stub, request, **call):
    return [event async for event in stub.Generate(request, **call)]


async def test_a_scheduler_hears_how_late_what_it_sends_is_looked_at(start_service, fake_triton, channel_to):
    async with start_service(fake_triton("abc", slots=3)) as service:
        scheduler = await Scheduler(channel_to(service)).open()
        stub = inference_pb2_grpc.InferenceStub(channel_to(service))
        # Any one of them may itself be looked at late; the least is what it is at rest.
        for _ in range(5):
            await collect(stub, ask(), metadata=((headers.SENT, f"{time.time() + 3600}"),))
        # Clocks differ by an hour; past that, what is looked at late is late.
        await asyncio.sleep(2 * LATENESS_WINDOW_SECONDS)
        await collect(stub, ask(), metadata=((headers.SENT, f"{time.time() + 3600 - 0.5}"),))
        await scheduler.read_until(lambda: any(load.lateness.ToMilliseconds() >= 500 for load in scheduler.loads))
        assert max(load.lateness.ToMilliseconds() for load in scheduler.loads) < 10_000


async def test_schedulers_hear_how_many_they_are(start_service, fake_triton, channel_to):
    async with start_service(fake_triton("abc", slots=3)) as service:
        first = await Scheduler(channel_to(service)).open()
        await first.read_until(lambda: any(load.scheduler_count == 1 for load in first.loads))
        second = await Scheduler(channel_to(service)).open()
        await first.read_until(lambda: first.loads[-1].scheduler_count == 2)
        second.stream.cancel()
        await first.read_until(lambda: first.loads[-1].scheduler_count == 1)


async def test_a_scheduler_hears_the_load_then_gets_standing_credits(start_service, fake_triton, channel_to):
    async with start_service(fake_triton("abc", slots=3)) as service:
        scheduler = await Scheduler(channel_to(service)).open()
        await scheduler.read_until(lambda: len(scheduler.credits) == 3)
        assert scheduler.loads[0].slot_count == 3
        assert scheduler.loads[0].ready
        assert scheduler.loads[0].models == ["bytes"]


async def test_a_spent_credit_ends_with_its_outcome_and_a_new_credit(start_service, fake_triton, channel_to):
    async with start_service(fake_triton("abc", slots=1, cached_token_count=3)) as service:
        scheduler = await Scheduler(channel_to(service)).open()
        await scheduler.read_until(lambda: scheduler.credits)
        credit = scheduler.credits.pop()
        stub = inference_pb2_grpc.InferenceStub(channel_to(service))
        await collect(stub, ask(request_id="r7"), metadata=(("x-tidegate-credit", credit),))
        await scheduler.read_until(lambda: scheduler.outcomes and scheduler.credits)
        (outcome,) = scheduler.outcomes
        assert (outcome.request_id, outcome.credit_id) == ("r7", credit)
        assert outcome.outcome == replica_pb2.REQUEST_OUTCOME_COMPLETED
        assert (outcome.prompt_token_count, outcome.completion_token_count) == (5, 4)
        assert outcome.cached_token_count == 3
        assert scheduler.credits != [credit]
        assert "tidegate_fail_open_requests_total 0.0" in generate_latest(service.registry).decode()


async def test_a_cancelled_request_reports_cancelled(start_service, fake_triton, channel_to):
    async with start_service(fake_triton("abc" * 100, pace=0.02, slots=1)) as service:
        scheduler = await Scheduler(channel_to(service)).open()
        await scheduler.read_until(lambda: scheduler.credits)
        stub = inference_pb2_grpc.InferenceStub(channel_to(service))
        call = stub.Generate(ask(), metadata=(("x-tidegate-credit", scheduler.credits.pop()),))
        await call.read()
        call.cancel()
        await scheduler.read_until(lambda: scheduler.outcomes)
        assert scheduler.outcomes[0].outcome == replica_pb2.REQUEST_OUTCOME_CANCELLED
        assert scheduler.outcomes[0].completion_token_count > 0


async def test_a_request_that_ends_before_it_takes_a_slot_gives_its_credit_back(start_service, fake_triton, channel_to):
    async with start_service(fake_triton("abc", slots=1)) as service:
        scheduler = await Scheduler(channel_to(service)).open()
        await scheduler.read_until(lambda: scheduler.credits)
        credit = scheduler.credits.pop()
        stub = inference_pb2_grpc.InferenceStub(channel_to(service))
        with pytest.raises(grpc.aio.AioRpcError):
            await collect(stub, ask(model="no-such-model"), metadata=((headers.CREDIT, credit),))
        # Long before the lease is over.
        await scheduler.read_until(lambda: scheduler.outcomes and scheduler.credits, seconds=0.5)
        assert scheduler.outcomes[0].credit_id == credit
        assert scheduler.outcomes[0].outcome == replica_pb2.REQUEST_OUTCOME_REFUSED


async def test_the_outcome_of_a_request_whose_credit_was_revoked_on_its_way_is_told(
    start_service, fake_triton, channel_to
):
    triton = fake_triton("abc", slots=1)
    async with start_service(triton) as service:
        scheduler = await Scheduler(channel_to(service)).open()
        await scheduler.read_until(lambda: scheduler.credits)
        credit = scheduler.credits[0]
        triton.set_ready(False)
        await scheduler.read_until(lambda: not scheduler.credits)
        triton.set_ready(True)
        await scheduler.read_until(lambda: scheduler.credits)
        stub = inference_pb2_grpc.InferenceStub(channel_to(service))
        await collect(stub, ask(), metadata=((headers.CREDIT, credit),))
        await collect(stub, ask(), metadata=((headers.CREDIT, "another-life-0"),))
        await collect(stub, ask(request_id="last"), metadata=((headers.CREDIT, scheduler.credits[0]),))
        await scheduler.read_until(lambda: any(one.request_id == "last" for one in scheduler.outcomes))
        assert next(one.credit_id for one in scheduler.outcomes) == credit
        assert "another-life-0" not in [one.credit_id for one in scheduler.outcomes]


async def test_when_the_scheduler_leaves_its_credits_serve_the_others(start_service, fake_triton, channel_to):
    async with start_service(fake_triton("abc", slots=2)) as service:
        scheduler = await Scheduler(channel_to(service)).open()
        await scheduler.read_until(lambda: len(scheduler.credits) == 2)
        scheduler.stream.cancel()
        async with asyncio.timeout(1):
            while service.slots.ledger.granted_count:
                await asyncio.sleep(0.005)
        assert service.slots.sessions == []


async def test_with_no_scheduler_it_serves_queues_and_refuses_by_its_own_bound(start_service, fake_triton, channel_to):
    triton = fake_triton("abc", pace=0.05, slots=1)
    async with start_service(triton, queue_limit=1) as service:
        stub = inference_pb2_grpc.InferenceStub(channel_to(service))
        results = await asyncio.gather(*(collect(stub, ask()) for _ in range(3)), return_exceptions=True)
        refused = [result for result in results if isinstance(result, grpc.aio.AioRpcError)]
        assert len(refused) == 1
        assert refused[0].code() is grpc.StatusCode.UNAVAILABLE
        trailers = dict(refused[0].trailing_metadata())
        assert trailers["x-tidegate-reason"] == "SERVER_IS_OVERLOADED"
        assert int(trailers["retry-after"]) >= 1
        assert max(len(triton.live), 1) == 1


async def test_an_engine_that_goes_away_is_said_and_takes_the_credits_back(start_service, fake_triton, channel_to):
    triton = fake_triton("abc", slots=2)
    async with start_service(triton) as service:
        scheduler = await Scheduler(channel_to(service)).open()
        await scheduler.read_until(lambda: len(scheduler.credits) == 2)
        triton.set_ready(False)
        await scheduler.read_until(lambda: not scheduler.credits and not scheduler.loads[-1].ready)
        assert scheduler.loads[-1].not_ready_reason
        triton.set_ready(True)
        await scheduler.read_until(lambda: len(scheduler.credits) == 2 and scheduler.loads[-1].ready)


async def test_a_stream_that_does_not_begin_with_hello_is_refused(start_service, fake_triton, channel_to):
    async with start_service(fake_triton("abc")) as service:
        stream = replica_pb2_grpc.ReplicaStub(channel_to(service)).Credits()
        await stream.write(Message(demand={"waiting_request_count": 1}))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stream.read()
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
