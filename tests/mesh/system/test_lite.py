"""A mesh of the simulated engine with a lite model beside the other: by name, by load, and with one of them gone."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import openai
import pytest

from tidegate.cli import config
from tidegate.common.grpc_clients import open_channel
from tidegate.v1 import inference_pb2, inference_pb2_grpc, scheduler_pb2, scheduler_pb2_grpc

pytestmark = pytest.mark.timeout(300)

ASK = {"messages": [{"role": "user", "content": "What is a tide?"}], "max_tokens": 4}


@pytest.fixture(scope="module")
def mesh(start_module_mesh: Callable[..., Any]) -> Any:
    """One slot for each model, and one place to wait."""
    return start_module_mesh(
        *("--engine", "llm_sim", "--sim-preset", "h200-70b", "--max-sequences", "1"),
        *("--lite-model", config.default_model_path(), "--lite-model-name", "small"),
        settings={"TIDEGATE_SCHEDULER_STANDARD_REQUEST_LIMIT": "1"},
    )


@pytest.fixture
async def client(mesh: Any) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=mesh.url, timeout=60) as opened:
        yield opened


async def lite_of(client: httpx.AsyncClient, **ask: Any) -> tuple[str, str | None]:
    response = await client.post("/v1/chat/completions", json=ASK | ask)
    assert response.status_code == 200, response.text
    return response.json()["model"], response.headers.get("x-tidegate-lite")


def test_both_models_are_listed(mesh: Any) -> None:
    with openai.OpenAI(base_url=f"{mesh.url}/v1", api_key="none") as client:
        assert [each.id for each in client.models.list()] == [mesh.state()["model_name"], "small"]


async def test_each_model_answers_to_its_name(mesh: Any, client: httpx.AsyncClient) -> None:
    name = mesh.state()["model_name"]
    assert await lite_of(client) == (name, None)
    assert await lite_of(client, model=name) == (name, None)
    assert await lite_of(client, model="small") == ("small", "name")
    response = await client.post("/v1/chat/completions", json=ASK | {"model": "medium"})
    assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found")


async def test_what_would_be_refused_is_answered_by_the_lite_model(mesh: Any, client: httpx.AsyncClient) -> None:
    long = ASK | {"max_tokens": 1500, "stream": True}
    async with (
        open_channel(mesh.ingress) as ingress,
        open_channel(mesh.address("mesh")) as inside,
        client.stream("POST", "/v1/chat/completions", json=long) as running,
    ):
        lines = running.aiter_lines()
        assert (await anext(lines)).startswith("data: ")
        stub = inference_pb2_grpc.InferenceStub(ingress)
        waiting = stub.Generate(
            inference_pb2.GenerateRequest(text="The tide", max_tokens=2), metadata=[("x-queue-status", "stream")]
        )
        assert (await waiting.read()).HasField("queued")

        assert await lite_of(client) == ("small", "load")
        typed = stub.Generate(inference_pb2.GenerateRequest(text="The tide", max_tokens=2))
        assert dict(await typed.initial_metadata())["x-tidegate-lite"] == "load"
        assert (await typed.read()).started.model == "small"
        typed.cancel()
        # Token ids are of one vocabulary only.
        ids = await client.post("/v1/completions", json={"prompt": [1, 2, 3], "max_tokens": 2})
        assert (ids.status_code, ids.json()["error"]["code"]) == (503, "server_is_overloaded"), ids.text
        waiting.cancel()

        watch = scheduler_pb2_grpc.SchedulerStub(inside).Watch(scheduler_pb2.WatchRequest(once=True))
        totals = (await anext(aiter(watch))).totals
        assert totals.dispatched_to_lite >= 2


async def test_status_tells_the_models_apart(mesh: Any) -> None:
    view = json.loads(mesh.run("status", "--output", "json").stdout)
    assert [each["model"] for each in view["replicas"]] == [mesh.state()["model_name"], "small"]


@pytest.mark.parametrize("killed", ["model-0", "model-lite-0"])
async def test_where_one_model_is_gone_the_other_answers_what_it_can(
    mesh: Any, client: httpx.AsyncClient, killed: str
) -> None:
    os.kill(mesh.record(killed)["pid"], signal.SIGKILL)
    async with open_channel(mesh.address("mesh")) as inside:
        async for snapshot in scheduler_pb2_grpc.SchedulerStub(inside).Watch(scheduler_pb2.WatchRequest()):
            if not all(replica.connected for replica in snapshot.replicas):
                break
    asked = {} if killed == "model-0" else {"model": "small"}
    response = await client.post("/v1/chat/completions", json=ASK | asked)
    if killed == "model-0":
        assert (response.status_code, response.json()["model"]) == (200, "small"), response.text
    else:
        assert (response.status_code, response.json()["error"]["code"]) == (503, "replica_unavailable"), response.text
        assert int(response.headers["retry-after"]) >= 1
        assert await lite_of(client) == (mesh.state()["model_name"], None)
    mesh.wait_for(lambda: mesh.record(killed)["state"] == "ready", 30)
