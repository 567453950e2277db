"""What the processes of a mesh are: each one's command, environment and readiness, from the mesh's settings.

Starts nothing. Files that the processes read at their start (Envoy's configuration, the endpoints, Triton's
backend) are written here, into the mesh's run folder.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Final

from tidegate.cli import ports, probes
from tidegate.cli.config import REPOSITORY, Settings, lite_replica_count, origins
from tidegate.cli.endpoints import endpoints_path, write_endpoints
from tidegate.cli.envoy_config import EnvoySettings, envoy_command, envoy_environment, write_envoy_files
from tidegate.cli.ports import LOOPBACK
from tidegate.cli.state import Home, Mesh
from tidegate.cli.supervisor import Program
from tidegate.cli.triton_runtime import (
    TritonServer,
    prepare_backend,
    shared_memory_prefix,
    stub_process_ids,
    triton_command,
)
from tidegate.common.memory import mimalloc_library, with_mimalloc

CONTROL_SERVICES: Final = ("preprocess", "cache", "batch", "waiting")
"""Those of which there is one; of schedulers there may be several."""

DECIDING_SERVICES: Final = frozenset({"scheduler", "preprocess"})
"""Those that stand between a request and its refusal."""

DEFAULT_STEP_TOKEN_BUDGET: Final = 128
"""The engine's own; it refuses to start when that is below the sequences that it runs at once."""

_OF_UP: Final = ("TIDEGATE_UP_", "TIDEGATE_HOME", "GRPC_ENABLE_FORK_SUPPORT")

_THREAD_VARIABLES: Final = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


def write_files(home: Home, mesh: Mesh, settings: Settings) -> Path:
    """Writes the endpoints and Envoy's configuration; answers the path of the latter.

    Raises:
        EnvoyConfigError: the template or the API keys cannot be used.
    """
    envoy = _envoy_settings(home, mesh, settings)
    envoy.endpoints_directory.mkdir(parents=True, exist_ok=True)
    members = {name: [_endpoint(mesh, name)] for name in CONTROL_SERVICES}
    members["scheduler"] = [_endpoint(mesh, name) for name in ports.scheduler_names(mesh.scheduler_count)]
    members["model"] = [_endpoint(mesh, f"model-{label}") for label in ports.replica_labels(mesh.replica_count)]
    members["lite"] = [_endpoint(mesh, f"model-{label}") for label in ports.replica_labels(0, mesh.lite_replica_count)]
    for cluster, endpoints in members.items():
        write_endpoints(endpoints_path(envoy.endpoints_directory, cluster), cluster, endpoints)
    return write_envoy_files(envoy)


def programs(home: Home, mesh: Mesh, settings: Settings) -> list[Program]:
    """Every process of the mesh, those that take longest to start first.

    Raises:
        TritonRuntimeError: Triton cannot be run; the message says what is missing.
    """
    backend = prepare_backend(home.run / "triton", Path(settings.triton_python))
    labels = ports.replica_labels(mesh.replica_count, mesh.lite_replica_count)
    tritons = [_triton(home, mesh, settings, backend, label) for label in labels]
    envoy = _envoy(home, mesh, settings)
    control = [
        _service(mesh, name, settings, _control_settings(home, mesh, settings, name))
        for name in (*ports.scheduler_names(mesh.scheduler_count), *CONTROL_SERVICES)
    ]
    models = [
        _service(mesh, f"model-{label}", settings, _model_settings(home, mesh, settings, label)) for label in labels
    ]
    return [*tritons, envoy, *control, *models]


def triton_instance_name(run_id: str, label: str) -> str:
    """The name of one Triton, unique on the host."""
    return f"{run_id}-{label}"


def shared_memory_prefixes(run_id: str) -> list[str]:
    """What the names of all shared memory of a run begin with: the arena's, and the Tritons'."""
    return [f"tidegate-{run_id}-", shared_memory_prefix(run_id)]


def thread_count(settings: Settings) -> int:
    """Threads that each engine computes with."""
    engine_count = settings.replicas + lite_replica_count(settings)
    return settings.thread_count or max(1, len(os.sched_getaffinity(0)) // engine_count)


def _envoy_settings(home: Home, mesh: Mesh, settings: Settings) -> EnvoySettings:
    return EnvoySettings(
        run_directory=home.run,
        ingress_host=settings.host,
        ingress_port=_port(mesh, "ingress"),
        mesh_host=LOOPBACK,
        mesh_port=_port(mesh, "mesh"),
        admin_port=_port(mesh, "admin"),
        api_keys_file=_file(settings.api_keys_file),
        tenant_requests_per_second=settings.tenant_requests_per_second,
        tenant_burst_requests=settings.tenant_burst_requests,
        body_limit_bytes=settings.body_limit_bytes,
        cors_origins=origins(settings),
        tls_certificate_file=_file(settings.tls_certificate_file),
        tls_key_file=_file(settings.tls_key_file),
        scheduler_timeout_seconds=settings.scheduler_timeout_seconds,
        heap_limit_bytes=settings.heap_limit_bytes,
    )


def _file(path: str) -> Path | None:
    """Whole, because Envoy may run from another folder."""
    return Path(path).resolve() if path else None


def _envoy(home: Home, mesh: Mesh, settings: Settings) -> Program:
    argv = envoy_command(_envoy_settings(home, mesh, settings).config_path)
    admin = mesh.addresses["admin"]
    return Program(
        name="envoy",
        argv=argv,
        environment=envoy_environment(_inherited()),
        is_ready=lambda: probes.envoy_is_live(admin),
    )


def _triton(home: Home, mesh: Mesh, settings: Settings, backend: Path, label: str) -> Program:
    name = f"triton-{label}"
    engine = engine_settings(home, _model(mesh, label)[0], settings, os.environ)
    server = TritonServer(
        triton_python=Path(settings.triton_python),
        backend_directory=backend,
        model_repository=REPOSITORY / "triton_models",
        grpc_port=_port(mesh, name),
        metrics_port=_port(mesh, f"{name}-metrics"),
        instance_name=triton_instance_name(mesh.run_id, label),
        model_names=(settings.engine,),
        engine_environment=_engine_environment() | {f"TIDEGATE_ENGINE_{key}": value for key, value in engine.items()},
    )
    argv, environment = triton_command(server)
    for variable in _THREAD_VARIABLES:
        environment.setdefault(variable, str(thread_count(settings)))
    return Program(
        name=name,
        argv=argv,
        environment={name: value for name, value in environment.items() if not name.startswith(_OF_UP)},
        is_ready=_health_probe(mesh, name),
        is_whole=lambda pid: bool(stub_process_ids(pid)),
        niceness=engine_niceness(settings, os.environ),
    )


def engine_niceness(settings: Settings, environment: Mapping[str, str]) -> int:
    """How far the engines step back: those that compute elsewhere no further than the services that wait for them."""
    computes_here = settings.engine != "llm_sim" and environment.get("TIDEGATE_ENGINE_DEVICE", "cpu") == "cpu"
    return settings.engine_niceness if computes_here else min(settings.engine_niceness, settings.service_niceness)


def engine_settings(home: Home, model_path: str, settings: Settings, environment: Mapping[str, str]) -> dict[str, str]:
    """What `up` says to each engine, by the name after TIDEGATE_ENGINE_; each engine refuses what it does not know."""
    if settings.engine == "llm_sim":
        values = {"MODEL_PATH": model_path}
        if settings.sim_preset:
            values["SIM_PRESET"] = settings.sim_preset
        if settings.max_sequences:
            values["MAX_SEQUENCES"] = str(settings.max_sequences)
        return values
    return {
        "MODEL_PATH": model_path,
        "CACHE_DIR": str(home.cache),
        "THREAD_COUNT": str(thread_count(settings)),
        **sequence_settings(settings.max_sequences, environment),
    }


def sequence_settings(max_sequences: int, environment: Mapping[str, str]) -> dict[str, str]:
    """How many sequences the engine runs at once, in steps that have a token for each; 0 leaves both to the engine."""
    if not max_sequences:
        return {}
    values = {"MAX_SEQUENCES": str(max_sequences)}
    if "TIDEGATE_ENGINE_STEP_TOKEN_BUDGET" not in environment:
        values["STEP_TOKEN_BUDGET"] = str(max(DEFAULT_STEP_TOKEN_BUDGET, max_sequences))
    return values


def _engine_environment() -> dict[str, str]:
    """What the caller says to the engine; the mesh's own settings go over it."""
    return {name: value for name, value in os.environ.items() if name.startswith("TIDEGATE_ENGINE_")}


def _service(mesh: Mesh, name: str, settings: Settings, values: Mapping[str, str]) -> Program:
    module = name.partition("-")[0]
    common = {
        "HOST": LOOPBACK,
        "PORT": str(_port(mesh, name)),
        "METRICS_PORT": str(_port(mesh, f"{name}-metrics")),
        "MESH_ADDRESS": mesh.addresses["mesh"],
        "LOG_LEVEL": settings.log_level,
    }
    # Thousands may wait in a scheduler, and then none; what they took is to go with them.
    environment = with_mimalloc(_inherited(), mimalloc_library()) if module == "scheduler" else _inherited()
    environment |= {f"TIDEGATE_{module.upper()}_{key}": value for key, value in {**common, **values}.items()}
    argv = [sys.executable, "-m", f"tidegate.{module}"]
    return Program(
        name=name,
        argv=argv,
        environment=environment,
        is_ready=_health_probe(mesh, name),
        niceness=0 if module in DECIDING_SERVICES else settings.service_niceness,
    )


def _control_settings(home: Home, mesh: Mesh, settings: Settings, name: str) -> dict[str, str]:
    if name in ports.scheduler_names(mesh.scheduler_count):
        lite = {
            "LITE_ENDPOINTS_FILE": str(_endpoints(home, mesh, settings, "lite")),
            "LITE_MODEL_NAME": mesh.lite_model_name,
            "LITE_PROMPT_TOKEN_LIMIT": str(settings.lite_prompt_token_limit),
        }
        envoy = _envoy_settings(home, mesh, settings)
        # One writer a file. What the first scheduler sees is as good a sample as what all of them see.
        written = {"SHED_FILE": str(envoy.shed_path.absolute()), "LIMITS_FILE": str(envoy.limits_path.absolute())}
        return {
            **(lite if mesh.lite_model_name else {}),
            **(written if name == "scheduler" else {}),
            "ENDPOINTS_FILE": str(_endpoints(home, mesh, settings, "model")),
            "SCHEDULERS_FILE": str(_endpoints(home, mesh, settings, "scheduler")) if mesh.scheduler_count > 1 else "",
        }
    if name == "preprocess":
        return {
            "MODEL_PATH": mesh.model_path,
            "MODEL_NAME": mesh.model_name,
            "LITE_MODEL_PATH": mesh.lite_model_path,
            "LITE_MODEL_NAME": mesh.lite_model_name,
            "ARENA_REGION": mesh.arena_region,
            "ARENA_BYTES": str(settings.arena_bytes),
        }
    if name == "batch":
        return {"FOLDER": str(home.batch), "LINE_BYTES_LIMIT": str(settings.body_limit_bytes)}
    return {}


def _model_settings(home: Home, mesh: Mesh, settings: Settings, label: str) -> dict[str, str]:
    path, name, cluster = _model(mesh, label)
    return {
        "TRITON_ADDRESS": mesh.addresses[f"triton-{label}"],
        "TRITON_MODEL_NAME": settings.engine,
        "MODEL_PATH": path,
        "MODEL_NAME": name,
        "LITE_MODEL_NAME": mesh.lite_model_name,
        "ARENA_REGION": mesh.arena_region,
        "ENDPOINTS_FILE": str(_endpoints(home, mesh, settings, cluster)),
    }


def _model(mesh: Mesh, label: str) -> tuple[str, str, str]:
    """A replica's model, by path and id, and the cluster that it is in."""
    if label.startswith("lite-"):
        return mesh.lite_model_path, mesh.lite_model_name, "lite"
    return mesh.model_path, mesh.model_name, "model"


def _endpoints(home: Home, mesh: Mesh, settings: Settings, cluster: str) -> Path:
    return endpoints_path(_envoy_settings(home, mesh, settings).endpoints_directory, cluster)


def _health_probe(mesh: Mesh, name: str) -> Callable[[], Awaitable[bool]]:
    address = mesh.addresses[name]
    return lambda: probes.serves(address)


def _inherited() -> dict[str, str]:
    """What the processes take from the shell: everything but what only `up` reads."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(_OF_UP)}
    inherited["PYTHONUNBUFFERED"] = "1"
    return inherited


def _endpoint(mesh: Mesh, name: str) -> tuple[str, int]:
    return LOOPBACK, _port(mesh, name)


def _port(mesh: Mesh, name: str) -> int:
    return int(mesh.addresses[name].rpartition(":")[2])
