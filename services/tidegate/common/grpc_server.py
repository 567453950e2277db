"""One way to run a gRPC server: health, reflection, channelz, bounds, and an orderly end on SIGTERM."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

import grpc
import structlog
from google.protobuf import descriptor_pb2, descriptor_pool, text_format
from grpc_channelz.v1 import channelz
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2

log = structlog.get_logger()

LARGEST_MESSAGE_BYTES: Final = 16 * 1024 * 1024
"""The bound on one message either way; Envoy's own limit on bodies is below it."""

LARGEST_HEADERS_BYTES: Final = 128 * 1024
"""The bound on a call's headers: what Envoy takes of a client (60 KiB), and room for what the mesh adds.

Past 8 KiB gRPC would refuse some by lot, and past 16 all, as an overload.
"""

CONCURRENT_STREAMS_PER_CONNECTION: Final = 20_000
"""Above the target concurrency of 10,000, so that Envoy's circuit breakers decide first."""

PENDING_CALLS: Final = 100_000
"""Calls that may have come while the event loop was busy: as many as Envoy's circuit breakers let through.

From the thousandth on gRPC would drop some by lot, with a bare CANCELLED; where those are the scheduler's, Envoy fails
open.
"""

REFLECTION_V1_NAME: Final = "grpc.reflection.v1.ServerReflection"

STOP_GRACE_SECONDS: Final = 5.0
"""How long running streams may go on after SIGTERM."""

SERVER_OPTIONS: Final[Sequence[tuple[str, int]]] = (
    ("grpc.max_receive_message_length", LARGEST_MESSAGE_BYTES),
    ("grpc.max_send_message_length", LARGEST_MESSAGE_BYTES),
    ("grpc.max_metadata_size", LARGEST_HEADERS_BYTES),
    ("grpc.absolute_max_metadata_size", LARGEST_HEADERS_BYTES),
    ("grpc.max_concurrent_streams", CONCURRENT_STREAMS_PER_CONNECTION),
    ("grpc.server.max_pending_requests", PENDING_CALLS),
    ("grpc.server.max_pending_requests_hard_limit", PENDING_CALLS),
    ("grpc.so_reuseport", 0),
    # A client that hangs (and does not die) keeps its streams, and what was granted on them; pings find it out.
    ("grpc.keepalive_time_ms", 5_000),
    ("grpc.keepalive_timeout_ms", 2_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 500),
    ("grpc.http2.max_ping_strikes", 0),
)


class Server:
    """A grpc.aio server with health and reflection for the services added to it.

    Args:
        host, port: where it listens; port 0 lets the system choose (then see `port`).
    """

    def __init__(self, host: str, port: int) -> None:
        self.grpc = grpc.aio.server(options=SERVER_OPTIONS)
        self.health = health.aio.HealthServicer()
        self._host = host
        self.port = port
        self._names: list[str] = []
        self._described: list[str] = []

    def add_service_name(self, name: str) -> None:
        """Makes a service known to health and reflection; its servicer is added to `grpc` by the caller."""
        self._names.append(name)

    def describe(self, name: str) -> None:
        """Tells reflection of a service that Envoy leads elsewhere, so that tools at the ingress can call it."""
        self._described.append(name)

    async def start(self) -> None:
        """Starts to listen; raises OSError with the address when the port is taken."""
        health_pb2_grpc.add_HealthServicer_to_server(self.health, self.grpc)
        channelz.add_channelz_servicer(self.grpc)
        _add_reflection(self.grpc, (*self._names, *self._described, health.SERVICE_NAME))
        try:
            self.port = self.grpc.add_insecure_port(f"{self._host}:{self.port}")
        except RuntimeError as error:
            raise OSError(f"cannot listen on {self._host}:{self.port}: {error}") from error
        await self.grpc.start()
        await self.set_serving(True)

    async def set_serving(self, serving: bool) -> None:
        """Says in health whether this process takes requests."""
        status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for name in ("", *self._names):
            await self.health.set(name, status)

    async def run_until_signal(self, on_stop: Callable[[], Awaitable[None]] | None = None) -> None:
        """Serves until SIGTERM or SIGINT; then refuses new calls and gives running ones a grace."""
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        await stop.wait()
        log.info("stopping", grace_seconds=STOP_GRACE_SECONDS)
        await self.health.enter_graceful_shutdown()
        await self.grpc.stop(STOP_GRACE_SECONDS)
        if on_stop is not None:
            await on_stop()


def _add_reflection(server: grpc.aio.Server, names: Sequence[str]) -> None:
    """Serves reflection v1, which tools ask for first, and v1alpha, the only one that the library has.

    The two differ by the package's name alone, so one servicer answers both.
    """
    _describe_reflection_v1()
    names = (*names, reflection.SERVICE_NAME, REFLECTION_V1_NAME)
    reflection.enable_server_reflection(names, server)
    method = grpc.stream_stream_rpc_method_handler(
        reflection.aio.ReflectionServicer(names).ServerReflectionInfo,
        request_deserializer=reflection_pb2.ServerReflectionRequest.FromString,
        response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    handler = grpc.method_handlers_generic_handler(REFLECTION_V1_NAME, {"ServerReflectionInfo": method})
    server.add_generic_rpc_handlers((handler,))


def _describe_reflection_v1() -> None:
    """Adds v1 to the descriptor pool, so that a tool that describes every listed service finds it."""
    pool = descriptor_pool.Default()
    try:
        pool.FindServiceByName(REFLECTION_V1_NAME)
    except KeyError:
        alpha = descriptor_pb2.FileDescriptorProto()
        reflection_pb2.DESCRIPTOR.CopyToProto(alpha)
        renamed = text_format.MessageToString(alpha).replace("v1alpha", "v1")
        pool.Add(text_format.Parse(renamed, descriptor_pb2.FileDescriptorProto()))
