"""The Batch surface as the official client uses it, through a whole mesh, with kill -9 of its processes in between."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

MODEL = "smollm2-135m-instruct"
FILE_BYTES_LIMIT = 10 << 20
BUF = Path(__file__).resolve().parents[3] / ".venv" / "bin" / "buf"


@pytest.fixture(scope="module")
def batch_mesh(start_module_mesh: Any) -> Any:
    return start_module_mesh("--replicas", "1", settings={"TIDEGATE_BATCH_FILE_BYTES_LIMIT": str(FILE_BYTES_LIMIT)})


@pytest.fixture
def client(batch_mesh: Any) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{batch_mesh.url}/v1", api_key="none", max_retries=5) as opened:
        yield opened


def line(custom_id: str, *, model: str = MODEL, max_tokens: int = 4) -> str:
    messages = [{"role": "user", "content": f"Say {custom_id}."}]
    body = {"model": model, "messages": messages, "max_tokens": max_tokens, "temperature": 0}
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": body}) + "\n"


def create(client: openai.OpenAI, content: str) -> Any:
    file = client.files.create(file=("in.jsonl", content.encode()), purpose="batch")
    return client.batches.create(
        input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h", metadata={"a": "b"}
    )


def until(client: openai.OpenAI, batch_id: str, *statuses: str, done: int = 0) -> Any:
    deadline = time.monotonic() + 90
    while True:
        batch = client.batches.retrieve(batch_id)
        if batch.status in statuses and batch.request_counts.completed >= done:
            return batch
        assert time.monotonic() < deadline, batch
        time.sleep(0.1)


def results(client: openai.OpenAI, file_id: str) -> list[dict[str, Any]]:
    return [json.loads(text) for text in client.files.content(file_id).text.splitlines()]


def test_a_batch_survives_kill_9_of_any_process_with_each_line_once(batch_mesh: Any, client: openai.OpenAI) -> None:
    names = [f"line-{index}" for index in range(64)]
    created = create(client, "".join(map(line, names)) + line("nobody", model="gpt-9"))
    assert (created.object, created.status, created.metadata) == ("batch", "validating", {"a": "b"})
    killed = ("batch", "scheduler", "model-0", "triton-0", "envoy", "preprocess", "cache", "waiting", "batch")
    for place, name in enumerate(killed):
        # A pause of this process may be long enough for all the lines.
        until(client, created.id, "in_progress", "finalizing", "completed", done=2 + 4 * place)
        os.kill(batch_mesh.record(name)["pid"], signal.SIGKILL)
    batch = until(client, created.id, "completed")
    counts = batch.request_counts
    assert (counts.total, counts.completed, counts.failed) == (65, 64, 1)
    output = results(client, batch.output_file_id)
    assert sorted(each["custom_id"] for each in output) == sorted(names)
    assert all(each["response"]["body"]["choices"][0]["message"]["content"] for each in output)
    assert batch.usage.output_tokens == sum(each["response"]["body"]["usage"]["completion_tokens"] for each in output)
    (failed,) = results(client, batch.error_file_id)
    assert (failed["custom_id"], failed["response"]["status_code"]) == ("nobody", 404)
    assert failed["response"]["body"]["error"]["code"] == "model_not_found"


def test_files_are_listed_read_and_deleted(client: openai.OpenAI) -> None:
    content = "".join(line(f"{index}") for index in range(40_000))
    file = client.files.create(file=("larger.jsonl", content.encode()), purpose="batch")
    assert (file.object, file.bytes, file.filename, file.purpose) == ("file", len(content), "larger.jsonl", "batch")
    assert len(content) > 4 << 20  # Above what other bodies may have.
    assert client.files.retrieve(file.id).id == file.id
    assert file.id in {each.id for each in client.files.list(purpose="batch")}
    assert client.files.content(file.id).text == content
    assert client.files.delete(file.id).deleted
    with pytest.raises(openai.NotFoundError) as raised:
        client.files.retrieve(file.id)
    assert (raised.value.type, raised.value.param) == ("invalid_request_error", "id")


def test_a_batch_can_be_cancelled(client: openai.OpenAI) -> None:
    created = create(client, "".join(line(f"{index}", max_tokens=200) for index in range(100)))
    until(client, created.id, "in_progress")
    assert client.batches.cancel(created.id).status in ("cancelling", "cancelled")
    batch = until(client, created.id, "cancelled")
    assert batch.request_counts.completed + batch.request_counts.failed == 100
    assert created.id in {each.id for each in client.batches.list(limit=10)}


def test_what_cannot_be_taken_is_an_openai_error(batch_mesh: Any, client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="purpose must be 'batch'"):
        client.files.create(file=b"{}", purpose="fine-tune")
    with pytest.raises(openai.BadRequestError, match="completion_window"):
        client.batches.create(input_file_id="f", endpoint="/v1/completions", completion_window="1h")  # type: ignore[arg-type]
    with pytest.raises(openai.APIStatusError, match="larger than 10485760 bytes") as raised:
        client.files.create(file=b"x" * (FILE_BYTES_LIMIT + 1), purpose="batch")
    assert raised.value.status_code == 413
    files, batches = f"{batch_mesh.url}/v1/files", f"{batch_mesh.url}/v1/batches"
    assert httpx.post(files, content=b"x", headers={"content-type": "text/plain"}).status_code == 415
    assert httpx.post(batches, data={"a": "b"}).status_code == 415
    assert httpx.put(files).status_code == 405
    foreign = httpx.post(files, files={"file": b""}, headers={"origin": "https://elsewhere.example"})
    assert (foreign.status_code, foreign.json()["error"]["code"]) == (403, "permission_denied")


def test_grpc_tools_can_use_it_too(batch_mesh: Any) -> None:
    argv = [str(BUF), "curl", "--http2-prior-knowledge", "--protocol", "grpc", "--reflect", "-d", "{}"]
    argv.append(f"http://{batch_mesh.ingress}/tidegate.v1.Batch/ListBatches")
    finished = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    assert finished.returncode == 0, finished.stderr
    assert json.loads(finished.stdout)["contentType"] == "application/json"
