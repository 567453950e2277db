"""The batch service on a loopback port, before a mesh that answers as a test says."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.api import httpbody_pb2
from prometheus_client import CollectorRegistry

from tidegate.batch.config import Settings
from tidegate.batch.file_folder import FileFolder
from tidegate.batch.gate import Gate
from tidegate.batch.inference_client import InferenceClient
from tidegate.batch.life import Means
from tidegate.batch.metrics import BatchMetrics
from tidegate.batch.runner import Runner
from tidegate.batch.scheduler_watch import SchedulerWatch
from tidegate.batch.servicer import BatchServicer
from tidegate.batch.store import Store
from tidegate.batch.store_thread import StoreThread
from tidegate.batch.verdicts import Pauses
from tidegate.common.errors import TidegateError, abort
from tidegate.common.grpc_clients import open_channel
from tidegate.common.grpc_server import Server
from tidegate.v1 import (
    batch_pb2,
    batch_pb2_grpc,
    inference_pb2_grpc,
    replica_pb2,
    scheduler_pb2,
    scheduler_pb2_grpc,
)

BOUNDARY = "a-boundary"


def snapshot(*, credit_count: int = 8, waiting: dict[str, int] | None = None, **load: int) -> scheduler_pb2.Snapshot:
    """A scheduler with one replica; `waiting` is by class."""
    classes = {"realtime": 1, "standard": 2, "batch": 3}
    return scheduler_pb2.Snapshot(
        lanes=[
            scheduler_pb2.LaneSnapshot(service_class=number, waiting_request_count=(waiting or {}).get(name, 0))
            for name, number in classes.items()
        ],
        replicas=[
            scheduler_pb2.ReplicaSnapshot(
                connected=True, credit_count=credit_count, load=replica_pb2.Load(ready=True, **load)
            )
        ],
    )


class FakeMesh(inference_pb2_grpc.InferenceServicer, scheduler_pb2_grpc.SchedulerServicer):
    """Answers each chat with its last message in capitals, once `act` lets it; shows `snapshot` as the scheduler."""

    def __init__(self) -> None:
        self.seen: list[tuple[dict[str, str], dict[str, Any]]] = []
        self.snapshot = snapshot()
        self.act: Callable[[str], Any] = lambda _: None
        self.in_flight = self.most_in_flight = 0

    async def ChatCompletions(self, request, context):
        body = json.loads(request.data)
        fields = {key: str(value) for key, value in context.invocation_metadata()}
        self.seen.append((fields, body))
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            text = body["messages"][-1]["content"]
            found = self.act(text)
            if asyncio.iscoroutine(found):
                found = await found
            if isinstance(found, TidegateError):
                await abort(context, found)
            answer = {
                "choices": [{"message": {"role": "assistant", "content": text.upper()}}],
                "usage": {"prompt_tokens": 3, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 1}},
            }
            yield httpbody_pb2.HttpBody(content_type="application/json", data=json.dumps(answer, indent=1).encode())
        finally:
            self.in_flight -= 1

    async def Watch(self, request, context):
        while True:
            yield self.snapshot
            await asyncio.sleep(request.interval.ToMilliseconds() / 1000)


@dataclass
class Service:
    """One batch service and a client of it."""

    stub: batch_pb2_grpc.BatchStub
    folder: Path
    registry: CollectorRegistry

    async def upload(self, content: str, *, tenant: str = "default", filename: str = "in.jsonl") -> dict[str, Any]:
        body = multipart({"purpose": "batch"}, content.encode(), filename)
        return await self.send_file(pieces(body), tenant=tenant)

    async def send_file(
        self, bodies: list[bytes], content_type: str = f"multipart/form-data; boundary={BOUNDARY}", *, tenant="default"
    ) -> dict[str, Any]:
        messages = [httpbody_pb2.HttpBody(content_type=content_type, data=data) for data in bodies]
        answer = await self.stub.CreateFile(iter(messages), metadata=metadata(tenant), timeout=20)
        return json.loads(answer.data)

    async def create(self, file_id: str, *, tenant: str = "default", **changes: Any) -> dict[str, Any]:
        order = {"input_file_id": file_id, "endpoint": "/v1/chat/completions", "completion_window": "24h"} | changes
        request = httpbody_pb2.HttpBody(content_type="application/json", data=json.dumps(order).encode())
        return json.loads((await self.stub.CreateBatch(request, metadata=metadata(tenant), timeout=20)).data)

    async def batch(self, batch_id: str, *, tenant: str = "default") -> dict[str, Any]:
        request = batch_pb2.GetBatchRequest(batch_id=batch_id)
        return json.loads((await self.stub.GetBatch(request, metadata=metadata(tenant), timeout=20)).data)

    async def until(self, batch_id: str, *statuses: str, tenant: str = "default") -> dict[str, Any]:
        """Polls until the batch has one of the statuses."""
        async with asyncio.timeout(20):
            while (batch := await self.batch(batch_id, tenant=tenant))["status"] not in statuses:
                await asyncio.sleep(0.01)
        return batch

    async def content(self, file_id: str, *, tenant: str = "default") -> bytes:
        request = batch_pb2.GetFileContentRequest(file_id=file_id)
        call = self.stub.GetFileContent(request, metadata=metadata(tenant), timeout=20)
        return b"".join([part.data async for part in call])

    async def lines(self, file_id: str, *, tenant: str = "default") -> dict[str | None, dict[str, Any]]:
        """The lines of an output file by custom_id, each there once."""
        found = [json.loads(line) for line in (await self.content(file_id, tenant=tenant)).splitlines()]
        assert len({line["id"] for line in found}) == len(found)
        return {line["custom_id"]: line for line in found}


def metadata(tenant: str) -> list[tuple[str, str]]:
    return [("x-tidegate-tenant", tenant)]


def multipart(fields: dict[str, str], content: bytes | None, filename: str = "in.jsonl") -> bytes:
    """The body of an upload."""
    parts = [
        f'--{BOUNDARY}\r\ncontent-disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'.encode()
        for name, value in fields.items()
    ]
    if content is not None:
        head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="file"; filename="{filename}"\r\n'
        parts.append(head.encode() + b"Content-Type: application/octet-stream\r\n\r\n" + content + b"\r\n")
    return b"".join(parts) + f"--{BOUNDARY}--\r\n".encode()


def pieces(body: bytes, size: int = 1000) -> list[bytes]:
    """As a stream brings it."""
    return [body[start : start + size] for start in range(0, len(body), size)]


class UnixClock:
    """Wall time that a test moves."""

    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def unix_clock() -> UnixClock:
    return UnixClock()


@pytest.fixture
def mesh() -> FakeMesh:
    return FakeMesh()


@pytest.fixture
async def start(tmp_path: Path, mesh: FakeMesh, unix_clock: UnixClock) -> AsyncIterator[Callable[..., Any]]:
    """Starts the service, with settings of the test's; a second start ends the first, in the same folder."""
    mesh_server = Server("127.0.0.1", 0)
    inference_pb2_grpc.add_InferenceServicer_to_server(mesh, mesh_server.grpc)
    scheduler_pb2_grpc.add_SchedulerServicer_to_server(mesh, mesh_server.grpc)
    await mesh_server.start()
    running: list[AsyncExitStack] = []

    async def start_service(**changes: Any) -> Service:
        if running:
            await running.pop().aclose()
        running.append(stack := AsyncExitStack())
        given = {"shortest_pause_seconds": 0.01, "watch_interval_seconds": 0.1, "folder": str(tmp_path)} | changes
        settings = Settings(**given)
        registry = CollectorRegistry()
        channel = await stack.enter_async_context(open_channel(f"127.0.0.1:{mesh_server.port}"))
        gate = Gate(Pauses(settings.shortest_pause_seconds, settings.longest_pause_seconds))
        store = StoreThread(Store(tmp_path / "batch.sqlite3"))
        means = Means(
            store=store,
            folder=FileFolder(tmp_path / "files"),
            gate=gate,
            inference=InferenceClient(channel, timeout_seconds=settings.line_timeout_seconds),
            settings=settings,
            metrics=BatchMetrics(registry),
            unix_seconds=unix_clock,
        )
        stack.push_async_callback(store.close)
        runner = Runner(means)
        stack.push_async_callback(runner.stop)
        watch = asyncio.create_task(SchedulerWatch(channel, gate, settings, means.metrics).run())
        stack.callback(watch.cancel)
        await runner.start()
        server = Server("127.0.0.1", 0)
        batch_pb2_grpc.add_BatchServicer_to_server(BatchServicer(means, runner), server.grpc)
        await server.start()
        stack.push_async_callback(server.grpc.stop, None)
        client = await stack.enter_async_context(grpc.aio.insecure_channel(f"127.0.0.1:{server.port}"))
        return Service(batch_pb2_grpc.BatchStub(client), tmp_path, registry)

    yield start_service
    for stack in running:
        await stack.aclose()
    await mesh_server.grpc.stop(None)
