"""Every setting of the cache, with its unit, its bounds and its reason."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

Port = Annotated[int, Meta(ge=0, le=65535)]


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """The settings of one cache process."""

    host: str = "127.0.0.1"
    """Where it listens. Only Envoy calls it, so loopback unless Envoy is on another host."""

    port: Port = 50053
    """tidegate.v1.Cache and the replaying tidegate.v1.Inference; 0 lets the system choose."""

    metrics_port: Port = 51053
    """Prometheus; 0 is off."""

    mesh_address: str = "127.0.0.1:8081"
    """Envoy's mesh listener. The cache calls nobody; every service has the setting."""

    log_level: Annotated[str, Meta(pattern="^(debug|info|warning|error)$")] = "info"
    """debug adds a line for every look-up, record and replay."""

    memory_bytes: Annotated[int, Meta(ge=0, le=1 << 40)] = 256 << 20
    """What the answers in memory may take, their keys included; 0 turns the cache off. An answer of 500 tokens
    takes about 5 KB."""

    largest_answer_bytes: Annotated[int, Meta(ge=1, le=16 << 20)] = 1 << 20
    """A larger answer is not kept: one answer must not push out thousands."""

    time_to_live_seconds: Annotated[float, Meta(gt=0, le=31_536_000)] = 3_600.0
    """How long an answer is kept, and the most that a record may ask for. An exact answer stays true while the
    model's name means the same weights, so this bounds how long a changed model is hidden."""

    hold_seconds: Annotated[float, Meta(gt=0, le=60)] = 2.0
    """How long a look-up's hit is held for the replay that follows it. Envoy needs milliseconds; a retry on the
    cache's other process, a second."""
