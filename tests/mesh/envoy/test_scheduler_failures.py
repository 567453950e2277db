"""The scheduler dies, hangs or stays silent, and the mesh goes on."""

from __future__ import annotations

import asyncio
import signal
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.asyncio(loop_scope="module")

CHAT = "/v1/chat/completions"
BODY = {"prompt": "hello"}
TIMEOUTS = "http.ingress.ext_proc.message_timeouts"
AT_ONCE_SECONDS = 2.0
"""Generous for a busy machine, and less than the waits that must not come to pass."""


def mesh_settings(directory: Path) -> dict:
    return {"scheduler_timeout_seconds": 0.2}


async def test_a_scheduler_that_does_not_answer_costs_its_timeout(mesh, client):
    mesh.scheduler.silent = True
    timeouts, start = await mesh.stat(TIMEOUTS), time.monotonic()
    response = await client.post(CHAT, json=BODY)
    assert response.status_code == 200, response.text
    assert 0.19 < time.monotonic() - start < AT_ONCE_SECONDS
    assert await mesh.stat(TIMEOUTS) == timeouts + 1


async def test_a_scheduler_that_is_gone_costs_nothing(mesh, client):
    mesh.endpoints("scheduler", 1)
    await mesh.wait_healthy("scheduler", 0)
    try:
        timeouts = await mesh.stat(TIMEOUTS)
        for _ in range(5):
            assert (await client.post(CHAT, json=BODY)).status_code == 200
        assert await mesh.stat(TIMEOUTS) == timeouts
        assert mesh.scheduler.seen == []
    finally:
        mesh.endpoints("scheduler", mesh.scheduler_server.port)
        await mesh.wait_healthy("scheduler", 1)
    await client.post(CHAT, json=BODY)
    assert len(mesh.scheduler.seen) == 1


async def hold_requests(mesh, client, lone_service, count: int) -> list[asyncio.Task]:
    """Lets a scheduler in a process of its own hold so many requests."""
    mesh.endpoints("scheduler", lone_service.port)
    await mesh.wait_healthy("scheduler", 1)
    requests = [asyncio.create_task(client.post(CHAT, json=BODY)) for _ in range(count)]
    await lone_service.wait_held(count)
    return requests


async def use_own_scheduler(mesh) -> None:
    mesh.endpoints("scheduler", mesh.scheduler_server.port)
    await mesh.wait_healthy("scheduler", 1)


async def test_requests_that_a_killed_scheduler_held_go_on_at_once(mesh, client, lone_service):
    requests = await hold_requests(mesh, client, lone_service, 3)
    lone_service.signal(signal.SIGKILL)
    start = time.monotonic()
    responses = await asyncio.gather(*requests)
    assert [response.status_code for response in responses] == [200, 200, 200]
    assert time.monotonic() - start < AT_ONCE_SECONDS
    await use_own_scheduler(mesh)


async def test_requests_that_a_hung_scheduler_holds_go_on_after_three_seconds(mesh, client, lone_service):
    requests = await hold_requests(mesh, client, lone_service, 3)
    lone_service.signal(signal.SIGSTOP)
    start = time.monotonic()
    assert (await client.post(CHAT, json=BODY)).status_code == 200
    assert time.monotonic() - start < AT_ONCE_SECONDS
    responses = await asyncio.gather(*requests)
    assert [response.status_code for response in responses] == [200, 200, 200]
    assert time.monotonic() - start < 3.0 + AT_ONCE_SECONDS
    # Its health is known by now, so new requests do not wait for it at all.
    await mesh.wait_healthy("scheduler", 0)
    timeouts = await mesh.stat(TIMEOUTS)
    assert (await client.post(CHAT, json=BODY)).status_code == 200
    assert await mesh.stat(TIMEOUTS) == timeouts
    await use_own_scheduler(mesh)
