"""A scheduler or a replica in a process of its own, so that it can be stopped and killed.

Takes every request and holds it without an answer. Prints its port, then a line for each request that it holds.
"""

from __future__ import annotations

import asyncio
import sys

import grpc
from envoy.service.ext_proc.v3 import external_processor_pb2 as ext_proc
from envoy.service.ext_proc.v3 import external_processor_pb2_grpc as ext_proc_grpc

from tidegate.common.grpc_server import Server
from tidegate.v1 import inference_pb2_grpc


async def hold() -> None:
    print("held", flush=True)
    await asyncio.Event().wait()


class HoldingScheduler(ext_proc_grpc.ExternalProcessorServicer):
    async def Process(self, request_iterator, context: grpc.aio.ServicerContext):
        async for message in request_iterator:
            if message.HasField("request_headers"):
                yield ext_proc.ProcessingResponse(request_headers=ext_proc.HeadersResponse())
            else:
                response = ext_proc.ProcessingResponse()
                response.override_message_timeout.FromSeconds(3600)
                yield response
                await hold()


class HoldingReplica(inference_pb2_grpc.InferenceServicer):
    async def ChatCompletions(self, request, context: grpc.aio.ServicerContext):
        await hold()
        yield None


async def main() -> None:
    server = Server("127.0.0.1", 0)
    ext_proc_grpc.add_ExternalProcessorServicer_to_server(HoldingScheduler(), server.grpc)
    inference_pb2_grpc.add_InferenceServicer_to_server(HoldingReplica(), server.grpc)
    await server.start()
    print(server.port, flush=True)
    await asyncio.Event().wait()


sys.exit(asyncio.run(main()))
