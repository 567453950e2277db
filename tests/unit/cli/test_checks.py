"""Whether a machine can carry a mesh, judged from made-up facts."""

import msgspec
import pytest

from tidegate.cli.checks import GIBIBYTE, MEBIBYTE, check_machine, failures, summary
from tidegate.cli.machine import Machine

GOOD = Machine(
    system="Linux",
    architecture="x86_64",
    python_version=(3, 11),
    processor_count=2,
    memory_available_bytes=16 * GIBIBYTE,
    shared_memory_free_bytes=GIBIBYTE,
    open_file_limit=1 << 20,
    libpython="/usr/lib/libpython3.11.so.1.0",
)


def judge(replica_count=1, **facts):
    machine = msgspec.structs.replace(GOOD, **facts)
    return check_machine(machine, model_bytes=[None] * replica_count, arena_bytes=64 * MEBIBYTE)


def test_a_good_machine_passes_everything():
    assert [check.outcome for check in judge()] == ["ok"] * 6


@pytest.mark.parametrize(
    ("facts", "name", "words"),
    [
        ({"system": "Darwin"}, "platform", "Linux on x86_64"),
        ({"architecture": "aarch64"}, "platform", "Linux on x86_64"),
        ({"python_version": (3, 13)}, "python", "make PYTHON="),
        ({"libpython": ""}, "libpython", "apt install libpython3.11"),
        ({"memory_available_bytes": GIBIBYTE}, "memory", "free some memory"),
        ({"shared_memory_free_bytes": 64 * MEBIBYTE}, "shared memory", "size=256m /dev/shm"),
        ({"shared_memory_free_bytes": 0}, "shared memory", "--shm-size=256m"),
    ],
)
def test_what_is_missing_fails_with_one_line_and_a_fix(facts, name, words):
    (check,) = failures(judge(**facts))
    assert check.name == name
    assert words in check.fix
    assert "\n" not in check.reason + check.fix


def test_memory_is_asked_for_by_replica():
    assert failures(judge(replica_count=2, memory_available_bytes=5 * GIBIBYTE)) == []
    (check,) = failures(judge(replica_count=8, memory_available_bytes=4 * GIBIBYTE))
    assert check.reason == "4.0 GiB available, 15 GiB needed for 8 replicas"
    assert "--replicas" in check.fix


def test_few_open_files_are_a_warning_only():
    checks = judge(open_file_limit=1024)
    assert [check.name for check in checks if check.outcome == "warning"] == ["open files"]
    assert failures(checks) == []


def test_memory_is_asked_for_by_the_size_of_another_model():
    machine = msgspec.structs.replace(GOOD, memory_available_bytes=10 * GIBIBYTE)
    assert failures(check_machine(machine, model_bytes=[3 * GIBIBYTE], arena_bytes=MEBIBYTE)) == []
    (check,) = failures(check_machine(machine, model_bytes=[4 * GIBIBYTE], arena_bytes=MEBIBYTE))
    assert check.reason == "10 GiB available, 12 GiB needed for 1 replica"
    (check,) = failures(check_machine(machine, model_bytes=[3 * GIBIBYTE, GIBIBYTE], arena_bytes=MEBIBYTE))
    assert "needed for 2 replicas" in check.reason


def test_the_summary_counts_what_fails():
    assert summary(judge()) == "all checks hold"
    assert summary(judge(libpython="")) == "1 check fails"
    assert summary(judge(libpython="", system="Darwin")) == "2 checks fail"
