"""What operators use: status, doctor and chat, the metrics pages, and API keys that are tenants."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import grpc
import httpx
import openai
import pytest

from tidegate.client import Client, RequestFailed
from tidegate.v1 import inference_pb2 as pb

MODEL = "smollm2-135m-instruct"
GREEDY = {
    "model": MODEL,
    "messages": [{"role": "user", "content": "Name three ports of the North Sea."}],
    "temperature": 0,
    "max_tokens": 8,
}


def test_status_is_a_table_for_people(mesh: Any) -> None:
    answer = mesh.run("status")
    lines = answer.stdout.splitlines()
    assert (answer.returncode, answer.stderr) == (0, "")
    assert lines[0] == f"{MODEL} at {mesh.ingress}: ready"
    rows: dict[str, list[str]] = {}
    for line in filter(str.strip, lines[1:]):
        rows.setdefault(line.split()[0], line.split())  # batch is a process, then a lane.
    for name in ("envoy", "scheduler", "preprocess", "cache", "batch", "model-0", "model-1", "triton-0", "triton-1"):
        assert rows[name][1] == "ok"
    assert {"PROCESS", "REPLICA", "LANE", mesh.address("model-0"), "realtime", "standard", "batch"} <= set(rows)
    assert "\x1b" not in answer.stdout


def test_without_a_mesh_each_command_says_so_in_one_line(mesh: Any, tmp_path: Any) -> None:
    status = mesh.run("status", home=tmp_path)
    assert (status.returncode, status.stdout) == (1, "")
    assert status.stderr.startswith("error: no mesh runs here") and status.stderr.count("\n") == 1
    chat = mesh.run("chat", "--address", "127.0.0.1:1", "Hello", home=tmp_path)
    assert (chat.returncode, chat.stdout) == (64 + grpc.StatusCode.UNAVAILABLE.value[0], "")
    assert "127.0.0.1:1" in chat.stderr and "Traceback" not in chat.stderr
    usage = mesh.run("chat", "--temperature", "hot", "Hello", home=tmp_path)
    assert usage.returncode == 2 and "--temperature" in usage.stderr


def test_the_engine_alone_says_what_the_mesh_says(mesh: Any, tmp_path: Any) -> None:
    """The same prompt, greedy; and a text is likelier than its words in another order."""
    prompt = "The largest port of the North Sea is"
    with Client(mesh.ingress) as client:
        request = pb.GenerateRequest(
            text=prompt, max_tokens=8, sampling=pb.SamplingParameters(temperature=0), ignore_eos=True
        )
        expected = "".join(event.delta.text for event in client.generate(request))
    answer = mesh.run("engine", "generate", "--max-tokens", "8", prompt)
    assert (answer.returncode, answer.stdout) == (0, expected + "\n")
    answer = mesh.run("engine", "generate", "--max-tokens", "8", stdin=prompt)
    assert (answer.returncode, answer.stdout) == (0, expected + "\n")
    found = {}
    for name, text in (("text", prompt * 3), ("shuffled", "Sea the is of port The North largest " * 3)):
        (tmp_path / name).write_text(text)
        found[name] = json.loads(mesh.run("engine", "perplexity", "-o", "json", str(tmp_path / name)).stdout)
    assert 1 < found["text"]["perplexity"] < found["shuffled"]["perplexity"]


def test_the_engine_alone_refuses_in_one_line(mesh: Any, tmp_path: Any) -> None:
    (tmp_path / "empty").touch()
    answer = mesh.run("engine", "perplexity", str(tmp_path / "empty"), home=tmp_path)
    assert (answer.returncode, answer.stdout) == (2, "")
    assert "empty: 0 tokens" in answer.stderr
    for flags, words in ((["--model", "/nowhere"], "/nowhere"), (["--tensor-parallel-size", "40"], "40")):
        answer = mesh.run("engine", *flags, "generate", "Hello", home=tmp_path)
        assert (answer.returncode, answer.stdout) == (1, "")
        assert words in answer.stderr and "Traceback" not in answer.stderr
    # More than Linux takes as an argument reaches the engine, which knows how much fits its context.
    answer = mesh.run("engine", "generate", stdin="tide " * 50_000, home=tmp_path)
    assert (answer.returncode, answer.stdout) == (1, "")
    assert "context" in answer.stderr and "Traceback" not in answer.stderr


@pytest.mark.parametrize("running", [True, False], ids=["a mesh runs", "nothing runs"])
def test_doctor_checks_in_groups_and_every_failure_has_its_fix(mesh: Any, tmp_path: Any, running: bool) -> None:
    home = None if running else tmp_path
    table = mesh.run("doctor", home=home)
    assert table.stderr == ""
    groups = [line for line in table.stdout.splitlines() if re.fullmatch("[a-z]+", line)]
    assert groups == ["machine", "environments", *([] if running else ["ports"]), "model", "mesh"]
    checks = json.loads(mesh.run("doctor", "-o", "json", home=home).stdout)
    # Another mesh may hold the default ports of this machine, or its memory; nothing else may be wrong.
    failed = [each for each in checks if each["outcome"] == "failed"]
    assert {each["group"] for each in failed} <= (set() if running else {"ports", "machine"})
    assert all(each["reason"] and each["fix"] for each in failed)
    assert (table.returncode == 0) == (not failed)
    named = {each["name"] for each in checks if each["group"] == "mesh"}
    assert named >= ({"envoy", "model-1", f"replica {mesh.address('model-0')}"} if running else {"running"})


def families(page: str) -> dict[str, str]:
    """Name and type of each metric."""
    return {line.split()[2]: line.split()[3] for line in page.splitlines() if line.startswith("# TYPE ")}


def test_the_model_service_has_the_public_metrics(mesh: Any) -> None:
    httpx.post(f"{mesh.url}/v1/chat/completions", json=GREEDY | {"logprobs": True}, timeout=60)
    pages = [httpx.get(f"http://{mesh.address(f'{name}-metrics')}/metrics").text for name in ("model-0", "model-1")]
    found = families(pages[0])
    for name, kind in {
        "vllm:num_requests_running": "gauge",
        "vllm:num_requests_waiting": "gauge",
        "vllm:kv_cache_usage_perc": "gauge",
        "vllm:prompt_tokens_total": "counter",
        "vllm:generation_tokens_total": "counter",
        "vllm:request_success_total": "counter",
        "vllm:num_preemptions_total": "counter",
        "vllm:time_to_first_token_seconds": "histogram",
        "vllm:inter_token_latency_seconds": "histogram",
        "vllm:e2e_request_latency_seconds": "histogram",
        "vllm:request_queue_time_seconds": "histogram",
        "vllm:request_prompt_tokens": "histogram",
        "vllm:request_generation_tokens": "histogram",
        "vllm:cache_config_info": "gauge",
        "gen_ai_server_time_to_first_token_seconds": "histogram",
        "gen_ai_server_time_per_output_token_seconds": "histogram",
        "gen_ai_server_request_duration_seconds": "histogram",
        "gen_ai_client_token_usage_token": "histogram",
    }.items():
        assert found.get(name) == kind, name
    retired = re.compile("gpu_cache_usage|gpu_prefix_cache|time_per_output_token_seconds|num_requests_swapped")
    assert {name.removesuffix("_created") for name in found if name.startswith("vllm:") and retired.search(name)} == {
        "vllm:request_time_per_output_token_seconds"
    }
    assert 'block_size="' in pages[0] and 'num_gpu_blocks="' in pages[0]
    samples = [line for page in pages for line in page.splitlines() if line.startswith("vllm:generation_tokens_total{")]
    assert all(f'model_name="{MODEL}"' in line for line in samples)
    assert sum(float(line.split()[-1]) for line in samples) >= 8
    usage = [line for page in pages for line in page.splitlines() if line.startswith("gen_ai_client_token_usage")]
    assert any('gen_ai_operation_name="chat"' in line and 'gen_ai_token_type="output"' in line for line in usage)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("scheduler", {"tidegate_lane_waiting_requests", "tidegate_credits_in_hand", "tidegate_drain_rate"}),
        ("preprocess", {"tidegate_preprocess_duration_seconds", "tidegate_preprocess_arena_free_bytes"}),
        ("cache", {"tidegate_cache_hits_total", "tidegate_cache_bytes"}),
        ("batch", {"tidegate_batch_open", "tidegate_batch_lines_total"}),
        ("triton-0", {"nv_inference_request_success"}),
    ],
)
def test_every_other_service_has_a_metrics_page(mesh: Any, name: str, expected: set[str]) -> None:
    response = httpx.get(f"http://{mesh.address(f'{name}-metrics')}/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    assert expected <= set(families(response.text))


@pytest.fixture(scope="module")
def guarded(start_module_mesh: Callable[..., Any], tmp_path_factory: Any) -> Any:
    """A mesh that asks for keys: two tenants, one of them with two keys."""
    keys = tmp_path_factory.mktemp("keys") / "keys.yaml"
    keys.write_text("amber-key-0001: amber\namber-key-0002: amber\nblue-key-00001: blue\n")
    return start_module_mesh("--api-keys", str(keys))


def openai_client(mesh: Any, key: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{mesh.url}/v1", api_key=key, max_retries=0, timeout=60)


def test_without_a_known_key_nothing_is_served(guarded: Any) -> None:
    for path in ("/v1/models", "/v1/chat/completions", "/nothing"):
        response = httpx.post(f"{guarded.url}{path}", json=GREEDY)
        assert response.status_code == 401
        error = response.json()["error"]
        assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_api_key")
        assert response.headers["x-request-id"] and response.headers["x-should-retry"] == "false"
    with openai_client(guarded, "no-such-key") as client, pytest.raises(openai.AuthenticationError):
        client.chat.completions.create(**GREEDY)
    for key in (None, "no-such-key"):
        with Client(guarded.ingress, api_key=key) as client, pytest.raises(RequestFailed) as raised:
            list(client.generate(pb.GenerateRequest(text="x"), timeout_seconds=30))
        assert (raised.value.status, raised.value.reason) == (grpc.StatusCode.UNAUTHENTICATED, "INVALID_API_KEY")
    # Probes have no keys.
    assert httpx.get(f"{guarded.url}/health").status_code == 200


def test_no_tenant_reuses_what_was_computed_for_another(guarded: Any) -> None:
    def cached_token_count(key: str, ending: str) -> int:
        with openai_client(guarded, key) as client:
            text = "A long beginning that both of them share, word for word, down to the last one. " * 4 + ending
            fields = GREEDY | {"messages": [{"role": "user", "content": text}]}
            usage = client.chat.completions.create(**fields).usage
            return usage.prompt_tokens_details.cached_tokens

    # A block or two of the template each may know from questions of its own.
    assert cached_token_count("amber-key-0001", "One.") <= 32
    assert cached_token_count("blue-key-00001", "Two.") <= 32
    assert cached_token_count("amber-key-0002", "Three.") >= 64


def test_a_key_is_its_tenant_and_no_tenant_gets_anothers_answer(guarded: Any) -> None:
    def ask(key: str) -> tuple[str | None, str, str]:
        with openai_client(guarded, key) as client:
            # What pretends to be a tenant is not believed.
            fields = GREEDY | {"extra_headers": {"x-tidegate-tenant": "amber"}}
            raw = client.chat.completions.with_raw_response.create(**fields)
            return raw.headers.get("x-tidegate-cache"), raw.parse().choices[0].message.content, raw.request_id

    asked = [ask(key) for key in ("amber-key-0001", "amber-key-0002", "blue-key-00001", "blue-key-00001")]
    assert [cached for cached, _, _ in asked] == [None, "hit", None, "hit"]
    assert len({text for _, text, _ in asked}) == 1
    generated = {asked[0][2]: "amber", asked[2][2]: "blue"}
    log = guarded.home / "logs" / "model-0.log"
    tenants = {}
    for line in log.read_text().splitlines():
        for request_id in generated:
            if request_id in line:
                tenants[request_id] = json.loads(line)["tenant"]
    assert tenants == generated
    everything = "".join(each.read_text() for each in (guarded.home / "logs").iterdir())
    assert "amber-key" not in everything and "blue-key" not in everything


def test_commands_take_the_key_from_the_environment(guarded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    refused = guarded.run("chat", "--max-tokens", "4", "Hello")
    assert refused.returncode == 64 + grpc.StatusCode.UNAUTHENTICATED.value[0]
    assert refused.stdout == "" and "key" in refused.stderr and "Traceback" not in refused.stderr
    monkeypatch.setenv("OPENAI_API_KEY", "blue-key-00001")
    answered = guarded.run("chat", "--max-tokens", "4", stdin="Hello")
    assert (answered.returncode, answered.stderr) == (0, "")
    assert answered.stdout.strip()
