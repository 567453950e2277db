"""One attempt at a line: a request of class batch through the mesh listener, in the name of the tenant."""

from __future__ import annotations

from typing import Any, Final

import grpc
from google.api import httpbody_pb2

from tidegate.batch.records import StoredBatch
from tidegate.common import headers
from tidegate.common.errors import Reason, TidegateError
from tidegate.common.remote_errors import from_rpc_error
from tidegate.v1 import inference_pb2_grpc

CLASS: Final = "batch"

ANSWER_BYTES_LIMIT: Final = 16 << 20
"""Of one answer."""


class InferenceClient:
    """Asks the mesh.

    Args:
        mesh: a channel to the mesh listener.
        timeout_seconds: for one attempt, its wait in the scheduler's lane included.
    """

    def __init__(self, mesh: grpc.aio.Channel, *, timeout_seconds: float) -> None:
        stub = inference_pb2_grpc.InferenceStub(mesh)
        self._calls: dict[str, Any] = {
            "/v1/chat/completions": stub.ChatCompletions,
            "/v1/completions": stub.Completions,
        }
        self._timeout_seconds = timeout_seconds

    async def ask(self, batch: StoredBatch, body: bytes, request_id: str) -> bytes:
        """Sends a line's body to the batch's endpoint; answers the answer's JSON.

        Raises:
            TidegateError: it was refused, or failed.
        """
        metadata = ((headers.TENANT, batch.tenant), (headers.SERVICE_CLASS, CLASS), (headers.REQUEST_ID, request_id))
        request = httpbody_pb2.HttpBody(content_type="application/json", data=body)
        call = self._calls[batch.endpoint](request, metadata=metadata, timeout=self._timeout_seconds)
        answer = bytearray()
        try:
            async for part in call:
                answer += part.data
                if len(answer) > ANSWER_BYTES_LIMIT:
                    raise TidegateError(Reason.INTERNAL_ERROR, f"The answer has more than {ANSWER_BYTES_LIMIT} bytes.")
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from error
        finally:
            call.cancel()
        return bytes(answer)
