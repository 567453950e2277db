"""Every setting of the scheduler, with its unit, its bounds and its reason."""

from __future__ import annotations

from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta

Port = Annotated[int, Meta(ge=0, le=65535)]
Seconds = Annotated[float, Meta(gt=0)]
Count = Annotated[int, Meta(ge=1)]
Share = Annotated[float, Meta(gt=0, le=1)]

LARGEST_FLOORS: Final = 0.9
"""Of both floors together; the rest is realtime's."""


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """The settings of one scheduler process."""

    host: str = "127.0.0.1"
    """Where it listens. Only Envoy calls it, so loopback unless Envoy is on another host."""

    port: Port = 50051
    """ext_proc and tidegate.v1.Scheduler; 0 lets the system choose."""

    metrics_port: Port = 51051
    """Prometheus; 0 is off."""

    mesh_address: str = "127.0.0.1:8081"
    """Envoy's mesh listener, through which preprocess and cache are reached."""

    log_level: Annotated[str, Meta(pattern="^(debug|info|warning|error)$")] = "info"
    """debug adds a line for every dispatched request."""

    endpoints_file: str = "mesh/endpoints/model.yaml"
    """The file from which Envoy, too, learns the replicas of cluster `model`."""

    lite_endpoints_file: str = ""
    """The same for cluster `lite`, the replicas of the lite model. Empty: there is no lite model."""

    lite_model_name: str = ""
    """The id of the lite model, as clients say it. Goes with `lite_endpoints_file`."""

    lite_prompt_token_limit: Annotated[int, Meta(ge=0)] = 0
    """Standard requests whose prompts have at most so many tokens go to the lite model while it has room, however
    little there is to do. 0: none do."""

    schedulers_file: str = ""
    """The same for cluster `scheduler`: all schedulers of the mesh, this one among them, which are asked about requests
    that do not wait here. Empty: this is the only one."""

    endpoints_poll_seconds: Annotated[float, Meta(ge=0.05, le=60)] = 0.5
    """How often these files are looked at. A poll costs one stat, and works on every file system."""

    held_request_limit: Count = 25_000
    """The most requests at once in any stage, those in preparation included; past it, headers are refused."""

    shed_file: str = ""
    """The file from which Envoy learns what to refuse before it asks here. Empty: nothing is refused so."""

    shed_late_seconds: Annotated[float, Meta(gt=0, le=5)] = 0.5
    """What comes so late, all through an interval, is more than can be decided. A burst may be late for a moment; at
    ten times of what can be decided, those who come when this is noticed wait ten times as long."""

    shed_drain_seconds: Seconds = 2.0
    """In this time what has piled up is to be decided."""

    shed_interval_seconds: Annotated[float, Meta(ge=0.02, le=1)] = 0.1
    """How often the shares are thought over."""

    limits_file: str = ""
    """The file from which Envoy learns which tenants to limit, because nearly all that they ask for is refused. Empty:
    nobody is limited so."""

    limit_interval_seconds: Annotated[float, Meta(ge=0.1, le=60)] = 1.0
    """How often these limits are thought over."""

    latest_look_seconds: Annotated[float, Meta(gt=0, le=60)] = 5.0
    """What is looked at later than this is refused, cheaply, from its headers: well before Envoy stops waiting
    (10 s) and lets it pass all queues."""

    realtime_request_limit: Count = 10_000
    """The most requests that wait in the lane of this class."""

    standard_request_limit: Count = 10_000
    """The same for standard."""

    batch_request_limit: Count = 10_000
    """The same for batch."""

    lane_token_limit: Count = 50_000_000
    """The most prompt and expected answer tokens that wait in one lane."""

    lane_byte_limit: Count = 1024 * 1024 * 1024
    """The most bytes of bodies that wait in Envoy for one lane: they are Envoy's memory."""

    waiting_request_limit: Count = 20_000
    """The most requests that wait in all lanes together. Whatever waits in the others, a lane may hold its own share of
    it: its floor, or what the floors leave to realtime; so they can be more for a while, but not twice as many."""

    waiting_token_limit: Count = 100_000_000
    """The same in prompt and expected answer tokens."""

    waiting_byte_limit: Count = 2 * 1024 * 1024 * 1024
    """The same in bytes of bodies."""

    tenant_share: Share = 0.5
    """What one tenant may use of a lane's bounds, so that it does not keep the others out; where there are no API
    keys, everybody is the one tenant `default`, which may use all."""

    standard_floor: Annotated[float, Meta(ge=0, le=0.5)] = 0.1
    """The share that standard gets at least of all that is dispatched while more of it is asked for, in cost. Realtime
    has what the two floors leave, and whatever they do not use."""

    batch_floor: Annotated[float, Meta(ge=0, le=0.5)] = 0.02
    """The same for batch."""

    order: Literal["fcfs", "wfq", "edf", "srpt"] = "fcfs"
    """In what order the requests of one tenant leave; see ordering.py."""

    tenant_weights: dict[str, Annotated[float, Meta(gt=0, le=1_000)]] = {}
    """Of tenants by name; one with twice the weight is served twice as much when there is not enough. Others: 1."""

    answer_quantile: Share = 0.8
    """An answer is expected to have so many tokens as this share of the tenant's answers had at most."""

    brownout_queue_delay_seconds: Seconds = 2.0
    """A class whose oldest request has waited longer fares badly; see brownout.py."""

    brownout_first_token_seconds: Seconds = 0.5
    """So does one whose 95th percentile of the time to first token is above this, and above what the engine does
    without any queue."""

    brownout_up_seconds: Seconds = 2.0
    """After so long a time the next step is taken."""

    brownout_down_seconds: Seconds = 2.0
    """After so long a time without it, a step is taken back."""

    brownout_max_tokens: Count = 256
    """What answers are cut to by the steps that shorten them."""

    realtime_deadline_seconds: Seconds = 120.0
    """How long a realtime request without a deadline of its own may wait for a replica; its answer is not bounded
    by it."""

    standard_deadline_seconds: Seconds = 600.0
    """The same for standard; 600 s is also what OpenAI's own clients wait."""

    batch_deadline_seconds: Seconds = 3_500.0
    """The same for batch."""

    body_wait_seconds: Annotated[float, Meta(gt=0, le=3_600)] = 60.0
    """How long a body may take after its headers. Envoy itself would wait for an hour, at the cost of a place here."""

    longest_hold_seconds: Annotated[float, Meta(gt=0, le=86_400)] = 3_590.0
    """No request is held longer. Below Envoy's max_message_timeout (3600 s): Envoy ignores a longer override."""

    expected_answer_token_count: Count = 256
    """What an answer is expected to have, where max_tokens does not say less."""

    bytes_per_token: Annotated[float, Meta(ge=1, le=64)] = 4.0
    """For the estimate of a prompt that preprocess did not read."""

    prepare_timeout_seconds: Seconds = 0.15
    """The time that preprocess has before the request goes on with an estimate."""

    prepare_patience_seconds: Seconds = 10.0
    """The same for a request that no replica could take now: it loses nothing by waiting for its tokens."""

    prepare_in_flight_limit: Annotated[int, Meta(ge=1, le=1_024)] = 1_024
    """The most prompts at once on the stream; preprocess reads no further than 1,024."""

    cache_timeout_seconds: Seconds = 0.02
    """The time that the cache has before the answer counts as unknown."""

    dependency_failure_limit: Count = 5
    """After so many failures in a row a dependency is left out for a while."""

    dependency_pause_seconds: Seconds = 1.0
    """For how long it is left out."""

    latency_weight: Annotated[float, Meta(ge=0, le=1)] = 0.6
    """What the expected latency counts in a replica's score."""

    queue_weight: Annotated[float, Meta(ge=0, le=1)] = 0.4
    """What the replica's own queue counts in its score."""

    prefix_weight: Annotated[float, Meta(ge=0, le=1)] = 1.0
    """What the part of a prompt counts that a replica does not hold and another does. It acts only on replicas that say
    that they reuse prefixes."""

    prefix_block_limit: Annotated[int, Meta(ge=1, le=4_096)] = 256
    """The blocks of a prompt, from its beginning, that are compared: 256 are 4,096 tokens, and 2 KiB a request."""

    prefix_memory_blocks: Annotated[int, Meta(ge=1, le=10_000_000)] = 65_536
    """The blocks remembered of each replica; about 10 MB each."""

    placement_policy: Literal["score", "two_choices", "round_robin", "least_request"] = "score"
    """score looks at all replicas; two_choices at two that are drawn, for very many; the others are for comparison."""

    breaker_failure_limit: Count = 5
    """A replica's breaker opens after so many failures in a row."""

    breaker_slow_limit: Count = 10
    """The same after so many slow answers in a row; a healthy one is called slow less than once in ten answers."""

    breaker_slow_factor: Annotated[float, Meta(ge=0, le=100)] = 1.2
    """Slow is more than so many times the time that nine tenths of the other replicas' answers kept (T90), by size.
    0: only failures count; for replicas of very different speed on purpose."""

    breaker_slow_quantile: Share = 0.9
    """Another share of the answers than nine tenths, whose time is multiplied."""

    breaker_open_seconds: Seconds = 5.0
    """For how long it gets nothing; twice as long each time, up to 60 s."""

    breaker_probe_limit: Count = 2
    """Requests at once that probe it then; as many good answers close the breaker."""

    start_share: Share = 0.125
    """Of a replica's slots, how many prompts are computed at once: each makes the first tokens of the others later, and
    a replica that fills up computes them one after the other anyway. At least 4, and twice as many as it takes for as
    many to begin as end."""

    batch_start_share: Share = 0.0625
    """A batch request goes to a replica only while fewer prompts than this share of its slots (2 at least) are computed
    there, so that realtime ones that come find it nearly free."""

    slow_start_seconds: Annotated[float, Meta(ge=0, le=600)] = 3.0
    """Until a new or returned replica may use all its slots, while another has been here longer. 0: at once."""

    alternative_count: Annotated[int, Meta(ge=0, le=16)] = 2
    """How many next best replicas are named beside the best, for Envoy's retries."""

    credit_margin_seconds: Annotated[float, Meta(ge=0, le=60)] = 0.25
    """A credit with less than this left of its lease is not spent: the request could arrive after its end."""

    demand_interval_seconds: Annotated[float, Meta(ge=0.001, le=10)] = 0.02
    """The least time between two demands on one credit stream."""

    replica_silence_seconds: Seconds = 3.0
    """A replica that says nothing for this long gets no new requests; it promises a word every second."""

    replica_grace_seconds: Annotated[float, Meta(ge=0)] = 5.0
    """With no replica for this long, new requests are refused with REPLICA_UNAVAILABLE; before, they wait."""

    replica_absence_limit_seconds: Annotated[float, Meta(ge=0)] = 60.0
    """With no replica for this long, those that wait are refused too."""

    drain_half_life_seconds: Seconds = 5.0
    """How fast the measured drain rate forgets."""

    default_retry_seconds: Seconds = 5.0
    """When to try again, as long as no drain rate is known."""

    tick_seconds: Annotated[float, Meta(ge=0.01, le=10)] = 0.25
    """How often leases, absence and in-flight counts are looked after."""

    anomalies_enabled: bool = False
    """Whether tenants whose requests are unlike the others' are looked for; theirs go to the batch lane."""

    anomaly_window_seconds: Annotated[float, Meta(ge=1, le=600)] = 10.0
    """A tenant's requests of so long are told by one set of numbers."""

    anomaly_interval_seconds: Annotated[float, Meta(ge=1, le=3_600)] = 30.0
    """How often tenants are judged. It takes a thread some tenths of a second."""

    anomaly_flag_seconds: Annotated[float, Meta(ge=1, le=86_400)] = 120.0
    """How long a flag holds after the last judgement that found the tenant abnormal."""

    anomaly_score_threshold: Annotated[float, Meta(gt=0, le=1)] = 0.55
    """From this score on a tenant is abnormal; ordinary ones have less than 0.5."""

    anomaly_deviation_threshold: Annotated[float, Meta(gt=0)] = 4.0
    """And what stands out must be so many spreads above the other tenants."""

    anomaly_tenant_minimum: Annotated[int, Meta(ge=3)] = 8
    """With fewer tenants nobody is flagged: there is no telling what is usual."""

    anomaly_sample_minimum: Count = 64
    """The same for windows of all tenants together."""

    anomaly_tenant_limit: Annotated[int, Meta(ge=8, le=10_000)] = 1_000
    """Tenants that are remembered; who asked longest ago is forgotten."""

    def __post_init__(self) -> None:
        if self.latency_weight + self.queue_weight <= 0:
            raise ValueError("latency_weight and queue_weight: at least one must be above 0")
        if bool(self.lite_endpoints_file) != bool(self.lite_model_name):
            raise ValueError("lite_endpoints_file and lite_model_name: neither goes without the other")
        if self.standard_floor + self.batch_floor > LARGEST_FLOORS:
            raise ValueError(f"standard_floor and batch_floor: together at most {LARGEST_FLOORS}, or realtime starves")
        if self.replica_absence_limit_seconds < self.replica_grace_seconds:
            raise ValueError("replica_absence_limit_seconds: must be at least replica_grace_seconds")
        if self.prepare_patience_seconds < self.prepare_timeout_seconds:
            raise ValueError("prepare_patience_seconds: must be at least prepare_timeout_seconds")
