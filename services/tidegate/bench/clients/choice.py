"""The client of a target's protocol."""

from __future__ import annotations

from collections.abc import Callable

from tidegate.bench.clients.answer import Client
from tidegate.bench.targets import Target


def open_client(target: Target, clock: Callable[[], float]) -> Client:
    """A client, not connected yet; only what its protocol needs is imported."""
    match target.protocol:
        case "grpc":
            from tidegate.bench.clients.grpc_client import GrpcClient

            return GrpcClient(target, clock)
        case "grpc-web":
            from tidegate.bench.clients.grpc_web import GrpcWebClient

            return GrpcWebClient(target, clock)
        case "http":
            from tidegate.bench.clients.sse import SseClient

            return SseClient(target, clock)
