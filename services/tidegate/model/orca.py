"""ORCA: how Envoy learns this replica's load, out of band (a stream) and with each response (a trailer).

Source: xds.service.orca.v3.OpenRcaService. No stub is generated for it, so a generic handler speaks it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any, Final

import grpc
from xds.data.orca.v3 import orca_load_report_pb2
from xds.service.orca.v3 import orca_pb2

from tidegate.model.load import ReplicaLoad

SERVICE_NAME: Final = "xds.service.orca.v3.OpenRcaService"

TRAILER: Final = "endpoint-load-metrics-bin"
"""The metadata key under which a response carries a serialized OrcaLoadReport."""

SHORTEST_INTERVAL_SECONDS: Final = 0.1
DEFAULT_INTERVAL_SECONDS: Final = 1.0
LONGEST_INTERVAL_SECONDS: Final = 60.0


def trailer(load: ReplicaLoad) -> tuple[str, bytes]:
    """The load as a response's trailer."""
    return TRAILER, load.orca_report().SerializeToString()


def handler(load: ReplicaLoad) -> grpc.GenericRpcHandler:
    """The service, to be added to a server."""

    async def stream_core_metrics(
        request: orca_pb2.OrcaLoadReportRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[orca_load_report_pb2.OrcaLoadReport]:
        seconds = interval_seconds(request)
        while True:
            yield load.orca_report()
            await asyncio.sleep(seconds)

    method = grpc.unary_stream_rpc_method_handler(
        stream_core_metrics,
        request_deserializer=orca_pb2.OrcaLoadReportRequest.FromString,
        response_serializer=orca_load_report_pb2.OrcaLoadReport.SerializeToString,
    )
    return grpc.method_handlers_generic_handler(SERVICE_NAME, {"StreamCoreMetrics": method})


def interval_seconds(request: orca_pb2.OrcaLoadReportRequest) -> float:
    """How often a report is wanted, within what this service is ready to do."""
    wanted = request.report_interval.ToMilliseconds() / 1000
    return min(LONGEST_INTERVAL_SECONDS, max(SHORTEST_INTERVAL_SECONDS, wanted or DEFAULT_INTERVAL_SECONDS))
