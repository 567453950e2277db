"""Runs the batch service: `python -m tidegate.batch`."""

from __future__ import annotations

import asyncio
import fcntl
import os
import sys
import time
from pathlib import Path

import structlog

from tidegate.batch.config import Settings
from tidegate.batch.file_folder import FileFolder
from tidegate.batch.gate import Gate
from tidegate.batch.inference_client import InferenceClient
from tidegate.batch.life import Means
from tidegate.batch.metrics import BatchMetrics
from tidegate.batch.runner import Runner
from tidegate.batch.scheduler_watch import SchedulerWatch
from tidegate.batch.servicer import BatchServicer
from tidegate.batch.store import Store, StoreError
from tidegate.batch.store_thread import StoreThread
from tidegate.batch.verdicts import Pauses
from tidegate.common import metrics, service_process
from tidegate.common.grpc_clients import open_channel
from tidegate.common.grpc_server import Server
from tidegate.v1 import batch_pb2, batch_pb2_grpc

log = structlog.get_logger()


def main() -> int:
    """Runs until SIGTERM; 2 for bad settings, 1 when it cannot start."""
    return service_process.run("batch", Settings, serve, start_errors=(StoreError,))


async def serve(settings: Settings) -> int:
    """Builds the service and serves; raises OSError when a port or the folder is taken, StoreError for its database."""
    folder = Path(settings.folder)
    folder.mkdir(parents=True, exist_ok=True)
    lock = claim(folder)
    batch_metrics = BatchMetrics()
    mesh = open_channel(settings.mesh_address)
    gate = Gate(Pauses(settings.shortest_pause_seconds, settings.longest_pause_seconds))
    store = StoreThread(Store(folder / "batch.sqlite3"))
    means = Means(
        store=store,
        folder=FileFolder(folder / "files"),
        gate=gate,
        inference=InferenceClient(mesh, timeout_seconds=settings.line_timeout_seconds),
        settings=settings,
        metrics=batch_metrics,
        unix_seconds=time.time,
    )
    runner = Runner(means)
    server = Server(settings.host, settings.port)
    batch_pb2_grpc.add_BatchServicer_to_server(BatchServicer(means, runner), server.grpc)
    server.add_service_name(batch_pb2.DESCRIPTOR.services_by_name["Batch"].full_name)
    if settings.metrics_port:
        metrics.serve(settings.host, settings.metrics_port)
    await runner.start()
    watch = asyncio.create_task(SchedulerWatch(mesh, gate, settings, batch_metrics).run())
    await server.start()
    log.info("started", port=server.port, metrics_port=settings.metrics_port, folder=str(folder))
    await server.run_until_signal()
    watch.cancel()
    await runner.stop()
    await store.close()
    await mesh.close()
    os.close(lock)
    return 0


def claim(folder: Path) -> int:
    """Makes this process the only one of the folder until it ends, however it ends; answers the lock.

    Raises:
        OSError: another process has it.
    """
    lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise OSError(f"another batch service has the folder {folder}") from None
    return lock


if __name__ == "__main__":
    sys.exit(main())
