"""What a failed call to another service of the mesh means here."""

from __future__ import annotations

from typing import Final

import grpc
from google.protobuf.message import DecodeError
from google.rpc import status_pb2

from tidegate.common.errors import Reason, TidegateError, from_status

_DETAILS: Final = "grpc-status-details-bin"

_REASON_OF_STATUS: Final = {
    grpc.StatusCode.CANCELLED: Reason.CANCELLED,
    grpc.StatusCode.INVALID_ARGUMENT: Reason.INVALID_VALUE,
    grpc.StatusCode.DEADLINE_EXCEEDED: Reason.DEADLINE_EXCEEDED,
    grpc.StatusCode.UNAVAILABLE: Reason.REPLICA_UNAVAILABLE,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Reason.SERVER_IS_OVERLOADED,
}
"""For statuses without details: those of Envoy and of gRPC itself."""


def from_rpc_error(error: grpc.aio.AioRpcError) -> TidegateError:
    """The error that the other service told, or the one that its bare status stands for."""
    for key, value in error.trailing_metadata() or ():
        if key == _DETAILS and isinstance(value, bytes):
            try:
                return from_status(status_pb2.Status.FromString(value))
            except DecodeError:
                break
    reason = _REASON_OF_STATUS.get(error.code(), Reason.INTERNAL_ERROR)
    return TidegateError(reason, error.details() or error.code().name, retry_after_seconds=1.0)
