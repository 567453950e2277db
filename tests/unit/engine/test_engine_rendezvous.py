"""Who may join node 0, who may not, and what is said of those who never come."""

import json
import pickle
import socket
import struct
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from llm_engine import EngineConfig, ModelLoadError
from llm_engine import agreement as agreement_module
from llm_engine.agreement import agreement, differences, engine_files
from llm_engine.link import Link
from llm_engine.orders import packed, plain_works, row_works, unpacked
from llm_engine.rendezvous import gather, join
from llm_engine.step_tensors import RowWork


@pytest.fixture
def make_config(make_folder):
    """Settings of a node of three, of which node 0 listens on a port of the test's."""
    folder = str(make_folder())
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]

    def make(node_rank=0, **settings):
        nodes = {"node_count": 3, "node_rank": node_rank, "tensor_parallel_size": 3, "master_port": port}
        return EngineConfig(**{"model_path": folder, "join_timeout_seconds": 10.0, **nodes, **settings})

    return make


@pytest.fixture
def beside():
    """Runs what other nodes do."""
    with ThreadPoolExecutor(4) as pool:
        yield pool.submit


def test_all_nodes_meet_whoever_is_first(make_config, beside):
    first = beside(join, make_config(2))
    time.sleep(0.3)
    here = beside(gather, make_config())
    second = beside(join, make_config(1))
    links = here.result(10)
    assert sorted(links) == [1, 2]
    for node, other in ((1, second), (2, first)):
        links[node].say(fault="hello")
        assert other.result(10).hear() == {"fault": "hello"}


def test_nodes_that_never_come_are_named(make_config, beside):
    started = time.monotonic()
    other = beside(join, make_config(1))
    with pytest.raises(ModelLoadError, match=r"of 3 nodes did not join within 0\.6 s .*: node 2$"):
        gather(make_config(join_timeout_seconds=0.6))
    with pytest.raises(ModelLoadError, match=r"node 0 at 127.0.0.1:.*: of 3 nodes did not join .*: node 2"):
        other.result(10)
    assert time.monotonic() - started < 5


def test_a_node_without_a_node_0_gives_up(make_config):
    with pytest.raises(
        ModelLoadError, match=r"node 1 has not found node 0 at 127\.0\.0\.1:\d+ within 0\.5 s: .*refused"
    ):
        join(make_config(1, join_timeout_seconds=0.5))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"dtype": "fp16"}, "dtype is 'fp16' there and 'fp32' on node 0"),
        ({"block_token_count": 4}, "block_token_count is 4 there and 16 on node 0"),
        ({"tensor_parallel_size": 6}, "tensor_parallel_size is 6 there and 3 on node 0"),
        ({"max_context_tokens": 64}, "max_context_tokens is 64 there and None on node 0"),
        (
            {"attention_window": 9},
            "attention_window is 9 there and 0 on node 0; step_token_budget is 128 there and None on node 0",
        ),
        ({"attention_window_from": 512}, "attention_window_from is 512 there and 4096 on node 0"),
        ({"attention_sinks": 3}, "attention_sinks is 3 there and 16 on node 0"),
        (
            {"node_count": 4, "node_rank": 3, "tensor_parallel_size": 4},
            "node_count is 4 there and 3 on node 0; tensor_parallel_size is 4 there and 3 on node 0",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_differs_is_refused_by_name(make_config, beside, settings, words):
    node = settings.get("node_rank", 1)
    other = beside(join, make_config(**{"node_rank": node, **settings}))
    with pytest.raises(ModelLoadError) as caught:
        gather(make_config(join_timeout_seconds=0.5))
    with pytest.raises(ModelLoadError, match=f"node {node} was refused: {words}"):
        other.result(10)
    if node == 1:
        assert f"node 1 ({words})" in str(caught.value)


def test_another_model_is_refused(make_config, make_folder, tiny_tensors):
    here = agreement(make_config())
    weight = tiny_tensors["model.layers.1.mlp.up_proj.weight"]
    make_folder(tensors={"model.layers.1.mlp.up_proj.weight": weight * 2})
    assert differences(agreement(make_config()), here).startswith("model files is ")
    make_folder()
    assert not differences(agreement(make_config(1, thread_count=3, max_waiting=2)), here)


def test_the_budget_of_a_step_must_be_the_same_with_a_window_alone(make_config):
    def difference(**settings):
        return differences(
            agreement(make_config(1, step_token_budget=64, **settings)), agreement(make_config(**settings))
        )

    assert difference() == ""
    assert difference(attention_window=512) == "step_token_budget is 64 there and 128 on node 0"


def test_a_processor_that_computes_in_another_type_is_refused(make_config, monkeypatch):
    monkeypatch.setattr(agreement_module, "compute_dtype", lambda dtype, device: torch.bfloat16)
    there = agreement(make_config(1))
    monkeypatch.setattr(agreement_module, "compute_dtype", lambda dtype, device: torch.float32)
    here = agreement(make_config())
    assert differences(there, here) == "compute type is 'torch.bfloat16' there and 'torch.float32' on node 0"


def test_the_engines_version_is_that_of_its_kernels_too():
    assert {"agreement.py", "layers.c", "vectors.h"} <= {path.name for path in engine_files()}


def test_who_is_no_node_is_sent_away_and_holds_nobody_up(make_config, beside):
    here = beside(gather, make_config())
    port = make_config().master_port
    strangers = []
    for payload in (b"GET / HTTP/1.1\r\n\r\n", b"\x00\x00\x00\x02[]", b"\x00\x00\xea\x60" + b"[" * 60_000, b""):
        stranger = connected(port)
        stranger.sendall(payload)
        stranger.shutdown(socket.SHUT_WR)
        strangers.append(stranger)
    gone = connected(port)
    gone.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    gone.close()  # With a reset.
    others = [beside(join, make_config(node)) for node in (1, 2)]
    assert sorted(here.result(10)) == [1, 2]
    for other in others:
        other.result(10)
    for stranger in strangers:
        stranger.close()


def test_a_node_may_leave_and_come_again_but_not_twice(make_config, beside):
    here = beside(gather, make_config())
    hello = {"node_rank": 1, "agreement": agreement(make_config())}
    early = Link(connected(make_config().master_port))
    early.say(**json.loads(json.dumps(hello)))
    twin = Link(connected(make_config().master_port))
    twin.say(**hello)
    assert "node 1 is there already" in twin.hear()["fault"]
    early.close()
    others = [beside(join, make_config(node)) for node in (1, 2)]
    assert sorted(here.result(10)) == [1, 2]
    for other in others:
        other.result(10)


def connected(port):
    for _ in range(100):
        try:
            return socket.create_connection(("127.0.0.1", port), 5)
        except OSError:
            time.sleep(0.05)
    raise AssertionError("nobody listens")


def test_an_address_of_another_host_cannot_be_listened_on(make_config):
    with pytest.raises(ModelLoadError, match=r"node 0 cannot listen on 192\.0\.2\.1:"):
        gather(make_config(master_address="192.0.2.1"))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"tensor_parallel_size": 4}, "tensor_parallel_size is 4, expected a multiple of node_count (3)"),
        ({"tensor_parallel_size": 1}, "tensor_parallel_size is 1, expected a multiple of node_count (3)"),
        ({"node_rank": 3}, "node_rank is 3, expected less than node_count (3)"),
        ({"master_port": 0}, "master_port is 0, expected the port on which node 0 listens, as node_count is 3"),
        ({"master_port": 65536}, "master_port is 65536, expected an integer from 0 to 65535"),
        ({"master_address": ""}, "master_address is empty"),
        ({"node_count": 0}, "node_count is 0, expected an integer from 1"),
        ({"join_timeout_seconds": 0}, "join_timeout_seconds is 0, expected more than 0"),
        ({"collective_timeout_seconds": -1.0}, "collective_timeout_seconds is -1.0, expected more than 0"),
    ],
)
def test_settings_that_cannot_be_are_refused(make_config, settings, words):
    with pytest.raises(ValueError) as caught:
        make_config(**settings)
    assert words in str(caught.value)


def test_each_node_has_its_share_of_the_ranks(make_config):
    ranks = [list(make_config(node, tensor_parallel_size=6).own_ranks) for node in range(3)]
    assert ranks == [[0, 1], [2, 3], [4, 5]]


def test_an_engine_is_only_on_node_0(make_engine, make_config):
    with pytest.raises(ModelLoadError, match="node_rank is 1: the engine is on node 0, the others join it"):
        make_engine(node_count=2, node_rank=1, tensor_parallel_size=2, master_port=1)


def test_an_order_is_plain_values():
    works = [RowWork(3, [7, 8], [0, 4], 2), RowWork(0, [1], [2], 0)]
    order, plain, rows = unpacked(packed("step", plain_works(works), [1]))
    assert (order, row_works(plain), rows) == ("step", works, [1])
    for thing in (works, threading.Event, print):
        with pytest.raises(pickle.UnpicklingError, match="expected plain values"):
            unpacked(packed("step", thing))
