"""A process of its own that takes every request and holds it, so that it can be stopped and killed.

Prints its port, then a line for each request that it holds.
"""

from __future__ import annotations

import asyncio

import grpc
from envoy.service.ext_proc.v3 import external_processor_pb2 as ext_proc
from envoy.service.ext_proc.v3 import external_processor_pb2_grpc as ext_proc_grpc

from tidegate.common.grpc_server import Server


class HoldingProcessor(ext_proc_grpc.ExternalProcessorServicer):
    async def Process(self, request_iterator, context: grpc.aio.ServicerContext):
        async for message in request_iterator:
            if message.HasField("request_headers"):
                yield ext_proc.ProcessingResponse(request_headers=ext_proc.HeadersResponse())
            else:
                hold = ext_proc.ProcessingResponse()
                hold.override_message_timeout.FromSeconds(3600)
                yield hold
                print("held", flush=True)
                await asyncio.Event().wait()


async def main() -> None:
    server = Server("127.0.0.1", 0)
    ext_proc_grpc.add_ExternalProcessorServicer_to_server(HoldingProcessor(), server.grpc)
    await server.start()
    print(server.port, flush=True)
    await asyncio.Event().wait()


asyncio.run(main())
