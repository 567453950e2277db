"""The template and what is filled into it; Envoy itself is the judge."""

from __future__ import annotations

import asyncio
import json
import ssl
import stat
import subprocess
from pathlib import Path

import grpc
import httpx
import msgspec
import pytest
import yaml
from google.protobuf import descriptor_pb2, descriptor_pool

from tidegate.cli import envoy_config
from tidegate.cli.envoy_config import EnvoyConfigError, EnvoySettings
from tidegate.cli.local_replies import envoy_replies, local_reply_config
from tidegate.common import headers
from tidegate.v1 import inference_pb2, inference_pb2_grpc

CHAT = "/v1/chat/completions"
ORIGIN = "https://chat.example"
STAINLESS = (
    "lang", "package-version", "os", "arch", "runtime", "runtime-version", "retry-count", "timeout", "helper-method",
)  # fmt: skip


def make_certificate(directory: Path) -> tuple[Path, Path]:
    certificate, key = directory / "cert.pem", directory / "key.pem"
    argv = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    argv += ["-days", "1", "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    subprocess.run([*argv, "-out", str(certificate), "-keyout", str(key)], check=True, capture_output=True, timeout=20)
    return certificate, key


def mesh_settings(directory: Path) -> dict:
    certificate, key = make_certificate(directory)
    return {"tls_certificate_file": certificate, "tls_key_file": key, "cors_origins": (ORIGIN,)}


def rendered(tmp_path: Path, **settings) -> str:
    return envoy_config.write_envoy_files(EnvoySettings(run_directory=tmp_path, **settings)).read_text()


def test_envoy_accepts_what_is_written_with_defaults(tmp_path: Path):
    path = envoy_config.write_envoy_files(EnvoySettings(run_directory=tmp_path))
    envoy_config.validate(path)


def test_envoy_accepts_every_setting_at_once(tmp_path: Path):
    keys = tmp_path / "keys.yaml"
    keys.write_text('"sk-a$b%{}`\'key": tenant-a\n')
    settings = EnvoySettings(run_directory=tmp_path, api_keys_file=keys, **mesh_settings(tmp_path))
    envoy_config.validate(envoy_config.write_envoy_files(settings))


def test_envoy_names_a_misspelt_field(tmp_path: Path):
    path = envoy_config.write_envoy_files(EnvoySettings(run_directory=tmp_path))
    path.write_text(path.read_text().replace("failure_mode_allow", "failure_mode_alow"))
    with pytest.raises(EnvoyConfigError, match="failure_mode_alow"):
        envoy_config.validate(path)


def test_a_placeholder_without_value_and_a_value_without_placeholder_are_refused():
    with pytest.raises(EnvoyConfigError, match=r"without a value: \['B'\].*without a placeholder: \['C'\]"):
        envoy_config.render("a: ${A}\nb: ${B}", {"A": "1", "C": "2"})
    with pytest.raises(EnvoyConfigError, match="dollar"):
        envoy_config.render("a: $ {A}", {"A": "1"})


def test_only_the_ingress_can_be_reached_from_other_hosts(tmp_path: Path):
    document = yaml.safe_load(rendered(tmp_path, ingress_host="0.0.0.0"))
    addresses = {item["name"]: item["address"]["socket_address"] for item in document["static_resources"]["listeners"]}
    assert addresses["ingress"]["address"] == "0.0.0.0"
    assert addresses["mesh"]["address"] == "127.0.0.1"
    assert document["admin"]["address"]["socket_address"]["address"] == "127.0.0.1"


def test_wherever_requests_are_tried_again_the_retries_are_a_tenth_of_the_traffic_at_most(tmp_path: Path):
    resources = yaml.safe_load(rendered(tmp_path))["static_resources"]
    clusters = {cluster["name"]: cluster for cluster in resources["clusters"]}
    retrying = {route["cluster"] for route in _routes(resources["listeners"]) if "retry_policy" in route}
    members = {name for cluster in retrying for name in _members(clusters[cluster])}
    assert {"model", "lite", "cache", "waiting", "mesh"} <= members
    for name in retrying | members:
        (thresholds,) = clusters[name]["circuit_breakers"]["thresholds"]
        assert thresholds["retry_budget"]["budget_percent"] == {"value": 10}, name
        assert "priority" not in thresholds and "max_retries" not in thresholds, name


def _routes(node) -> list[dict]:
    """The actions of all routes, wherever they stand."""
    if isinstance(node, list):
        return [route for each in node for route in _routes(each)]
    if not isinstance(node, dict):
        return []
    found = [node["route"]] if isinstance(node.get("route"), dict) else []
    return found + [route for each in node.values() for route in _routes(each)]


def _members(cluster) -> list[str]:
    """The clusters behind an aggregate one; of any other, itself."""
    aggregate = cluster.get("cluster_type")
    return aggregate["typed_config"]["clusters"] if aggregate else [cluster["name"]]


def test_the_rendered_file_is_for_its_owner_only(tmp_path: Path):
    rendered(tmp_path)
    rendered(tmp_path)
    assert stat.S_IMODE((tmp_path / "envoy.yaml").stat().st_mode) == 0o600


def test_endpoint_files_that_exist_are_left_alone(tmp_path: Path):
    rendered(tmp_path)
    path = tmp_path / "endpoints" / "model.yaml"
    path.write_text("resources: []")
    rendered(tmp_path)
    assert path.read_text() == "resources: []"


@pytest.mark.parametrize(
    "text",
    ["", "[]", "a: [", "short: t", "long-enough-key: {}", "long-enough-key: 'bad tenant'", "'has space in it': t"],
)
def test_keys_that_cannot_be_used_stop_the_start_with_the_files_name(tmp_path: Path, text: str):
    keys = tmp_path / "keys.yaml"
    keys.write_text(text)
    with pytest.raises(EnvoyConfigError, match=r"keys\.yaml"):
        rendered(tmp_path, api_keys_file=keys)


def test_a_key_that_is_refused_is_not_shown(tmp_path: Path):
    keys = tmp_path / "keys.yaml"
    keys.write_text("very secret key: tenant\n")
    with pytest.raises(EnvoyConfigError) as caught:
        rendered(tmp_path, api_keys_file=keys)
    assert "secret" not in str(caught.value)


def test_tls_with_half_a_pair_is_refused(tmp_path: Path):
    with pytest.raises(EnvoyConfigError, match="both"):
        rendered(tmp_path, tls_certificate_file=tmp_path / "cert.pem")


def test_settings_are_bounded():
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert({"run_directory": "/x", "body_limit_bytes": 1 << 30}, EnvoySettings)


def test_the_descriptor_set_is_complete():
    files = descriptor_pb2.FileDescriptorSet.FromString(envoy_config.descriptor_set())
    pool = descriptor_pool.DescriptorPool()
    for file in files.file:
        pool.Add(file)  # Fails when an import is missing.
    assert pool.FindServiceByName("tidegate.v1.Inference").methods_by_name["ChatCompletions"]


def test_every_reply_of_envoy_ends_in_one_that_matches_the_rest():
    replies = envoy_replies(body_limit_bytes=1, tenant_retry_after_seconds=1)
    assert replies[-1].condition == "response.code >= 500"
    assert len(local_reply_config(replies)["mappers"]) == 1 + 2 * len(replies)


def test_the_command_keeps_instances_apart(tmp_path: Path):
    argv = envoy_config.envoy_command(tmp_path / "envoy.yaml", log_path=tmp_path / "envoy.log", concurrency=3)
    assert "--disable-hot-restart" in argv
    assert argv[argv.index("--concurrency") + 1] == "3"
    assert argv[argv.index("--log-path") + 1] == str(tmp_path / "envoy.log")


@pytest.mark.asyncio(loop_scope="module")
async def test_tls_carries_http1_http2_and_grpc(mesh):
    certificate = mesh.settings.tls_certificate_file
    address = f"localhost:{mesh.settings.ingress_port}"
    for version in ("--http1.1", "--http2"):
        process = await asyncio.create_subprocess_exec(
            "curl", "-s", version, "--cacert", str(certificate), "-H", "content-type: application/json",
            "-d", '{"prompt": "hello"}', "-w", "\n%{http_version} %{http_code}", f"https://{address}{CHAT}",
            stdout=asyncio.subprocess.PIPE,
        )  # fmt: skip
        output, _ = await asyncio.wait_for(process.communicate(), 10)
        assert output.decode().rsplit("\n", 1)[1] in {"1.1 200", "2 200"}
    credentials = grpc.ssl_channel_credentials(certificate.read_bytes())
    async with grpc.aio.secure_channel(address, credentials) as channel:
        call = inference_pb2_grpc.InferenceStub(channel).Generate(inference_pb2.GenerateRequest(text="hi"))
        assert json.loads((await call.read()).delta.text)["bytes"] == 2


@pytest.mark.asyncio(loop_scope="module")
async def test_openais_client_may_send_its_headers_from_a_browser_and_read_ours(mesh):
    asked = [f"x-stainless-{name}" for name in STAINLESS] + ["authorization", "content-type"]
    asked += [headers.CLIENT_REQUEST_ID, headers.QUEUE_STATUS, headers.ASKED_CLASS, headers.ASKED_TIMEOUT_MS]
    read = {headers.REQUEST_ID, headers.REASON, headers.CACHED, headers.LITE, headers.BROWNOUT, "openai-processing-ms"}
    read |= {"retry-after", "retry-after-ms", "x-should-retry", "grpc-retry-pushback-ms", "allow"}
    context = ssl.create_default_context(cafile=mesh.settings.tls_certificate_file)
    async with httpx.AsyncClient(base_url=mesh.url.replace("http:", "https:"), verify=context) as client:
        asks = {"origin": ORIGIN, "access-control-request-method": "POST"}
        asks["access-control-request-headers"] = ",".join(asked)
        preflight = await client.options(CHAT, headers=asks)
        response = await client.post(CHAT, json={"prompt": "hello"}, headers={"origin": ORIGIN})
    assert set(asked) <= set(preflight.headers["access-control-allow-headers"].split(", "))
    exposed = set(response.headers["access-control-expose-headers"].split(", "))
    assert read <= exposed


@pytest.mark.asyncio(loop_scope="module")
async def test_a_named_origin_may_call_and_no_other(mesh):
    context = ssl.create_default_context(cafile=mesh.settings.tls_certificate_file)
    async with httpx.AsyncClient(base_url=mesh.url.replace("http:", "https:"), verify=context) as client:
        for origin, allowed in ((ORIGIN, ORIGIN), ("https://elsewhere.example", None)):
            asks = {"origin": origin, "access-control-request-method": "POST"}
            preflight = await client.options(CHAT, headers=asks)
            assert preflight.headers.get("access-control-allow-origin") == allowed
            response = await client.post(CHAT, json={"prompt": "hello"}, headers={"origin": origin})
            assert response.headers.get("access-control-allow-origin") == allowed
