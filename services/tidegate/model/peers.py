"""Other replicas: which there are, and an answer that goes on at one of them.

The list comes from the file in which Envoy reads the endpoints of its cluster `model`, read anew at each use (a
stream breaks seldom). The call goes through the mesh listener, so that Envoy keeps its breakers and statistics.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from pathlib import Path

import grpc
import structlog

from tidegate.common import headers
from tidegate.common.endpoints import EndpointsError, parse_endpoints
from tidegate.common.errors import Reason, TidegateError, from_status
from tidegate.common.remote_errors import from_rpc_error
from tidegate.model.call import Job
from tidegate.model.tokens import Chunk
from tidegate.v1 import inference_pb2, inference_pb2_grpc

log = structlog.get_logger()

_FINISH_WORDS = {inference_pb2.FINISH_REASON_STOP: "stop", inference_pb2.FINISH_REASON_LENGTH: "length"}


class Peers:
    """The other replicas of the model.

    Args:
        mesh: a channel to the mesh listener.
        endpoints_file: the EDS file; empty when there are no others.
        own_address: left out of the list.
    """

    def __init__(self, mesh: grpc.aio.Channel, endpoints_file: str, own_address: str) -> None:
        self._stub = inference_pb2_grpc.InferenceStub(mesh)
        self._endpoints_file = endpoints_file
        self._own_address = own_address

    def addresses(self) -> list[str]:
        """The others' ip:port, in the file's order; none when it cannot be read."""
        if not self._endpoints_file:
            return []
        try:
            addresses = parse_endpoints(Path(self._endpoints_file).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, EndpointsError) as error:
            log.warning("endpoints_unreadable", path=self._endpoints_file, error=str(error))
            return []
        return [address for address in addresses if address != self._own_address]

    async def continue_at(
        self, addresses: Sequence[str], job: Job, prompt_token_ids: Sequence[int], answer_token_ids: Sequence[int],
        timeout_seconds: float,
    ) -> AsyncGenerator[Chunk, None]:  # fmt: skip
        """Lets another replica go on with an answer.

        Raises:
            TidegateError: it refused, or could not finish it.
        """
        call = self._stub.Generate(
            continued(job.request, prompt_token_ids, answer_token_ids),
            timeout=timeout_seconds,
            metadata=(
                (headers.REPLICA, ",".join(addresses)),
                (headers.RESUME, str(len(answer_token_ids))),
                (headers.TENANT, job.call.tenant),
                (headers.SERVICE_CLASS, job.service_class),
                (headers.REQUEST_ID, job.record.request_id),
                *([(headers.FLOOR, "1")] if job.call.is_owed else ()),
                *([(headers.ROUTE, "lite"), (headers.LITE, job.call.lite)] if job.call.lite else ()),
            ),
        )
        given_count = len(answer_token_ids)
        try:
            async for event in call:
                if event.HasField("delta"):
                    given_count += len(event.delta.token_ids)
                    yield Chunk(token_ids=event.delta.token_ids, logprobs=event.delta.logprobs)
                elif event.HasField("finished"):
                    yield _end(event.finished, given_count)
                    return
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from error
        finally:
            call.cancel()
        raise TidegateError(Reason.REPLICA_UNAVAILABLE, "The other replica's stream ended without a last event.")


def continued(
    request: inference_pb2.GenerateRequest, prompt_token_ids: Sequence[int], answer_token_ids: Sequence[int]
) -> inference_pb2.GenerateRequest:
    """The request that goes on with the answer: same sampling, same bounds, prompt and answer as tokens."""
    copy = inference_pb2.GenerateRequest()
    copy.CopyFrom(request)
    copy.tokens.token_ids[:] = prompt_token_ids
    copy.resume.token_ids[:] = answer_token_ids
    copy.truncation = inference_pb2.TRUNCATION_POLICY_REFUSE
    return copy


def _end(finished: inference_pb2.Finished, given_count: int) -> Chunk:
    if finished.reason == inference_pb2.FINISH_REASON_ERROR:
        raise from_status(finished.error)
    unseen = finished.usage.completion_token_count - given_count
    return Chunk(
        token_ids=(),
        finish_reason=_FINISH_WORDS[finished.reason],
        unseen_token_count=max(0, unseen),
        cached_token_count=finished.usage.cached_token_count,
    )
