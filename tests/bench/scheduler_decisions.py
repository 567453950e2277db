"""Measures what a decision costs the scheduler when nothing waits: `make bench SCENARIO=scheduler_decisions`.

A scheduler process of its own is spoken to as Envoy does, over one HTTP/2 connection, by a client that keeps some
requests under way. A fake replica has granted credits enough, and a fake preprocess answers at once. The figure to
trust on a busy machine is decisions per second of the scheduler's own processor time. Exit status 1 if a row does not
hold.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final

import grpc
from envoy.config.core.v3 import base_pb2
from envoy.service.ext_proc.v3 import external_processor_pb2 as ext_proc
from envoy.service.ext_proc.v3 import external_processor_pb2_grpc as ext_proc_grpc
from table import Table

from tidegate.common.memory import mimalloc_library, with_mimalloc
from tidegate.v1 import preprocess_pb2, preprocess_pb2_grpc, replica_pb2, replica_pb2_grpc, scheduler_pb2
from tidegate.v1 import scheduler_pb2_grpc as scheduler_grpc

LEASE_SECONDS: Final = 3600
ALONE_COUNT: Final = 1_000
"""Decisions one at a time, so that ten of them are above the P99."""


class Replica(replica_pb2_grpc.ReplicaServicer):
    """Grants all the credits at once."""

    def __init__(self, credit_count: int) -> None:
        self._credit_count = credit_count

    async def Credits(self, request_iterator: AsyncIterator[Any], context: Any) -> None:
        """Says every half second that it is ready."""
        grant = replica_pb2.Grant(credit_ids=[str(number) for number in range(self._credit_count)])
        grant.lease.FromSeconds(LEASE_SECONDS)
        await context.write(replica_pb2.ReplicaMessage(load=replica_pb2.Load(slot_count=64, ready=True)))
        await context.write(replica_pb2.ReplicaMessage(grant=grant))
        while True:
            await asyncio.sleep(0.5)
            await context.write(replica_pb2.ReplicaMessage(load=replica_pb2.Load(slot_count=64, ready=True)))


class Preprocess(preprocess_pb2_grpc.PreprocessServicer):
    """Finds every prompt ready."""

    async def Prepare(
        self, request_iterator: AsyncIterator[Any], context: Any
    ) -> AsyncIterator[preprocess_pb2.PrepareResponse]:
        """Answers in order."""
        prompt = preprocess_pb2.PreparedPrompt(model="m", prompt_token_count=32, max_tokens=64)
        prompt.tokens.shared_memory.host_id = "h" * 32
        async for request in request_iterator:
            yield preprocess_pb2.PrepareResponse(request_id=request.request_id, prepared=prompt)


def messages() -> tuple[ext_proc.ProcessingRequest, ext_proc.ProcessingRequest]:
    """What Envoy sends of a chat request of usual size."""
    fields = {
        ":method": "POST", ":path": "/v1/chat/completions", ":scheme": "http", ":authority": "127.0.0.1:8080",
        "content-type": "application/json", "accept": "application/json", "user-agent": "OpenAI/Python 3.54.0",
        "x-request-id": "5b4f7f3a-6a53-4b4c-9a4f-2f7f0a8f5a10", "x-tidegate-tenant": "bench",
        "x-forwarded-proto": "http", "x-envoy-expected-rq-timeout-ms": "15000",
    }  # fmt: skip
    headers = [base_pb2.HeaderValue(key=key, raw_value=value.encode()) for key, value in fields.items()]
    first = ext_proc.ProcessingRequest(
        request_headers=ext_proc.HttpHeaders(headers=base_pb2.HeaderMap(headers=headers))
    )
    body = json.dumps({"model": "m", "messages": [{"role": "user", "content": "word " * 100}]}).encode()
    return first, ext_proc.ProcessingRequest(request_body=ext_proc.HttpBody(body=body, end_of_stream=True))


async def decide(stub: Any, first: Any, body: Any) -> float:
    """One exchange as Envoy has it; returns its seconds."""
    began = time.perf_counter()
    call = stub.Process()
    await call.write(first)
    await call.read()
    await call.write(body)
    decision = await call.read()
    if decision.HasField("override_message_timeout"):
        decision = await call.read()
    assert decision.request_body.response.header_mutation.set_headers, decision
    assert await call.read() is grpc.aio.EOF
    return time.perf_counter() - began


async def measure(table: Table, port: int, pid: int, count: int, parallel: int) -> None:
    """Runs the exchanges and adds the rows."""
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = ext_proc_grpc.ExternalProcessorStub(channel)
        await _ready(channel)
        first, body = messages()
        for _ in range(100):
            await decide(stub, first, body)
        alone = [1000 * await decide(stub, first, body) for _ in range(ALONE_COUNT)]
        how = "one at a time, nothing waits"
        table.at_most("scheduler's decision, P50", statistics.median(alone), 3, "ms", how)
        table.at_most("scheduler's decision, P99", statistics.quantiles(alone, n=100)[98], 15, "ms", how)
        remaining = iter(range(count))

        async def work() -> list[float]:
            return [await decide(stub, first, body) for _ in remaining]

        began, cpu = time.perf_counter(), cpu_seconds(pid)
        times = [seconds for part in await asyncio.gather(*(work() for _ in range(parallel))) for seconds in part]
        seconds, cpu = time.perf_counter() - began, cpu_seconds(pid) - cpu
        how = (
            f"{parallel} at a time, p50 {statistics.median(times) * 1000:.1f} ms; {cpu / count * 1e6:.0f} us of"
            f" processor time each, {count / cpu:.0f} decisions/s a core"
        )
        table.at_least("scheduler's decisions a process", count / seconds, 1_000, "/s", how)


async def _ready(channel: grpc.aio.Channel) -> None:
    stub = scheduler_grpc.SchedulerStub(channel)
    while True:
        async for snapshot in stub.Watch(scheduler_pb2.WatchRequest(once=True), wait_for_ready=True):
            if snapshot.replicas and snapshot.replicas[0].credit_count:
                return
        await asyncio.sleep(0.1)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def cpu_seconds(pid: int) -> float:
    """Processor time of a process."""
    parts = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(parts[11]) + int(parts[12])) / os.sysconf("SC_CLK_TCK")


async def main(count: int, parallel: int, json_path: Path | None) -> int:
    """Starts everything, measures, and ends it; the exit status."""
    table = Table("The scheduler's decisions while nothing waits")
    server = grpc.aio.server()
    replica_pb2_grpc.add_ReplicaServicer_to_server(Replica(count + 2 * ALONE_COUNT), server)
    preprocess_pb2_grpc.add_PreprocessServicer_to_server(Preprocess(), server)
    fakes_port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    with tempfile.TemporaryDirectory() as folder:
        endpoints = Path(folder) / "model.yaml"
        address = {"socket_address": {"address": "127.0.0.1", "port_value": fakes_port}}
        group = {"lb_endpoints": [{"endpoint": {"address": address}}]}
        endpoints.write_text(json.dumps({"resources": [{"cluster_name": "model", "endpoints": [group]}]}))
        port = _free_port()
        environment = {
            "TIDEGATE_SCHEDULER_PORT": str(port),
            "TIDEGATE_SCHEDULER_METRICS_PORT": "0",
            "TIDEGATE_SCHEDULER_MESH_ADDRESS": f"127.0.0.1:{fakes_port}",
            "TIDEGATE_SCHEDULER_ENDPOINTS_FILE": str(endpoints),
            # The replica never tells that a prompt has begun, so starts must not be paced: nothing is to wait here.
            "TIDEGATE_SCHEDULER_START_SHARE": "1",
        }
        environment = with_mimalloc({**os.environ, **environment}, mimalloc_library())
        process = await asyncio.create_subprocess_exec(sys.executable, "-m", "tidegate.scheduler", env=environment)
        try:
            await measure(table, port, process.pid, count, parallel)
        finally:
            process.kill()
            await process.wait()
            await server.stop(0)
    return table.finish(json_path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=3000, help="decisions to measure")
    parser.add_argument("--parallel", type=int, default=32, help="requests under way at once")
    parser.add_argument("--json", type=Path, default=None, help="also write the rows to this file")
    arguments = parser.parse_args()
    sys.exit(asyncio.run(main(arguments.count, arguments.parallel, arguments.json)))
