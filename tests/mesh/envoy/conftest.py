"""A real Envoy before small in-process services that say what they got and fail as they are told."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
import pytest_asyncio
from envoy.config.core.v3 import base_pb2
from envoy.service.ext_proc.v3 import external_processor_pb2 as ext_proc
from envoy.service.ext_proc.v3 import external_processor_pb2_grpc as ext_proc_grpc
from google.api import httpbody_pb2
from xds.data.orca.v3 import orca_load_report_pb2
from xds.service.orca.v3 import orca_pb2

from tidegate.cli.endpoints import endpoints_path, write_endpoints
from tidegate.cli.envoy_config import EnvoySettings, envoy_command, envoy_environment, write_envoy_files
from tidegate.common import headers
from tidegate.common.errors import Reason, TidegateError, abort
from tidegate.common.grpc_server import Server
from tidegate.scheduler import envoy_messages
from tidegate.v1 import inference_pb2, inference_pb2_grpc

HOST = "127.0.0.1"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]


async def until(condition: Callable[[], Awaitable[bool]], timeout_seconds: float = 10.0) -> None:
    """Waits for a condition of another process; looks at it now and then."""
    deadline = time.monotonic() + timeout_seconds
    while not await condition():
        assert time.monotonic() < deadline, "it did not come true in time"
        await asyncio.sleep(0.02)


class FakeInference(inference_pb2_grpc.InferenceServicer):
    """A replica (or a cache) that does what the request's text says, as JSON: {"do": ..., ...}."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.seen: list[dict[str, str]] = []
        self.open_streams = 0
        self.refuse_with: TidegateError | None = None
        self.hang = False
        self.utilization = 0.5

    async def report_load(self, request, context):
        """ORCA, out of band: what Envoy's own balancing goes by."""
        while True:
            yield orca_load_report_pb2.OrcaLoadReport(application_utilization=self.utilization, rps_fractional=10)
            await asyncio.sleep(0.2)

    async def _act(self, text: str, context: grpc.aio.ServicerContext) -> AsyncIterator[str]:
        self.seen.append({key: str(value) for key, value in context.invocation_metadata()})
        order = json.loads(text) if text.startswith("{") else {"do": "report"}
        self.open_streams += 1
        try:
            if self.hang:
                await asyncio.sleep(60)
            if self.refuse_with is not None:
                await abort(context, self.refuse_with)
            match order["do"]:
                case "report":
                    if headers.BROWNOUT in self.seen[-1]:
                        await context.send_initial_metadata(((headers.BROWNOUT, self.seen[-1][headers.BROWNOUT]),))
                    load = orca_load_report_pb2.OrcaLoadReport(application_utilization=self.utilization)
                    context.set_trailing_metadata((("endpoint-load-metrics-bin", load.SerializeToString()),))
                    yield json.dumps({"name": self.name, "headers": self.seen[-1], "bytes": len(text)})
                case "refuse":
                    error = TidegateError(
                        Reason[order["reason"]],
                        order.get("message", "No: größer als „100“."),
                        field=order.get("field", ""),
                        retry_after_seconds=order.get("retry_after_seconds"),
                    )
                    await abort(context, error)
                case "crash":
                    raise RuntimeError("a fault of the service")
                case "end":
                    await context.abort(grpc.StatusCode[order["status"]], "without a reason")
                case "stream":
                    for index in range(order["count"]):
                        yield f"chunk {index}"
                        await asyncio.sleep(order["interval_seconds"])
                case "flood":
                    for _ in range(order["count"]):
                        yield "x" * order["bytes"]
        finally:
            self.open_streams -= 1

    async def Generate(self, request, context):
        async for text in self._act(request.text, context):
            yield inference_pb2.GenerateEvent(delta=inference_pb2.Delta(text=text))

    async def GenerateMany(self, request_iterator, context):
        async for request in request_iterator:
            delta = inference_pb2.Delta(text=request.text)
            yield inference_pb2.GenerateEvent(request_id=request.request_id, delta=delta)

    async def ChatCompletions(self, request, context):
        text = json.loads(request.data).get("prompt", "")
        async for chunk in self._act(text, context):
            if text.startswith("{"):
                yield httpbody_pb2.HttpBody(content_type="text/event-stream", data=f"data: {chunk}\n\n".encode())
            else:
                yield httpbody_pb2.HttpBody(content_type="application/json", data=chunk.encode())

    async def Completions(self, request, context):
        async for chunk in self.ChatCompletions(request, context):
            yield chunk

    async def Models(self, request, context):
        data = json.dumps({"object": "list", "asked": request.model, "name": self.name})
        return httpbody_pb2.HttpBody(content_type="application/json", data=data.encode())


@dataclass
class FakeService:
    """One fake and its server."""

    inference: FakeInference
    server: Server

    @property
    def address(self) -> str:
        return f"{HOST}:{self.server.port}"

    async def stop(self) -> None:
        await self.server.grpc.stop(None)


async def start_service(name: str, port: int = 0) -> FakeService:
    server = Server(HOST, port)
    inference = FakeInference(name)
    inference_pb2_grpc.add_InferenceServicer_to_server(inference, server.grpc)
    server.add_service_name("tidegate.v1.Inference")
    report_load = grpc.unary_stream_rpc_method_handler(
        inference.report_load,
        request_deserializer=orca_pb2.OrcaLoadReportRequest.FromString,
        response_serializer=orca_load_report_pb2.OrcaLoadReport.SerializeToString,
    )
    handler = grpc.method_handlers_generic_handler(
        "xds.service.orca.v3.OpenRcaService", {"StreamCoreMetrics": report_load}
    )
    server.grpc.add_generic_rpc_handlers((handler,))
    await server.start()
    return FakeService(inference, server)


@dataclass
class FakeScheduler(ext_proc_grpc.ExternalProcessorServicer):
    """An external processor that sets headers, refuses, holds or stays silent, as a test says."""

    set_headers: dict[str, str] = field(default_factory=dict)
    clear_route: bool = False
    refuse_on_headers: TidegateError | None = None
    refuse_on_body: TidegateError | None = None
    silent: bool = False
    hold: asyncio.Event | None = None
    seen: list[dict[str, str]] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)
    open_streams: int = 0

    def reset(self) -> None:
        self.set_headers, self.clear_route, self.silent, self.hold = {}, False, False, None
        self.refuse_on_headers = self.refuse_on_body = None
        self.seen.clear()
        self.bodies.clear()

    async def Process(self, request_iterator, context):
        self.open_streams += 1
        try:
            async for message in request_iterator:
                if self.silent:
                    await asyncio.sleep(60)
                if message.HasField("request_headers"):
                    fields = {h.key: h.raw_value.decode() for h in message.request_headers.headers.headers}
                    self.seen.append(fields)
                    if self.refuse_on_headers is not None:
                        yield refusal(self.refuse_on_headers, fields)
                        return
                    yield ext_proc.ProcessingResponse(request_headers=ext_proc.HeadersResponse())
                else:
                    self.bodies.append(message.request_body.body)
                    if self.hold is not None:
                        wait = ext_proc.ProcessingResponse()
                        wait.override_message_timeout.FromSeconds(3600)
                        yield wait
                        await self.hold.wait()
                    if self.refuse_on_body is not None:
                        yield refusal(self.refuse_on_body, self.seen[-1])
                        return
                    yield self._go_on()
                    return
        finally:
            self.open_streams -= 1

    def _go_on(self) -> ext_proc.ProcessingResponse:
        mutation = ext_proc.HeaderMutation(set_headers=[option(*pair) for pair in self.set_headers.items()])
        common = ext_proc.CommonResponse(header_mutation=mutation, clear_route_cache=self.clear_route)
        return ext_proc.ProcessingResponse(request_body=ext_proc.BodyResponse(response=common))


def option(key: str, value: str) -> base_pb2.HeaderValueOption:
    header = base_pb2.HeaderValue(key=key, raw_value=value.encode())
    overwrite = base_pb2.HeaderValueOption.OVERWRITE_IF_EXISTS_OR_ADD
    return base_pb2.HeaderValueOption(header=header, append_action=overwrite)


def refusal(error: TidegateError, fields: dict[str, str]) -> ext_proc.ProcessingResponse:
    """As the scheduler refuses."""

    class Request:
        is_grpc = fields.get("content-type", "").startswith("application/grpc")

    return envoy_messages.refuse(error, Request())  # type: ignore[arg-type]


@dataclass
class Mesh:
    """An Envoy that runs, and what stands behind it."""

    settings: EnvoySettings
    process: subprocess.Popen[bytes]
    replicas: list[FakeService]
    cache: FakeService
    lite: FakeService
    scheduler: FakeScheduler
    scheduler_server: Server
    access_log_path: Path

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.settings.ingress_port}"

    @property
    def ingress(self) -> str:
        return f"{HOST}:{self.settings.ingress_port}"

    @property
    def mesh(self) -> str:
        return f"{HOST}:{self.settings.mesh_port}"

    def endpoints(self, cluster: str, *services: FakeService | int) -> None:
        """Replaces a cluster's endpoint file."""
        ports = [service if isinstance(service, int) else service.server.port for service in services]
        path = endpoints_path(self.settings.endpoints_directory, cluster)
        write_endpoints(path, cluster, [(HOST, port) for port in ports])

    async def admin(self, path: str) -> str:
        async with httpx.AsyncClient() as client:
            return (await client.get(f"http://{HOST}:{self.settings.admin_port}{path}")).text

    async def healthy_count(self, cluster: str) -> int:
        """How many endpoints of a cluster Envoy would send to."""
        hosts = (await self.cluster(cluster)).get("host_statuses", [])
        return sum(host["health_status"] == {"eds_health_status": "HEALTHY"} for host in hosts)

    async def wait_healthy(self, cluster: str, count: int) -> None:
        async def is_so() -> bool:
            return await self.healthy_count(cluster) == count

        await until(is_so)

    async def cluster(self, name: str) -> dict[str, Any]:
        """What Envoy's admin page says of a cluster."""
        clusters = json.loads(await self.admin("/clusters?format=json"))["cluster_statuses"]
        return next(cluster for cluster in clusters if cluster["name"] == name)

    async def stat(self, name: str) -> int:
        lines = dict(line.split(": ", 1) for line in (await self.admin("/stats")).splitlines() if ": " in line)
        return int(lines.get(name, "0"))

    def access_log(self) -> list[dict[str, Any]]:
        # Envoy may be in the middle of the last line.
        whole, _, _ = self.access_log_path.read_text().rpartition("\n")
        return [json.loads(line) for line in whole.splitlines()]


@contextlib.asynccontextmanager
async def running_mesh(directory: Path, *, replica_count: int = 2, **settings: Any) -> AsyncIterator[Mesh]:
    """Starts the services, then Envoy before them."""
    replicas = [await start_service(f"replica-{index}") for index in range(replica_count)]
    cache = await start_service("cache")
    lite = await start_service("lite")
    scheduler = FakeScheduler()
    scheduler_server = Server(HOST, 0)
    ext_proc_grpc.add_ExternalProcessorServicer_to_server(scheduler, scheduler_server.grpc)
    await scheduler_server.start()
    ports = {name: free_port() for name in ("ingress_port", "mesh_port", "admin_port")}
    envoy = EnvoySettings(run_directory=directory, **ports, **settings)
    config_path = write_envoy_files(envoy)
    log = open(directory / "access.log", "wb")  # noqa: SIM115 -- it lives as long as the process.
    argv = envoy_command(config_path, log_path=directory / "envoy.log", concurrency=2)
    process = subprocess.Popen(argv, stdout=log, stderr=subprocess.STDOUT, env=envoy_environment(os.environ))
    mesh = Mesh(envoy, process, replicas, cache, lite, scheduler, scheduler_server, directory / "access.log")
    try:
        mesh.endpoints("model", *replicas)
        mesh.endpoints("cache", cache)
        mesh.endpoints("lite", lite)
        mesh.endpoints("scheduler", scheduler_server.port)

        async def is_up() -> bool:
            assert process.poll() is None, (directory / "envoy.log").read_text()
            with contextlib.suppress(httpx.TransportError):
                return "LIVE" in await mesh.admin("/ready")
            return False

        await until(is_up, 20)
        for cluster, count in (("model", replica_count), ("lite", 1), ("cache", 1), ("scheduler", 1)):
            await mesh.wait_healthy(cluster, count)
        yield mesh
    finally:
        process.terminate()
        process.wait(10)
        log.close()
        for service in (*replicas, cache, lite):
            await service.stop()
        await scheduler_server.grpc.stop(None)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def mesh_module(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> AsyncIterator[Mesh]:
    """One mesh a test module; a function `mesh_settings` of the module says what differs from the defaults."""
    directory = tmp_path_factory.mktemp("mesh")
    settings = getattr(request.module, "mesh_settings", lambda _: {})(directory)
    # So that on a machine that is busy no request slips past the scheduler; where 200 ms matter they are set.
    settings.setdefault("scheduler_timeout_seconds", 2.0)
    async with running_mesh(directory, **settings) as mesh:
        yield mesh


@pytest.fixture
def mesh(mesh_module: Mesh) -> Mesh:
    """The module's mesh with its services as at the start."""
    mesh_module.scheduler.reset()
    for service in (*mesh_module.replicas, mesh_module.cache):
        service.inference.seen.clear()
        service.inference.refuse_with = None
        service.inference.hang = False
        service.inference.utilization = 0.5
    return mesh_module


@pytest_asyncio.fixture(loop_scope="module")
async def client(mesh: Mesh) -> AsyncIterator[httpx.AsyncClient]:
    """An HTTP/1.1 client of the ingress."""
    async with httpx.AsyncClient(base_url=mesh.url, timeout=10) as http:
        yield http


@pytest_asyncio.fixture(loop_scope="module")
async def stub(mesh: Mesh) -> AsyncIterator[inference_pb2_grpc.InferenceStub]:
    """A gRPC client of the ingress."""
    async with grpc.aio.insecure_channel(mesh.ingress) as channel:
        yield inference_pb2_grpc.InferenceStub(channel)


@pytest_asyncio.fixture(loop_scope="module")
async def start_replica() -> AsyncIterator[Callable[[str], Awaitable[FakeService]]]:
    """Starts further replicas, which end with the test."""
    started: list[FakeService] = []

    async def start(name: str) -> FakeService:
        started.append(await start_service(name))
        return started[-1]

    yield start
    for service in started:
        await service.stop()


@dataclass
class LoneService:
    """A service in a process of its own that holds what it gets, as a scheduler or as a replica."""

    process: asyncio.subprocess.Process
    port: int

    async def wait_held(self, count: int) -> None:
        assert self.process.stdout is not None
        for _ in range(count):
            assert await asyncio.wait_for(self.process.stdout.readline(), 10) == b"held\n"

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.process.pid, number)


@pytest_asyncio.fixture(loop_scope="module")
async def lone_service() -> AsyncIterator[LoneService]:
    script = Path(__file__).with_name("lone_service.py")
    process = await asyncio.create_subprocess_exec(sys.executable, str(script), stdout=asyncio.subprocess.PIPE)
    try:
        assert process.stdout is not None
        yield LoneService(process, int(await asyncio.wait_for(process.stdout.readline(), 20)))
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
