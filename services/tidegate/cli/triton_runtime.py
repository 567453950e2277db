"""How to run the Triton server that the PyPI package nvidia-pytriton carries.

Owns the command line, its environment, and what a killed server leaves behind. It starts nothing: a supervisor runs
the command in a process group of its own (`start_new_session=True`), ends it with SIGTERM and, after
EXIT_SECONDS and some, SIGKILL to the group, then calls `remove_shared_memory`.

A server whose Python stub was killed goes on calling its model ready and refuses every request, so a supervisor
restarts one that was ready and whose `stub_process_ids` are empty.
"""

from __future__ import annotations

import filecmp
import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import msgspec

EXIT_SECONDS: Final = 3
"""How long Triton waits for streams that are under way when it is told to end; model services drain them before."""

SHARED_MEMORY_FOLDER: Final = Path("/dev/shm")

STUB_NAME: Final = "triton_python_backend_stub"

_PATH_VARIABLES: Final = frozenset({"TIDEGATE_ENGINE_MODEL_PATH", "TIDEGATE_ENGINE_CACHE_DIR"})

_PROBE: Final = """
import sys, sysconfig
v = sys.version_info
print(f"{v[0]}.{v[1]}", sysconfig.get_config_var("LIBDIR"), sysconfig.get_path("purelib"), sep="\\n")
"""


class TritonRuntimeError(Exception):
    """Triton cannot be run here; the message says what is missing."""


class TritonServer(msgspec.Struct, frozen=True, kw_only=True):
    """One Triton server: where it listens, and what it serves. All its ports are on the loopback interface."""

    triton_python: Path
    """The interpreter of the environment that has nvidia-pytriton and torch."""
    backend_directory: Path
    """What `prepare_backend` gave."""
    model_repository: Path
    """The folder whose folders are models."""
    grpc_port: int
    metrics_port: int
    http_port: int = 0
    """0: no HTTP."""
    instance_name: str
    """Unique on the host; names the shared memory."""
    log_file: Path | None = None
    """None: to standard error."""
    model_names: tuple[str, ...] = ("llm",)
    """Models to load; empty loads none."""
    engine_environment: Mapping[str, str] = {}
    """TIDEGATE_ENGINE_* for the models."""


class _Installation(msgspec.Struct, frozen=True):
    """Where an interpreter's own things are."""

    python_version: str
    library_folder: Path
    site_packages: Path

    @property
    def triton(self) -> Path:
        return self.site_packages / "pytriton" / "tritonserver"


def prepare_backend(directory: Path, triton_python: Path) -> Path:
    """Puts Triton's Python backend together for an interpreter's version; gives the folder for --backend-directory.

    Raises:
        TritonRuntimeError: no interpreter, no nvidia-pytriton in it, no stub for its version, or no libpython.
    """
    installation = _inspect(triton_python)
    stub = installation.triton / "python_backend_stubs" / installation.python_version / STUB_NAME
    if not stub.is_file():
        raise TritonRuntimeError(f"nvidia-pytriton has no Python stub for {installation.python_version}: {stub}")
    _require_libpython(installation)
    target = directory / "python"
    target.mkdir(parents=True, exist_ok=True)
    backend = installation.triton / "backends" / "python"
    for source in (backend / "libtriton_python.so", backend / "triton_python_backend_utils.py", stub):
        _copy_if_changed(source, target / source.name)
    (target / STUB_NAME).chmod(0o755)
    return directory


def triton_command(server: TritonServer) -> tuple[list[str], dict[str, str]]:
    """The command line and the whole environment of a Triton server; TritonRuntimeError where it cannot run."""
    installation = _inspect(server.triton_python)
    program = installation.triton / "bin" / "tritonserver"
    if not program.is_file():
        raise TritonRuntimeError(
            f"there is no tritonserver at {program}: install nvidia-pytriton for {server.triton_python}"
        )
    # The stub imports from the working directory before anything else, so that must hold nothing of ours.
    move = ["env", f"--chdir={server.backend_directory.resolve()}"]
    return [*move, str(program), *_options(server)], _environment(server, installation)


def shared_memory_prefix(instance_name: str) -> str:
    """What the names of an instance's files in /dev/shm begin with."""
    return f"tidegate-triton-{instance_name}-"


def remove_shared_memory(instance_name: str) -> list[str]:
    """Removes what a killed instance left in /dev/shm, and names it; only while the instance does not run."""
    left = list(SHARED_MEMORY_FOLDER.glob(f"{shared_memory_prefix(instance_name)}*"))
    for path in left:
        path.unlink(missing_ok=True)
    return [path.name for path in left]


def stub_process_ids(server_process_id: int) -> list[int]:
    """The live Python stubs of a server, by /proc."""
    found = []
    for children in Path(f"/proc/{server_process_id}/task").glob("*/children"):
        for word in _read(children).split():
            name, _, state = _read(Path(f"/proc/{word}/stat")).partition("(")[2].rpartition(")")
            if STUB_NAME.startswith(name) and name and state.split()[0] not in ("Z", "X"):
                found.append(int(word))
    return found


def _options(server: TritonServer) -> list[str]:
    options = {
        "model-repository": server.model_repository.resolve(),
        "backend-directory": server.backend_directory.resolve(),
        "model-control-mode": "explicit",
        # Triton listens on all interfaces by default.
        "grpc-address": "127.0.0.1",
        "grpc-port": server.grpc_port,
        "allow-http": "true" if server.http_port else "false",
        "http-address": "127.0.0.1",
        "http-port": server.http_port or 8000,
        "metrics-address": "127.0.0.1",
        "metrics-port": server.metrics_port,
        "metrics-interval-ms": 1000,
        "allow-gpu-metrics": "false",
        "backend-config": f"python,shm-region-prefix-name={shared_memory_prefix(server.instance_name)}",
        # A client may ping as often as it likes to notice a hung server.
        "grpc-http2-max-ping-strikes": 0,
        "exit-timeout-secs": EXIT_SECONDS,
        # Both pools are for backends that copy to a GPU themselves.
        "pinned-memory-pool-byte-size": 0,
        "cuda-memory-pool-byte-size": "0:0",
    }
    if server.log_file is not None:
        options["log-file"] = server.log_file.resolve()
    # The model's configuration is complete: completing it would start the Python stub twice.
    flags = ["--disable-auto-complete-config", *(f"--load-model={name}" for name in server.model_names)]
    return [*(f"--{name}={value}" for name, value in options.items()), *flags]


def _environment(server: TritonServer, installation: _Installation) -> dict[str, str]:
    """Ours, with what the stub needs to find libpython and the environment's packages.

    The stub ignores PYTHONPATH and finds its packages by the first python3 of PATH.
    """
    environment = {
        name: text for name, text in os.environ.items() if not name.startswith(("PYTHON", "TIDEGATE_ENGINE_"))
    }
    libraries = [str(installation.site_packages / "nvidia_pytriton.libs"), str(installation.library_folder)]
    if "LD_LIBRARY_PATH" in environment:
        libraries.append(environment["LD_LIBRARY_PATH"])
    environment["LD_LIBRARY_PATH"] = ":".join(libraries)
    environment["PATH"] = f"{server.triton_python.absolute().parent}:{environment.get('PATH', os.defpath)}"
    environment["VIRTUAL_ENV"] = str(server.triton_python.absolute().parent.parent)
    environment["PYTHONDONTWRITEBYTECODE"] = "1"
    environment.update(server.engine_environment)
    for name in _PATH_VARIABLES & environment.keys():
        if environment[name]:
            environment[name] = str(Path(environment[name]).resolve())
    return environment


def _inspect(triton_python: Path) -> _Installation:
    try:
        answer = subprocess.run(
            [str(triton_python), "-c", _PROBE], capture_output=True, text=True, check=True, timeout=20
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise TritonRuntimeError(f"{triton_python} does not run: {error}") from error
    version, library_folder, site_packages = answer.stdout.splitlines()
    return _Installation(version, Path(library_folder), Path(site_packages))


def _require_libpython(installation: _Installation) -> None:
    name = f"libpython{installation.python_version}.so.1.0"
    if (installation.library_folder / name).exists():
        return
    known = subprocess.run(["/sbin/ldconfig", "-p"], capture_output=True, text=True, check=False)
    if name not in known.stdout:
        raise TritonRuntimeError(
            f"Triton's Python stub needs {name}, which is neither in {installation.library_folder} nor known to the"
            f" system's linker: install it (on Debian the package libpython{installation.python_version})"
        )


def _copy_if_changed(source: Path, target: Path) -> None:
    """Copies by rename, so that a server that runs from the folder never sees half a file."""
    if not source.is_file():
        raise TritonRuntimeError(f"nvidia-pytriton is not complete: there is no {source}")
    if target.exists() and filecmp.cmp(source, target, shallow=False):
        return
    part = target.with_name(f"{target.name}.{os.getpid()}")
    shutil.copyfile(source, part)
    part.chmod(0o755)
    part.replace(target)


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
