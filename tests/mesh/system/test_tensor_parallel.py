"""A DeepSeek-V3 whose replicas are two ranks each: the right tokens, also when a rank is killed under them."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest

from tidegate.common.grpc_clients import open_channel
from tidegate.v1 import inference_pb2 as pb
from tidegate.v1 import inference_pb2_grpc

pytestmark = pytest.mark.timeout(240)
REPOSITORY = Path(__file__).resolve().parents[3]
ENGINE = REPOSITORY / "triton_models" / "llm"
TRITON_PYTHON = REPOSITORY / ".venv-triton" / "bin" / "python"
PROMPTS = [[(seed * 37 + place * 11) % 256 for place in range(20)] for seed in range(4)]
ANSWER_TOKENS = 600


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "deepseek"
    script = Path(__file__).with_name("deepseek_folder.py")
    subprocess.run([TRITON_PYTHON, script, path], check=True, timeout=60)
    return path


@pytest.fixture(scope="module")
def mesh(start_module_mesh: Callable[..., Any], folder: Path) -> Any:
    return start_module_mesh(
        *("--model", str(folder), "--model-name", "deepseek-small", "--replicas", "2", "--threads", "1"),
        settings={"TIDEGATE_ENGINE_TENSOR_PARALLEL_SIZE": "2"},
    )


ENGINE_ALONE = """
import json, sys
from llm_engine import Engine, EngineConfig, SamplingParams, SequenceRequest
engine = Engine(EngineConfig(model_path=sys.argv[1]))
answers = {}
for place, prompt in enumerate(json.loads(sys.argv[2])):
    greedy = SamplingParams(temperature=0.0)
    engine.add(SequenceRequest(
        request_id=str(place), token_ids=prompt, max_tokens=int(sys.argv[3]), sampling=greedy, ignore_eos=True,
    ))
while engine.has_work:
    for output in engine.step():
        answers.setdefault(output.request_id, []).extend(output.token_ids)
print(json.dumps([answers[name] for name in sorted(answers)]))
"""


def engine_alone(folder: Path) -> list[list[int]]:
    """What the engine says in one process, without a mesh."""
    answer = subprocess.run(
        [TRITON_PYTHON, "-c", ENGINE_ALONE, folder, json.dumps(PROMPTS), str(ANSWER_TOKENS)],
        env=os.environ | {"PYTHONPATH": str(ENGINE)}, capture_output=True, check=True, timeout=60,
    )  # fmt: skip
    answers: list[list[int]] = json.loads(answer.stdout)
    return answers


def ranks_beside(mesh: Any, replica: int) -> list[psutil.Process]:
    """The ranks that a replica's Triton has started, beside the first, which is a part of it."""
    children = psutil.Process(mesh.record(f"triton-{replica}")["pid"]).children(recursive=True)
    return [child for child in children if "llm_engine.rank_process" in child.cmdline()]


def test_the_official_client_gets_an_answer(mesh: Any) -> None:
    with openai.OpenAI(base_url=f"{mesh.url}/v1", api_key="none") as client:
        assert [model.id for model in client.models.list()] == ["deepseek-small"]
        answer = client.chat.completions.create(
            model="deepseek-small", messages=[{"role": "user", "content": "Hi"}], max_tokens=5
        )
    assert answer.usage is not None
    assert answer.usage.completion_tokens <= 5


async def test_a_killed_rank_costs_no_token(mesh: Any, folder: Path) -> None:
    """All four answers are under way when a rank dies; its replica's go on at the other, and it comes back."""
    expected = engine_alone(folder)
    (rank,) = ranks_beside(mesh, 0)
    (other,) = ranks_beside(mesh, 1)
    begun = [asyncio.Event() for _ in PROMPTS]

    async def tokens(stub: inference_pb2_grpc.InferenceStub, place: int) -> list[int]:
        found: list[int] = []
        request = pb.GenerateRequest(
            tokens=pb.TokenIds(token_ids=PROMPTS[place]),
            max_tokens=ANSWER_TOKENS,
            sampling=pb.SamplingParameters(temperature=0),
            ignore_eos=True,
        )
        async for event in stub.Generate(request, timeout=120):
            if event.HasField("delta"):
                found += event.delta.token_ids
                begun[place].set()
        return found

    async with open_channel(mesh.ingress) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        answers = [asyncio.create_task(tokens(stub, place)) for place in range(len(PROMPTS))]
        await asyncio.gather(*(event.wait() for event in begun))
        rank.send_signal(signal.SIGKILL)
        assert await asyncio.gather(*answers) == expected
        for _ in range(300):
            if ranks_beside(mesh, 0) and mesh.state()["phase"] == "ready":
                break
            await asyncio.sleep(0.2)
        assert ranks_beside(mesh, 0) != [rank]
        assert ranks_beside(mesh, 1) == [other]
