"""What every service's gRPC server offers: health, reflection in both versions, and a clear word on a taken port."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator

import grpc
import pytest
from google.protobuf import descriptor_pb2
from grpc_channelz.v1 import channelz, channelz_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2

from tidegate.common.grpc_clients import open_channel
from tidegate.common.grpc_server import Server
from tidegate.v1 import cache_pb2, cache_pb2_grpc

SERVICE_NAME = cache_pb2.DESCRIPTOR.services_by_name["Cache"].full_name
REFLECTION_VERSIONS = ["v1", "v1alpha"]


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    served = Server("127.0.0.1", 0)
    cache_pb2_grpc.add_CacheServicer_to_server(cache_pb2_grpc.CacheServicer(), served.grpc)  # type: ignore[abstract]
    served.add_service_name(SERVICE_NAME)
    await served.start()
    yield served
    await served.grpc.stop(None)


@pytest.fixture
async def channel(server: Server) -> AsyncIterator[grpc.aio.Channel]:
    async with open_channel(f"127.0.0.1:{server.port}") as opened:
        yield opened


async def reflect(
    channel: grpc.aio.Channel, version: str, request: reflection_pb2.ServerReflectionRequest
) -> reflection_pb2.ServerReflectionResponse:
    method = channel.stream_stream(
        f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo",
        request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
        response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
    )
    call = method(timeout=5)
    await call.write(request)
    await call.done_writing()
    response: reflection_pb2.ServerReflectionResponse = await call.read()
    return response


@pytest.mark.parametrize("name", ["", SERVICE_NAME])
async def test_health_says_serving_and_follows_the_process(
    server: Server, channel: grpc.aio.Channel, name: str
) -> None:
    stub = health_pb2_grpc.HealthStub(channel)
    request = health_pb2.HealthCheckRequest(service=name)
    assert (await stub.Check(request, timeout=5)).status == health_pb2.HealthCheckResponse.SERVING
    await server.set_serving(False)
    assert (await stub.Check(request, timeout=5)).status == health_pb2.HealthCheckResponse.NOT_SERVING


async def test_health_of_an_unknown_service_is_not_found(channel: grpc.aio.Channel) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service="no.such"), timeout=5)
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize("version", REFLECTION_VERSIONS)
async def test_reflection_lists_the_services(channel: grpc.aio.Channel, version: str) -> None:
    response = await reflect(channel, version, reflection_pb2.ServerReflectionRequest(list_services=""))
    names = {service.name for service in response.list_services_response.service}
    assert names == {
        SERVICE_NAME,
        "grpc.health.v1.Health",
        "grpc.reflection.v1.ServerReflection",
        "grpc.reflection.v1alpha.ServerReflection",
    }


@pytest.mark.parametrize("version", REFLECTION_VERSIONS)
async def test_reflection_describes_every_service_it_lists(channel: grpc.aio.Channel, version: str) -> None:
    listed = await reflect(channel, version, reflection_pb2.ServerReflectionRequest(list_services=""))
    for service in listed.list_services_response.service:
        request = reflection_pb2.ServerReflectionRequest(file_containing_symbol=service.name)
        response = await reflect(channel, version, request)
        raw = response.file_descriptor_response.file_descriptor_proto
        files = [descriptor_pb2.FileDescriptorProto.FromString(one) for one in raw]
        described = {f"{file.package}.{one.name}" for file in files for one in file.service}
        assert service.name in described


async def test_a_taken_port_is_an_error_that_names_the_address(server: Server) -> None:
    second = Server("127.0.0.1", server.port)
    with pytest.raises(OSError, match=f"cannot listen on 127.0.0.1:{server.port}"):
        await second.start()


async def test_calls_that_come_while_the_event_loop_stands_still_are_all_answered(server: Server) -> None:
    count, give_up_at = 1_600, time.monotonic() + 30
    with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        calls = [stub.Check.future(health_pb2.HealthCheckRequest(), timeout=60) for _ in range(count)]
        while started_call_count() < count and time.monotonic() < give_up_at:
            time.sleep(0.01)  # The loop stands still, gRPC's own threads do not.
        codes = await asyncio.to_thread(lambda: Counter(call.code() for call in calls))
    assert codes == {grpc.StatusCode.OK: count}


async def test_headers_as_large_as_envoy_lets_through_are_taken(channel: grpc.aio.Channel) -> None:
    check = health_pb2_grpc.HealthStub(channel).Check
    headers = [(f"x-{number}", "a" * 5_000) for number in range(12)]
    answer = await check(health_pb2.HealthCheckRequest(), metadata=headers, timeout=5)
    assert answer.status == health_pb2.HealthCheckResponse.SERVING


def started_call_count() -> int:
    """Calls that the busiest server of this process has seen, taken by the event loop or not."""
    servers = channelz.ChannelzServicer.GetServers(channelz_pb2.GetServersRequest(), None).server
    return int(max(one.data.calls_started for one in servers))
