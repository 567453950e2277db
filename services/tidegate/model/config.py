"""Every setting of the model service, with its unit, bound and reason. Variables: TIDEGATE_MODEL_<FIELD>."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

Port = Annotated[int, Meta(ge=0, le=65535)]
Seconds = Annotated[float, Meta(gt=0, le=86_400)]


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What one model service needs to know; one runs beside each Triton."""

    host: str = "127.0.0.1"
    """Where it listens; only Envoy's ingress listens beyond loopback."""
    port: Port = 50060
    metrics_port: Port = 51060
    """0 switches the metrics page off."""
    advertise_address: str = ""
    """ip:port of this replica as it stands in the endpoints. Empty: host and port."""
    mesh_address: str = "127.0.0.1:8081"
    """Envoy's mesh listener: the way to other replicas and to the cache."""
    endpoints_file: str = ""
    """The EDS file that Envoy's cluster `model` watches: the replicas that can take over. Empty: there are none."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"

    triton_address: str = "127.0.0.1:8001"
    """Triton's gRPC address."""
    triton_model_name: Annotated[str, Meta(min_length=1)] = "llm"
    model_path: str
    """A GGUF file or a Hugging Face folder, for tokenizer and template; the engine's own. Required."""
    max_context_tokens: Annotated[int, Meta(ge=2)] | None = None
    """The context in tokens, where the engine is set up with less than the model has. None: the model's own."""
    model_name: Annotated[str, Meta(min_length=1, max_length=128)] = "smollm2-135m-instruct"
    """The model's id, as clients say it."""
    lite_model_name: str = ""
    """The id of the mesh's lite model, which may be this one. Empty: there is none."""
    arena_region: str = "tidegate-tokens"
    """The shared-memory region in which preprocess writes prompts."""
    vllm_metric_names: bool = True
    """Publishes the engine's figures under vLLM's names too, for dashboards and routers that know those."""

    credit_lease_seconds: Annotated[float, Meta(ge=0.2, le=60)] = 5.0
    """How long a scheduler may spend a credit; a lost one costs its slot for about half of this."""
    credit_grace_seconds: Annotated[float, Meta(ge=0, le=10)] = 1.0
    """How much longer a credit is honoured, for the request on its way: Envoy's retries and a slow loop."""
    credit_protected_seconds: Annotated[float, Meta(ge=0, le=10)] = 0.25
    """A younger credit may be on its way with a request: it is not revoked for another scheduler's demand."""
    slot_limit: Annotated[int, Meta(ge=0, le=100_000)] = 0
    """Bounds the requests that run at once below the engine's own bound. 0: the engine's."""
    queue_limit: Annotated[int, Meta(ge=0, le=100_000)] = 256
    """Requests without a credit that wait here; it serves when no scheduler does."""
    refuses_late: bool = True
    """Refuses, of these, what would have its answer only after its deadline, by how long slots are held on average."""
    overflow_slot_count: Annotated[int, Meta(ge=0, le=1_000)] = 8
    """Resumed requests that may run above the slots; their clients were promised an answer."""

    tpot_target_seconds: Annotated[float, Meta(ge=0, le=60)] = 0.0
    """Fewer requests run at once while a token takes longer than this. 0: no target, the default, for a processor's
    tokens take 50 ms where a GPU's take 5; no number suits both, and a wrong one would throw throughput away."""
    credit_ahead_limit: Annotated[int, Meta(ge=0, le=64)] = 4
    """The most credits above the slots, while requests wait: as many as slots would stand empty on average between
    two requests. 0: none."""
    preempting_share: Annotated[float, Meta(ge=0, le=1)] = 0.5
    """The share of the slots whose batch requests may be paused for realtime ones at once; the rest of batch goes on.
    0: none."""

    default_timeout_seconds: Seconds = 600.0
    """The deadline of a request that has none."""
    longest_timeout_seconds: Seconds = 7_200.0
    """The longest that a request may take, whatever deadline it has: it bounds how long a slot can be held."""
    resume_wait_seconds: Seconds = 30.0
    """How long a broken stream looks for a replica to go on, its own Triton included."""
    resume_backoff_seconds: Annotated[float, Meta(gt=0, le=10)] = 0.25
    """Between two rounds of looking."""
    stream_buffer_token_limit: Annotated[int, Meta(ge=1, le=1_000_000)] = 4096
    """Tokens kept for a client that reads slowly; past it, its stream takes no more from the engine's client."""
    batch_delta_seconds: Annotated[float, Meta(ge=0, le=10)] = 0.25
    """The shortest time between two pieces of a batch answer: nobody watches it grow, and each piece costs processor
    time on its whole way. 0: each token as it comes."""
    write_grace_seconds: Seconds = 5.0
    """How long past its deadline a stream waits for a client that does not read."""
    many_limit: Annotated[int, Meta(ge=1, le=256)] = 256
    """Answers under way on one GenerateMany stream; the protocol says 256."""
    many_write_seconds: Seconds = 60.0
    """How long one event of a GenerateMany stream waits for a client that does not read; past it the stream ends."""
    record_queue_limit: Annotated[int, Meta(ge=0, le=100_000)] = 256
    """Finished answers that wait to be sent to the cache; more are dropped and counted."""
    record_timeout_seconds: Seconds = 2.0
    """How long the cache may take to store one."""
    tensor_lease_seconds: Annotated[float, Meta(ge=1, le=3_600)] = 30.0
    """The lease that a running request keeps on its prompt in shared memory, renewed at a third of it."""
    inline_prepare_bytes: Annotated[int, Meta(ge=0)] = 16_384
    """A larger request is tokenized in a thread, so that it does not hold up the streams."""
    load_report_seconds: Annotated[float, Meta(ge=0.005, le=1)] = 0.02
    """The shortest time between two loads to a scheduler."""
    load_poll_seconds: Annotated[float, Meta(ge=0.05, le=10)] = 0.5
    """Between two looks at Triton's readiness; it is also the longest time until its return is seen."""

    @property
    def is_lite(self) -> bool:
        """Whether this is a replica of the lite model."""
        return self.model_name == self.lite_model_name

    @property
    def address(self) -> str:
        """The replica's name."""
        return self.advertise_address or f"{self.host}:{self.port}"
