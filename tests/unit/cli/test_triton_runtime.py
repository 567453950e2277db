"""The command line of Triton, from an installation that the test makes up."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tidegate.cli import triton_runtime
from tidegate.cli.triton_runtime import TritonRuntimeError, TritonServer, prepare_backend, triton_command


def installation(folder: Path, *, version: str = "3.11", libpython: bool = True) -> Path:
    """An interpreter that says where its things are, and files of the names that nvidia-pytriton has."""
    triton = folder / "site-packages" / "pytriton" / "tritonserver"
    names = (
        "bin/tritonserver",
        "backends/python/libtriton_python.so",
        "backends/python/triton_python_backend_utils.py",
        "python_backend_stubs/3.11/triton_python_backend_stub",
    )
    for name in names:
        (triton / name).parent.mkdir(parents=True, exist_ok=True)
        (triton / name).write_text(name)
    (folder / "lib").mkdir()
    if libpython:
        (folder / "lib" / f"libpython{version}.so.1.0").touch()
    python = folder / "bin" / "python"
    python.parent.mkdir()
    python.write_text(f"#!/bin/sh\nprintf '%s\\n' {version} {folder}/lib {folder}/site-packages\n")
    python.chmod(0o755)
    return python


def server(python: Path, folder: Path, **changes) -> TritonServer:
    settings = {
        "triton_python": python,
        "backend_directory": folder / "backends",
        "model_repository": folder / "models",
        "grpc_port": 9001,
        "metrics_port": 9002,
        "instance_name": "run-0",
    }
    return TritonServer(**{**settings, **changes})


def test_the_backend_is_put_together_from_the_installation(tmp_path):
    python = installation(tmp_path)
    backend = prepare_backend(tmp_path / "backends", python)
    assert sorted(path.name for path in (backend / "python").iterdir()) == [
        "libtriton_python.so",
        "triton_python_backend_stub",
        "triton_python_backend_utils.py",
    ]
    assert os.access(backend / "python" / "triton_python_backend_stub", os.X_OK)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"version": "3.99"}, "no Python stub for 3.99"),
        # No system has a libpython of this version that its linker knows.
        ({"libpython": False, "version": "3.98"}, "libpython3.98.so.1.0"),
    ],
)
def test_what_is_missing_is_named(tmp_path, changes, words):
    python = installation(tmp_path, **changes)
    if "libpython" in changes:
        stubs = tmp_path / "site-packages/pytriton/tritonserver/python_backend_stubs"
        (stubs / "3.11").rename(stubs / "3.98")
    with pytest.raises(TritonRuntimeError, match=words):
        prepare_backend(tmp_path / "backends", python)


def test_an_interpreter_that_is_not_there_is_named(tmp_path):
    with pytest.raises(TritonRuntimeError, match="nowhere/python does not run"):
        prepare_backend(tmp_path, Path("/nowhere/python"))


def test_nothing_listens_beyond_loopback(tmp_path):
    argv, _ = triton_command(server(installation(tmp_path), tmp_path, http_port=9000))
    addresses = [word.partition("=")[2] for word in argv if "-address=" in word]
    assert addresses == ["127.0.0.1"] * 3
    assert {"--grpc-port=9001", "--metrics-port=9002", "--http-port=9000"} <= set(argv)


def test_http_is_off_unless_a_port_is_given(tmp_path):
    argv, _ = triton_command(server(installation(tmp_path), tmp_path))
    assert "--allow-http=false" in argv


def test_the_environment_finds_the_interpreter_first_and_takes_no_stray_settings(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    monkeypatch.setenv("TIDEGATE_ENGINE_DTYPE", "fp32")
    python = installation(tmp_path)
    engine = {"TIDEGATE_ENGINE_MODEL_PATH": "model.gguf"}
    _, environment = triton_command(server(python, tmp_path, engine_environment=engine))
    assert environment["PATH"].split(":")[0] == str(python.parent)
    assert environment["LD_LIBRARY_PATH"].split(":")[:2] == [
        str(tmp_path / "site-packages" / "nvidia_pytriton.libs"),
        str(tmp_path / "lib"),
    ]
    assert "PYTHONPATH" not in environment and "TIDEGATE_ENGINE_DTYPE" not in environment
    assert environment["TIDEGATE_ENGINE_MODEL_PATH"] == str(Path.cwd() / "model.gguf")


def test_shared_memory_of_one_instance_is_removed_and_no_other(tmp_path, monkeypatch):
    monkeypatch.setattr(triton_runtime, "SHARED_MEMORY_FOLDER", tmp_path)
    for name in ("tidegate-triton-run-1-abc", "tidegate-triton-run-12-abc", "tidegate-run-tokens"):
        (tmp_path / name).touch()
    assert triton_runtime.remove_shared_memory("run-1") == ["tidegate-triton-run-1-abc"]
    assert len(list(tmp_path.iterdir())) == 2


def test_only_live_stubs_among_a_servers_children_count(tmp_path):
    stub = tmp_path / triton_runtime.STUB_NAME
    stub.symlink_to(sys.executable)
    # The kernel keeps 15 characters of a process's name.
    child = subprocess.Popen([str(stub), "-c", "import time; time.sleep(30)"])
    try:
        assert triton_runtime.stub_process_ids(os.getpid()) == [child.pid]
    finally:
        child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert triton_runtime.stub_process_ids(os.getpid()) == []
    child.wait()


def test_a_file_of_the_backend_that_changed_and_kept_its_size_is_copied_again(tmp_path):
    python = installation(tmp_path)
    copied = prepare_backend(tmp_path / "backends", python) / "python" / "libtriton_python.so"
    (source,) = tmp_path.glob("site-packages/pytriton/tritonserver/backends/python/libtriton_python.so")
    source.write_text(source.read_text().swapcase())
    prepare_backend(tmp_path / "backends", python)
    assert copied.read_text() == source.read_text()
