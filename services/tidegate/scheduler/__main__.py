"""Runs one scheduler: `python -m tidegate.scheduler`."""

from __future__ import annotations

import signal
import sys

import structlog

from tidegate.common import memory, metrics, service_process
from tidegate.scheduler.config import Settings
from tidegate.scheduler.service import SchedulerService

log = structlog.get_logger()


def main() -> int:
    """Runs until SIGTERM or SIGINT; 2 for settings that cannot be used, 1 for a taken port or a fault."""
    return service_process.run("scheduler", Settings, serve)


async def serve(settings: Settings) -> int:
    """Builds the scheduler and serves; raises OSError when a port is taken."""
    if settings.metrics_port:
        metrics.serve(settings.host, settings.metrics_port)
    faults: list[BaseException] = []

    def stop(fault: BaseException) -> None:
        # Requests that are held go on by Envoy's balancing, and whoever runs this process starts it anew.
        faults.append(fault)
        signal.raise_signal(signal.SIGTERM)

    service = SchedulerService(settings, on_fault=stop)
    service.gauges.register()
    await service.start()
    if not memory.has_mimalloc():
        # It works as well, but after thousands have waited it keeps a part of what they took.
        log.warning("no_mimalloc", library=str(memory.mimalloc_library() or "not installed"))
    log.info("started", scheduler_id=service.scheduler_id, port=service.server.port)
    await service.server.run_until_signal(service.close)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
