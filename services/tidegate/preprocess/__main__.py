"""Runs preprocess: `python -m tidegate.preprocess`."""

from __future__ import annotations

import asyncio
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import structlog

from tidegate.common import metrics, service_process
from tidegate.common.arena import Arena, ArenaUnavailable
from tidegate.common.grpc_server import Server
from tidegate.preprocess.config import Settings
from tidegate.preprocess.metrics import PreprocessMetrics
from tidegate.preprocess.servicer import PreprocessServicer
from tidegate.text.model_files import ModelFileError, load_text_model
from tidegate.v1 import preprocess_pb2, preprocess_pb2_grpc

log = structlog.get_logger()


def main() -> int:
    """Runs until SIGTERM; 2 for bad settings, 1 when it cannot start."""
    return service_process.run("preprocess", Settings, serve, start_errors=(ArenaUnavailable, ModelFileError))


async def serve(settings: Settings) -> int:
    """Builds the service and serves; raises when the model, the arena or a port cannot be had."""
    model = load_text_model(settings.model_path, settings.model_name, context_token_limit=settings.max_context_tokens)
    lite_model = (
        load_text_model(settings.lite_model_path, settings.lite_model_name) if settings.lite_model_path else None
    )
    arena = Arena.open(settings.arena_region, settings.arena_bytes)
    preprocess_metrics = PreprocessMetrics()
    threads = ThreadPoolExecutor(settings.thread_count, thread_name_prefix="prepare")
    servicer = PreprocessServicer(model, arena, threads, settings, preprocess_metrics, lite_model=lite_model)
    server = Server(settings.host, settings.port)
    preprocess_pb2_grpc.add_PreprocessServicer_to_server(servicer, server.grpc)
    server.add_service_name(preprocess_pb2.DESCRIPTOR.services_by_name["Preprocess"].full_name)
    if settings.metrics_port:
        metrics.serve(settings.host, settings.metrics_port)
    await server.start()
    log.info(
        "started",
        port=server.port,
        metrics_port=settings.metrics_port,
        model=model.name,
        context_token_count=model.context_token_count,
        arena_region=settings.arena_region,
        arena_bytes=arena.byte_count,
    )
    watching = asyncio.create_task(_watch_arena(arena, preprocess_metrics, settings.usage_interval_seconds))
    await server.run_until_signal()
    watching.cancel()
    threads.shutdown(cancel_futures=True)
    arena.close()
    return 0


async def _watch_arena(arena: Arena, preprocess_metrics: PreprocessMetrics, interval_seconds: float) -> None:
    while True:
        preprocess_metrics.show_arena(arena.usage(time.monotonic()))
        await asyncio.sleep(interval_seconds)


if __name__ == "__main__":
    sys.exit(main())
