"""Every setting of the batch service, with its unit, its bounds and its reason."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

Port = Annotated[int, Meta(ge=0, le=65535)]
Seconds = Annotated[float, Meta(gt=0)]
Count = Annotated[int, Meta(ge=1)]

DAY_SECONDS = 86_400


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """The settings of one batch process."""

    folder: str
    """Where files and batches are kept. One process at a time has it."""

    host: str = "127.0.0.1"
    """Where it listens. Only Envoy calls it, so loopback unless Envoy is on another host."""

    port: Port = 50054
    """tidegate.v1.Batch; 0 lets the system choose."""

    metrics_port: Port = 51054
    """Prometheus; 0 is off."""

    mesh_address: str = "127.0.0.1:8081"
    """Envoy's mesh listener, through which the lines are sent and the scheduler is watched."""

    log_level: Annotated[str, Meta(pattern="^(debug|info|warning|error)$")] = "info"
    """debug adds a line for every line of a batch."""

    in_flight_limit: Annotated[int, Meta(ge=1, le=4096)] = 8
    """The most lines sent and not answered, of all batches together. Few: what they hold is slow to give back when
    others come."""

    urgent_waiting_limit: Annotated[int, Meta(ge=0)] = 0
    """With more realtime and standard requests than this waiting at the scheduler, no further line is sent."""

    reserved_credit_count: Annotated[int, Meta(ge=0)] = 1
    """Credits that are left in the scheduler's hand for whoever comes next."""

    watch_interval_seconds: Annotated[float, Meta(ge=0.1, le=60)] = 0.25
    """How often the scheduler says what is spare, while there are lines to send."""

    watch_silence_seconds: Seconds = 3.0
    """A scheduler that says nothing for so long is not known to have room: nothing is sent."""

    line_timeout_seconds: Annotated[float, Meta(gt=0, le=3_600)] = 3_600.0
    """How long one attempt at a line may take, its wait in the scheduler's lane included."""

    attempt_limit: Count = 3
    """How often a line is tried that fails by a fault or by its time-out; refusals for lack of room do not count."""

    shortest_pause_seconds: Seconds = 0.5
    """The least time that nothing is sent after a refusal for lack of room; doubled with each in a row."""

    longest_pause_seconds: Seconds = 60.0
    """The most of it, whatever the refusal says: the watch tells better when there is room."""

    file_bytes_limit: Annotated[int, Meta(ge=1024, le=1 << 30)] = 100 << 20
    """The largest file that is taken."""

    line_bytes_limit: Annotated[int, Meta(ge=1024, le=15 << 20)] = 4 << 20
    """The largest line of a file; Envoy takes no larger request."""

    line_count_limit: Count = 50_000
    """The most lines of a batch; OpenAI's own bound."""

    files_per_tenant_limit: Count = 1_000
    """Files kept for one tenant, output files included; at the limit, uploads are refused."""

    bytes_per_tenant_limit: Annotated[int, Meta(ge=1024)] = 4 << 30
    """Bytes kept for one tenant; at the limit, uploads are refused."""

    open_batches_per_tenant_limit: Count = 10
    """Batches of one tenant that have not ended; their lines lie in the database."""

    open_batch_limit: Count = 200
    """The same of all tenants together."""

    upload_limit: Count = 8
    """Uploads at once; past it they are told to come back."""

    upload_timeout_seconds: Seconds = 600.0
    """How long one upload may take."""

    lifetime_seconds: Annotated[int, Meta(ge=3_600)] = 30 * DAY_SECONDS
    """How long files are kept, and batches after their end."""

    sweep_interval_seconds: Seconds = 600.0
    """How often what is too old is removed."""
