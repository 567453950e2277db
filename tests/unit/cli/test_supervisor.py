"""The supervisor over small programs of its own."""

import asyncio
import os
import signal
import subprocess
import sys
import time

import pytest

from tidegate.cli import process_table, state, supervisor
from tidegate.cli.process_table import ProcessId
from tidegate.cli.supervisor import Program, Supervisor

SLEEP = "import time; time.sleep(60)"
STUBBORN = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('on', flush=True); time.sleep(60)"
WITH_CHILD = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {SLEEP!r}]); {SLEEP}"


class Heard:
    """Keeps what the supervisor tells."""

    def __init__(self):
        self.ready, self.exits, self.given_up, self.broken = [], [], [], []

    def became_ready(self, name, seconds, restart_count):
        self.ready.append((name, restart_count))

    def exited(self, name, how, delay_seconds):
        self.exits.append((name, how))

    def gave_up(self, name, how, reason, tail):
        self.given_up.append((name, how, reason, tail))

    def broke(self, what, error):
        self.broken.append((what, str(error)))


def program(code, *, name="p", ready=True, is_whole=None):
    async def is_ready():
        return ready

    return Program(
        name=name, argv=[sys.executable, "-c", code], environment=dict(os.environ), is_ready=is_ready, is_whole=is_whole
    )


@pytest.fixture
async def run(tmp_path):
    """Starts programs; everything is stopped in the end."""
    home = state.Home(tmp_path)
    home.claim()
    started = []

    def start(*programs):
        mesh = state.Mesh(
            run_id=state.new_run_id(),
            supervisor=ProcessId.of(os.getpid()),
            model_name="m",
            model_path="/m",
            shared_memory_prefixes=[],
            arena_region="tidegate-x",
            addresses={},
            replica_count=1,
        )
        heard = Heard()
        started.append(Supervisor(home, mesh, heard))
        started[-1].start(programs)
        return started[-1], heard, mesh

    yield start
    for each in started:
        await each.stop()
    home.release()


async def until(condition, seconds=10):
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.02)


async def test_a_process_is_ready_when_it_says_so(run):
    watched, heard, _ = run(program(SLEEP), program(SLEEP, name="late", ready=False))
    await until(lambda: heard.ready == [("p", 0)])
    assert watched.not_ready() == ["late"]


async def test_a_crashed_process_is_started_again_and_told(run):
    _, heard, mesh = run(program(SLEEP))
    await until(lambda: heard.ready)
    os.kill(mesh.processes[0].pid, signal.SIGKILL)
    await until(lambda: heard.ready == [("p", 0), ("p", 1)])
    assert heard.exits == [("p", "killed by SIGKILL")]
    assert (mesh.processes[0].restart_count, mesh.processes[0].last_error) == (1, "ended: killed by SIGKILL")
    assert mesh.processes[0].process.is_alive


async def test_one_with_wrong_settings_is_given_up_with_the_end_of_its_log(run):
    watched, heard, _ = run(program("import sys; sys.exit(print('no such setting') or 2)", ready=False))
    await until(watched.failed.is_set)
    assert heard.given_up == [("p", "exit code 2", "its settings are wrong", ["no such setting"])]


async def test_a_program_that_does_not_exist_is_given_up(run):
    missing = Program(name="p", argv=["/no/such/program"], environment={}, is_ready=program("", ready=False).is_ready)
    watched, heard, _ = run(missing)
    await until(watched.failed.is_set)
    assert "cannot start /no/such/program" in heard.given_up[0][3][-1]


async def test_stop_ends_the_stubborn_and_what_they_started(run, monkeypatch):
    monkeypatch.setattr(supervisor, "STOP_SECONDS", 0.3)
    watched, heard, mesh = run(program(STUBBORN), program(WITH_CHILD, name="parent"))
    await until(lambda: len(heard.ready) == 2 and len(process_table.with_run_id(mesh.run_id)) == 3)
    await watched.stop()
    assert process_table.with_run_id(mesh.run_id) == []
    assert {record.state for record in mesh.processes} == {"stopped"}


async def test_what_a_crashed_process_had_started_ends_with_it(run):
    _, heard, mesh = run(program(WITH_CHILD))
    await until(lambda: heard.ready and len(process_table.with_run_id(mesh.run_id)) == 2)
    before = set(process_table.with_run_id(mesh.run_id))
    os.kill(mesh.processes[0].pid, signal.SIGKILL)
    await until(lambda: len(heard.ready) == 2 and len(process_table.with_run_id(mesh.run_id)) == 2)
    assert not before & set(process_table.with_run_id(mesh.run_id))


async def test_a_process_that_lost_a_part_of_itself_is_started_again(run):
    parts = {"alive": True}
    _, heard, _ = run(program(SLEEP, is_whole=lambda _pid: parts["alive"]))
    await until(lambda: heard.ready)
    await asyncio.sleep(0.1)
    parts["alive"] = False
    await until(lambda: heard.exits == [("p", "killed by SIGKILL")])


def test_processes_die_with_a_supervisor_that_is_killed(tmp_path):
    code = f"""
import asyncio, os, sys
sys.path[:0] = {sys.path!r}
from tidegate.cli import state
from tidegate.cli.process_table import ProcessId
from tidegate.cli.supervisor import Program, Supervisor

class Silent:
    def became_ready(self, name, seconds, restart_count): print("ready", flush=True)
    def exited(self, *arguments): pass
    def gave_up(self, *arguments): pass
    def broke(self, *arguments): pass

async def ready(): return True

async def main():
    home = state.Home(__import__("pathlib").Path({str(tmp_path)!r}))
    home.claim()
    mesh = state.Mesh(run_id="{"ab" * 8}{os.getpid()}", supervisor=ProcessId.of(os.getpid()),
                      model_name="", model_path="",
                      shared_memory_prefixes=[], arena_region="", addresses={{}}, replica_count=1)
    program = Program(name="p", argv=[sys.executable, "-c", {SLEEP!r}], environment=dict(os.environ), is_ready=ready)
    Supervisor(home, mesh, Silent()).start([program])
    await asyncio.sleep(60)

asyncio.run(main())
"""
    killed = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert killed.stdout is not None
    assert killed.stdout.readline() == "ready\n"
    child = state.Home(tmp_path).read().processes[0].process
    assert child.is_alive
    killed.kill()
    killed.wait()
    deadline = time.monotonic() + 5
    while child.is_alive and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not child.is_alive


def test_a_log_that_is_too_long_begins_anew_and_keeps_what_was_written(tmp_path):
    log = tmp_path / "p.log"
    with log.open("ab") as writer:
        writer.write(b"a" * 100)
        writer.flush()
        supervisor.bound_log(log, 99)
        writer.write(b"after")
    assert log.read_bytes() == b"after"
    assert (tmp_path / "p.log.1").read_bytes() == b"a" * 100


async def test_a_failure_of_the_supervisor_itself_is_told_and_stops_the_mesh(run, monkeypatch):
    def broken(path, longest_bytes):
        raise OSError("no space left")

    monkeypatch.setattr(supervisor, "LOG_CHECK_SECONDS", 0.01)
    monkeypatch.setattr(supervisor, "bound_log", broken)
    watched, heard, _ = run(program(SLEEP))
    await until(watched.failed.is_set)
    assert heard.broken == [("bounding the logs", "no space left")]


async def test_a_process_that_is_kept_running_no_more_is_told_and_stops_the_mesh(run, monkeypatch):
    def broken(path, count):
        raise ArithmeticError("too far")

    monkeypatch.setattr(supervisor, "last_lines", broken)
    watched, heard, mesh = run(program(SLEEP))
    await until(lambda: heard.ready)
    os.kill(mesh.processes[0].pid, signal.SIGKILL)
    await until(watched.failed.is_set)
    assert heard.broken == [("keeping p running", "too far")]
