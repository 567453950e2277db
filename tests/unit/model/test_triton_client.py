"""The client against a KServe stream in this process that says what each test tells it to."""

from __future__ import annotations

import asyncio
import struct
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
import numpy as np
import pytest
from tritonclient.grpc import service_pb2, service_pb2_grpc

from tidegate.model.triton_client import (
    ArenaSlice,
    ArenaUnavailable,
    EngineOutput,
    EngineRefused,
    EngineRequest,
    TritonClient,
    TritonGone,
)
from tidegate.v1.inference_pb2 import GRAMMAR_KIND_REGEX, SamplingParameters

LOAD = (3, 2, 32, 64, 90, 100, 16, 7)


class FakeTriton(service_pb2_grpc.GRPCInferenceServiceServicer):
    """Triton's stream with the model `llm` in it, played by the test."""

    def __init__(self) -> None:
        self.port = 0
        self.model_ready = True
        self.answers_load = True
        self.load_error = ""
        self.hangs = False
        self.regions: dict[str, int] = {}
        self.existing_regions = {"tokens"}
        self.messages: list[service_pb2.ModelInferRequest] = []
        self.arrived = asyncio.Condition()
        self._server: grpc.aio.Server | None = None
        self._out: asyncio.Queue[service_pb2.ModelStreamInferResponse | None] = asyncio.Queue()
        self._subscription = ""

    async def start(self) -> None:
        self._server = grpc.aio.server()
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(self, self._server)
        self.port = self._server.add_insecure_port(f"127.0.0.1:{self.port}")
        await self._server.start()

    async def stop(self) -> None:
        assert self._server is not None
        await self._server.stop(None)
        self.regions.clear()
        self.messages.clear()

    async def ModelReady(self, request, context):
        return service_pb2.ModelReadyResponse(ready=self.model_ready)

    async def SystemSharedMemoryRegister(self, request, context):
        if request.name not in self.existing_regions:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"no region {request.key}")
        self.regions[request.name] = request.byte_size
        return service_pb2.SystemSharedMemoryRegisterResponse()

    async def SystemSharedMemoryUnregister(self, request, context):
        while self.hangs:
            await asyncio.sleep(0.01)
        self.regions.pop(request.name, None)
        return service_pb2.SystemSharedMemoryUnregisterResponse()

    async def ModelStreamInfer(self, requests, context):
        self._out = asyncio.Queue()
        reader = asyncio.create_task(self._read(requests))
        try:
            while (message := await self._out.get()) is not None:
                yield message
        finally:
            reader.cancel()

    async def _read(self, requests) -> None:
        async for request in requests:
            command = text_input(request, "command")
            if command == "subscribe":
                self._subscription = request.id
                self.bundle()
            elif command == "load":
                if self.load_error:
                    self.answer_error(request.id, self.load_error)
                elif self.answers_load:
                    self.answer(request.id, {"engine_load": integers(LOAD)})
            else:
                async with self.arrived:
                    self.messages.append(request)
                    self.arrived.notify_all()

    async def wait_for(self, command: str, count: int = 1) -> list[service_pb2.ModelInferRequest]:
        """The messages of a command, when so many have come."""

        def found() -> list:
            return [message for message in self.messages if text_input(message, "command") == command]

        async with asyncio.timeout(5), self.arrived:
            await self.arrived.wait_for(lambda: len(found()) >= count)
        return found()

    def bundle(self, *parts: tuple[str, list[int], str, str]) -> None:
        """One step's outputs: (sequence id, tokens, finish reason, error)."""
        arrays = {"engine_load": integers(LOAD)}
        if parts:
            arrays["request_ids"] = joined_texts([part[0] for part in parts])
            arrays["token_counts"] = integers([len(part[1]) for part in parts])
            arrays["token_ids"] = integers([token for part in parts for token in part[1]])
            arrays["finish_reasons"] = texts([part[2] for part in parts])
            arrays["errors"] = texts([part[3] for part in parts])
        self.answer(self._subscription, arrays)

    def end_subscription(self) -> None:
        response = service_pb2.ModelInferResponse(model_name="llm", id=self._subscription)
        response.parameters["triton_final_response"].bool_param = True
        self._out.put_nowait(service_pb2.ModelStreamInferResponse(infer_response=response))

    def answer(self, message_id: str, arrays: dict[str, tuple[str, list[int], bytes]]) -> None:
        response = service_pb2.ModelInferResponse(model_name="llm", id=message_id)
        for name, (data_type, shape, raw) in arrays.items():
            response.outputs.add(name=name, datatype=data_type, shape=shape)
            response.raw_output_contents.append(raw)
        self._out.put_nowait(service_pb2.ModelStreamInferResponse(infer_response=response))

    def answer_error(self, message_id: str, error: str) -> None:
        response = service_pb2.ModelInferResponse(id=message_id)
        self._out.put_nowait(service_pb2.ModelStreamInferResponse(error_message=error, infer_response=response))


def integers(values) -> tuple[str, list[int], bytes]:
    return "INT32", [len(values)], np.asarray(values, "<i4").tobytes()


def texts(values) -> tuple[str, list[int], bytes]:
    return "BYTES", [len(values)], b"".join(struct.pack("<I", len(value)) + value.encode() for value in values)


def joined_texts(values) -> tuple[str, list[int], bytes]:
    _, _, raw = texts(values)
    return "UINT8", [len(raw)], raw


def text_input(message, name: str) -> str:
    raws = iter(message.raw_input_contents)
    inline = {tensor.name: next(raws) for tensor in message.inputs if "shared_memory_region" not in tensor.parameters}
    return inline[name][4:].decode() if name in inline else "generate" if name == "command" else ""


def request(request_id: str = "r", **fields) -> EngineRequest:
    defaults = {"tokens": np.array([1, 2, 3], np.int32), "max_tokens": 8, "sampling": SamplingParameters()}
    return EngineRequest(request_id=request_id, **{**defaults, **fields})


@asynccontextmanager
async def connected(fake: FakeTriton, **settings) -> AsyncIterator[TritonClient]:
    client = TritonClient(f"127.0.0.1:{fake.port}", **settings)
    await client.start()
    try:
        yield client
    finally:
        await client.close()


@pytest.fixture
async def fake():
    triton = FakeTriton()
    await triton.start()
    yield triton
    await triton.stop()


@pytest.fixture
async def client(fake):
    async with connected(fake) as client:
        assert await client.wait_ready(5)
        yield client


async def read_all(client: TritonClient, wanted: EngineRequest) -> list[EngineOutput]:
    return [output async for output in client.generate(wanted)]


def starts(client: TritonClient, request_id: str = "r", **fields) -> asyncio.Task[list[EngineOutput]]:
    return asyncio.create_task(read_all(client, request(request_id, **fields)))


async def test_outputs_come_in_order_and_end_with_the_finish_reason(fake, client):
    reading = starts(client)
    (message,) = await fake.wait_for("generate")
    fake.bundle((message.id, [11], "", ""))
    fake.bundle((message.id, [12, 13], "", ""))
    fake.bundle((message.id, [], "stop", ""))
    outputs = await reading
    assert [token for output in outputs for token in output.token_ids] == [11, 12, 13]
    assert [output.finish_reason for output in outputs][-1] == "stop"


async def test_sequences_of_one_step_get_their_own_tokens(fake, client):
    first, second = starts(client, "a"), starts(client, "b")
    one, other = await fake.wait_for("generate", 2)
    fake.bundle((one.id, [1], "length", ""), (other.id, [2, 3], "length", ""))
    assert [(await first)[0].token_ids, (await second)[0].token_ids] == [[1], [2, 3]]


async def test_sequences_of_the_same_request_id_do_not_mix(fake, client):
    first, second = starts(client, "same"), starts(client, "same")
    one, other = await fake.wait_for("generate", 2)
    fake.bundle((other.id, [2], "length", ""))
    fake.bundle((one.id, [1], "length", ""))
    assert [(await first)[0].token_ids, (await second)[0].token_ids] == [[1], [2]]


async def test_a_reader_that_is_slow_gets_its_outputs_merged(fake, client):
    outputs = client.generate(request())
    first = asyncio.create_task(anext(outputs))
    (message,) = await fake.wait_for("generate")
    fake.bundle((message.id, [1], "", ""))
    await first
    for token in range(2, 6):
        fake.bundle((message.id, [token], "", ""))
    await client.load()
    assert (await anext(outputs)).token_ids == [2, 3, 4, 5]


async def test_a_grammar_is_sent_with_what_it_is_written_in(fake, client):
    reading = starts(client, sampling=SamplingParameters(grammar="é+", grammar_kind=GRAMMAR_KIND_REGEX))
    (message,) = await fake.wait_for("generate")
    raws = dict(zip([tensor.name for tensor in message.inputs], message.raw_input_contents, strict=True))
    assert raws["grammar"] == struct.pack("<I", 3) + "é+".encode()
    assert raws["grammar_kind"] == struct.pack("<I", 5) + b"regex"
    reading.cancel()


async def test_a_refusal_raises_the_engines_reason(fake, client):
    reading = starts(client)
    (message,) = await fake.wait_for("generate")
    fake.bundle((message.id, [], "error", "QUEUE_FULL: 64 wait"))
    with pytest.raises(EngineRefused) as caught:
        await reading
    assert (caught.value.reason, caught.value.message) == ("QUEUE_FULL", "64 wait")


async def test_an_error_of_triton_itself_is_a_refusal(fake, client):
    reading = starts(client)
    (message,) = await fake.wait_for("generate")
    fake.answer_error(message.id, "unexpected inference input 'x'")
    with pytest.raises(EngineRefused) as caught:
        await reading
    assert (caught.value.reason, caught.value.message) == ("TRITON_ERROR", "unexpected inference input 'x'")


async def test_an_error_after_tokens_is_the_last_output(fake, client):
    reading = starts(client)
    (message,) = await fake.wait_for("generate")
    fake.bundle((message.id, [5], "", ""))
    fake.bundle((message.id, [], "error", "NON_FINITE_LOGITS: at 1"))
    outputs = await reading
    assert (outputs[-1].finish_reason, outputs[-1].error) == ("error", "NON_FINITE_LOGITS: at 1")


async def test_closing_a_generate_early_cancels_its_sequence(fake, client):
    outputs = client.generate(request())
    first = asyncio.create_task(anext(outputs))
    (message,) = await fake.wait_for("generate")
    fake.bundle((message.id, [5], "", ""))
    await first
    await outputs.aclose()
    (cancel,) = await fake.wait_for("cancel")
    assert text_input(cancel, "target_request_id") == message.id


async def test_cancelling_the_reader_cancels_its_sequence(fake, client):
    reading = starts(client)
    (message,) = await fake.wait_for("generate")
    reading.cancel()
    (cancel,) = await fake.wait_for("cancel")
    assert text_input(cancel, "target_request_id") == message.id


async def test_a_finished_sequence_is_not_cancelled(fake, client):
    reading = starts(client)
    (message,) = await fake.wait_for("generate")
    fake.bundle((message.id, [5], "length", ""))
    await reading
    await client.load()
    assert [text_input(message, "command") for message in fake.messages] == ["generate"]


async def test_a_late_output_of_a_cancelled_sequence_is_dropped(fake, client):
    reading = starts(client)
    (message,) = await fake.wait_for("generate")
    reading.cancel()
    await fake.wait_for("cancel")
    fake.bundle((message.id, [1], "", ""), (message.id, [], "cancelled", ""))
    assert (await client.load()).running == LOAD[0]


async def test_a_killed_triton_ends_every_sequence_and_the_client_comes_back(fake, client):
    changes: list[bool] = []
    client.on_ready.append(changes.append)
    reading = [starts(client, str(number)) for number in range(3)]
    await fake.wait_for("generate", 3)
    await fake.stop()
    results = await asyncio.wait_for(asyncio.gather(*reading, return_exceptions=True), 1)
    assert [type(result) for result in results] == [TritonGone] * 3
    assert not client.ready
    with pytest.raises(TritonGone):
        await read_all(client, request())
    await fake.start()
    assert await client.wait_ready(5)
    assert changes == [False, True]
    again = starts(client)
    (message,) = await fake.wait_for("generate")
    fake.bundle((message.id, [9], "length", ""))
    assert (await again)[0].token_ids == [9]


async def test_a_server_that_hangs_counts_as_gone(fake):
    async with connected(fake, heartbeat_seconds=0.05, silence_seconds=0.3) as client:
        assert await client.wait_ready(5)
        reading = starts(client)
        await fake.wait_for("generate")
        fake.answers_load = False
        with pytest.raises(TritonGone, match="silent"):
            await asyncio.wait_for(reading, 2)


async def test_a_hang_is_found_as_soon_while_an_arena_cannot_be_mapped(fake):
    async with connected(fake, heartbeat_seconds=0.05, silence_seconds=0.3) as client:
        assert await client.wait_ready(5)
        with pytest.raises(ArenaUnavailable):
            await client.register_arena("none", 64)
        reading = starts(client)
        await fake.wait_for("generate")
        fake.answers_load, fake.hangs = False, True
        try:
            with pytest.raises(TritonGone, match="silent"):
                await asyncio.wait_for(reading, 1.5)
        finally:
            fake.hangs = False


@pytest.mark.parametrize(
    "arrays",
    [
        {"engine_load": ("INT32", [1], b"\x01")},
        {"engine_load": integers((1, 2))},
        {"request_ids": joined_texts(["x"]), "token_counts": integers([1, 2])},
        {"request_ids": ("UINT8", [5], b"\x01\x00\x00\x00\xff"), "token_counts": integers([1])},
    ],
)
async def test_a_response_that_cannot_be_read_is_a_lost_stream_and_the_client_comes_back(fake, client, arrays):
    reading = starts(client)
    await fake.wait_for("generate")
    fake.answer(fake._subscription, arrays)
    with pytest.raises(TritonGone, match="cannot be read"):
        await asyncio.wait_for(reading, 2)
    assert not client.ready
    assert await client.wait_ready(5)


async def test_a_fault_of_the_clients_own_is_told(fake):
    client, faults = TritonClient(f"127.0.0.1:{fake.port}"), []

    def fail(load: object) -> None:
        raise ZeroDivisionError("listener")

    client.on_fault.append(faults.append)
    client.on_load.append(fail)
    await client.start()
    async with asyncio.timeout(2):
        while not faults:
            await asyncio.sleep(0.005)
    assert [str(fault) for fault in faults] == ["listener"]
    await client.close()


async def test_an_idle_stream_is_kept_alive_by_asking_for_the_load(fake):
    async with connected(fake, heartbeat_seconds=0.05, silence_seconds=0.3) as client:
        assert await client.wait_ready(5)
        await asyncio.sleep(0.6)
        assert client.ready


@pytest.mark.parametrize("how", ["error", "ended"])
async def test_an_engine_that_is_unavailable_is_gone(fake, client, how):
    reading = starts(client)
    (message,) = await fake.wait_for("generate")
    fake.model_ready = False
    if how == "error":
        fake.bundle((message.id, [], "error", "ENGINE_UNAVAILABLE: three steps failed"))
        with pytest.raises(TritonGone, match="three steps failed"):
            await reading
    else:
        fake.end_subscription()
        with pytest.raises(TritonGone):
            await reading
    assert not client.ready


async def test_a_dead_python_stub_makes_the_client_not_ready(fake, client):
    reading = starts(client)
    (message,) = await fake.wait_for("generate")
    fake.model_ready = False
    fake.answer_error(message.id, "Stub process 'llm_0_0' is not healthy.")
    with pytest.raises(TritonGone, match="not healthy"):
        await reading
    assert not client.ready


async def test_a_model_that_was_unloaded_makes_the_client_not_ready(fake):
    async with connected(fake, heartbeat_seconds=0.05, silence_seconds=60.0) as client:
        assert await client.wait_ready(5)
        reading = starts(client)
        await fake.wait_for("generate")
        fake.model_ready = False
        fake.load_error = "Request for unknown model: 'llm' version 1 is not at ready state"
        with pytest.raises(TritonGone, match="not at ready state"):
            await asyncio.wait_for(reading, 2)
        assert not client.ready


async def test_it_waits_for_a_model_that_is_not_loaded_yet(fake):
    fake.model_ready = False
    async with connected(fake) as client:
        assert not await client.wait_ready(0.2)
        fake.model_ready = True
        assert await client.wait_ready(5)


async def test_the_load_is_known_and_listeners_are_told(fake, client):
    seen = []
    client.on_load.append(seen.append)
    load = await client.load()
    assert (load.running, load.waiting, load.free_blocks, load.preemptions) == (3, 2, 90, 7)
    assert seen == [load] and client.latest_load == load


async def test_tokens_in_an_arena_travel_as_region_and_offset(fake, client):
    await client.register_arena("tokens", 4096)
    reading = starts(client, tokens=ArenaSlice("tokens", 256, 12))
    (message,) = await fake.wait_for("generate")
    tensor = next(tensor for tensor in message.inputs if tensor.name == "token_ids")
    parameters = tensor.parameters
    assert (list(tensor.shape), parameters["shared_memory_region"].string_param) == ([3], "tokens")
    assert parameters["shared_memory_offset"].int64_param == 256
    assert parameters["shared_memory_byte_size"].int64_param == 12
    reading.cancel()


async def test_a_slice_of_an_unregistered_arena_is_refused(client):
    with pytest.raises(EngineRefused) as caught:
        await read_all(client, request(tokens=ArenaSlice("tokens", 256, 12)))
    assert caught.value.reason == "ARENA_UNAVAILABLE"


async def test_a_missing_arena_is_registered_once_it_is_there(fake):
    async with connected(fake, heartbeat_seconds=0.05) as client:
        assert await client.wait_ready(5)
        with pytest.raises(ArenaUnavailable):
            await client.register_arena("later", 64)
        fake.existing_regions.add("later")
        async with asyncio.timeout(5):
            while not client.arena_is_registered("later"):
                await asyncio.sleep(0.01)
        assert fake.regions == {"later": 64}


async def test_arenas_are_registered_again_after_a_reconnect(fake, client):
    await client.register_arena("tokens", 4096)
    await fake.stop()
    await fake.start()
    async with asyncio.timeout(5):
        while fake.regions != {"tokens": 4096}:
            await asyncio.sleep(0.01)


async def test_log_probabilities_come_with_their_alternatives(fake, client):
    reading = starts(client, logprobs=2)
    (message,) = await fake.wait_for("generate")
    assert text_input(message, "subscription") == ""
    fake.answer(
        message.id,
        {
            "token_ids": integers([7]),
            "logprobs": ("FP32", [1], np.array([-0.5], "<f4").tobytes()),
            "top_token_ids": ("INT32", [1, 2], np.array([7, 8], "<i4").tobytes()),
            "top_logprobs": ("FP32", [1, 2], np.array([-0.5, -1.5], "<f4").tobytes()),
            "finish_reason": texts(["length"]),
        },
    )
    (output,) = await reading
    assert (output.logprobs, output.top_token_ids, output.top_logprobs) == ([-0.5], [[7, 8]], [[-0.5, -1.5]])


async def test_only_given_sampling_parameters_are_sent(fake, client):
    reading = starts(client, sampling=SamplingParameters(temperature=0.0, seed=-5), prior_output_count=2)
    (message,) = await fake.wait_for("generate")
    raws = dict(zip([tensor.name for tensor in message.inputs], message.raw_input_contents, strict=True))
    assert sorted(raws) == ["max_tokens", "prior_output_count", "seed", "subscription", "temperature", "token_ids"]
    assert struct.unpack("<f", raws["temperature"]) == (0.0,)
    assert struct.unpack("<q", raws["seed"]) == (-5,)
    reading.cancel()


async def test_a_bias_is_sent_as_two_arrays_of_one_order(fake, client):
    reading = starts(client, sampling=SamplingParameters(min_p=0.25, logit_bias={9: -100, 4: 1.5}))
    (message,) = await fake.wait_for("generate")
    tensors = {tensor.name: (tensor.datatype, list(tensor.shape)) for tensor in message.inputs}
    raws = dict(zip(tensors, message.raw_input_contents, strict=True))
    assert (tensors["logit_bias_token_ids"], tensors["logit_bias_values"]) == (("INT32", [2]), ("FP32", [2]))
    assert np.frombuffer(raws["logit_bias_token_ids"], "<i4").tolist() == [4, 9]
    assert np.frombuffer(raws["logit_bias_values"], "<f4").tolist() == [1.5, -100.0]
    assert struct.unpack("<f", raws["min_p"]) == (0.25,)
    reading.cancel()


async def test_closing_the_client_ends_its_sequences(fake):
    async with connected(fake) as client:
        assert await client.wait_ready(5)
        reading = starts(client)
        await fake.wait_for("generate")
    with pytest.raises(TritonGone):
        await reading


async def test_a_client_closes_while_its_triton_hangs(fake):
    client = TritonClient(f"127.0.0.1:{fake.port}", heartbeat_seconds=0.01, silence_seconds=0.05)
    await client.start()
    assert await client.wait_ready(5)
    fake.answers_load = False
    for _ in range(3):
        # What became of the heartbeat and the closing come in one turn of the event loop.
        time.sleep(0.1)
        await asyncio.sleep(0)
    await asyncio.wait_for(client.close(), 1)


async def test_an_event_loop_that_stood_still_is_not_the_servers_silence(fake):
    async with connected(fake, heartbeat_seconds=0.1, silence_seconds=0.3) as client:
        assert await client.wait_ready(5)
        changes: list[bool] = []
        client.on_ready.append(changes.append)
        time.sleep(0.8)
        await asyncio.sleep(0.3)
        assert client.ready and changes == []
