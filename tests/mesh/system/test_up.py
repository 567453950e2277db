"""`tidegate up` for real: it answers, it mends itself, and it leaves nothing behind."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from pathlib import Path

import pytest

from tidegate.cli import process_table, state

pytestmark = pytest.mark.timeout(300)


def left_over(mesh_state: dict) -> dict[str, list]:
    """Processes, shared memory and ports of a run that are still there."""
    ports = [int(address.rpartition(":")[2]) for address in mesh_state["addresses"].values()]
    return {
        "processes": process_table.with_run_id(mesh_state["run_id"]),
        "shared memory": state.shared_memory(mesh_state["shared_memory_prefixes"]),
        "ports": [port for port in ports if is_listening(port)],
    }


def is_listening(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0


NOTHING = {"processes": [], "shared memory": [], "ports": []}


def test_after_kill_9_of_the_supervisor_a_second_start_removes_what_is_left_and_works(start_mesh):
    first = start_mesh().wait_ready()
    before = first.state()
    assert len(process_table.with_run_id(before["run_id"])) >= len(before["processes"])
    assert state.shared_memory(before["shared_memory_prefixes"])
    first.process.send_signal(signal.SIGKILL)
    first.process.wait()
    second = start_mesh().wait_ready()
    assert left_over(before) == NOTHING
    assert second.state()["run_id"] != before["run_id"]


def test_a_crashed_process_is_started_again_and_ctrl_c_leaves_nothing(start_mesh):
    mesh = start_mesh().wait_ready()
    for name in ("cache", "envoy"):
        os.kill(mesh.record(name)["pid"], signal.SIGKILL)
        mesh.wait_for(lambda name=name: mesh.record(name)["restart_count"] == 1, 10)
        mesh.wait_for(lambda name=name: mesh.record(name)["state"] == "ready", 20)
        assert f"{name} ended (killed by SIGKILL); starting it again" in mesh.talk.read_text()
    answer = mesh.run("chat", "--max-tokens", "4", "Hello")
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.strip()
    running = mesh.state()
    began_at = time.monotonic()
    assert mesh.stop() == 0
    assert time.monotonic() - began_at < 10
    assert left_over(running) == NOTHING


def test_a_start_without_a_terminal_tells_its_steps_in_plain_lines(mesh):
    talk = mesh.talk.read_text()
    assert "\x1b" not in talk
    assert "the model answered through the ingress" in talk
    assert "ready after" in talk
    assert "chat/completions" in mesh.output.read_text()


def test_a_second_mesh_in_the_same_folder_is_refused(mesh):
    answer = mesh.run("up", "--ports", "auto")
    assert answer.returncode == 1
    assert answer.stderr.startswith(f"error: a mesh runs here already (pid {mesh.process.pid}")


def test_a_taken_port_is_named_with_the_flag_that_changes_it(mesh, tmp_path):
    taken = mesh.ingress.rpartition(":")[2]
    answer = mesh.run("up", "--ports", "auto", "--port", taken, home=tmp_path)
    assert answer.returncode == 1
    assert answer.stderr.startswith(f"error: port {taken} (the ingress) is taken by envoy")
    assert answer.stderr.rstrip().endswith("choose another with --port N")
    assert not (tmp_path / "run" / "mesh.json").exists()


def test_status_shows_every_process_and_replica(mesh):
    answer = mesh.run("status", "-o", "json")
    view = json.loads(answer.stdout)
    services = ["scheduler", "preprocess", "cache", "batch", "waiting"]
    names = ["triton-0", "triton-1", "envoy", *services, "model-0", "model-1"]
    assert {each["name"]: each["health"] for each in view["processes"]} == dict.fromkeys(names, "ok")
    assert sorted(each["address"] for each in view["replicas"]) == sorted(
        [mesh.address("model-0"), mesh.address("model-1")]
    )
    assert view["errors"] == []
    assert answer.returncode == 0


def test_the_scheduler_alone_has_mimalloc(mesh):
    names = [each["name"] for each in mesh.state()["processes"]]
    maps = {name: Path(f"/proc/{mesh.record(name)['pid']}/maps").read_text() for name in names}
    assert [name for name in names if "libmimalloc" in maps[name]] == ["scheduler"]


def test_what_carries_answers_steps_back_for_what_decides(mesh):
    names = [each["name"] for each in mesh.state()["processes"]]
    niceness = {name: os.getpriority(os.PRIO_PROCESS, mesh.record(name)["pid"]) for name in names}
    decides = {name for name, value in niceness.items() if value == min(niceness.values())}
    assert decides == {"envoy", "scheduler", "preprocess"}
    steps_back_most = {name for name, value in niceness.items() if value == max(niceness.values())}
    assert steps_back_most == {name for name in names if name.startswith("triton")}


def test_doctor_finds_nothing_wrong_with_a_mesh_that_runs(mesh):
    answer = mesh.run("doctor", "-o", "json")
    assert [check for check in json.loads(answer.stdout) if check["outcome"] == "failed"] == []
    assert answer.returncode == 0


def test_chat_takes_its_prompt_from_standard_input_and_prints_only_the_answer(mesh):
    answer = mesh.run("chat", "--max-tokens", "8", "--temperature", "0", stdin="What is the capital of France?")
    assert answer.returncode == 0, answer.stderr
    assert "Paris" in answer.stdout
    assert answer.stderr == ""


def test_chat_says_a_refusal_without_a_traceback(mesh):
    answer = mesh.run("chat", "--model", "gpt-9", "Hello")
    assert answer.returncode == 64 + 5  # NOT_FOUND
    assert "gpt-9" in answer.stderr
    assert "Traceback" not in answer.stderr
    assert answer.stdout == ""
