"""Every setting of preprocess, with its unit, its bounds and its reason."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

Port = Annotated[int, Meta(ge=0, le=65535)]


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """The settings of one preprocess process."""

    model_path: str
    """A GGUF file or a Hugging Face folder; only its tokenizer, template and metadata are read. Required."""

    model_name: str = "smollm2-135m-instruct"
    """The id by which clients ask for the model. It must be the model services' own."""

    lite_model_path: str = ""
    """The same of the lite model, for requests that ask for it by name. Empty: there is none."""

    lite_model_name: str = ""
    """The lite model's id."""

    max_context_tokens: Annotated[int, Meta(ge=2)] | None = None
    """The context in tokens, where the engine is set up with less than the model has. None: the model's own."""

    host: str = "127.0.0.1"
    """Where it listens. Only Envoy calls it, so loopback unless Envoy is on another host."""

    port: Port = 50052
    """tidegate.v1.Preprocess; 0 lets the system choose."""

    metrics_port: Port = 51052
    """Prometheus; 0 is off."""

    mesh_address: str = "127.0.0.1:8081"
    """Envoy's mesh listener. Preprocess calls nobody; every service has the setting."""

    log_level: Annotated[str, Meta(pattern="^(debug|info|warning|error)$")] = "info"
    """debug adds a line for every prompt."""

    arena_region: Annotated[str, Meta(pattern="^[A-Za-z0-9_-][A-Za-z0-9._-]{0,199}$")] = "tidegate-tokens"
    """The name of the shared-memory region; the model services of the host have the same."""

    arena_bytes: Annotated[int, Meta(ge=1 << 20, le=1 << 36)] = 64 << 20
    """The region's size, reserved at the start: 16 million tokens. When it is full, prompts travel without tokens
    and the model service prepares them itself."""

    lease_seconds: Annotated[float, Meta(ge=1, le=3600)] = 300.0
    """How long a prompt's tokens stay for whoever spends them. Above the longest usual wait in a queue; what waits
    longer is prepared again."""

    inline_body_bytes: Annotated[int, Meta(ge=0, le=16 << 20)] = 2_048
    """Bodies up to this size are prepared on the event loop: about 500 tokens, 1 ms; 9 ms for the worst text found
    (digits, a token each). A larger one would make the others wait for longer than the hop to a thread takes."""

    thread_count: Annotated[int, Meta(ge=1, le=64)] = 2
    """Threads for larger bodies. The tokenizer leaves Python's lock while it works, so they do run at once."""

    in_flight_limit: Annotated[int, Meta(ge=1, le=65_536)] = 1_024
    """The most requests under way on one stream, as preprocess.proto promises; past it the stream is not read."""

    in_flight_bytes: Annotated[int, Meta(ge=1 << 20, le=1 << 34)] = 64 << 20
    """The most bytes of bodies under way on one stream; a larger single body still goes, alone."""

    usage_interval_seconds: Annotated[float, Meta(gt=0, le=60)] = 5.0
    """Between two looks at the arena for the metrics. A look also takes back what was released; it costs 1 ms."""
