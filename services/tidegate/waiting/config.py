"""Every setting of the waiting room, with its unit, its bounds and its reason."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

Port = Annotated[int, Meta(ge=0, le=65535)]


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """The settings of one waiting room."""

    host: str = "127.0.0.1"
    """Where it listens. Only Envoy calls it, so loopback unless Envoy is on another host."""

    port: Port = 50055
    """tidegate.v1.Inference, of streams that tell their place; 0 lets the system choose."""

    metrics_port: Port = 51055
    """Prometheus; 0 is off."""

    mesh_address: str = "127.0.0.1:8081"
    """Envoy's mesh listener, through which each request goes on, and through which its place is asked for."""

    log_level: Annotated[str, Meta(pattern="^(debug|info|warning|error)$")] = "info"
    """debug adds a line for every stream; the service that answers writes the one line of each request anyway."""

    stream_limit: Annotated[int, Meta(ge=1, le=10_000)] = 2_000
    """The most streams at once, for each costs Python's time for every event; those past it go the ordinary way,
    without status."""

    least_interval_seconds: Annotated[float, Meta(ge=0.1, le=60)] = 0.5
    """Between two statuses on one stream."""

    longest_silence_seconds: Annotated[float, Meta(ge=0.1, le=60)] = 10.0
    """An unchanged status is said again after so long, because proxies end streams on which nothing moves."""

    write_seconds: Annotated[float, Meta(gt=0, le=3_600)] = 60.0
    """How long a client may leave one event unread."""

    def __post_init__(self) -> None:
        if self.longest_silence_seconds < self.least_interval_seconds:
            raise ValueError("longest_silence_seconds: must be at least least_interval_seconds")
