"""Asks the processes of a mesh themselves whether they are there: gRPC health, Envoy's admin page, a real answer."""

from __future__ import annotations

import asyncio
import json
import ssl
import urllib.error
import urllib.request
from collections.abc import Sequence
from typing import Any, Final

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tidegate.common.grpc_clients import open_channel
from tidegate.common.snapshots import together
from tidegate.v1 import scheduler_pb2, scheduler_pb2_grpc

PROBE_TIMEOUT_SECONDS: Final = 1.5
FIRST_ANSWER_TIMEOUT_SECONDS: Final = 60.0
FIRST_QUESTION: Final = "Say hello in five words."


async def serves(address: str, service: str = "") -> bool:
    """Whether a gRPC server says of itself that it can work.

    Raises:
        grpc.aio.AioRpcError: it cannot be reached.
    """
    async with open_channel(address) as channel:
        request = health_pb2.HealthCheckRequest(service=service)
        answer = await health_pb2_grpc.HealthStub(channel).Check(request, timeout=PROBE_TIMEOUT_SECONDS)
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


async def envoy_is_live(admin_address: str) -> bool:
    """Whether Envoy has its configuration and listens."""
    return await asyncio.to_thread(_get_text, f"http://{admin_address}/ready") == "LIVE"


async def snapshot(scheduler_address: str, timeout_seconds: float = PROBE_TIMEOUT_SECONDS) -> scheduler_pb2.Snapshot:
    """The scheduler as it is now.

    Raises:
        grpc.aio.AioRpcError: it cannot be reached.
    """
    async with open_channel(scheduler_address) as channel:
        stub = scheduler_pb2_grpc.SchedulerStub(channel)
        request = scheduler_pb2.WatchRequest(once=True)
        async for each in stub.Watch(request, timeout=timeout_seconds):
            return each
    raise grpc.aio.UsageError("the scheduler ended its stream without a snapshot")


async def real_answer(ingress_url: str, model: str, api_key: str) -> tuple[str, str]:
    """Asks the mesh a real question through the ingress; answers (text, "") or ("", what is wrong)."""
    return await asyncio.to_thread(_ask, ingress_url, model, api_key)


async def snapshot_of_all(
    scheduler_addresses: Sequence[str], timeout_seconds: float = PROBE_TIMEOUT_SECONDS
) -> scheduler_pb2.Snapshot:
    """All schedulers of a mesh as they are now, as one; raises as `snapshot` where one cannot be reached."""
    return together(await asyncio.gather(*(snapshot(address, timeout_seconds) for address in scheduler_addresses)))


async def unreached_replicas(scheduler_addresses: Sequence[str], replica_count: int) -> str:
    """Which of the replicas a scheduler does not reach yet; "" where each reaches all."""
    for address in scheduler_addresses:
        try:
            found = await snapshot(address)
        except (grpc.aio.AioRpcError, grpc.aio.UsageError) as error:
            return f"a scheduler does not answer: {type(error).__name__}"
        reached = sum(replica.connected and replica.load.ready for replica in found.replicas)
        if reached < replica_count:
            return f"a scheduler reaches {reached} of {replica_count} replicas"
    return ""


async def health_problem(ingress_url: str) -> str:
    """What `GET /health` says of the mesh, as a load balancer in front of it would ask; "" where it says 200."""
    return await asyncio.to_thread(_health_problem, ingress_url)


def _health_problem(ingress_url: str) -> str:
    try:
        _get_text(f"{ingress_url}/health")
    except urllib.error.HTTPError as error:
        return f"/health: {error.code}, no replica has passed Envoy's health check yet"
    except OSError as error:
        return f"/health: {type(error).__name__}: {error}"
    return ""


def _ask(ingress_url: str, model: str, api_key: str) -> tuple[str, str]:
    messages = [{"role": "user", "content": FIRST_QUESTION}]
    body = {"model": model, "max_tokens": 12, "temperature": 0, "messages": messages}
    headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {api_key}"} if api_key else {})
    request = urllib.request.Request(f"{ingress_url}/v1/chat/completions", json.dumps(body).encode(), headers)
    try:
        with _opener.open(request, timeout=FIRST_ANSWER_TIMEOUT_SECONDS) as response:
            answer: Any = json.load(response)
        text, answerer = answer["choices"][0]["message"]["content"], answer["model"]
    except urllib.error.HTTPError as error:
        return "", f"{error.code} {_error_message(error.read())}"
    except (OSError, ValueError, LookupError, TypeError) as error:
        return "", f"{type(error).__name__}: {error}"
    if answerer != model:  # The lite model stands in for one that is not there yet.
        return "", f"{model} was asked and {answerer} answered"
    return (text, "") if isinstance(text, str) and text.strip() else ("", "the answer was empty")


def _error_message(body: bytes) -> str:
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, LookupError, TypeError):
        return body.decode(errors="replace")[:200]


def _get_text(url: str) -> str:
    with _opener.open(url, timeout=PROBE_TIMEOUT_SECONDS) as response:
        return str(response.read().decode().strip())


def _own_ingress() -> ssl.SSLContext:
    """A certificate is for the name that clients use; what is asked here is this machine's own process, by address."""
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


_opener: Final = urllib.request.build_opener(
    urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=_own_ingress())
)
"""Proxies of the environment are for the world outside, not for loopback."""
