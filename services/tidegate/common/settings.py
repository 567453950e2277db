"""The one door to the environment: builds a process's settings once, or says everything that is wrong with them.

Settings are frozen msgspec structs whose fields carry their bounds. A value comes from, first match wins:
the environment variable `TIDEGATE_<SECTION>_<FIELD>`, the YAML file named by `TIDEGATE_CONFIG` (one section a
service), the field's default. Unknown keys and variables of the section are errors, not ignored.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, TypeVar

import msgspec
import yaml

CONFIG_FILE_VARIABLE: Final = "TIDEGATE_CONFIG"

SECTIONS: Final = frozenset({"scheduler", "preprocess", "cache", "batch", "waiting", "model", "up"})
"""The sections that a configuration file may have."""

_Settings = TypeVar("_Settings", bound=msgspec.Struct)


class SettingsError(Exception):
    """The settings cannot be used; the message names every fault, a line each."""


def load(settings_type: type[_Settings], section: str, environment: Mapping[str, str] | None = None) -> _Settings:
    """Builds the settings of one process.

    Raises:
        SettingsError: a file that cannot be read, an unknown key, a value of the wrong type or out of bounds.
    """
    assert section in SECTIONS, section
    environment = os.environ if environment is None else environment
    faults: list[str] = []
    values: dict[str, tuple[str, Any]] = {}
    for name, value in _file_section(environment.get(CONFIG_FILE_VARIABLE), section).items():
        values[name] = (f"{environment[CONFIG_FILE_VARIABLE]}: {section}.{name}", value)
    prefix = f"TIDEGATE_{section.upper()}_"
    for variable, text in environment.items():
        if variable.startswith(prefix):
            values[variable.removeprefix(prefix).lower()] = (variable, text)
    fields = {field.name: field for field in msgspec.structs.fields(settings_type)}
    converted: dict[str, Any] = {}
    for name, (origin, value) in values.items():
        if name not in fields:
            faults.append(f"{origin}: there is no such setting")
            continue
        try:
            strict = not isinstance(value, str)
            converted[name] = msgspec.convert(_plain(value), fields[name].type, strict=strict)
        except msgspec.ValidationError as error:
            faults.append(f"{origin}={value!r}: {error}")
    for name, field in fields.items():
        if field.required and name not in values:
            faults.append(f"{prefix}{name.upper()}: is required and not set")
    if faults:
        raise SettingsError("\n".join(faults))
    try:
        return settings_type(**converted)
    except ValueError as error:
        raise SettingsError(f"{section}: {error}") from error


def _plain(value: Any) -> Any:
    """A value from the environment as it would stand in the file: mappings are written as JSON there."""
    if isinstance(value, str) and value.startswith("{"):
        try:
            return msgspec.json.decode(value)
        except msgspec.DecodeError:
            return value
    return value


def _file_section(path: str | None, section: str) -> dict[str, Any]:
    if not path:
        return {}
    try:
        document = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SettingsError(f"{path}: {error}") from error
    if not isinstance(document, dict):
        raise SettingsError(f"{path}: must be a mapping of sections, is {type(document).__name__}")
    unknown = sorted(str(name) for name in document if name not in SECTIONS)
    if unknown:
        raise SettingsError(f"{path}: unknown section {', '.join(unknown)}; there are {', '.join(sorted(SECTIONS))}")
    content = document.get(section) or {}
    if not isinstance(content, dict):
        raise SettingsError(f"{path}: {section} must be a mapping of settings, is {type(content).__name__}")
    return content
