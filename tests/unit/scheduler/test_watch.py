from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time

import grpc
import pytest
from prometheus_client import CollectorRegistry, generate_latest

from tidegate.scheduler.request import ServiceClass
from tidegate.scheduler.tenant_limits import Key
from tidegate.v1 import inference_pb2, scheduler_pb2


async def test_a_snapshot_shows_lanes_replicas_and_dependencies(world):
    world.replica.say_load(running_request_count=3)
    world.replica.grant("a", "b")
    await world.credits(2)
    snapshot = await world.snapshot()
    assert snapshot.scheduler_id == world.service.scheduler_id
    assert [lane.service_class for lane in snapshot.lanes] == [1, 2, 3]
    assert snapshot.lanes[0].request_limit == 10_000
    (replica,) = snapshot.replicas
    assert (replica.connected, replica.credit_count, replica.load.running_request_count) == (True, 2, 3)
    assert [dependency.name for dependency in snapshot.dependencies] == ["preprocess", "cache"]


async def test_a_snapshot_shows_what_envoy_refuses_for_the_scheduler(world):
    shedder, limits, now = world.service.shedder, world.service.limits, time.monotonic()
    keys = [Key("acme", ""), Key("acme", "batch"), Key("other", "")]
    for _ in range(2_000):
        shedder.see(ServiceClass.STANDARD, now - 2.0, now, None)
        for key in keys:
            limits.see(key)
    shedder.end_interval(now + 1.0)
    limits.end_interval(now + 1.0)
    snapshot = await world.snapshot()
    assert 0 < snapshot.lanes[1].shed_share < 1
    assert [lane.shed_share for lane in snapshot.lanes] == [1 - shedder.shares[one] for one in ServiceClass]
    assert snapshot.limited_tenant_count == 2


async def test_snapshots_come_at_once_and_then_each_interval(world):
    request = scheduler_pb2.WatchRequest()
    request.interval.FromMilliseconds(100)
    began = asyncio.get_running_loop().time()
    call = world.scheduler.Watch(request)
    for _ in range(3):
        assert await call.read() is not grpc.aio.EOF
    call.cancel()
    assert 0.2 <= asyncio.get_running_loop().time() - began < 2


@pytest.mark.parametrize("milliseconds", [0, 99, 60_001])
async def test_an_interval_out_of_range_is_refused(world, milliseconds):
    request = scheduler_pb2.WatchRequest()
    request.interval.FromMilliseconds(milliseconds)
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await world.scheduler.Watch(request).read()
    assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_the_status_of_a_request_that_does_not_wait_is_not_found(world):
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await world.scheduler.GetQueueStatus(scheduler_pb2.GetQueueStatusRequest(request_id="nobody"))
    assert raised.value.code() is grpc.StatusCode.NOT_FOUND


async def test_a_waiting_request_is_shown_in_its_lane(world):
    await world.exchange().begin()
    await world.replica.demand(1)
    lane = (await world.snapshot()).lanes[1]
    assert lane.service_class == inference_pb2.SERVICE_CLASS_STANDARD
    assert (lane.waiting_request_count, lane.waiting_token_count) == (1, 7 + 16)
    assert lane.waiting_bytes > 0
    assert lane.HasField("oldest_wait")


async def test_the_metrics_page_shows_lanes_and_credits(world):
    world.replica.grant("a")
    await world.credits(1)
    registry = CollectorRegistry()
    world.service.gauges.register(registry)
    page = generate_latest(registry).decode()
    assert f'tidegate_credits_in_hand{{replica="{world.replica.address}"}} 1.0' in page
    for quantity in ("requests", "tokens", "bytes"):
        assert f'tidegate_lane_waiting_{quantity}{{class="standard"}} 0.0' in page
    assert "inference_pool_ready_pods 1.0" in page


def run_scheduler(**settings):
    environment = {f"TIDEGATE_SCHEDULER_{name.upper()}": str(value) for name, value in settings.items()}
    return subprocess.run(
        [sys.executable, "-m", "tidegate.scheduler"],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def test_bad_settings_are_one_message_and_exit_2():
    result = run_scheduler(port="many", latency_weigth=1)
    assert result.returncode == 2
    assert "TIDEGATE_SCHEDULER_PORT='many'" in result.stderr
    assert "TIDEGATE_SCHEDULER_LATENCY_WEIGTH: there is no such setting" in result.stderr
    assert "Traceback" not in result.stderr


async def test_a_taken_port_is_one_message_and_exit_1(world):
    result = await asyncio.to_thread(run_scheduler, port=world.service.server.port, metrics_port=0)
    assert result.returncode == 1
    assert f"cannot listen on 127.0.0.1:{world.service.server.port}" in result.stderr
    assert "Traceback" not in result.stderr
    assert not any(_is_json(line) for line in result.stderr.splitlines())


def _is_json(line):
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


async def test_a_flagged_tenants_requests_go_to_the_batch_lane_and_the_flag_is_shown(start_world):
    world = await start_world(anomalies_enabled=True, anomaly_flag_seconds=60)
    world.service.anomalies.flag("acme", score=0.7, feature="arrival_rate")
    await world.exchange().begin()
    await world.exchange().begin({"x-tidegate-tenant": "other"})
    await world.replica.demand(2)
    snapshot = await world.snapshot()
    assert [lane.waiting_request_count for lane in snapshot.lanes] == [0, 1, 1]
    (flagged,) = snapshot.flagged_tenants
    assert (flagged.tenant, flagged.score, flagged.feature) == ("acme", 0.7, "arrival_rate")
    assert 0 < flagged.expires_in.ToMilliseconds() <= 60_000
    assert snapshot.looks_for_anomalies


async def test_nobody_is_flagged_and_no_model_is_loaded_unless_it_is_enabled(world):
    snapshot = await world.snapshot()
    assert (list(snapshot.flagged_tenants), snapshot.looks_for_anomalies) == ([], False)
    said = "import sys, tidegate.scheduler.service; print('sklearn' in sys.modules)"
    output = subprocess.run([sys.executable, "-c", said], capture_output=True, text=True, check=True, env=os.environ)
    assert output.stdout.strip() == "False"
