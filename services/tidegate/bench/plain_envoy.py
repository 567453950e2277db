"""An Envoy without Tidegate's parts before the same replicas: what there is to compare with.

It has one listener that balances by turns over all replicas, and one listener a replica, behind which a replica speaks
plain HTTP: public routers know engines only so. JSON and gRPC-Web become gRPC as at the mesh's own ingress; nothing is
queued, scheduled, bounded or retried here.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from tidegate.bench.own_mesh import MeshDidNotStart, stop_process
from tidegate.cli.envoy_config import descriptor_set, envoy_command, envoy_environment
from tidegate.cli.ports import free_ports

UNBOUNDED: Final = {"TIDEGATE_MODEL_QUEUE_LIMIT": "100000", "TIDEGATE_MODEL_REFUSES_LATE": "false"}
"""Settings of a mesh whose replicas let wait whatever comes, as engines do by default."""

READY_SECONDS: Final = 20.0
STOP_SECONDS: Final = 10.0
_MANAGER: Final = "envoy.extensions.filters.network.http_connection_manager"
_HTTP: Final = "envoy.extensions.filters.http"


class PlainEnvoy:
    """Runs it; `round_robin` and `replicas` are its addresses."""

    def __init__(self, replica_addresses: list[str], directory: Path) -> None:
        self._upstreams = replica_addresses
        self._directory = directory
        ports = free_ports(len(replica_addresses) + 2)
        self._admin_port = ports.pop()
        self.round_robin = f"127.0.0.1:{ports.pop()}"
        self.replicas = [f"127.0.0.1:{port}" for port in ports]
        self._process: asyncio.subprocess.Process | None = None

    async def __aenter__(self) -> Self:
        descriptors = self._directory / "plain.pb"
        descriptors.write_bytes(descriptor_set())
        config = self._directory / "plain-envoy.yaml"
        config.write_text(json.dumps(self._config(descriptors)), encoding="utf-8")
        self._process = await asyncio.create_subprocess_exec(
            *envoy_command(config, log_path=self._directory / "plain-envoy.log"),
            stdin=asyncio.subprocess.DEVNULL,
            env=envoy_environment(os.environ),
        )
        give_up_at = time.monotonic() + READY_SECONDS
        while not await _accepts(self.round_robin):
            if self._process.returncode is not None or time.monotonic() > give_up_at:
                words = (self._directory / "plain-envoy.log").read_text(encoding="utf-8", errors="replace")
                await self.__aexit__(None, None, None)
                raise MeshDidNotStart(f"the plain Envoy to compare with did not start:\n{words}")
            await asyncio.sleep(0.05)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process is not None
        await stop_process(self._process, signal.SIGTERM, STOP_SECONDS)

    def _config(self, descriptors: Path) -> dict[str, Any]:
        doors = [("all", self.round_robin, self._upstreams)]
        doors += [
            (f"replica-{index}", address, [self._upstreams[index]]) for index, address in enumerate(self.replicas)
        ]
        return {
            "admin": {"address": _socket(f"127.0.0.1:{self._admin_port}")},
            "static_resources": {
                "listeners": [_listener(name, address, descriptors) for name, address, _ in doors],
                "clusters": [_cluster(name, upstreams) for name, _, upstreams in doors],
            },
        }


def _listener(name: str, address: str, descriptors: Path) -> dict[str, Any]:
    transcoder = {
        "@type": f"type.googleapis.com/{_HTTP}.grpc_json_transcoder.v3.GrpcJsonTranscoder",
        "proto_descriptor": str(descriptors.absolute()),
        "services": ["tidegate.v1.Inference"],
        "match_incoming_request_route": True,
        "auto_mapping": False,
        "ignore_unknown_query_parameters": True,
    }
    health = {
        "@type": f"type.googleapis.com/{_HTTP}.health_check.v3.HealthCheck",
        "pass_through_mode": False,
        "headers": [{"name": ":path", "string_match": {"exact": "/health"}}],
    }
    manager = {
        "@type": f"type.googleapis.com/{_MANAGER}.v3.HttpConnectionManager",
        "stat_prefix": name,
        "codec_type": "AUTO",
        "stream_idle_timeout": "3600s",
        "http2_protocol_options": {"max_concurrent_streams": 20_000},
        "http_filters": [
            {"name": f"{_HTTP}.health_check", "typed_config": health},
            {
                "name": f"{_HTTP}.grpc_web",
                "typed_config": {"@type": f"type.googleapis.com/{_HTTP}.grpc_web.v3.GrpcWeb"},
            },
            {"name": f"{_HTTP}.grpc_json_transcoder", "typed_config": transcoder},
            {
                "name": f"{_HTTP}.router",
                "typed_config": {"@type": f"type.googleapis.com/{_HTTP}.router.v3.Router"},
            },
        ],
        "route_config": {
            "virtual_hosts": [
                {
                    "name": name,
                    "domains": ["*"],
                    "routes": [{"match": {"prefix": "/"}, "route": {"cluster": name, "timeout": "0s"}}],
                }
            ]
        },
    }
    filters = [{"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}]
    return {"name": name, "address": _socket(address), "filter_chains": [{"filters": filters}]}


def _cluster(name: str, upstreams: list[str]) -> dict[str, Any]:
    options = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
    members = [{"endpoint": {"address": _socket(address)}} for address in upstreams]
    limits = {"max_connections": 100_000, "max_pending_requests": 100_000, "max_requests": 100_000}
    return {
        "name": name,
        "type": "STATIC",
        "connect_timeout": "1s",
        "lb_policy": "ROUND_ROBIN",
        "load_assignment": {"cluster_name": name, "endpoints": [{"lb_endpoints": members}]},
        "circuit_breakers": {"thresholds": [limits]},
        "typed_extension_protocol_options": {
            options: {
                "@type": f"type.googleapis.com/{options}",
                "explicit_http_config": {"http2_protocol_options": {}},
            }
        },
    }


def _socket(address: str) -> dict[str, Any]:
    host, _, port = address.rpartition(":")
    return {"socket_address": {"address": host, "port_value": int(port)}}


async def _accepts(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        _, writer = await asyncio.open_connection(host, int(port))
    except OSError:
        return False
    writer.close()
    return True
