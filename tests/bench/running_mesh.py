"""A mesh of the benchmark's own, on free ports and in a folder of its own, and the engine beside it."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from pathlib import Path
from typing import Final, Self

import grpc
import psutil
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tidegate.bench.own_mesh import OwnMesh
from tidegate.cli.config import default_model_path

REPOSITORY: Final = Path(__file__).resolve().parents[2]
NO_BUCKET: Final = {
    "TIDEGATE_UP_TENANT_REQUESTS_PER_SECOND": "1000000",
    "TIDEGATE_UP_TENANT_BURST_REQUESTS": "10000000",
}
"""For benchmarks that do not measure what tenants are allowed a second."""

ENGINE_SECONDS: Final = 300.0
"""The bound on one run of the engine alone."""


class RunningMesh(OwnMesh):
    """`tidegate up`, with its processes, which a benchmark may measure or kill."""

    async def __aenter__(self) -> Self:
        print(f"starting a mesh with {self.replica_count} replica(s)", flush=True)
        return await super().__aenter__()

    @property
    def ingress(self) -> str:
        """host:port of Envoy's ingress."""
        return self.address("ingress")

    @property
    def mesh_address(self) -> str:
        """host:port of Envoy's mesh listener."""
        return self.address("mesh")

    @property
    def triton_addresses(self) -> list[str]:
        """host:port of each replica's Triton."""
        return [self.address(f"triton-{index}") for index in range(self.replica_count)]

    @property
    def slot_count(self) -> int:
        """Sequences that one engine generates at once: the engine's own default."""
        return 32

    def kill(self, name: str) -> None:
        """kill -9 of one process."""
        print(f"  kill -9 {name}", flush=True)
        os.kill(self.pid(name), signal.SIGKILL)

    async def wait_healthy(self, seconds: float) -> None:
        """Waits until every process answers again."""
        deadline = time.monotonic() + seconds
        names = ["scheduler", "preprocess", "cache", *(f"model-{index}" for index in range(self.replica_count))]
        for name in names:
            while not await serves(self.address(name)):
                if time.monotonic() > deadline:
                    raise SystemExit(f"{name} did not come back within {seconds} s")
                await asyncio.sleep(0.2)


async def engine_tokens_per_second(mesh: RunningMesh, sequences: int, tokens: int, prompt_tokens: int) -> float:
    """Drives the engine alone, in a process of its own with the same settings, and returns tokens per second.

    The time is that of the whole run, prefill included, as a client of the mesh sees it.
    """
    python = os.environ.get("TIDEGATE_TRITON_PYTHON", str(REPOSITORY / ".venv-triton" / "bin" / "python"))
    options = {
        "--model": default_model_path(),
        "--cache-dir": str(REPOSITORY / ".tidegate" / "cache"),
        "--sequences": str(sequences),
        "--tokens": str(tokens),
        "--prompt-tokens": str(prompt_tokens),
        "--temperature": "1.0",
        "--threads": str(max(1, (os.cpu_count() or 1) // mesh.replica_count)),
    }
    process = await asyncio.create_subprocess_exec(
        *(python, "-m", "llm_engine", "bench", "--json"),
        *(word for pair in options.items() for word in pair),
        cwd=REPOSITORY / "triton_models" / "llm",
        stdout=asyncio.subprocess.PIPE,
        stdin=asyncio.subprocess.DEVNULL,
    )
    output, _ = await asyncio.wait_for(process.communicate(), ENGINE_SECONDS)
    if process.returncode != 0:
        raise SystemExit(f"the engine's own benchmark failed with status {process.returncode}")
    return float(json.loads(output)["tokens_per_second"])


def process_cpu_seconds(pid: int) -> float:
    """CPU time of a process, its threads and its children, to the nanosecond (Linux, /proc/PID/task/*/schedstat)."""
    tasks = [task for each in _with_children(pid) for task in Path(f"/proc/{each}/task").iterdir()]
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9


def resident_bytes(pid: int) -> int:
    """Resident memory of a process and its children that is their own, in bytes (shared memory left out)."""
    status = [line for each in _with_children(pid) for line in Path(f"/proc/{each}/status").read_text().splitlines()]
    return sum(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon:"))


def _with_children(pid: int) -> list[int]:
    return [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]


async def serves(address: str) -> bool:
    """Whether a gRPC server there says that it serves."""
    async with grpc.aio.insecure_channel(address) as channel:
        try:
            answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=1)
        except grpc.aio.AioRpcError:
            return False
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)
