"""What a mesh leaves on disk, and who may hold the folder."""

import os
import subprocess
import sys

import pytest

from tidegate.cli import process_table, state
from tidegate.cli.process_table import ProcessId

RUN_ID = "0123456789abcdef"


@pytest.fixture
def home(tmp_path):
    found = state.Home(tmp_path)
    yield found
    found.release()


def make_mesh(*processes, run_id=RUN_ID, prefixes=()):
    return state.Mesh(
        run_id=run_id,
        supervisor=ProcessId.of(os.getpid()),
        model_name="m",
        model_path="/m",
        shared_memory_prefixes=list(prefixes),
        arena_region="tidegate-x",
        addresses={"ingress": "127.0.0.1:1"},
        replica_count=1,
        processes=[
            state.ProcessRecord(name="p", log="", pid=each.pid, start_ticks=each.start_ticks) for each in processes
        ],
    )


def sleeper(**environment):
    return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], env=os.environ | environment)


@pytest.fixture
def stranger():
    process = sleeper()
    yield process
    process.kill()
    process.wait()


def test_what_is_written_is_read(home):
    home.claim()
    home.write(make_mesh())
    assert home.read() == make_mesh()


def test_nothing_and_nonsense_read_as_no_mesh(home):
    assert home.read() is None
    home.claim()
    home.mesh_file.write_text("{")
    assert home.read() is None


def test_a_folder_has_one_supervisor(home):
    home.claim()
    with pytest.raises(state.AlreadyRunning, match=f"pid {os.getpid()}"):
        state.Home(home.directory).claim()
    home.release()
    other = state.Home(home.directory)
    other.claim()
    other.release()


def test_a_process_that_has_the_pid_of_an_old_one_is_not_it(stranger):
    process = ProcessId.of(stranger.pid)
    assert process.is_alive
    assert not ProcessId(pid=process.pid, start_ticks=process.start_ticks - 1).is_alive


def test_clean_up_ends_recorded_processes_and_those_with_the_run_id_and_no_others(home, stranger):
    recorded, marked = sleeper(), sleeper(**{process_table.RUN_ID_VARIABLE: RUN_ID})
    reused = ProcessId(pid=stranger.pid, start_ticks=ProcessId.of(stranger.pid).start_ticks - 7)
    home.claim()
    home.write(make_mesh(ProcessId.of(recorded.pid), reused))
    assert home.clean_up().process_count == 2
    assert (recorded.wait(5), marked.wait(5), stranger.poll()) == (-9, -9, None)


def test_clean_up_removes_the_runs_shared_memory_and_no_other(home):
    prefix = f"tidegate-test-{os.getpid()}-"
    mine, other = state.SHARED_MEMORY / f"{prefix}a", state.SHARED_MEMORY / f"other-{prefix}"
    try:
        mine.touch()
        other.touch()
        home.claim()
        home.write(make_mesh(prefixes=[prefix]))
        assert home.clean_up() == state.Leftovers(region_count=1)
        assert (mine.exists(), other.exists()) == (False, True)
    finally:
        mine.unlink(missing_ok=True)
        other.unlink(missing_ok=True)


def test_a_prefix_that_others_may_have_is_never_removed():
    with pytest.raises(AssertionError):
        state.remove_shared_memory([""])
