"""What is left, and who learns of it, when Triton or the process of its model dies."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path

import numpy as np
import psutil
import tritonclient.grpc.aio

from tidegate.cli.process_table import ProcessId
from tidegate.cli.triton_runtime import remove_shared_memory, stub_process_ids
from tidegate.model.triton_client import EngineRequest, TritonGone
from tidegate.v1.inference_pb2 import SamplingParameters


def long_request(request_id: str) -> EngineRequest:
    tokens = np.array([1, 504, 3575], np.int32)
    sampling = SamplingParameters(temperature=0.0)
    return EngineRequest(request_id=request_id, tokens=tokens, max_tokens=4000, sampling=sampling, ignore_eos=True)


async def begun(client, count: int) -> list[asyncio.Task]:
    """Readers of streams that have brought their first output."""
    started = asyncio.Semaphore(0)

    async def read(request: EngineRequest) -> None:
        async for _ in client.generate(request):
            started.release()

    readers = [asyncio.create_task(read(long_request(f"d{number}"))) for number in range(count)]
    for _ in readers:
        await asyncio.wait_for(started.acquire(), 10)
    return readers


async def gone_after(readers: list[asyncio.Task]) -> float:
    """Seconds until all readers were told that Triton is gone."""
    began = time.monotonic()
    results = await asyncio.wait_for(asyncio.gather(*readers, return_exceptions=True), 10)
    assert [type(result) for result in results] == [TritonGone] * len(readers)
    return time.monotonic() - began


async def test_a_killed_triton_is_noticed_leaves_no_process_and_comes_back(triton, client, until):
    (stub,) = stub_process_ids(triton.process.pid)
    readers = await begun(client, 4)
    triton.process.kill()
    assert await gone_after(readers) < 0.5
    assert not client.ready
    triton.process.wait(5)
    await until(lambda: not Path(f"/proc/{stub}").exists())
    remove_shared_memory(triton.server.instance_name)
    assert triton.shared_memory() == []
    triton.start()
    assert await client.wait_ready(60)
    output = await anext(client.generate(long_request("again")))
    assert output.token_ids


async def test_a_triton_that_hangs_is_noticed_and_taken_back(triton, connect):
    client = await connect(triton, heartbeat_seconds=0.2, silence_seconds=1.0)
    readers = await begun(client, 2)
    triton.process.send_signal(signal.SIGSTOP)
    try:
        assert await gone_after(readers) < 2.0
        assert not client.ready
    finally:
        triton.process.send_signal(signal.SIGCONT)
    assert await client.wait_ready(10)
    await client.close()


async def test_a_dead_stub_makes_the_model_not_ready(triton, client):
    (stub,) = stub_process_ids(triton.process.pid)
    readers = await begun(client, 2)
    os.kill(stub, signal.SIGKILL)
    assert await gone_after(readers) < 6.0
    assert not client.ready
    await asyncio.sleep(0.5)
    assert not client.ready
    assert stub_process_ids(triton.process.pid) == []
    # Told to end, a server whose stub is dead may take any time.
    triton.signal_group(signal.SIGKILL)
    triton.process.wait(5)
    remove_shared_memory(triton.server.instance_name)
    assert triton.shared_memory() == []


async def test_the_death_of_a_rank_makes_triton_call_its_model_not_ready(make_triton, gguf_path, connect, until):
    ranks = {"TIDEGATE_ENGINE_TENSOR_PARALLEL_SIZE": "2", "TIDEGATE_ENGINE_THREAD_COUNT": "1"}
    triton = make_triton(engine_environment={"TIDEGATE_ENGINE_MODEL_PATH": str(gguf_path), **ranks})
    triton.start()
    client = await connect(triton)
    readers = await begun(client, 2)
    (stub,) = stub_process_ids(triton.process.pid)
    (rank,) = psutil.Process(stub).children()
    rank.kill()
    assert await gone_after(readers) < 6.0
    await until(lambda: not stub_process_ids(triton.process.pid))
    async with tritonclient.grpc.aio.InferenceServerClient(triton.address) as asked:
        assert await asked.is_server_live(client_timeout=5)
        assert not await asked.is_model_ready("llm", client_timeout=5)
    assert "the engine is broken, ending the model: " in triton.log.read_text(errors="replace")
    await client.close()
    # Told to end, a server whose stub is dead may take any time.
    triton.signal_group(signal.SIGKILL)
    triton.process.wait(5)


async def test_told_to_end_it_ends_its_streams_and_leaves_nothing(triton, client):
    readers = await begun(client, 2)
    (pid,) = stub_process_ids(triton.process.pid)
    stub = ProcessId.of(pid)
    triton.signal_group(signal.SIGTERM)
    assert await gone_after(readers) < 2.0
    assert not client.ready
    triton.process.wait(8)
    assert not stub.is_alive
    assert triton.shared_memory() == []


async def test_bad_settings_end_the_start_with_all_their_names(make_triton):
    triton = make_triton(engine_environment={"TIDEGATE_ENGINE_MODEL_PATH": "", "TIDEGATE_ENGINE_MAX_SEQUENZES": "4"})
    triton.start()
    assert await asyncio.to_thread(triton.process.wait, 30) != 0
    said = triton.log.read_text(errors="replace")
    assert "TIDEGATE_ENGINE_MAX_SEQUENZES: the engine has no such setting" in said
    assert "TIDEGATE_ENGINE_MODEL_PATH is not set" in said
