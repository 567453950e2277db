"""The batch service as a process that is killed at random moments: each line stands once in the output, as answered."""

from __future__ import annotations

import asyncio
import json
import os
import random
import sys
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.api import httpbody_pb2

from tidegate.common.grpc_server import Server
from tidegate.v1 import (
    batch_pb2,
    batch_pb2_grpc,
    inference_pb2_grpc,
    scheduler_pb2,
    scheduler_pb2_grpc,
)

LINE_COUNT = 400
KILL_COUNT = 6


class FakeMesh(inference_pb2_grpc.InferenceServicer, scheduler_pb2_grpc.SchedulerServicer):
    """Always has room, and answers with the prompt's own text and the number of the execution."""

    def __init__(self) -> None:
        self.executions: Counter[str] = Counter()
        self.count_changed = asyncio.Event()

    async def Completions(self, request, context):
        prompt = json.loads(request.data)["prompt"]
        self.executions[prompt] += 1
        self.count_changed.set()
        await asyncio.sleep(0.002)
        answer = {"text": f"{prompt}, execution {self.executions[prompt]}"}
        yield httpbody_pb2.HttpBody(content_type="application/json", data=json.dumps(answer).encode())

    async def Watch(self, request, context):
        while True:
            replica = scheduler_pb2.ReplicaSnapshot(connected=True, credit_count=64)
            yield scheduler_pb2.Snapshot(replicas=[replica])
            await asyncio.sleep(0.1)

    async def wait_executed(self, count: int) -> None:
        """Until so many executions began from now."""
        target = self.executions.total() + count
        while self.executions.total() < target:
            self.count_changed.clear()
            await self.count_changed.wait()


@pytest.fixture
async def mesh() -> AsyncIterator[tuple[FakeMesh, str]]:
    server, fake = Server("127.0.0.1", 0), FakeMesh()
    inference_pb2_grpc.add_InferenceServicer_to_server(fake, server.grpc)
    scheduler_pb2_grpc.add_SchedulerServicer_to_server(fake, server.grpc)
    await server.start()
    yield fake, f"127.0.0.1:{server.port}"
    await server.grpc.stop(None)


async def spawn(folder: Path, mesh_address: str) -> asyncio.subprocess.Process:
    settings = {
        "FOLDER": str(folder),
        "PORT": "0",
        "METRICS_PORT": "0",
        "MESH_ADDRESS": mesh_address,
        "WATCH_INTERVAL_SECONDS": "0.1",
    }
    environment = {key: value for key, value in os.environ.items() if not key.startswith("TIDEGATE_")}
    return await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tidegate.batch",
        env=environment | {f"TIDEGATE_BATCH_{key}": value for key, value in settings.items()},
        stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip


class BatchProcess:
    """One `python -m tidegate.batch`."""

    def __init__(self, process: asyncio.subprocess.Process, port: int) -> None:
        self.process = process
        self.channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}")
        self.stub = batch_pb2_grpc.BatchStub(self.channel)

    @classmethod
    async def start(cls, folder: Path, mesh_address: str) -> BatchProcess:
        process = await spawn(folder, mesh_address)
        assert process.stderr is not None
        async for line in process.stderr:
            event = json.loads(line)
            if event["event"] == "started":
                return cls(process, event["port"])
        raise AssertionError(f"ended with {await process.wait()} and never started")

    async def kill(self) -> None:
        await self.channel.close()
        if self.process.returncode is None:
            self.process.kill()
        await self.process.communicate()


async def batch_of(service: BatchProcess, batch_id: str) -> dict[str, Any]:
    answer = await service.stub.GetBatch(batch_pb2.GetBatchRequest(batch_id=batch_id), timeout=10)
    return json.loads(answer.data)


async def content(service: BatchProcess, file_id: str) -> list[dict[str, Any]]:
    call = service.stub.GetFileContent(batch_pb2.GetFileContentRequest(file_id=file_id), timeout=10)
    return [json.loads(line) for line in b"".join([part.data async for part in call]).splitlines()]


@pytest.mark.parametrize("seed", [1, 2])
async def test_each_line_is_in_the_output_once_whenever_the_service_is_killed(mesh, tmp_path, seed):
    fake, address = mesh
    choose = random.Random(seed)
    service = await BatchProcess.start(tmp_path, address)
    try:
        lines = [
            json.dumps({"custom_id": f"{i}", "method": "POST", "url": "/v1/completions", "body": {"prompt": f"p{i}"}})
            for i in range(LINE_COUNT)
        ]
        upload = httpbody_pb2.HttpBody(content_type="application/jsonl", data="\n".join(lines).encode())
        file = json.loads((await service.stub.CreateFile(iter([upload]))).data)
        order = {"input_file_id": file["id"], "endpoint": "/v1/completions", "completion_window": "24h"}
        created = json.loads(
            (await service.stub.CreateBatch(httpbody_pb2.HttpBody(data=json.dumps(order).encode()))).data
        )
        for _ in range(KILL_COUNT):
            if choose.random() < 0.7:
                await fake.wait_executed(choose.randrange(1, LINE_COUNT // KILL_COUNT))
            else:
                await asyncio.sleep(choose.random() * 0.05)
            await service.kill()
            service = await BatchProcess.start(tmp_path, address)
        while (batch := await batch_of(service, created["id"]))["status"] != "completed":
            await asyncio.sleep(choose.random() * 0.02)
        await service.kill()
        service = await BatchProcess.start(tmp_path, address)
        output = await content(service, batch["output_file_id"])
    finally:
        await service.kill()
    assert sorted(int(line["custom_id"]) for line in output) == list(range(LINE_COUNT))
    assert all(line["response"]["body"]["text"].startswith(f"p{line['custom_id']}, ") for line in output)
    assert batch["request_counts"] == {"total": LINE_COUNT, "completed": LINE_COUNT, "failed": 0}
    # Some lines were under way when the process was killed, or the test shows nothing.
    assert fake.executions.total() > LINE_COUNT


async def test_a_folder_has_one_process_at_a_time(mesh, tmp_path):
    service = await BatchProcess.start(tmp_path, mesh[1])
    try:
        second = await spawn(tmp_path, mesh[1])
        _, said = await asyncio.wait_for(second.communicate(), 20)
        assert (second.returncode, "another batch service has the folder" in said.decode()) == (1, True)
        assert "Traceback" not in said.decode()
    finally:
        await service.kill()
