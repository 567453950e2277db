"""What this machine offers a mesh, read once, so that judging it (`doctor.py`) needs no machine."""

from __future__ import annotations

import ctypes.util
import os
import platform
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Final

import msgspec

from tidegate.cli.state import SHARED_MEMORY

LIBPYTHON: Final = "libpython3.11.so.1.0"
"""What Triton's Python backend stub is linked with."""

_PROBE_TIMEOUT_SECONDS: Final = 10


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """The facts that decide whether a mesh can run here."""

    system: str
    architecture: str
    python_version: tuple[int, int]
    processor_count: int
    memory_available_bytes: int
    shared_memory_free_bytes: int
    """0 when there is no /dev/shm."""
    open_file_limit: int
    libpython: str
    """Where the library lies; empty when it was not found."""


def look(triton_python: Path) -> Machine:
    """Reads the facts. `triton_python` is the interpreter whose library is looked for first."""
    return Machine(
        system=platform.system(),
        architecture=platform.machine(),
        python_version=(sys.version_info.major, sys.version_info.minor),
        processor_count=len(os.sched_getaffinity(0)),
        memory_available_bytes=_memory_available_bytes(),
        shared_memory_free_bytes=shutil.disk_usage(SHARED_MEMORY).free if SHARED_MEMORY.is_dir() else 0,
        open_file_limit=resource.getrlimit(resource.RLIMIT_NOFILE)[1],
        libpython=find_libpython(triton_python),
    )


def find_libpython(triton_python: Path) -> str:
    """Where libpython lies: beside the interpreter that the environment was made from, or in the system's places."""
    base = triton_python.resolve().parent.parent if triton_python.exists() else Path(sys.base_prefix)
    for candidate in (base / "lib" / LIBPYTHON, Path(sys.base_prefix) / "lib" / LIBPYTHON):
        if candidate.exists():
            return str(candidate)
    if ctypes.util.find_library("python3.11"):
        return LIBPYTHON
    return ""


def fits_together(triton_python: Path) -> str:
    """What is missing in the Triton environment; empty when nothing is."""
    if not triton_python.exists():
        return f"{triton_python} does not exist"
    program = (
        "from importlib.metadata import version, PackageNotFoundError\n"
        "import sys\n"
        "missing = []\n"
        "for name in ('nvidia-pytriton', 'torch', 'numpy', 'safetensors'):\n"
        "    try: found = version(name)\n"
        "    except PackageNotFoundError: missing.append(name + ' is not installed')\n"
        "    else: name == 'numpy' and found[:2] != '1.' and missing.append('numpy ' + found + ' is not below 2')\n"
        "sys.version_info[:2] == (3, 11) or missing.append('its Python is not 3.11')\n"
        "print(', '.join(missing))\n"
    )
    try:
        answer = subprocess.run(
            [str(triton_python), "-c", program],
            capture_output=True,
            text=True,
            timeout=_PROBE_TIMEOUT_SECONDS,
            check=True,
        )
    except (OSError, subprocess.SubprocessError) as error:
        return f"{triton_python} does not run: {error}"
    return answer.stdout.strip()


def _memory_available_bytes() -> int:
    """What may still be taken: the machine's, or what the control group leaves, whichever is less."""
    import psutil

    available = int(psutil.virtual_memory().available)
    group = Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text().strip()
        if limit != "max":
            available = min(available, int(limit) - int((group / "memory.current").read_text()))
    except (OSError, ValueError):
        pass
    return available
