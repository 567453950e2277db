"""The settings of `up`: what cannot be meant, and what reaches Envoy and the engine."""

import os
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest
import yaml

from tidegate.cli import config, ports, processes, state
from tidegate.cli.config import Settings
from tidegate.cli.envoy_config import EnvoySettings
from tidegate.cli.process_table import ProcessId
from tidegate.common.settings import SettingsError

OF_ENVOY = (
    "tenant_requests_per_second",
    "tenant_burst_requests",
    "body_limit_bytes",
    "scheduler_timeout_seconds",
    "heap_limit_bytes",
)


def rendered(folder, settings):
    home = state.Home(folder)
    mesh = state.Mesh(
        run_id="0" * 16,
        supervisor=ProcessId.of(os.getpid()),
        model_name="m",
        model_path="/m",
        shared_memory_prefixes=[],
        arena_region="tidegate-x",
        addresses={name: f"127.0.0.1:{port}" for name, port in ports.assign(1, given={}, auto=False).items()},
        replica_count=1,
    )
    return processes.write_files(home, mesh, settings).read_text()


@pytest.fixture
def from_environment(monkeypatch):
    """The settings with these variables in the environment."""

    def load(**values):
        for name, value in values.items():
            monkeypatch.setenv(f"TIDEGATE_UP_{name.upper()}", value)
        return config.load()

    return load


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("tenant_requests_per_second", "717", "717"),
        ("tenant_burst_requests", "7171", "7171"),
        ("body_limit_bytes", "71717", "71717"),
        ("scheduler_timeout_seconds", "7.25", "7.25s"),
        ("heap_limit_bytes", "717171717", "717171717"),
        ("cors_origins", "https://a.example, https://b.example", "https://b.example"),
    ],
)
def test_a_setting_of_the_ingress_reaches_envoys_file(tmp_path, from_environment, name, value, expected):
    assert expected not in rendered(tmp_path, Settings())
    text = rendered(tmp_path, from_environment(**{name: value}))
    assert expected in text
    yaml.safe_load(text)


def test_what_is_refused_for_load_is_503_or_429(from_environment):
    assert Settings().overload_status == 503
    assert from_environment(overload_status="429").overload_status == 429
    with pytest.raises(SettingsError, match="TIDEGATE_UP_OVERLOAD_STATUS='500'"):
        from_environment(overload_status="500")


def test_the_certificate_reaches_envoys_file_by_its_whole_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = rendered(tmp_path, Settings(tls_certificate_file="c.pem", tls_key_file="k.pem"))
    assert str(tmp_path / "c.pem") in text
    assert str(tmp_path / "k.pem") in text


def test_settings_of_the_ingress_have_the_bounds_and_defaults_that_envoys_have():
    ours = {field.name: (field.type, field.default) for field in msgspec.structs.fields(Settings)}
    envoys = {field.name: (field.type, field.default) for field in msgspec.structs.fields(EnvoySettings)}
    assert {name: ours[name] for name in OF_ENVOY} == {name: envoys[name] for name in OF_ENVOY}


def test_origins_come_as_a_list_or_as_one_text():
    assert config.origins(Settings(cors_origins=("https://a", "https://b"))) == ("https://a", "https://b")
    assert config.origins(Settings(cors_origins="https://a,https://b")) == ("https://a", "https://b")
    assert config.origins(Settings()) == ()


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_loopback_needs_no_keys(host):
    assert config.usage_faults(Settings(host=host)) == []


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.7", "tide.example"])
def test_another_host_needs_keys_or_to_be_open_on_purpose(host):
    (fault,) = config.usage_faults(Settings(host=host))
    assert "--api-keys FILE" in fault
    assert "--no-api-keys" in fault
    assert "\n" not in fault
    assert config.usage_faults(Settings(host=host, api_keys_file="keys.yaml")) == []
    assert config.usage_faults(Settings(host=host, no_api_keys=True)) == []


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (Settings(model_path="/no/such/model"), "--model /no/such/model: there is no such file or folder"),
        (Settings(api_keys_file="keys.yaml", no_api_keys=True), "exclude each other"),
        (Settings(tls_key_file="k.pem"), "TLS needs both"),
    ],
)
def test_what_cannot_be_meant_is_said(settings, words):
    (fault,) = config.usage_faults(settings)
    assert words in fault


def test_the_size_of_a_model_is_that_of_its_weights(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"1" * 30)
    (tmp_path / "model.bin").write_bytes(b"1" * 50)
    assert config.model_bytes(Settings(model_path=str(tmp_path))) == [30]
    assert config.model_bytes(Settings(model_path=str(tmp_path / "model.bin"))) == [50]
    assert config.model_bytes(Settings(replicas=2)) == [None, None]
    assert config.model_bytes(Settings(lite_model_path=str(tmp_path), lite_replicas=2)) == [None, 30, 30]
    assert config.model_bytes(Settings(engine="llm_sim")) == [0]


@pytest.mark.parametrize(
    ("max_sequences", "environment", "expected"),
    [
        (0, {}, {}),
        (8, {}, {"MAX_SEQUENCES": "8", "STEP_TOKEN_BUDGET": "128"}),
        (256, {}, {"MAX_SEQUENCES": "256", "STEP_TOKEN_BUDGET": "256"}),
        (256, {"TIDEGATE_ENGINE_STEP_TOKEN_BUDGET": "999"}, {"MAX_SEQUENCES": "256"}),
    ],
)
def test_the_engines_steps_have_a_token_for_each_sequence(max_sequences, environment, expected):
    assert processes.sequence_settings(max_sequences, environment) == expected


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (
            Settings(thread_count=2, max_sequences=8),
            {
                "MODEL_PATH": "m.gguf",
                "CACHE_DIR": "home/cache",
                "THREAD_COUNT": "2",
                "MAX_SEQUENCES": "8",
                "STEP_TOKEN_BUDGET": "128",
            },
        ),
        (Settings(engine="llm_sim"), {"MODEL_PATH": "m.gguf"}),
        (
            Settings(engine="llm_sim", sim_preset="h200-8b", max_sequences=48),
            {"MODEL_PATH": "m.gguf", "SIM_PRESET": "h200-8b", "MAX_SEQUENCES": "48"},
        ),
    ],
)
def test_each_engine_is_told_only_what_it_knows(settings, expected):
    assert processes.engine_settings(SimpleNamespace(cache=Path("home/cache")), "m.gguf", settings, {}) == expected


def test_a_preset_of_the_simulated_engine_goes_with_it_alone():
    assert config.usage_faults(Settings(engine="llm_sim", sim_preset="h200-8b")) == []
    for settings in (Settings(sim_preset="h200-8b"), Settings(engine="vllm")):
        (fault,) = config.usage_faults(settings)
        assert "--engine" in fault


@pytest.mark.parametrize(
    ("engine", "device", "niceness"), [("llm", "cpu", 18), ("llm", "cuda", 10), ("llm_sim", "cpu", 10)]
)
def test_an_engine_that_computes_elsewhere_steps_back_as_services_do(engine, device, niceness):
    settings = Settings(engine=engine)
    assert processes.engine_niceness(settings, {"TIDEGATE_ENGINE_DEVICE": device}) == niceness
