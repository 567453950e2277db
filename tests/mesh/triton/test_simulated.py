"""The simulated engine in the real Triton: the behaviour of `llm`, and answers that anybody can work out."""

from __future__ import annotations

import asyncio
import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

from tidegate.model.triton_client import EngineRefused, EngineRequest
from tidegate.text.gguf_metadata import read_metadata
from tidegate.text.model_files import load_text_model
from tidegate.v1.inference_pb2 import GRAMMAR_KIND_REGEX, SamplingParameters

ANSWER_FILE = Path(__file__).resolve().parents[3] / "triton_models" / "llm_sim" / "answer.py"


def load_answer():
    spec = importlib.util.spec_from_file_location("simulated_answer", ANSWER_FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


answer = load_answer()


@pytest.fixture(scope="session")
def simulated_triton(make_triton, gguf_path):
    triton = make_triton(
        model_names=("llm_sim",),
        engine_environment={
            "TIDEGATE_ENGINE_MODEL_PATH": str(gguf_path),
            "TIDEGATE_ENGINE_BASE_STEP_SECONDS": "0.004",
            "TIDEGATE_ENGINE_MAX_SEQUENCES": "4",
            "TIDEGATE_ENGINE_MAX_WAITING": "4",
        },
    )
    triton.start()
    return triton


@pytest.fixture
async def simulated(simulated_triton, connect):
    client = await connect(simulated_triton, model_name="llm_sim")
    yield client
    await client.close()


@pytest.fixture(scope="session")
def table(gguf_path):
    return answer.answer_table(read_metadata(gguf_path)["tokenizer.ggml.tokens"])


def request(request_id: str, prompt, **fields) -> EngineRequest:
    defaults = {"max_tokens": 8, "sampling": SamplingParameters()}
    return EngineRequest(request_id=request_id, tokens=np.array(prompt, np.int32), **{**defaults, **fields})


async def tokens_of(client, wanted: EngineRequest) -> list[int]:
    return [token async for output in client.generate(wanted) for token in output.token_ids]


async def test_streams_at_once_are_each_the_expected_answer_and_what_is_too_much_is_refused(simulated, table):
    prompts = [[5 + number] * (1 + 40 * number) for number in range(12)]
    wanted = (request(f"s{number}", prompt, max_tokens=20) for number, prompt in enumerate(prompts))
    results = await asyncio.gather(*(tokens_of(simulated, one) for one in wanted), return_exceptions=True)
    assert {result.reason for result in results if isinstance(result, EngineRefused)} == {"QUEUE_FULL"}
    answered = {number: result for number, result in enumerate(results) if isinstance(result, list)}
    assert len(answered) == 8
    assert answered == {number: answer.expected_token_ids(prompts[number], 20, table) for number in answered}


async def test_a_resumed_answer_goes_on_and_its_text_is_plain_words(simulated, table, gguf_path):
    whole = answer.expected_token_ids([1, 2, 3], 12, table)
    assert (
        await tokens_of(simulated, request("r", [1, 2, 3, *whole[:5]], prior_output_count=5, max_tokens=12))
        == whole[5:]
    )
    tokenizer = load_text_model(str(gguf_path), "m").tokenizer
    words = [tokenizer.decode([token]) for token in whole]
    assert tokenizer.decode(whole) == "".join(words)
    assert all(word.startswith(" ") and word[1:].isalpha() and word.isascii() and word.islower() for word in words)


async def test_an_urgent_sequence_pauses_one_that_runs_which_loses_no_token(simulated, table, until):
    batch = [
        asyncio.create_task(tokens_of(simulated, request(f"batch{number}", [30 + number], max_tokens=300, priority=2)))
        for number in range(4)
    ]
    await until(lambda: simulated.latest_load.running == 4)
    urgent = await tokens_of(simulated, request("urgent", [7, 8], max_tokens=4, priority=0))
    assert urgent == answer.expected_token_ids([7, 8], 4, table)
    assert not any(task.done() for task in batch)
    for number, task in enumerate(batch):
        assert await task == answer.expected_token_ids([30 + number], 300, table)


async def test_a_cancelled_sequence_frees_its_place_and_its_blocks(simulated, until):
    outputs = simulated.generate(request("c", [9], max_tokens=4000))
    await anext(outputs)
    await outputs.aclose()
    async with asyncio.timeout(2):
        while (load := await simulated.load()).running or load.free_blocks != load.total_blocks:
            await asyncio.sleep(0.01)


async def test_a_schema_or_a_grammar_is_refused(simulated):
    schema = SamplingParameters(json_schema="{}")
    with pytest.raises(EngineRefused, match="json_schema cannot be used"):
        await tokens_of(simulated, request("schema", [9], sampling=schema))
    grammar = SamplingParameters(grammar="a", grammar_kind=GRAMMAR_KIND_REGEX)
    with pytest.raises(EngineRefused, match="grammar cannot be used"):
        await tokens_of(simulated, request("grammar", [9], sampling=grammar))


async def test_a_bad_value_is_refused_with_its_name(simulated):
    with pytest.raises(EngineRefused) as caught:
        await tokens_of(simulated, request("bad", [10**6]))
    assert caught.value.reason == "INVALID_VALUE"
    assert "token_ids[0] is 1000000" in caught.value.message
