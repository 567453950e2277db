"""A second scheduler beside a mesh's own: told as the first is, on ports of its own, and in Envoy's endpoints."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

from running_mesh import serves

from tidegate.bench.own_mesh import OwnMesh
from tidegate.cli.endpoints import endpoints_path, write_endpoints
from tidegate.cli.ports import free_ports

START_SECONDS: Final = 30.0
SETTLE_SECONDS: Final = 3.0
"""Until Envoy has found it healthy and replicas have divided their credits."""


@asynccontextmanager
async def second_scheduler(mesh: OwnMesh) -> AsyncIterator[int]:
    """Runs it; yields its process id. The endpoints are as before afterwards."""
    first = mesh.pid("scheduler")
    told = dict(
        line.decode().split("=", 1) for line in Path(f"/proc/{first}/environ").read_bytes().split(b"\0") if b"=" in line
    )
    port, metrics_port = free_ports(2)
    own = {
        "TIDEGATE_SCHEDULER_PORT": str(port),
        "TIDEGATE_SCHEDULER_METRICS_PORT": str(metrics_port),
        # One writer a file.
        "TIDEGATE_SCHEDULER_SHED_FILE": "",
        "TIDEGATE_SCHEDULER_LIMITS_FILE": "",
    }
    with (mesh.home / "second-scheduler.log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "tidegate.scheduler"),
            env=told | own,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
    path = endpoints_path(mesh.home / "run" / "endpoints", "scheduler")
    host, _, first_port = mesh.address("scheduler").rpartition(":")
    before = [(host, int(first_port))]
    try:
        async with asyncio.timeout(START_SECONDS):
            while not await serves(f"127.0.0.1:{port}"):
                await asyncio.sleep(0.1)
        write_endpoints(path, "scheduler", [*before, ("127.0.0.1", port)])
        await asyncio.sleep(SETTLE_SECONDS)
        yield process.pid
    finally:
        write_endpoints(path, "scheduler", before)
        if process.returncode is None:
            os.kill(process.pid, 9)
        await process.wait()
