"""Runs one scheduler: `python -m tidegate.scheduler`."""

from __future__ import annotations

import asyncio
import signal
import sys

import structlog
import uvloop

from tidegate.common import logs, metrics
from tidegate.common.settings import SettingsError, load
from tidegate.scheduler.config import Settings
from tidegate.scheduler.service import SchedulerService

log = structlog.get_logger()


def main() -> int:
    """Runs until SIGTERM or SIGINT; 2 for settings that cannot be used, 1 for a taken port or a fault."""
    try:
        settings = load(Settings, "scheduler")
    except SettingsError as error:
        print(error, file=sys.stderr)
        return 2
    logs.configure("scheduler", level=settings.log_level)
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(_serve(settings))
    except OSError as error:
        print(f"tidegate.scheduler: {error}", file=sys.stderr)
        return 1


async def _serve(settings: Settings) -> int:
    if settings.metrics_port:
        try:
            metrics.serve(settings.host, settings.metrics_port)
        except OSError as error:
            address = f"{settings.host}:{settings.metrics_port}"
            raise OSError(f"cannot listen on {address} for metrics: {error}") from error
    faults: list[BaseException] = []

    def stop(fault: BaseException) -> None:
        # Requests that are held go on by Envoy's balancing, and whoever runs this process starts it anew.
        faults.append(fault)
        signal.raise_signal(signal.SIGTERM)

    service = SchedulerService(settings, on_fault=stop)
    service.gauges.register()
    await service.start()
    log.info("started", scheduler_id=service.scheduler_id, port=service.server.port)
    await service.server.run_until_signal(service.close)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
