"""SmolLM2-135M-Instruct in fp32, against transformers and against itself."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import llm_engine
from llm_engine import SamplingParams, SequenceRequest
from llm_engine.grammars import Grammar

LOGPROBS = SamplingParams(temperature=0.0, logprobs=5)

SUMS = """start: NUMBER (" " SIGN " " NUMBER){2} " = " NUMBER "."
NUMBER: /[0-9]{1,3}/
SIGN: "+" | "-"
"""


def random_prompt(count: int) -> list[int]:
    return torch.randint(0, 49152, (count,), generator=torch.Generator().manual_seed(count)).tolist()


def run(engine, *requests: SequenceRequest) -> dict[str, dict]:
    for request in requests:
        engine.add(request)
    got = {request.request_id: {"token_ids": [], "logprobs": [], "top_logprobs": []} for request in requests}
    while engine.has_work:
        for output in engine.step():
            got[output.request_id]["token_ids"] += output.token_ids
            got[output.request_id]["logprobs"] += output.logprobs or []
            got[output.request_id]["top_logprobs"] += output.top_logprobs or []
    return got


def request(name: str, tokens: list[int], **fields) -> SequenceRequest:
    defaults = {"max_tokens": 12, "sampling": LOGPROBS, "ignore_eos": True}
    return SequenceRequest(request_id=name, token_ids=tokens, **{**defaults, **fields})


@pytest.mark.parametrize("count", [1, 2, 17, 64, 333, 1000, 2000])
def test_logits_are_those_of_transformers(engine, reference, prompt_logits, reference_logits, count):
    tokens = random_prompt(count)
    expected = reference_logits(reference, tokens, last=333)
    got = prompt_logits(engine, tokens, last=333)
    assert got.shape == expected.shape
    assert (got - expected).abs().max() < 1e-3


def test_greedy_decoding_gives_the_tokens_and_logprobs_of_transformers(engine, reference, reference_logits):
    prompt = random_prompt(40)
    got = run(engine, request("a", prompt, max_tokens=24))["a"]
    logits = reference_logits(reference, [*prompt, *got["token_ids"]])[len(prompt) - 1 : -1]
    expected = logits.log_softmax(-1)
    assert got["token_ids"] == logits.argmax(-1).tolist()
    assert got["logprobs"] == pytest.approx(expected.amax(-1).tolist(), abs=1e-3)
    top = torch.tensor(got["top_logprobs"])
    assert (top - expected.topk(5).values).abs().max() < 1e-3


def test_json_of_a_schema_is_what_transformers_would_have_said_where_there_is_a_choice(engine, reference):
    people = {"type": "object", "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
              "required": ["name", "age"], "additionalProperties": False}  # fmt: skip
    sampling = SamplingParams(temperature=0.0, json_schema=json.dumps(people))
    prompt = [1, 504, 3575, 282, 4649, 314]
    said = run(engine, request("a", prompt, max_tokens=60, sampling=sampling, ignore_eos=False))["a"]["token_ids"]
    assert set(json.loads(engine._grammars._tokenizer.decode_str(said))) == {"name", "age"}
    matcher = engine._grammars.matcher(Grammar("json_schema", sampling.json_schema), frozenset(), [])
    with torch.inference_mode():
        logits = reference(torch.tensor([prompt + said])).logits[0, len(prompt) - 1 :].float()
    for token, row in zip(said, logits, strict=False):
        assert token == int(row.masked_fill(torch.from_numpy(~matcher.allowed()), float("-inf")).argmax())
        matcher.follow(token)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    ("kind", "grammar", "expected"),
    [
        ("regex", "[A-Z][a-z]{2,8}, [0-9]{4}", "[A-Z][a-z]{2,8}, [0-9]{4}"),
        ("regex", r"the\ moon|Zürich|a\.b", r"the moon|Zürich|a\.b"),
        ("lark", SUMS, r"[0-9]+( [+-] [0-9]+){2} = [0-9]+\."),
    ],
)
def test_what_a_grammar_describes_is_said_and_nothing_else(engine, kind, grammar, expected, temperature):
    sampling = SamplingParams(temperature=temperature, seed=7, grammar=grammar, grammar_kind=kind)
    asked = request("a", [1, 504, 3575, 282], max_tokens=60, sampling=sampling, ignore_eos=False)
    said = engine._grammars._tokenizer.decode_str(run(engine, asked)["a"]["token_ids"])
    assert re.fullmatch(expected, said), said


def test_a_batch_gives_each_sequence_what_it_gets_alone(engine):
    requests = [request(str(count), random_prompt(count)) for count in (1, 3, 16, 17, 90, 150, 400)]
    requests.append(request("drawn", random_prompt(25), sampling=SamplingParams(seed=5, logprobs=5)))
    together = run(engine, *requests)
    for each in requests:
        alone = run(engine, each)[each.request_id]
        assert together[each.request_id]["token_ids"] == alone["token_ids"]
        assert together[each.request_id]["logprobs"] == pytest.approx(alone["logprobs"], abs=1e-3)


def test_a_prompt_in_chunks_gives_what_it_gives_whole(engine, make_engine, gguf_path, prompt_logits):
    tokens = random_prompt(230)
    whole = prompt_logits(engine, tokens)
    chunked = make_engine(gguf_path, step_token_budget=37, kv_cache_bytes=1 << 25)
    assert (prompt_logits(chunked, tokens) - whole).abs().max() < 1e-3


def test_preemption_changes_no_token(engine, make_engine, gguf_path):
    requests = [request(str(count), random_prompt(count), max_tokens=40) for count in (20, 21, 22, 23)]
    expected = run(engine, *requests)
    block_bytes = 30 * 16 * 2 * 192 * 4
    tight = make_engine(gguf_path, kv_cache_bytes=13 * block_bytes)
    got = run(tight, *requests)
    assert tight.load.preemption_count > 0
    assert {k: v["token_ids"] for k, v in got.items()} == {k: v["token_ids"] for k, v in expected.items()}


def test_bf16_weights_choose_the_likeliest_tokens_of_fp32(
    make_engine, gguf_path, reference, prompt_logits, reference_logits
):
    narrow = make_engine(gguf_path, dtype="bf16")
    tokens = random_prompt(120)
    got, expected = prompt_logits(narrow, tokens), reference_logits(reference, tokens)
    apart = (got.log_softmax(-1).exp() - expected.log_softmax(-1).exp()).abs().sum(-1) / 2
    assert 0 < apart.mean() < 0.1, "total variation between the distributions"


def test_the_bench_command_prints_one_json_object(gguf_path, cache_dir, tmp_path):
    prompts = tmp_path / "prompts.json"
    prompts.write_text(json.dumps([random_prompt(9), random_prompt(5)]))
    command = [sys.executable, "-m", "llm_engine", "bench", "--model", str(gguf_path), "--json"]
    command += ["--cache-dir", str(cache_dir), "--dtype", "fp32", "--sequences", "3", "--tokens", "6"]
    done = subprocess.run(
        [*command, "--prompts", str(prompts)],
        cwd=Path(llm_engine.__file__).parents[1],
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        check=True,
        capture_output=True,
        text=True,
    )
    result = json.loads(done.stdout)
    assert (result["sequences"], result["prompt_tokens"], result["output_tokens"]) == (3, 23, 18)
    assert 0 < result["tokens_per_second"] < result["decode_tokens_per_second"]
