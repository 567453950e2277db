"""The wait for the first answer, and what a command answers when nothing can be started."""

import asyncio
import http.server
import itertools
import json
import os
import threading
import time
import types

import pytest
from click.testing import CliRunner

from tidegate.cli import main, probes, up
from tidegate.cli.envoy_config import envoy_command, envoy_environment
from tidegate.v1 import scheduler_pb2

REFUSED = {"error": {"message": "no replica is ready"}}


class Said:
    """Steps that keep what is said."""

    def __init__(self):
        self.waits, self.ended = [], []
        self._started_at = time.monotonic()

    @property
    def elapsed_seconds(self):
        return time.monotonic() - self._started_at

    def waiting(self, what, *, every_seconds):
        self.waits.append((what, every_seconds))

    def done(self, what, seconds=None):
        self.ended.append(what)

    def pause(self):
        pass


@pytest.fixture
def refusing_ingress():
    """An ingress that answers 503 at once: (url, times of the questions)."""
    asked_at = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            asked_at.append(time.monotonic())
            self.rfile.read(int(self.headers["content-length"]))
            body = json.dumps(REFUSED).encode()
            self.send_response(503)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}", asked_at
    server.shutdown()
    thread.join()
    server.server_close()


async def test_an_ingress_that_refuses_is_told_of_and_not_asked_all_the_time(refusing_ingress):
    url, asked_at = refusing_ingress
    said = Said()
    text, problem = await up.wait_for_answer(
        lambda: probes.real_answer(url, "m", ""),
        not_ready=list,
        is_over=lambda: said.elapsed_seconds > 1.3,
        steps=said,
    )
    assert (text, problem) == ("", "503 no replica is ready")
    assert ("waiting for the first answer; the ingress says: 503 no replica is ready", 3.0) in said.waits
    assert all(later - earlier >= 0.5 for earlier, later in itertools.pairwise(asked_at))
    assert 2 <= len(asked_at) <= 3


async def test_a_mesh_is_ready_once_the_model_asked_for_has_answered_and_health_is_good(monkeypatch):
    health = [503, 200, 200]
    models = ["small", "m", "m", "m"]

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["content-length"]))
            self.answer(200, {"model": models.pop(0), "choices": [{"message": {"content": "hello"}}]})

        def do_GET(self):
            self.answer(health.pop(0) if self.path == "/health" else 404, {})

        def answer(self, status, value):
            body = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}).start()
        monkeypatch.setattr(up, "_url", lambda mesh: f"http://127.0.0.1:{server.server_address[1]}")
        mesh = types.SimpleNamespace(
            model_name="m",
            lite_model_name="",
            replica_count=2,
            lite_replica_count=1,
            scheduler_addresses=("a:1", "b:1"),
        )
        reached = {"a:1": [3, 3], "b:1": [2, 3]}

        async def snapshot(address):
            return _snapshot_of(reached[address].pop(0))

        monkeypatch.setattr(up.probes, "snapshot", snapshot)
        answers = [await up._ask_all_models(mesh, "") for _ in range(4)]
        server.shutdown()
    assert answers == [
        ("", "m was asked and small answered"),
        ("", "/health: 503, no replica has passed Envoy's health check yet"),
        ("", "a scheduler reaches 2 of 3 replicas"),
        ("hello", ""),
    ]


def _snapshot_of(reached_count):
    """Of a scheduler that reaches so many replicas, and knows of one more."""
    snapshot = scheduler_pb2.Snapshot()
    for _ in range(reached_count):
        snapshot.replicas.add(connected=True).load.ready = True
    snapshot.replicas.add(connected=True)
    return snapshot


async def test_the_first_answer_ends_the_wait():
    async def ask():
        return "hello", ""

    said = Said()
    missing = [["envoy"], []]
    answer = await up.wait_for_answer(ask, not_ready=lambda: missing.pop(0), is_over=lambda: False, steps=said)
    assert answer == ("hello", "")
    assert said.waits[0][0] == "waiting for envoy"
    assert said.ended == ["the model answered through the ingress: “hello”"]


async def test_an_answer_that_does_not_come_is_not_waited_for_when_it_is_over():
    async def ask():
        await asyncio.sleep(60)
        raise AssertionError

    said = Said()
    answer = await up.wait_for_answer(ask, not_ready=list, is_over=lambda: said.elapsed_seconds > 0.2, steps=said)
    assert answer == ("", "")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "/no/such/model"], "there is no such file or folder"),
        (["--host", "0.0.0.0"], "--no-api-keys"),
    ],
)
def test_what_cannot_be_meant_is_a_usage_error(tmp_path, monkeypatch, arguments, words):
    monkeypatch.setenv("TIDEGATE_HOME", str(tmp_path / "home"))
    outcome = CliRunner().invoke(main.cli, ["up", *arguments])
    assert outcome.exit_code == 2
    assert words in outcome.stderr
    assert not (tmp_path / "home").exists()


def test_status_without_a_mesh_is_json_where_json_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setenv("TIDEGATE_HOME", str(tmp_path))
    outcome = CliRunner().invoke(main.cli, ["status", "-o", "json"])
    assert (outcome.exit_code, json.loads(outcome.stdout)) == (1, {"running": False})


def test_envoy_has_a_worker_for_each_processor_that_it_may_use(tmp_path):
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        argv = envoy_command(tmp_path / "envoy.yaml")
    finally:
        os.sched_setaffinity(0, allowed)
    assert argv[argv.index("--concurrency") + 1] == "1"


@pytest.mark.parametrize(
    ("said", "tunables"),
    [
        ({}, "glibc.pthread.rseq=0"),
        ({"GLIBC_TUNABLES": "glibc.malloc.check=3"}, "glibc.malloc.check=3:glibc.pthread.rseq=0"),
        ({"GLIBC_TUNABLES": "glibc.pthread.rseq=1"}, "glibc.pthread.rseq=1"),
    ],
)
def test_envoy_has_the_restartable_sequences_unless_the_user_says_otherwise(said, tunables):
    assert envoy_environment({"PATH": "/bin", **said}) == {"PATH": "/bin", "GLIBC_TUNABLES": tunables}


@pytest.mark.parametrize(("template", "scheme"), [(up.READY_TEXT, "http"), (up.READY_TEXT_TLS, "https")])
def test_the_commands_to_copy_speak_what_the_ingress_speaks(template, scheme):
    text = template.format(
        url=f"{scheme}://h:1", address="h:1", model="m", tidegate="tidegate", python="python", buf="buf"
    )
    assert f"{scheme}://h:1/v1/chat/completions" in text
    assert ("-plaintext" in text) == (scheme == "http")
