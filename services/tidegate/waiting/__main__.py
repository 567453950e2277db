"""Runs a waiting room: `python -m tidegate.waiting`."""

from __future__ import annotations

import sys

import structlog

from tidegate.common import metrics, service_process
from tidegate.common.grpc_clients import open_channel
from tidegate.common.grpc_server import Server
from tidegate.waiting.config import Settings
from tidegate.waiting.servicer import SERVICE_NAME, WaitingRoom

log = structlog.get_logger()


def main() -> int:
    """Runs until SIGTERM; 2 for bad settings, 1 when it cannot start."""
    return service_process.run("waiting", Settings, serve)


async def serve(settings: Settings) -> int:
    """Builds the service and serves; raises OSError when a port is taken."""
    mesh = open_channel(settings.mesh_address)
    server = Server(settings.host, settings.port)
    server.grpc.add_generic_rpc_handlers((WaitingRoom(mesh, settings).handlers(),))
    server.add_service_name(SERVICE_NAME)
    if settings.metrics_port:
        metrics.serve(settings.host, settings.metrics_port)
    await server.start()
    log.info("started", port=server.port, metrics_port=settings.metrics_port, stream_limit=settings.stream_limit)
    await server.run_until_signal(mesh.close)
    return 0


if __name__ == "__main__":
    sys.exit(main())
