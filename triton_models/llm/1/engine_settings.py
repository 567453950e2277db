"""Where the engine's settings come from: the model's config.pbtxt, and over it TIDEGATE_ENGINE_* of the environment.
Where neither says how hosts find each other, torchrun's variables do.

Pure: both come in as mappings. Invariant: a name that the engine does not know, and a value that is not of the
setting's type, stop the load with one message that names all of them. Bounds are the engine's own to check.
"""

from __future__ import annotations

import typing
from collections.abc import Mapping

from llm_engine import EngineConfig

ENVIRONMENT_PREFIX = "TIDEGATE_ENGINE_"

STREAM_INTERVAL = "stream_interval_seconds"
"""A setting of this model beside the engine's."""

DEFAULT_STREAM_INTERVAL_SECONDS = 0.1

MAX_STREAM_INTERVAL_SECONDS = 1.0

# Parameters that Triton's own Python backend reads from config.pbtxt.
_TRITON_PARAMETERS = frozenset({"EXECUTION_ENV_PATH", "FORCE_CPU_ONLY_INPUT_TENSORS"})

# As torchrun and what starts it on many hosts name them.
_TORCHRUN_VARIABLES = {
    "node_count": "NNODES",
    "node_rank": "NODE_RANK",
    "master_address": "MASTER_ADDR",
    "master_port": "MASTER_PORT",
}


def engine_config(parameters: Mapping[str, str], environment: Mapping[str, str]) -> EngineConfig:
    """The engine's settings; an empty text means the engine's own default.

    Raises:
        ValueError: an unknown name, a value of the wrong type or out of its bounds, no model path.
    """
    return EngineConfig(**setting_values(EngineConfig, parameters, environment))  # type: ignore[arg-type]


def stream_interval(parameters: Mapping[str, str], environment: Mapping[str, str]) -> float:
    """For how many seconds a sequence's outputs gather at most, but for its first and its last one; 0 is not at all.

    Raises:
        ValueError: not a number, or out of bounds.
    """
    variable = ENVIRONMENT_PREFIX + STREAM_INTERVAL.upper()
    given = {
        f"parameter {STREAM_INTERVAL}": parameters.get(STREAM_INTERVAL, ""),
        variable: environment.get(variable, ""),
    }
    seconds = DEFAULT_STREAM_INTERVAL_SECONDS
    for origin, text in given.items():
        if text.strip():
            try:
                seconds = float(text)
            except ValueError:
                raise ValueError(f"{origin} is {text!r}, expected a number of seconds") from None
            if not 0 <= seconds <= MAX_STREAM_INTERVAL_SECONDS:
                raise ValueError(f"{origin} is {text!r}, expected 0 to {MAX_STREAM_INTERVAL_SECONDS:g}")
    return seconds


def setting_values(settings: type, parameters: Mapping[str, str], environment: Mapping[str, str]) -> dict[str, object]:
    """The values that are given for the fields of a class of settings, of the fields' types.

    Args:
        settings: its annotations are the names and types; it needs a `model_path`.
        parameters: config.pbtxt's parameters by name, lower case (`kv_cache_bytes`).
        environment: the process's; `TIDEGATE_ENGINE_KV_CACHE_BYTES` wins over the parameter, and that, where it is
            not empty, over torchrun's.

    Raises:
        ValueError: an unknown name, a value of the wrong type, no model path.
    """
    types = {name: _plain_type(hint) for name, hint in typing.get_type_hints(settings).items()}
    texts = {
        name: (variable, environment[variable])
        for name, variable in _TORCHRUN_VARIABLES.items()
        if name in types and variable in environment
    }
    texts |= {
        name: (f"parameter {name}", text)
        for name, text in parameters.items()
        if name not in _TRITON_PARAMETERS and (text.strip() or name not in texts)
    }
    for variable, text in environment.items():
        if variable.startswith(ENVIRONMENT_PREFIX):
            texts[variable.removeprefix(ENVIRONMENT_PREFIX).lower()] = (variable, text)
    texts.pop(STREAM_INTERVAL, None)
    values: dict[str, object] = {}
    faults: list[str] = []
    for name, (origin, text) in texts.items():
        if name not in types:
            faults.append(f"{origin}: the engine has no such setting; it has {', '.join(sorted(types))}")
        elif text.strip():
            try:
                values[name] = _converted(text.strip(), types[name])
            except ValueError:
                faults.append(f"{origin} is {text!r}, expected {types[name].__name__}")
    if "model_path" not in values:
        faults.append(f"{ENVIRONMENT_PREFIX}MODEL_PATH is not set: a GGUF file or a Hugging Face folder")
    if faults:
        raise ValueError("; ".join(faults))
    return values


def _plain_type(hint: object) -> type:
    """The type of a setting's value, where it may also be None."""
    return next(kind for kind in typing.get_args(hint) or (hint,) if kind is not type(None))


def _converted(text: str, kind: type) -> object:
    return _BOOLEANS.index(text.lower()) == 1 if kind is bool else kind(text)


_BOOLEANS = ("false", "true")
