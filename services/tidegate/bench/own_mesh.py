"""A mesh of a benchmark's own: `tidegate up` on free ports, in a temporary folder, ended with the benchmark."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import yaml

from tidegate.bench.targets import Protocol, Target
from tidegate.cli.config import HOME_VARIABLE, REPOSITORY
from tidegate.cli.state import Home, Mesh

START_SECONDS: Final = 300.0
STOP_SECONDS: Final = 20.0
"""The bounds on starting and stopping."""

_LOG_TAIL_CHARACTERS: Final = 4000


class MeshDidNotStart(Exception):
    """The message has the end of the mesh's own words."""


class OwnMesh:
    """Starts a mesh and stops it, as an asynchronous context.

    Args:
        replicas: model services.
        engine: the Triton model that answers; empty for the mesh's default.
        tenants: each gets an API key, so that the mesh can tell them apart; none: no keys.
        settings: environment variables for the mesh.
        arguments: more of `tidegate up`'s.
        weights_cache: where dequantised weights are kept from one mesh to the next; None keeps none.
    """

    def __init__(
        self,
        *,
        replicas: int,
        engine: str = "",
        tenants: Sequence[str] = (),
        settings: Mapping[str, str] | None = None,
        arguments: Sequence[str] = (),
        weights_cache: Path | None = REPOSITORY / ".tidegate" / "cache",
    ) -> None:
        self.replica_count = replicas
        self.engine = engine
        self.api_keys = {tenant: f"bench-key-of-{tenant}" for tenant in tenants}
        self._settings = dict(settings or {})
        self._arguments = list(arguments)
        self._weights_cache = weights_cache
        self._folder = tempfile.TemporaryDirectory(prefix="tidegate-bench-")
        self._process: asyncio.subprocess.Process | None = None

    async def __aenter__(self) -> Self:
        folder = Path(self._folder.name)
        if self._weights_cache is not None:
            self._weights_cache.mkdir(parents=True, exist_ok=True)
            (folder / "cache").symlink_to(self._weights_cache)
        with (folder / "up.log").open("wb") as log:
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "tidegate.cli.main", "up", "--ports", "auto"),
                *("--replicas", str(self.replica_count)),
                *(["--engine", self.engine] if self.engine else []),
                *self._key_arguments(folder),
                *self._arguments,
                env=os.environ | self._settings | {HOME_VARIABLE: self._folder.name},
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        try:
            await self._until_ready()
        except BaseException:
            await self.__aexit__(None, None, None)
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process is not None
        await stop_process(self._process, signal.SIGINT, STOP_SECONDS)
        self._folder.cleanup()

    @property
    def home(self) -> Path:
        """The mesh's state folder."""
        return Path(self._folder.name)

    @property
    def state(self) -> Mesh:
        """The mesh as it has written itself down."""
        mesh = Home(self.home).read()
        assert mesh is not None
        return mesh

    def address(self, name: str) -> str:
        """host:port by the name of the port: ingress, mesh, model-0, triton-0, scheduler-metrics, ..."""
        return self.state.addresses[name]

    def pids(self) -> dict[str, int]:
        """The process id of each process, by name."""
        return {record.name: record.pid for record in self.state.processes}

    def pid(self, name: str) -> int:
        """The process id of one process."""
        return self.pids()[name]

    def target(self, *, name: str = "tidegate", protocol: Protocol = "grpc-web") -> Target:
        """This mesh as a target."""
        return mesh_target(self.state, name=name, protocol=protocol, api_keys=self.api_keys, engine=self.engine)

    def _key_arguments(self, folder: Path) -> list[str]:
        if not self.api_keys:
            return []
        path = folder / "keys.yaml"
        path.write_text(yaml.safe_dump({key: tenant for tenant, key in self.api_keys.items()}), encoding="utf-8")
        return ["--api-keys", str(path)]

    async def _until_ready(self) -> None:
        assert self._process is not None
        deadline = time.monotonic() + START_SECONDS
        while True:
            mesh = Home(self.home).read()
            if mesh is not None and mesh.phase == "ready":
                return
            if self._process.returncode is not None or time.monotonic() > deadline:
                words = (self.home / "up.log").read_text(encoding="utf-8", errors="replace")
                raise MeshDidNotStart(f"the mesh did not start:\n{words[-_LOG_TAIL_CHARACTERS:]}")
            await asyncio.sleep(0.2)


async def stop_process(process: asyncio.subprocess.Process, number: signal.Signals, seconds: float) -> None:
    """Ends a process with a signal, and after so many seconds without mercy; one that has ended is left alone."""
    if process.returncode is not None:
        return
    process.send_signal(number)
    try:
        await asyncio.wait_for(process.wait(), seconds)
    except TimeoutError:
        process.kill()
        await process.wait()


def mesh_target(mesh: Mesh, *, name: str, protocol: Protocol, api_keys: Mapping[str, str], engine: str = "") -> Target:
    """A mesh that runs on this machine as a target whose scheduler is watched and whose counts are read."""
    return Target(
        name=name,
        address=mesh.addresses["ingress"],
        protocol=protocol,
        model=mesh.model_name,
        api_keys=api_keys,
        scheduler_addresses=mesh.scheduler_addresses,
        model_metrics_addresses=tuple(mesh.addresses[f"model-{index}-metrics"] for index in range(mesh.replica_count)),
        envoy_admin_address=mesh.addresses["admin"],
        engine=engine,
        model_path=mesh.model_path,
    )
