"""Builds the environments that Tidegate runs in, from the pinned files beside this one.

Runs on the bare Python of the machine (3.11, standard library only), because nothing else is there yet. Each
environment has a stamp, the hash of all that went into it: with the stamp in place there is nothing to do. The
environments are built side by side, and what they do is said at least every two seconds.

Usage: python3 requirements/install.py [mesh] [triton] [reference]
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
PYTHON_VERSION = (3, 11)
HEARTBEAT_SECONDS = 2.0
LOG_TAIL_LINES = 15
PACKAGES_OF_OTHERS = ("google", "opentelemetry", "opencensus", "test")
"""What xds-protos carries beside Envoy's messages: older copies of packages that are installed properly."""


@dataclass(frozen=True)
class Environment:
    """One environment: where it lies, and the requirement files that fill it."""

    name: str
    directory: str
    files: tuple[str, ...]
    files_without_dependencies: tuple[str, ...] = ()
    has_xds: bool = False
    has_project: bool = False
    on_top_of: str = ""
    proof: str = ""
    """Modules whose import shows that the environment works; it also compiles what a first start would."""

    @property
    def path(self) -> Path:
        """The environment's folder."""
        return ROOT / self.directory

    @property
    def site_packages(self) -> Path:
        """Where its packages lie."""
        return self.path / "lib" / f"python{PYTHON_VERSION[0]}.{PYTHON_VERSION[1]}" / "site-packages"

    @property
    def stamp(self) -> Path:
        """The file whose content says what the environment was built from."""
        return self.path / ".stamp"


ENVIRONMENTS = {
    "mesh": Environment(
        "mesh",
        ".venv",
        ("mesh.txt", "dev.txt"),
        ("mesh-no-deps.txt",),
        has_xds=True,
        has_project=True,
        proof="grpc, numpy, tokenizers, tritonclient.grpc, envoy.service.ext_proc.v3.external_processor_pb2",
    ),
    "triton": Environment(
        "triton",
        ".venv-triton",
        ("triton.txt",),
        ("triton-no-deps.txt",),
        proof="torch, numpy, gguf, safetensors.torch",
    ),
    # What the Triton environment has already is not installed again.
    "reference": Environment("reference", ".venv-reference", (), ("reference.txt",), on_top_of="triton"),
}


class InstallError(Exception):
    """An environment cannot be built; the message is for the person who asked for it."""


@dataclass
class Progress:
    """What each environment is doing, for the heartbeat."""

    started_at: float = field(default_factory=time.monotonic)
    doing: dict[str, str] = field(default_factory=dict)

    def say(self, name: str, text: str) -> None:
        """Prints one line with the time since the start."""
        print(f"[{time.monotonic() - self.started_at:5.1f} s] {name:<9} {text}", file=sys.stderr, flush=True)


def check_python() -> None:
    """Refuses any Python that Triton's Python backend was not built for."""
    if sys.version_info[:2] != PYTHON_VERSION:
        raise InstallError(
            f"Tidegate needs Python 3.11, which Triton's Python backend is built for; {sys.executable} is "
            f"{sys.version_info.major}.{sys.version_info.minor}. Install Python 3.11 and run: "
            "make PYTHON=/path/to/python3.11 ..."
        )


def content_hash(environment: Environment) -> str:
    """The hash of everything that decides what is in the environment."""
    names = (*environment.files, *environment.files_without_dependencies)
    paths = [Path(__file__).resolve(), *(HERE / name for name in names)]
    paths += [HERE / "xds.txt"] if environment.has_xds else []
    paths += [ROOT / "pyproject.toml"] if environment.has_project else []
    digest = hashlib.sha256(f"{sys.version} {environment.path} {sys.base_prefix}".encode())
    for path in paths:
        digest.update(path.read_bytes())
    if environment.on_top_of:
        digest.update(content_hash(ENVIRONMENTS[environment.on_top_of]).encode())
    return digest.hexdigest()


def is_current(environment: Environment) -> bool:
    """Whether the environment is there and built from what the files say now."""
    return environment.stamp.exists() and environment.stamp.read_text() == content_hash(environment)


def build(environment: Environment, progress: Progress) -> None:
    """Builds one environment anew; its stamp is written last, so that a broken build is built again."""
    started_at = time.monotonic()
    progress.doing[environment.name] = "creating the environment"
    progress.say(environment.name, f"building {environment.directory}")
    shutil.rmtree(environment.path, ignore_errors=True)
    run(environment, [sys.executable, "-m", "venv", str(environment.path)], progress)
    for names, options in ((environment.files, []), (environment.files_without_dependencies, ["--no-deps"])):
        if names:
            pip(environment, [*options, *(item for name in names for item in ("-r", str(HERE / name)))], progress)
    if environment.has_xds:
        add_xds(environment, progress)
    if environment.has_project:
        progress.doing[environment.name] = "installing the project"
        pip(environment, ["--no-deps", "--no-build-isolation", "-e", str(ROOT)], progress)
    if environment.on_top_of:
        lower = ENVIRONMENTS[environment.on_top_of].site_packages
        (environment.site_packages / "lower_environment.pth").write_text(f"{lower}\n")
    if environment.proof:
        progress.doing[environment.name] = f"importing {environment.proof}"
        run(environment, [str(environment.path / "bin" / "python"), "-c", f"import {environment.proof}"], progress)
    environment.stamp.write_text(content_hash(environment))
    del progress.doing[environment.name]
    progress.say(environment.name, f"ready after {time.monotonic() - started_at:.0f} s")


def pip(environment: Environment, arguments: list[str], progress: Progress) -> None:
    """Runs pip's install in the environment. Nothing is compiled: what is imported compiles itself."""
    command = [str(environment.path / "bin" / "python"), "-m", "pip", "install", "--no-compile", "--no-input"]
    run(environment, [*command, "--disable-pip-version-check", "--progress-bar", "off", *arguments], progress)


def add_xds(environment: Environment, progress: Progress) -> None:
    """Adds Envoy's messages beside the package `envoy` that carries the program, and overwrites nothing."""
    with tempfile.TemporaryDirectory() as directory:
        pip(environment, ["--no-deps", "--target", directory, "-r", str(HERE / "xds.txt")], progress)
        for source in sorted(Path(directory).rglob("*")):
            relative = source.relative_to(directory)
            target = environment.site_packages / relative
            if relative.parts[0] in PACKAGES_OF_OTHERS or source.is_dir() or target.exists():
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target)


def run(environment: Environment, command: list[str], progress: Progress) -> None:
    """Runs one command; its output goes to a log, and its last line is what the environment is doing.

    Raises:
        InstallError: the command failed; with the end of its output.
    """
    lines: list[str] = []
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
    assert process.stdout is not None
    for raw in process.stdout:
        line = raw.decode(errors="replace").strip()
        lines.append(line)
        if line.startswith(("Collecting", "Downloading", "Processing", "Building", "Installing", "Using cached")):
            progress.doing[environment.name] = short(line)
    if process.wait() != 0:
        tail = "\n  ".join(lines[-LOG_TAIL_LINES:])
        raise InstallError(f"{environment.name}: {' '.join(command[:5])} ... failed:\n  {tail}")


def short(line: str) -> str:
    """A line of pip's output without paths and lists."""
    if line.startswith("Installing collected packages"):
        return f"installing {line.count(',') + 1} packages"
    words = line.split()
    subject = words[1].rstrip("/").rsplit("/", 1)[-1] if len(words) > 1 else ""
    return f"{words[0].lower()} {subject}"[:90]


def build_all(environments: list[Environment]) -> None:
    """Builds environments side by side; one on top of another only needs that one's folder name, not its end."""
    progress = Progress()
    faults: list[InstallError] = []

    def build_one(environment: Environment) -> None:
        try:
            build(environment, progress)
        except InstallError as error:
            progress.doing.pop(environment.name, None)
            faults.append(error)

    threads = [threading.Thread(target=build_one, args=(environment,), daemon=True) for environment in environments]
    for thread in threads:
        thread.start()
    said_at = time.monotonic()
    while any(thread.is_alive() for thread in threads):
        time.sleep(0.05)
        if time.monotonic() - said_at >= HEARTBEAT_SECONDS:
            said_at = time.monotonic()
            for name, doing in sorted(progress.doing.copy().items()):
                progress.say(name, doing)
    if faults:
        raise InstallError("\n".join(str(fault) for fault in faults))


def main(names: list[str]) -> int:
    """Builds what is named (default: mesh and triton) and is not current."""
    unknown = [name for name in names if name not in ENVIRONMENTS]
    if unknown:
        print(f"no such environment: {', '.join(unknown)}; there are {', '.join(ENVIRONMENTS)}", file=sys.stderr)
        return 2
    try:
        check_python()
        wanted = [ENVIRONMENTS[name] for name in names or ("mesh", "triton")]
        stale = [environment for environment in wanted if not is_current(environment)]
        if stale:
            build_all(stale)
    except InstallError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the next run builds what is missing", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    sys.exit(main(sys.argv[1:]))
