from __future__ import annotations

import asyncio

from grpc_health.v1 import health_pb2, health_pb2_grpc

from tidegate.scheduler.config import Settings
from tidegate.scheduler.service import SchedulerService


async def test_a_task_that_fails_is_told(tmp_path):
    faults: asyncio.Queue[BaseException] = asyncio.Queue()
    service = SchedulerService(
        Settings(port=0, mesh_address="127.0.0.1:1", endpoints_file=str(tmp_path / "none.yaml"), tick_seconds=0.01),
        on_fault=faults.put_nowait,
    )
    service.dispatcher.match = lambda now: 1 / 0
    await service.start()
    assert isinstance(await asyncio.wait_for(faults.get(), 5), ZeroDivisionError)
    await service.server.grpc.stop(0)
    await service.close()


async def test_health_knows_the_services_and_the_pickers_names(world):
    stub = health_pb2_grpc.HealthStub(world.channel)
    for name in ("", "envoy.service.ext_proc.v3.ExternalProcessor", "tidegate.v1.Scheduler", "liveness", "readiness"):
        response = await stub.Check(health_pb2.HealthCheckRequest(service=name))
        assert response.status == health_pb2.HealthCheckResponse.SERVING
