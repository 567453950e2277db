"""Our engine inside a real Triton: how soon it is ready, and what its streams bring."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import numpy as np
from engine_runs import CACHE_FOLDER, Case, prompt, triton_python
from running_mesh import REPOSITORY
from tritonclient.grpc import service_pb2, service_pb2_grpc

from tidegate.bench.own_mesh import stop_process
from tidegate.cli.ports import free_ports
from tidegate.cli.triton_runtime import TritonServer, prepare_backend, remove_shared_memory, triton_command
from tidegate.common.grpc_clients import open_channel
from tidegate.model.triton_client import EngineRequest, TritonClient
from tidegate.v1 import inference_pb2 as pb

START_SECONDS: Final = 120.0
STOP_SECONDS: Final = 10.0
POLL_SECONDS: Final = 0.02


class TritonDidNotStart(Exception):
    """The message has the end of its log."""


@asynccontextmanager
async def running_triton(folder: Path, settings: dict[str, object]) -> AsyncIterator[tuple[str, float]]:
    """A Triton with the model `llm`: its host:port, and the seconds from its start until the model was ready.

    Args:
        settings: the engine's, by the names of EngineConfig.
    """
    python = Path(triton_python())
    grpc_port, metrics_port = free_ports(2)
    server = TritonServer(
        triton_python=python,
        backend_directory=prepare_backend(folder / "backends", python),
        model_repository=REPOSITORY / "triton_models",
        grpc_port=grpc_port,
        metrics_port=metrics_port,
        instance_name=f"bench{os.getpid()}",
        engine_environment={
            f"TIDEGATE_ENGINE_{name.upper()}": str(value)
            # The same prompts come in every round, and each is to be computed, as is each token.
            for name, value in {
                "cache_dir": CACHE_FOLDER,
                "prefix_reuse": "false",
                "speculation_tokens": 0,
                **settings,
            }.items()
        },
    )
    command, environment = triton_command(server)
    log_file = folder / "triton.log"
    started = time.monotonic()
    with log_file.open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            *command, env=environment, stdin=asyncio.subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
    try:
        await _until_ready(process, grpc_port, log_file)
        yield f"127.0.0.1:{grpc_port}", time.monotonic() - started
    finally:
        await stop_process(process, signal.SIGTERM, STOP_SECONDS)
        remove_shared_memory(server.instance_name)


async def tokens_per_second(address: str, case: Case) -> float:
    """All sequences of a case at once, from the first request to the last token, prefill included."""
    client = TritonClient(address)
    await client.start()
    try:
        assert await client.wait_ready(START_SECONDS), "Triton's stream is not ready"
        await _stream(client, "warm-up", prompt(0, case.prompt_tokens), 4)
        prompts = [prompt(seed, case.prompt_tokens) for seed in range(case.sequences)]
        started = time.monotonic()
        counts = await asyncio.gather(
            *(_stream(client, f"bench-{place}", each, case.tokens) for place, each in enumerate(prompts))
        )
        seconds = time.monotonic() - started
    finally:
        await client.close()
    assert set(counts) == {case.tokens}, f"some streams were short: {min(counts)} of {case.tokens} tokens"
    return sum(counts) / seconds


async def _stream(client: TritonClient, name: str, token_ids: list[int], tokens: int) -> int:
    request = EngineRequest(
        request_id=name,
        tokens=np.asarray(token_ids, dtype=np.int32),
        max_tokens=tokens,
        sampling=pb.SamplingParameters(temperature=0.0),
        ignore_eos=True,
    )
    return sum([len(output.token_ids) async for output in client.generate(request)])


async def _until_ready(process: asyncio.subprocess.Process, port: int, log_file: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not (_listens(port) and await _model_is_ready(port)):
        if process.returncode is not None or time.monotonic() > deadline:
            raise TritonDidNotStart(log_file.read_text(errors="replace")[-2000:])
        await asyncio.sleep(POLL_SECONDS)


def _listens(port: int) -> bool:
    with socket.socket() as attempt:
        return attempt.connect_ex(("127.0.0.1", port)) == 0


async def _model_is_ready(port: int) -> bool:
    channel = open_channel(f"127.0.0.1:{port}")
    try:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        answer = await stub.ModelReady(service_pb2.ModelReadyRequest(name="llm"), timeout=5, wait_for_ready=True)
    finally:
        await channel.close()
    return bool(answer.ready)
