"""Models divided among nodes, two trees of processes on loopback: the same texts, and an end instead of a hang."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from small_models import SHAPES, save_spoiled_model, small_model, tokens_of

ENGINE = Path(__file__).resolve().parents[3] / "triton_models" / "llm"
SETTINGS = {"kv_cache_bytes": 1 << 22, "step_token_budget": 48, "thread_count": 1, "cpu_kernels": False}
QUICK_SECONDS = 20
"""Far below the time-out of a collective."""


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


@pytest.fixture
def start_join():
    """Node 1 of two, which ends with the test."""
    nodes = []

    def start(folder, size, port):
        environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NNODES": "2", "NODE_RANK": "1"}
        flags = {"model": folder, "tensor-parallel-size": size, "kv-cache-bytes": 1 << 22}
        given = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
        nodes.append(
            subprocess.Popen(
                [sys.executable, "-m", "llm_engine", "join", *given, "--threads", "1", "--no-cpu-kernels"],
                env=os.environ | environment | {"PYTHONPATH": str(ENGINE)},
                stderr=subprocess.PIPE,
                text=True,
            )
        )
        return nodes[-1]

    yield start
    for node in nodes:
        node.kill()
        node.communicate()


@pytest.fixture
def start_both(make_engine, start_join):
    """The engine on node 0, and node 1, which has joined it."""
    engines = []

    def start(folder, size):
        port = free_port()
        node = start_join(folder, size, port)
        nodes = {"tensor_parallel_size": size, "node_count": 2, "master_port": port}
        engines.append(make_engine(folder, **SETTINGS, **nodes))
        return engines[-1], node

    yield start
    for engine in engines:
        engine.close()


def greedy_texts(engine):
    from llm_engine import SamplingParams, SequenceRequest

    for count in (3, 40):
        engine.add(
            SequenceRequest(
                request_id=str(count),
                token_ids=tokens_of(count),
                max_tokens=8,
                sampling=SamplingParams(temperature=0.0),
                ignore_eos=True,
            )
        )
    texts = {}
    while engine.has_work:
        for output in engine.step():
            texts.setdefault(output.request_id, []).extend(output.token_ids)
    return texts


@pytest.mark.parametrize("size", [2, 4])
def test_texts_and_logits_are_those_of_one_rank(
    tmp_path, make_engine, start_both, prompt_logits, reference_logits, size
):
    model = small_model(**SHAPES["grouped"])
    model.save_pretrained(tmp_path)
    alone = make_engine(tmp_path, **SETTINGS)
    engine, node = start_both(tmp_path, size)
    difference = (prompt_logits(engine, tokens_of(60)) - reference_logits(model, tokens_of(60))).abs().max()
    assert difference < 1e-3
    texts = greedy_texts(engine)
    assert texts == greedy_texts(alone)
    assert all(len(tokens) == 8 for tokens in texts.values())
    engine.close()
    _, said = node.communicate(timeout=QUICK_SECONDS)
    assert (node.returncode, said) == (0, "")


def rank_of(node):
    (rank,) = psutil.Process(node.pid).children()
    return rank


@pytest.mark.parametrize(
    ("lose", "heard", "node_says"),
    [
        (lambda engine, node: node.send_signal(signal.SIGKILL), "node 1 at 127.0.0.1 is gone", ""),
        (
            lambda engine, node: rank_of(node).kill(),
            "node 1 at 127.0.0.1: rank 1 has ended, with status -9",
            "has ended: node 1 at 127.0.0.1: rank 1 has ended, with status -9",
        ),
    ],
    ids=["node", "rank of a node"],
)
def test_what_is_lost_ends_all_at_once(tmp_path, start_both, lose, heard, node_says):
    from llm_engine import EngineBroken, SequenceRequest

    small_model().save_pretrained(tmp_path)
    engine, node = start_both(tmp_path, 2)
    rank = rank_of(node)
    told, words = threading.Event(), []
    engine.watch(lambda message: (words.append(message), told.set()))
    engine.add(SequenceRequest(request_id="a", token_ids=tokens_of(10), max_tokens=50, ignore_eos=True))
    engine.step()
    lost_at = time.monotonic()
    lose(engine, node)
    assert told.wait(QUICK_SECONDS)
    assert words == [heard]
    with pytest.raises(EngineBroken):
        for _ in range(2):
            engine.step()
    _, said = node.communicate(timeout=QUICK_SECONDS)
    assert node.returncode != 0 and node_says in said
    rank.wait(QUICK_SECONDS)
    assert time.monotonic() - lost_at < QUICK_SECONDS


def test_a_node_that_cannot_load_is_named(tmp_path, start_both):
    from llm_engine import ModelLoadError

    save_spoiled_model(tmp_path)
    with pytest.raises(ModelLoadError, match=r"node 1 at 127.0.0.1: rank 1: .*up_proj.weight holds 1 values"):
        start_both(tmp_path, 2)


def test_a_node_ends_when_node_0_is_gone(tmp_path, start_join):
    from llm_engine import EngineConfig
    from llm_engine.rendezvous import gather

    small_model().save_pretrained(tmp_path)
    port = free_port()
    node = start_join(tmp_path, 2, port)
    nodes = {"tensor_parallel_size": 2, "node_count": 2, "master_port": port}
    link = gather(EngineConfig(model_path=str(tmp_path), kv_cache_bytes=1 << 22, **nodes))[1]
    link.close()
    _, said = node.communicate(timeout=QUICK_SECONDS)
    assert (node.returncode, said) == (1, f"error: node 0 at 127.0.0.1:{port} is gone\n")
