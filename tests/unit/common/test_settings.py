"""Settings are built once, or refused with every fault at once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec
import pytest
from msgspec import Meta

from tidegate.common.settings import SettingsError, load


class Example(msgspec.Struct, frozen=True, kw_only=True):
    """A little of everything."""

    model_path: str
    port: Annotated[int, Meta(ge=0, le=65535)] = 50052
    lease_seconds: Annotated[float, Meta(gt=0)] = 5.0
    enabled: bool = True
    limit: Annotated[int, Meta(ge=1)] | None = None


REQUIRED = {"TIDEGATE_PREPROCESS_MODEL_PATH": "m.gguf"}


def build(environment: dict[str, str] | None = None) -> Example:
    return load(Example, "preprocess", REQUIRED | (environment or {}))


def faults(environment: dict[str, str]) -> list[str]:
    with pytest.raises(SettingsError) as caught:
        load(Example, "preprocess", environment)
    return str(caught.value).splitlines()


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    return tmp_path / "tidegate.yaml"


def test_defaults_stand_where_nothing_is_said() -> None:
    assert build() == Example(model_path="m.gguf")


def test_values_come_from_the_environment_in_their_types() -> None:
    built = build(
        {
            "TIDEGATE_PREPROCESS_PORT": "0",
            "TIDEGATE_PREPROCESS_LEASE_SECONDS": "2.5",
            "TIDEGATE_PREPROCESS_ENABLED": "false",
            "TIDEGATE_PREPROCESS_LIMIT": "7",
        }
    )
    assert built == Example(model_path="m.gguf", port=0, lease_seconds=2.5, enabled=False, limit=7)


def test_a_text_that_looks_like_a_number_stays_a_text() -> None:
    assert build({"TIDEGATE_PREPROCESS_MODEL_PATH": "123"}).model_path == "123"


def test_the_environment_wins_over_the_file_and_the_file_over_defaults(config_file: Path) -> None:
    config_file.write_text("preprocess: {model_path: file.gguf, port: 1, lease_seconds: 9}\ncache: {anything: 1}\n")
    environment = {"TIDEGATE_CONFIG": str(config_file), "TIDEGATE_PREPROCESS_PORT": "2"}
    assert load(Example, "preprocess", environment) == Example(model_path="file.gguf", port=2, lease_seconds=9)


def test_variables_of_other_sections_and_programs_mean_nothing() -> None:
    assert build({"TIDEGATE_CACHE_PORT": "x", "TIDEGATE_ENGINE_DTYPE": "bf16", "PATH": "/bin"}) == build()


def test_all_faults_are_named_at_once() -> None:
    lines = faults(
        {
            "TIDEGATE_PREPROCESS_PORT": "70000",
            "TIDEGATE_PREPROCESS_LEASE_SECONDS": "soon",
            "TIDEGATE_PREPROCESS_PROT": "1",
        }
    )
    assert len(lines) == 4
    assert lines[0].startswith("TIDEGATE_PREPROCESS_PORT='70000': ") and "65535" in lines[0]
    assert lines[1].startswith("TIDEGATE_PREPROCESS_LEASE_SECONDS='soon': ")
    assert lines[2] == "TIDEGATE_PREPROCESS_PROT: there is no such setting"
    assert lines[3] == "TIDEGATE_PREPROCESS_MODEL_PATH: is required and not set"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PORT", "-1"),
        ("PORT", "65536"),
        ("PORT", "1.5"),
        ("PORT", ""),
        ("LEASE_SECONDS", "0"),
        ("LEASE_SECONDS", "nan"),
        ("ENABLED", "perhaps"),
        ("LIMIT", "0"),
    ],
)
def test_a_value_out_of_bounds_or_of_another_type_is_refused(name: str, value: str) -> None:
    lines = faults(REQUIRED | {f"TIDEGATE_PREPROCESS_{name}": value})
    assert len(lines) == 1
    assert lines[0].startswith(f"TIDEGATE_PREPROCESS_{name}={value!r}: ")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("preprocess: {prot: 1}", "preprocess.prot: there is no such setting"),
        ("preprocess: {port: [1]}", "preprocess.port=[1]"),
        ("preprocess: {port: 99999}", "preprocess.port=99999"),
        ("preproces: {}", "unknown section preproces"),
        ("[1, 2]", "must be a mapping of sections, is list"),
        ("preprocess: 5", "preprocess must be a mapping of settings, is int"),
        ("a: b: c", "mapping values are not allowed"),
    ],
)
def test_a_fault_in_the_file_names_the_file_and_the_place(config_file: Path, content: str, said: str) -> None:
    config_file.write_text(content)
    lines = faults(REQUIRED | {"TIDEGATE_CONFIG": str(config_file)})
    assert str(config_file) in "\n".join(lines)
    assert said in "\n".join(lines)


def test_a_file_that_is_not_there_is_a_fault(config_file: Path) -> None:
    assert str(config_file) in faults(REQUIRED | {"TIDEGATE_CONFIG": str(config_file)})[0]


def test_an_empty_file_or_section_is_as_none(config_file: Path) -> None:
    for content in ("", "preprocess:\n"):
        config_file.write_text(content)
        assert build({"TIDEGATE_CONFIG": str(config_file)}) == build()


class WithMapping(msgspec.Struct, frozen=True, kw_only=True):
    """A setting with parts of its own."""

    weights: dict[str, Annotated[float, Meta(gt=0)]] = {}


def test_a_mapping_in_the_environment_is_json() -> None:
    assert load(WithMapping, "scheduler", {"TIDEGATE_SCHEDULER_WEIGHTS": '{"a": 2}'}).weights == {"a": 2.0}


@pytest.mark.parametrize("text", ['{"a": 0}', '{"a": "b"}', "{a: 1", "a=1"])
def test_a_mapping_that_is_none_or_out_of_bounds_is_refused(text: str) -> None:
    with pytest.raises(SettingsError, match="TIDEGATE_SCHEDULER_WEIGHTS"):
        load(WithMapping, "scheduler", {"TIDEGATE_SCHEDULER_WEIGHTS": text})
