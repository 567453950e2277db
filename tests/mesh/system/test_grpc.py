"""The typed surface of the real mesh: streams, many at once, time limits, leaving, reflection, gRPC-Web, the client."""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tidegate.client import AsyncClient, Client, RequestFailed, chat_request
from tidegate.v1 import inference_pb2 as pb
from tidegate.v1 import inference_pb2_grpc, scheduler_pb2, scheduler_pb2_grpc

MODEL = "smollm2-135m-instruct"
BUF = Path(sys.executable).parent / "buf"
GREEDY = pb.SamplingParameters(temperature=0)
LONG = pb.GenerateRequest(text="Once upon a time", max_tokens=3000, ignore_eos=True)

SLOW = pb.GenerateRequest(
    tokens=pb.TokenIds(token_ids=[1000 + place % 997 for place in range(6000)]), max_tokens=2000, ignore_eos=True
)
"""The engine takes seconds to read its prompt."""


def greedy(text: str, **fields: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(text=text, sampling=GREEDY, ignore_eos=True, **fields)


def text_of(events: list[pb.GenerateEvent]) -> str:
    return "".join(each.delta.text for each in events if each.HasField("delta"))


@pytest.fixture
def stub(mesh: Any) -> Iterator[inference_pb2_grpc.InferenceStub]:
    with grpc.insecure_channel(mesh.ingress) as channel:
        yield inference_pb2_grpc.InferenceStub(channel)


@pytest.fixture
def wait_idle(mesh: Any) -> Iterator[Callable[[], None]]:
    """Waits until no replica has anything to do, as the scheduler sees it and as the replicas say."""
    with grpc.insecure_channel(mesh.address("mesh")) as channel:
        scheduler = scheduler_pb2_grpc.SchedulerStub(channel)

        def busy() -> int:
            snapshot = next(iter(scheduler.Watch(scheduler_pb2.WatchRequest(once=True), timeout=10)))
            waiting = sum(lane.waiting_request_count for lane in snapshot.lanes)
            loads = [each.load for each in snapshot.replicas]
            assert len(loads) == 2
            running = sum(each.running_request_count + each.waiting_request_count for each in loads)
            return waiting + running + sum(each.in_flight_count for each in snapshot.replicas)

        def wait(seconds: float = 15) -> None:
            deadline = time.monotonic() + seconds
            while busy():
                assert time.monotonic() < deadline, f"still busy after {seconds} s"
                time.sleep(0.1)

        wait.busy = busy  # type: ignore[attr-defined]
        wait()
        yield wait


def test_an_answer_is_started_deltas_and_finished(stub: Any) -> None:
    call = stub.Generate(greedy("The tide", max_tokens=9, request_id="mine", logprobs=2), timeout=60)
    events = list(call)
    assert dict(call.initial_metadata())["x-request-id"]
    assert {each.request_id for each in events} == {"mine"}
    kinds = [each.WhichOneof("event") for each in events]
    assert kinds == ["started", *["delta"] * (len(kinds) - 2), "finished"]
    assert events[0].started.model == MODEL
    deltas = [each.delta for each in events[1:-1]]
    token_ids = [token_id for delta in deltas for token_id in delta.token_ids]
    logprobs = [entry for delta in deltas for entry in delta.logprobs]
    assert [entry.token_id for entry in logprobs] == token_ids
    assert b"".join(entry.text for entry in logprobs).decode() == text_of(events)
    assert all(len(entry.alternatives) == 2 for entry in logprobs)
    finished = events[-1].finished
    assert finished.reason == pb.FINISH_REASON_LENGTH
    assert finished.usage.completion_token_count == len(token_ids) == 9
    assert finished.usage.prompt_token_count == events[0].started.prompt_token_count
    assert finished.time_to_first_token.ToMicroseconds() > 0


def test_an_answer_goes_on_after_the_tokens_that_came_before(stub: Any) -> None:
    whole = list(stub.Generate(greedy("Water flows", max_tokens=12), timeout=60))
    token_ids = [token_id for each in whole for token_id in each.delta.token_ids]
    rest = list(stub.Generate(greedy("Water flows", max_tokens=12, resume=pb.TokenIds(token_ids=token_ids[:5]))))
    assert [token_id for each in rest for token_id in each.delta.token_ids] == token_ids[5:]
    assert text_of(whole).endswith(text_of(rest)) and text_of(rest)
    assert rest[-1].finished.usage.completion_token_count == 12


def test_many_answers_interleave_and_a_bad_one_disturbs_none(stub: Any) -> None:
    prompts = {f"r{number}": pb.TokenIds(token_ids=range(1000, 1003 + number)) for number in range(6)}
    requests = [
        pb.GenerateRequest(tokens=prompt, max_tokens=16, ignore_eos=True, request_id=name)
        for name, prompt in prompts.items()
    ]
    requests.insert(2, pb.GenerateRequest(text="x", model="gpt-9", request_id="bad"))
    events = list(stub.GenerateMany(iter(requests), timeout=60))
    of = {name: [each for each in events if each.request_id == name] for name in [*prompts, "bad"]}
    assert sum(map(len, of.values())) == len(events)
    for name, prompt in prompts.items():
        first, *_, last = of[name]
        assert first.started.prompt_token_count == len(prompt.token_ids)
        assert last.finished.reason == pb.FINISH_REASON_LENGTH
        assert sum(len(each.delta.token_ids) for each in of[name]) == 16
    [bad] = of["bad"]
    info = error_details_pb2.ErrorInfo()
    assert bad.finished.reason == pb.FINISH_REASON_ERROR
    assert bad.finished.error.details[0].Unpack(info) and info.reason == "MODEL_NOT_FOUND"
    switches = sum(one.request_id != other.request_id for one, other in itertools.pairwise(events))
    assert switches > len(of), "the answers came one after the other"


@pytest.mark.parametrize("when", ["before the first token", "after it"])
def test_a_deadline_that_passes_is_said_and_frees_the_slot(stub: Any, wait_idle: Any, when: str) -> None:
    events: list[pb.GenerateEvent] = []
    try:
        # What came before an error stays.
        events.extend(stub.Generate(SLOW if when == "before the first token" else LONG, timeout=1.5))
        # After the first event the status is spent: the mesh says it in the last one.
        assert events[-1].finished.reason == pb.FINISH_REASON_ERROR
        code = events[-1].finished.error.code
    except grpc.RpcError as error:
        code = error.code().value[0]
    assert code == grpc.StatusCode.DEADLINE_EXCEEDED.value[0]
    assert bool(events) == (when == "after it")
    wait_idle()


@pytest.mark.parametrize("when", ["before the first token", "after it"])
def test_a_client_that_leaves_frees_the_slot(stub: Any, wait_idle: Any, when: str) -> None:
    call = stub.Generate(SLOW if when == "before the first token" else LONG, timeout=60)
    if when == "after it":
        assert next(call).HasField("started")
    deadline = time.monotonic() + 15
    while not wait_idle.busy():
        assert time.monotonic() < deadline
    call.cancel()
    wait_idle()


def test_a_client_that_leaves_its_many_answers_frees_all_slots(stub: Any, wait_idle: Any) -> None:
    requests = [pb.GenerateRequest(text="Tell", max_tokens=3000, ignore_eos=True, request_id=f"{n}") for n in range(5)]
    call = stub.GenerateMany(iter(requests), timeout=60)
    next(call)
    call.cancel()
    wait_idle()


SERVICES = {
    "ingress": {"tidegate.v1.Inference"},
    "scheduler": {"tidegate.v1.Scheduler", "envoy.service.ext_proc.v3.ExternalProcessor"},
    "preprocess": {"tidegate.v1.Preprocess"},
    "cache": {"tidegate.v1.Cache", "tidegate.v1.Inference"},
    "batch": {"tidegate.v1.Batch"},
    "model-0": {"tidegate.v1.Inference", "tidegate.v1.Replica"},
}


def buf_curl(*arguments: str) -> str:
    command = [str(BUF), "curl", "--http2-prior-knowledge", "--protocol", "grpc", *arguments]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


@pytest.mark.parametrize("name", SERVICES)
def test_every_service_tells_what_it_serves_and_how_it_is(mesh: Any, name: str) -> None:
    url = f"http://{mesh.address(name)}"
    listed = set(buf_curl("--list-services", url).split())
    assert SERVICES[name] | {"grpc.health.v1.Health"} <= listed
    methods = set(buf_curl("--list-methods", url).split())
    assert {each.partition("/")[0] for each in methods} == listed
    assert name in ("scheduler", "preprocess", "batch") or "tidegate.v1.Inference/Generate" in methods
    with grpc.insecure_channel(mesh.address(name)) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for service in ["", *sorted(SERVICES[name])]:
            status = health.Check(health_pb2.HealthCheckRequest(service=service), timeout=10).status
            assert status == health_pb2.HealthCheckResponse.SERVING, service


def test_a_tool_that_knows_only_the_ingress_can_generate(mesh: Any) -> None:
    body = json.dumps({"text": "The tide", "max_tokens": 5, "sampling": {"temperature": 0}})
    output = buf_curl("--reflect", "-d", body, f"http://{mesh.ingress}/tidegate.v1.Inference/Generate")
    decoder, events, place = json.JSONDecoder(), [], 0
    while place < len(output.rstrip()):
        event, place = decoder.raw_decode(output, place)
        place += 1
        events.append(event)
    assert "started" in events[0]
    assert events[-1]["finished"]["usage"]["completionTokenCount"] == 5


@pytest.mark.parametrize("kind", ["application/grpc-web+proto", "application/grpc-web-text+proto"])
def test_grpc_web_answers_over_plain_http(mesh: Any, kind: str) -> None:
    def call(request: pb.GenerateRequest) -> tuple[httpx.Response, list[tuple[int, bytes]]]:
        data = request.SerializeToString()
        body = struct.pack(">BI", 0, len(data)) + data
        is_text = "text" in kind
        response = httpx.post(
            f"{mesh.url}/tidegate.v1.Inference/Generate",
            content=base64.b64encode(body) if is_text else body,
            headers={"content-type": kind, "accept": kind, "x-grpc-web": "1"},
            timeout=60,
        )
        return response, frames(unbase64(response.content) if is_text else response.content)

    response, (*messages, (flags, trailers)) = call(greedy("The tide", max_tokens=5))
    assert response.http_version == "HTTP/1.1" and response.status_code == 200
    assert response.headers["content-type"] == kind
    assert response.headers["x-request-id"]
    events = [pb.GenerateEvent.FromString(data) for _, data in messages]
    assert events[0].HasField("started") and events[-1].finished.usage.completion_token_count == 5
    assert flags == 0x80 and b"grpc-status:0" in trailers.lower().replace(b" ", b"")
    refused, rest = call(pb.GenerateRequest(text="x", model="gpt-9"))
    said = {**refused.headers} if not rest else dict(line.split(":", 1) for line in rest[0][1].decode().splitlines())
    assert said["grpc-status"].strip() == str(grpc.StatusCode.NOT_FOUND.value[0])


def frames(body: bytes) -> list[tuple[int, bytes]]:
    """(flags, data) of each frame."""
    found, place = [], 0
    while place < len(body):
        flags, length = struct.unpack_from(">BI", body, place)
        found.append((flags, body[place + 5 : place + 5 + length]))
        place += 5 + length
    assert place == len(body)
    return found


def unbase64(text: bytes) -> bytes:
    """Base64 of many pieces, each with its own padding."""
    return b"".join(base64.b64decode(text[place : place + 4]) for place in range(0, len(text), 4))


def test_the_client_library_chats_with_and_without_a_loop(mesh: Any) -> None:
    request = chat_request([("user", "What is the capital of France?")], sampling=GREEDY, max_tokens=12)

    async def asynchronously() -> str:
        async with AsyncClient(mesh.ingress) as client:
            return text_of([event async for event in client.generate(request, timeout_seconds=60)])

    with Client(mesh.ingress) as client:
        text = text_of(list(client.generate(request, timeout_seconds=60)))
        with pytest.raises(RequestFailed) as raised:
            list(client.generate(pb.GenerateRequest(text="x", model="gpt-9"), timeout_seconds=60))
    assert "Paris" in text
    assert asyncio.run(asynchronously()) == text
    failure = raised.value
    assert (failure.status, failure.reason) == (grpc.StatusCode.NOT_FOUND, "MODEL_NOT_FOUND")
    assert failure.retry_after_seconds is None


def test_leaving_the_client_librarys_stream_frees_the_slot(mesh: Any, wait_idle: Any) -> None:
    with Client(mesh.ingress) as client:
        for event in client.generate(LONG, timeout_seconds=60):
            if event.HasField("delta"):
                break
        wait_idle()
