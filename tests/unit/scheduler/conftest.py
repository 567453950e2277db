"""A whole scheduler on port 0, spoken to as Envoy does, with a fake replica, preprocess and cache around it."""

from __future__ import annotations

import asyncio
import contextlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
from envoy.config.core.v3 import base_pb2
from envoy.service.ext_proc.v3 import external_processor_pb2 as ext_proc
from envoy.service.ext_proc.v3 import external_processor_pb2_grpc as ext_proc_grpc

from tidegate.common import headers
from tidegate.scheduler.config import Settings
from tidegate.scheduler.service import SchedulerService
from tidegate.v1 import (
    cache_pb2,
    cache_pb2_grpc,
    preprocess_pb2,
    preprocess_pb2_grpc,
    replica_pb2,
    replica_pb2_grpc,
    scheduler_pb2,
    scheduler_pb2_grpc,
)

BODY = b'{"model":"m","messages":[{"role":"user","content":"hi"}]}'
FIELDS = {
    ":method": "POST",
    ":path": "/v1/chat/completions",
    "content-type": "application/json",
    headers.REQUEST_ID: "request-1",
    headers.TENANT: "acme",
}


class FakeReplica(replica_pb2_grpc.ReplicaServicer):
    """A replica that sends what the test says, and notes what it is told."""

    def __init__(self) -> None:
        self.address = ""
        self.is_ready = True
        self.connected = asyncio.Event()
        self.heard: asyncio.Queue[replica_pb2.SchedulerMessage] = asyncio.Queue()
        self.hello = ""
        self._outgoing: asyncio.Queue[replica_pb2.ReplicaMessage | None] = asyncio.Queue()

    def say(self, **message: Any) -> None:
        self._outgoing.put_nowait(replica_pb2.ReplicaMessage(**message))

    def say_load(self, **fields: Any) -> None:
        values = {"replica": self.address, "slot_count": 8, "ready": self.is_ready, **fields}
        self.say(load=replica_pb2.Load(**values))

    def grant(self, *credit_ids: str, lease_seconds: float = 60.0) -> None:
        grant = replica_pb2.Grant(credit_ids=credit_ids)
        grant.lease.FromMilliseconds(round(lease_seconds * 1000))
        self.say(grant=grant)

    def hang_up(self) -> None:
        self._outgoing.put_nowait(None)

    async def Credits(self, request_iterator, context):
        reader = asyncio.create_task(self._read(request_iterator))
        self.say_load()
        try:
            while (message := await self._outgoing.get()) is not None:
                await context.write(message)
        finally:
            reader.cancel()

    async def _read(self, request_iterator):
        async for message in request_iterator:
            if message.HasField("hello"):
                self.hello = message.hello.scheduler_id
                self.connected.set()
            else:
                self.heard.put_nowait(message)

    async def hears(self, kind: str) -> Any:
        """The next message of this kind."""
        async with asyncio.timeout(5):
            while True:
                message = await self.heard.get()
                if message.HasField(kind):
                    return getattr(message, kind)

    async def demand(self, count: int) -> None:
        """Waits until so many requests wait."""
        while (await self.hears("demand")).waiting_request_count != count:
            pass


class FakePreprocess(preprocess_pb2_grpc.PreprocessServicer):
    """Answers as the test says: `answer` makes the response, or None for no answer at all."""

    def __init__(self) -> None:
        self.requests: list[preprocess_pb2.PrepareRequest] = []
        self.released_leases: list[int] = []
        self.answer = prepared
        self.streams = 0
        self._context = None
        self.break_off = asyncio.Event()

    async def Prepare(self, request_iterator, context):
        self.streams += 1
        self._context = context
        self.break_off.clear()
        tasks = [
            asyncio.create_task(self._serve(request_iterator, context)),
            asyncio.create_task(self.break_off.wait()),
        ]
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            task.cancel()

    async def say(self, response: preprocess_pb2.PrepareResponse) -> None:
        """Answers late."""
        await self._context.write(response)

    async def released(self, *lease_ids: int) -> None:
        """Waits until exactly these leases have been given back."""
        async with asyncio.timeout(5):
            while len(self.released_leases) < len(lease_ids):
                await asyncio.sleep(0.01)
        assert sorted(self.released_leases) == sorted(lease_ids)

    async def _serve(self, request_iterator, context):
        async for request in request_iterator:
            self.released_leases += [handle.lease_id for handle in request.releases]
            if request.releases and not request.request_id:
                continue
            self.requests.append(request)
            response = self.answer(request)
            if response is not None:
                await context.write(response)


class FakeCache(cache_pb2_grpc.CacheServicer):
    """Knows the keys it is told; `delay_seconds` makes it slow."""

    def __init__(self) -> None:
        self.known: set[bytes] = set()
        self.lookups: list[cache_pb2.LookUpRequest] = []
        self.delay_seconds = 0.0

    async def LookUp(self, request, context):
        self.lookups.append(request)
        await asyncio.sleep(self.delay_seconds)
        return cache_pb2.LookUpResponse(hit=request.answer_key in self.known)


def prepared(request: preprocess_pb2.PrepareRequest, **fields: Any) -> preprocess_pb2.PrepareResponse:
    values = {"model": "m", "prompt_token_count": 7, "max_tokens": 16, **fields}
    return preprocess_pb2.PrepareResponse(
        request_id=request.request_id, prepared=preprocess_pb2.PreparedPrompt(**values)
    )


class Exchange:
    """One ext_proc stream, from Envoy's side."""

    def __init__(self, stub: ext_proc_grpc.ExternalProcessorStub) -> None:
        self.call = stub.Process()
        self.hold_seconds = 0.0
        """What Envoy was last asked to wait; 0 while it was not."""

    async def send_headers(self, fields: dict[str, str] | None = None, *, end_of_stream: bool = False) -> None:
        values = [
            base_pb2.HeaderValue(key=key, raw_value=value.encode())
            for key, value in {**FIELDS, **(fields or {})}.items()
        ]
        message = ext_proc.HttpHeaders(headers=base_pb2.HeaderMap(headers=values), end_of_stream=end_of_stream)
        await self.call.write(ext_proc.ProcessingRequest(request_headers=message))

    async def send_body(self, body: bytes = BODY) -> None:
        message = ext_proc.HttpBody(body=body, end_of_stream=True)
        await self.call.write(ext_proc.ProcessingRequest(request_body=message))

    async def receive(self) -> ext_proc.ProcessingResponse | None:
        """The next answer; None at the end of the stream. A wish to wait before it is noted."""
        message = await self._read()
        if message is not None and message.HasField("override_message_timeout"):
            assert self.hold_seconds == 0, "Envoy takes one such wish a phase"
            self.hold_seconds = message.override_message_timeout.ToMilliseconds() / 1000
            message = await self._read()
        return message

    async def is_asked_to_wait(self) -> float:
        """The wish to wait that comes next, in seconds."""
        message = await self._read()
        assert message.HasField("override_message_timeout")
        return message.override_message_timeout.ToMilliseconds() / 1000

    async def _read(self) -> ext_proc.ProcessingResponse | None:
        async with asyncio.timeout(5):
            message = await self.call.read()
        return None if message is grpc.aio.EOF else message

    async def begin(self, fields: dict[str, str] | None = None, body: bytes = BODY) -> None:
        """As far as the decision: headers and body, and what is answered at once."""
        await self.send_headers(fields)
        assert (await self.receive()).WhichOneof("response") == "request_headers"
        await self.send_body(body)

    async def run(self, fields: dict[str, str] | None = None, body: bytes = BODY) -> ext_proc.ProcessingResponse:
        """All of it; returns the decision."""
        await self.begin(fields, body)
        return await self.receive()


def decided(response: ext_proc.ProcessingResponse) -> dict[str, str]:
    """The headers that a decision sets."""
    phase = getattr(response, response.WhichOneof("response"))
    return {item.header.key: item.header.raw_value.decode() for item in phase.response.header_mutation.set_headers}


def refused(response: ext_proc.ProcessingResponse) -> tuple[int, dict[str, str], Any]:
    """Status, headers and body of a refusal."""
    immediate = response.immediate_response
    fields = {item.header.key: item.header.raw_value.decode() for item in immediate.headers.set_headers}
    return immediate.status.code, fields, json.loads(immediate.body)


@dataclass
class World:
    """A scheduler and all that it speaks to."""

    service: SchedulerService
    replica: FakeReplica
    preprocess: FakePreprocess
    cache: FakeCache
    processor: ext_proc_grpc.ExternalProcessorStub
    scheduler: scheduler_pb2_grpc.SchedulerStub
    channel: grpc.aio.Channel
    endpoints: Path
    """The file that names the replica."""
    lite: FakeReplica | None = None
    exchanges: list[Exchange] = field(default_factory=list)
    decided = staticmethod(decided)
    refused = staticmethod(refused)
    prepared = staticmethod(prepared)

    def exchange(self) -> Exchange:
        exchange = Exchange(self.processor)
        self.exchanges.append(exchange)
        return exchange

    async def snapshot(self) -> scheduler_pb2.Snapshot:
        async for snapshot in self.scheduler.Watch(scheduler_pb2.WatchRequest(once=True)):
            return snapshot
        raise AssertionError("no snapshot came")

    async def until(self, is_so) -> None:
        """Waits until the snapshot says so."""
        async with asyncio.timeout(5):
            while not is_so(await self.snapshot()):
                await asyncio.sleep(0.01)

    async def credits(self, count: int) -> None:
        """Waits until so many credits are in hand."""
        await self.until(lambda snapshot: snapshot.replicas[0].credit_count == count)


@pytest.fixture
async def start_world(tmp_path):
    """Starts a scheduler with settings of the test's choice."""
    async with contextlib.AsyncExitStack() as stack:

        async def start(*, with_services: bool = True, **settings: Any) -> World:
            lite = None
            if "lite_model_name" in settings:
                lite = FakeReplica()
                lite_port = await _serve(stack, (replica_pb2_grpc.add_ReplicaServicer_to_server, lite))
                lite.address = f"127.0.0.1:{lite_port}"
                lite_endpoints = tmp_path / "lite.yaml"
                lite_endpoints.write_text(json.dumps(_endpoints(lite_port)))
                settings["lite_endpoints_file"] = str(lite_endpoints)
            replica, preprocess, cache = FakeReplica(), FakePreprocess(), FakeCache()
            replica_port = await _serve(stack, (replica_pb2_grpc.add_ReplicaServicer_to_server, replica))
            services_port = 1
            if with_services:
                services_port = await _serve(
                    stack,
                    (preprocess_pb2_grpc.add_PreprocessServicer_to_server, preprocess),
                    (cache_pb2_grpc.add_CacheServicer_to_server, cache),
                )
            replica.address = f"127.0.0.1:{replica_port}"
            endpoints = tmp_path / f"model-{replica_port}.yaml"
            endpoints.write_text(json.dumps(_endpoints(replica_port)))
            service = SchedulerService(
                Settings(
                    port=0,
                    mesh_address=f"127.0.0.1:{services_port}",
                    endpoints_file=str(endpoints),
                    **{"endpoints_poll_seconds": 0.05, "cache_timeout_seconds": 0.5, **settings},
                )
            )
            await service.start()
            stack.push_async_callback(service.close)
            stack.push_async_callback(service.server.grpc.stop, 0)
            channel = await stack.enter_async_context(grpc.aio.insecure_channel(f"127.0.0.1:{service.server.port}"))
            await asyncio.wait_for(replica.connected.wait(), 5)
            world = World(
                service,
                replica,
                preprocess,
                cache,
                ext_proc_grpc.ExternalProcessorStub(channel),
                scheduler_pb2_grpc.SchedulerStub(channel),
                channel,
                endpoints,
                lite,
            )
            stack.callback(lambda: [exchange.call.cancel() for exchange in world.exchanges])
            await world.until(lambda snapshot: snapshot.replicas[0].load.ready == replica.is_ready)
            if lite is not None:
                await asyncio.wait_for(lite.connected.wait(), 5)
            return world

        yield start


@pytest.fixture
async def world(start_world):
    return await start_world()


async def _serve(stack, *additions) -> int:
    server = grpc.aio.server()
    for add, servicer in additions:
        add(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    stack.push_async_callback(server.stop, 0)
    return port


def _endpoints(port: int):
    address = {"socket_address": {"address": "127.0.0.1", "port_value": port}}
    return {
        "resources": [{"cluster_name": "model", "endpoints": [{"lb_endpoints": [{"endpoint": {"address": address}}]}]}]
    }
