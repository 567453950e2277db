"""The whole real mesh, as `tidegate up` starts it: on free ports, with a state folder of its own."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[3]
START_SECONDS = 180.0
STOP_SECONDS = 15.0


def stop_with_the_tests() -> None:
    """A mesh is told to stop when the tests are killed."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


NO_BROWNOUT = {
    "TIDEGATE_MODEL_CREDIT_AHEAD_LIMIT": "0",
    "TIDEGATE_SCHEDULER_BROWNOUT_QUEUE_DELAY_SECONDS": "1000",
    "TIDEGATE_SCHEDULER_BROWNOUT_FIRST_TOKEN_SECONDS": "1000",
}
"""Tests fill the slots for long with the most urgent class, and count what waits."""


class MeshProcess:
    """One `tidegate up` and what it wrote down; `settings` are environment variables for it."""

    def __init__(self, home: Path, *flags: str, settings: Mapping[str, str] | None = None) -> None:
        self.home = home
        self.settings = dict(settings or {})
        self.output = home / "up.out"
        self.talk = home / "up.err"
        home.mkdir(parents=True, exist_ok=True)
        # Weights in the engine's own form are the same for every mesh: made once.
        shared_cache = REPOSITORY / ".tidegate" / "cache"
        shared_cache.mkdir(parents=True, exist_ok=True)
        if not (home / "cache").exists():
            (home / "cache").symlink_to(shared_cache)
        with self.output.open("ab") as out, self.talk.open("ab") as err:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tidegate.cli.main", "up", "--ports", "auto", *flags],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                env=self.environment,
                start_new_session=True,
                preexec_fn=stop_with_the_tests,
            )

    @property
    def environment(self) -> dict[str, str]:
        """What a `tidegate` command needs to find this mesh."""
        return os.environ | NO_BROWNOUT | self.settings | {"TIDEGATE_HOME": str(self.home)}

    def state(self) -> dict:
        """run/mesh.json, empty as long as there is none of this process."""
        try:
            state = json.loads((self.home / "run" / "mesh.json").read_bytes())
        except FileNotFoundError:
            return {}
        return state if state["supervisor"]["pid"] == self.process.pid else {}

    def address(self, name: str) -> str:
        """host:port by the name of a port."""
        return self.state()["addresses"][name]

    @property
    def ingress(self) -> str:
        return self.address("ingress")

    @property
    def url(self) -> str:
        return f"http://{self.ingress}"

    def record(self, name: str) -> dict:
        """What is written down of one process."""
        return next(each for each in self.state()["processes"] if each["name"] == name)

    def wait_ready(self) -> MeshProcess:
        self.wait_for(lambda: self.state().get("phase") == "ready", START_SECONDS)
        return self

    def wait_for(self, condition: Callable[[], bool], seconds: float) -> None:
        """Waits; fails with what the mesh said when it ended or took too long."""
        deadline = time.monotonic() + seconds
        while not condition():
            if self.process.poll() is not None or time.monotonic() > deadline:
                what = "ended" if self.process.poll() is not None else f"took longer than {seconds} s"
                pytest.fail(f"the mesh {what}:\n{self.talk.read_text()[-4000:]}", pytrace=False)
            time.sleep(0.05)

    def run(
        self, *command: str, stdin: str = "", seconds: float = 60, home: Path | None = None
    ) -> subprocess.CompletedProcess:
        """Runs another `tidegate` command: against this mesh, or with a state folder of its own."""
        argv = [sys.executable, "-m", "tidegate.cli.main", *command]
        return subprocess.run(
            argv,
            input=stdin,
            env=self.environment | ({"TIDEGATE_HOME": str(home)} if home else {}),
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )

    def stop(self) -> int:
        """Ctrl-C; answers the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
        try:
            return self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            pytest.fail(f"the mesh did not stop within {STOP_SECONDS} s:\n{self.talk.read_text()[-4000:]}")


@pytest.fixture(scope="session")
def mesh(tmp_path_factory) -> Iterator[MeshProcess]:
    """A mesh of two replicas, ready; shared by all tests that leave it as they found it."""
    process = MeshProcess(tmp_path_factory.mktemp("mesh") / "home", "--replicas", "2", "--threads", "1")
    try:
        yield process.wait_ready()
    finally:
        process.stop()


@pytest.fixture(scope="module")
def start_module_mesh(tmp_path_factory) -> Iterator[Callable[..., MeshProcess]]:
    """Starts meshes for one file of tests, each in a state folder of its own, and waits until they are ready."""
    started: list[MeshProcess] = []

    def start(*flags: str, settings: Mapping[str, str] | None = None) -> MeshProcess:
        started.append(MeshProcess(tmp_path_factory.mktemp("mesh") / "home", *flags, settings=settings))
        return started[-1].wait_ready()

    yield start
    for each in started:
        each.stop()


@pytest.fixture
def start_mesh(tmp_path) -> Iterator[Callable[..., MeshProcess]]:
    """Starts meshes of a test's own, all in one state folder, one after the other."""
    started: list[MeshProcess] = []

    def start(*flags: str) -> MeshProcess:
        started.append(MeshProcess(tmp_path / "home", *flags))
        return started[-1]

    yield start
    for each in started:
        each.stop()
