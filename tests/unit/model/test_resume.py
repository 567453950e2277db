"""A stream whose engine breaks goes on elsewhere, and the client sees every character once."""

from __future__ import annotations

import json

import pytest

from tidegate.v1 import inference_pb2, inference_pb2_grpc

TEXT = "Grüße 世界 STO STOP"
SHOWN = "Grüße 世界 STO "


def ask(**fields) -> inference_pb2.GenerateRequest:
    return inference_pb2.GenerateRequest(
        request_id="r1", text="hello", sampling={"temperature": 0}, stop=["STOP"], **fields
    )


async def collect(stub, request, **call):
    return [event async for event in stub.Generate(request, **call)]


def text_of(events) -> str:
    return "".join(event.delta.text for event in events)


def tokens_of(events) -> list[int]:
    return [token for event in events for token in event.delta.token_ids]


def endpoints(tmp_path, *ports: int) -> str:
    entries = [
        {"endpoint": {"address": {"socket_address": {"address": "127.0.0.1", "port_value": port}}}} for port in ports
    ]
    path = tmp_path / "model.yaml"
    path.write_text(json.dumps({"resources": [{"cluster_name": "model", "endpoints": [{"lb_endpoints": entries}]}]}))
    return str(path)


@pytest.mark.parametrize("cut", range(len(TEXT.encode())))
async def test_the_text_is_the_same_wherever_the_engine_breaks(start_service, fake_triton, channel_to, tmp_path, cut):
    peer_triton = fake_triton(TEXT)
    async with start_service(peer_triton) as peer:
        port = peer.server.port
        broken = fake_triton(TEXT, break_after=cut)
        async with start_service(
            broken, mesh_address=f"127.0.0.1:{port}", endpoints_file=endpoints(tmp_path, port)
        ) as service:
            events = await collect(inference_pb2_grpc.InferenceStub(channel_to(service)), ask())
    assert text_of(events) == SHOWN
    assert bytes(tokens_of(events)).decode() == TEXT
    assert [event.WhichOneof("event") for event in events].count("started") == 1
    assert events[-1].finished.reason == inference_pb2.FINISH_REASON_STOP
    assert events[-1].finished.usage.completion_token_count == len(TEXT.encode())
    assert peer_triton.requests[0].prior_output_count == cut
    assert peer_triton.prompt_of(0) == list(b"hello" + TEXT.encode()[:cut])
    assert peer_triton.requests[0].sampling == broken.requests[0].sampling


@pytest.mark.parametrize("cut", range(len(TEXT.encode()) + 1))
async def test_a_client_that_resumes_by_itself_gets_exactly_what_it_lacks(start_service, fake_triton, channel_to, cut):
    async with start_service(fake_triton(TEXT)) as service:
        stub = inference_pb2_grpc.InferenceStub(channel_to(service))
        whole = await collect(stub, ask())
        had_text, had_tokens = "", []
        for event in whole:
            if len(had_tokens) + len(event.delta.token_ids) > cut:
                break
            had_text += event.delta.text
            had_tokens += event.delta.token_ids
        rest = await collect(stub, ask(resume={"token_ids": had_tokens}))
    assert had_text + text_of(rest) == SHOWN
    assert rest[-1].finished.usage.completion_token_count == len(TEXT.encode())
    assert rest[-1].finished.reason == inference_pb2.FINISH_REASON_STOP


async def test_without_another_replica_it_waits_for_its_own_engine(start_service, fake_triton, channel_to):
    triton = fake_triton(TEXT, break_after=7)
    async with start_service(triton, resume_backoff_seconds=0.02) as service:
        events = await collect(inference_pb2_grpc.InferenceStub(channel_to(service)), ask())
        assert service.slots.ledger.running_count == 0
    assert text_of(events) == SHOWN
    assert [request.prior_output_count for request in triton.requests] == [0, 7]


async def test_when_nobody_can_go_on_the_stream_ends_with_an_error_event(start_service, fake_triton, channel_to):
    triton = fake_triton(TEXT, break_after=7, pace=0.005)
    async with start_service(triton, resume_backoff_seconds=0.02, resume_wait_seconds=0.2) as service:
        stub = inference_pb2_grpc.InferenceStub(channel_to(service))
        events = []
        async for event in stub.Generate(ask()):
            events.append(event)
            triton.ready = False
    assert events[-1].finished.reason == inference_pb2.FINISH_REASON_ERROR
    assert "REPLICA_UNAVAILABLE" in str(events[-1].finished.error)
    assert events[-1].finished.usage.completion_token_count == 7


async def test_a_request_that_was_handed_over_is_not_handed_on(start_service, fake_triton, channel_to):
    triton = fake_triton(TEXT, break_after=7)
    async with start_service(triton) as service:
        stub = inference_pb2_grpc.InferenceStub(channel_to(service))
        events = await collect(stub, ask(), metadata=(("x-tidegate-resume", "0"),))
    assert events[-1].finished.reason == inference_pb2.FINISH_REASON_ERROR
    assert len(triton.requests) == 1
