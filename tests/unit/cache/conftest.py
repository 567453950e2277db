"""A cache service on a loopback port, with a clock that the test moves."""

from __future__ import annotations

from collections.abc import AsyncIterator

import grpc
import pytest
from prometheus_client import CollectorRegistry

from tidegate.cache.config import Settings
from tidegate.cache.memory import MemoryStore
from tidegate.cache.metrics import CacheMetrics
from tidegate.cache.replay import ReplayServicer
from tidegate.cache.servicer import CacheServicer
from tidegate.cache.tiers import MemoryTier, Tiers
from tidegate.common.grpc_clients import open_channel
from tidegate.common.grpc_server import Server
from tidegate.v1 import cache_pb2_grpc, inference_pb2_grpc


class FakeClock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def settings() -> Settings:
    return Settings(memory_bytes=100_000, largest_answer_bytes=10_000, time_to_live_seconds=600.0)


@pytest.fixture
async def channel(clock: FakeClock, registry: CollectorRegistry, settings: Settings) -> AsyncIterator[grpc.aio.Channel]:
    metrics = CacheMetrics(registry)
    tiers = Tiers(MemoryTier(MemoryStore(settings.memory_bytes)), [], metrics)
    server = Server("127.0.0.1", 0)
    cache_pb2_grpc.add_CacheServicer_to_server(CacheServicer(tiers, settings, metrics, clock=clock), server.grpc)
    replay = ReplayServicer(tiers, metrics, clock=clock, wall_clock=lambda: 1_700_000_000.0)
    inference_pb2_grpc.add_InferenceServicer_to_server(replay, server.grpc)
    await server.start()
    async with open_channel(f"127.0.0.1:{server.port}") as opened:
        yield opened
    await server.grpc.stop(None)
