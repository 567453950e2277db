"""Channels to the rest of the mesh: one set of options, bounds and keepalive for all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import grpc

from tidegate.common.grpc_server import LARGEST_MESSAGE_BYTES

CHANNEL_OPTIONS: Final[Sequence[tuple[str, int]]] = (
    ("grpc.max_receive_message_length", LARGEST_MESSAGE_BYTES),
    ("grpc.max_send_message_length", LARGEST_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 5_000),
    ("grpc.keepalive_timeout_ms", 2_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    # Each service owns its retries; the transparent ones of grpc would hide a replica that fails.
    ("grpc.enable_retries", 0),
    ("grpc.use_local_subchannel_pool", 1),
)


def open_channel(address: str) -> grpc.aio.Channel:
    """A channel to `address` (host:port): the mesh listener, or one replica where a call speaks of that replica."""
    return grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
