"""Runs the cache: `python -m tidegate.cache`."""

from __future__ import annotations

import sys

import structlog

from tidegate.cache.config import Settings
from tidegate.cache.memory import MemoryStore
from tidegate.cache.metrics import CacheMetrics
from tidegate.cache.replay import ReplayServicer
from tidegate.cache.servicer import CacheServicer
from tidegate.cache.tiers import MEMORY, MemoryTier, Tiers
from tidegate.common import metrics, service_process
from tidegate.common.grpc_server import Server
from tidegate.v1 import cache_pb2, cache_pb2_grpc, inference_pb2, inference_pb2_grpc

log = structlog.get_logger()


def main() -> int:
    """Runs until SIGTERM; 2 for bad settings, 1 when it cannot start."""
    return service_process.run("cache", Settings, serve)


async def serve(settings: Settings) -> int:
    """Builds the service and serves; raises OSError when a port is taken."""
    cache_metrics = CacheMetrics()
    cache_metrics.capacity.labels(MEMORY).set(settings.memory_bytes)
    memory = MemoryTier(MemoryStore(settings.memory_bytes))
    cache_metrics.show(memory.store)
    tiers = Tiers(memory, [], cache_metrics)
    server = Server(settings.host, settings.port)
    cache_pb2_grpc.add_CacheServicer_to_server(CacheServicer(tiers, settings, cache_metrics), server.grpc)
    inference_pb2_grpc.add_InferenceServicer_to_server(ReplayServicer(tiers, cache_metrics), server.grpc)
    server.add_service_name(cache_pb2.DESCRIPTOR.services_by_name["Cache"].full_name)
    server.add_service_name(inference_pb2.DESCRIPTOR.services_by_name["Inference"].full_name)
    if settings.metrics_port:
        metrics.serve(settings.host, settings.metrics_port)
    await server.start()
    log.info("started", port=server.port, metrics_port=settings.metrics_port, memory_bytes=settings.memory_bytes)
    await server.run_until_signal()
    return 0


if __name__ == "__main__":
    sys.exit(main())
