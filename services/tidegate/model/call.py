"""One call as the model service sees it: what its headers say, what it asks for, and the record of how it went."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable
from typing import Final

import msgspec

from tidegate.common import headers
from tidegate.model.credits import Spent
from tidegate.model.prompts import HeldPrompt
from tidegate.v1 import inference_pb2, replica_pb2

CLASS_NAMES: Final = {
    inference_pb2.SERVICE_CLASS_REALTIME: "realtime",
    inference_pb2.SERVICE_CLASS_STANDARD: "standard",
    inference_pb2.SERVICE_CLASS_BATCH: "batch",
}

ENGINE_PRIORITIES: Final = {"realtime": 0, "standard": 1, "batch": 2}
"""The engine's order of prefill and preemption; lower is more urgent."""

ANSWER_KEY_CHARACTERS: Final = 64

DEADLINE_MARGIN_SHARE: Final = 0.05
LONGEST_DEADLINE_MARGIN_SECONDS: Final = 0.02
"""A gRPC deadline is kept so much early, so that its status still reaches the client before it gives up."""


class CallHeaders(msgspec.Struct, frozen=True, kw_only=True):
    """The mesh's headers of one call; an absent one is empty."""

    request_id: str = ""
    tenant: str = headers.DEFAULT_TENANT
    service_class: str = ""
    credit: str = ""
    tensor: str = ""
    answer_key: bytes = b""
    timeout_seconds: float | None = None
    queue_seconds: float = 0.0
    sent_at: float | None = None
    """When the scheduler sent it, in Unix seconds."""
    max_tokens: int | None = None
    """A bound that the scheduler sets in a brownout; None for none."""
    brownout: str = ""
    """The step of the brownout that touched the request."""
    lite: str = ""
    """Why it came to the lite model, where it did."""
    is_owed: bool = False
    """Its class's floor pays for it."""
    resumed: bool = False
    """Another replica hands the request over."""


def read_headers(metadata: Iterable[tuple[str, str | bytes]] | None) -> CallHeaders:
    """Reads a call's metadata. Headers come from the mesh itself; one that makes no sense is as if absent."""
    found = {key: value for key, value in metadata or () if isinstance(value, str)}
    timeout_ms = _whole(found.get(headers.TIMEOUT_MS))
    return CallHeaders(
        request_id=found.get(headers.REQUEST_ID, ""),
        tenant=found.get(headers.TENANT) or headers.DEFAULT_TENANT,
        service_class=found.get(headers.SERVICE_CLASS, ""),
        credit=found.get(headers.CREDIT, ""),
        tensor=found.get(headers.TENSOR, ""),
        answer_key=_answer_key(found.get(headers.ANSWER_KEY, "")),
        timeout_seconds=None if timeout_ms is None else timeout_ms / 1000,
        queue_seconds=_number(found.get(headers.QUEUE_MS, "")) / 1000,
        sent_at=_number(found.get(headers.SENT, "")) or None,
        max_tokens=_whole(found.get(headers.MAX_TOKENS)),
        brownout=found.get(headers.BROWNOUT, ""),
        lite=found.get(headers.LITE, ""),
        is_owed=headers.FLOOR in found,
        resumed=headers.RESUME in found,
    )


def time_allowed_seconds(
    call: CallHeaders,
    grpc_remaining_seconds: float | None,
    *,
    late_seconds: float,
    default_seconds: float,
    longest_seconds: float,
) -> float:
    """How long the call may take from now.

    Args:
        late_seconds: since the scheduler sent it with the time that was left then.
        default_seconds: for a call that has neither a gRPC deadline nor the header.
        longest_seconds: bounds every call.
    """
    bounds = []
    if call.timeout_seconds is not None:
        bounds.append(call.timeout_seconds - late_seconds)
    if grpc_remaining_seconds is not None:
        margin = min(LONGEST_DEADLINE_MARGIN_SECONDS, grpc_remaining_seconds * DEADLINE_MARGIN_SHARE)
        bounds.append(grpc_remaining_seconds - margin)
    return max(0.0, min(longest_seconds, *(bounds or [default_seconds])))


class Job(msgspec.Struct, kw_only=True, eq=False):
    """An accepted request: everything that its generation needs."""

    request: inference_pb2.GenerateRequest
    """Concrete: `sampling.seed` and `max_tokens` are there, so that it can go on elsewhere."""
    request_id: str
    """The client's own name for the request, which its events carry; the mesh's where it gave none."""
    call: CallHeaders
    service_class: str
    prompt: HeldPrompt
    record: Record
    spent: Spent | None = None
    """The credit that it spent, once it has a slot."""

    @property
    def priority(self) -> int:
        """The engine's, which pauses lower ones for higher ones."""
        return ENGINE_PRIORITIES["realtime" if self.call.is_owed else self.service_class]

    @property
    def max_tokens(self) -> int:
        """The most tokens of the answer, those resumed included."""
        return self.prompt.max_tokens


class Record(msgspec.Struct, kw_only=True, eq=False):
    """How one request went; seconds are of the service's monotonic clock."""

    operation: str
    """chat, text_completion or generate_content, as OpenTelemetry has it."""
    request_id: str
    """The request's id in the mesh."""
    tenant: str
    client_request_id: str = ""
    credit_id: str = ""
    """What the request carried; empty for none."""
    service_class: str = "standard"
    arrived_at: float
    deadline: float
    queue_seconds: float = 0.0
    prepared_at: float | None = None
    slot_at: float | None = None
    first_token_at: float | None = None
    last_token_at: float | None = None
    ended_at: float | None = None
    prompt_token_count: int = 0
    cached_token_count: int = 0
    """Of the prompt's tokens those that the engine had computed for others."""
    prior_token_count: int = 0
    """Tokens of the answer that came with the request."""
    completion_token_count: int = 0
    max_tokens: int = 0
    resumed_count: int = 0
    """How often the stream went on elsewhere."""
    finish_reason: str = ""
    outcome: replica_pb2.RequestOutcome.ValueType = replica_pb2.REQUEST_OUTCOME_UNSPECIFIED
    reason: str = ""
    """The reason word of an error; empty for none."""

    @property
    def time_to_first_token_seconds(self) -> float | None:
        """From arrival here to the first token; None while there is none."""
        return None if self.first_token_at is None else self.first_token_at - self.arrived_at


def make_concrete(
    request: inference_pb2.GenerateRequest, prompt: HeldPrompt, model_name: str, dice: random.Random
) -> None:
    """Fills in what would be drawn or derived anew elsewhere: the model, the seed and the bound on tokens."""
    request.model = model_name
    request.max_tokens = prompt.max_tokens
    if not request.sampling.HasField("seed"):
        request.sampling.seed = dice.getrandbits(63)


def class_of(request: inference_pb2.GenerateRequest, call: CallHeaders) -> str:
    """The class: the scheduler's word, else the request's own, else standard."""
    if call.service_class in ENGINE_PRIORITIES:
        return call.service_class
    return CLASS_NAMES.get(request.service_class, "standard")


def _whole(text: str | None) -> int | None:
    return int(text) if text and text.isascii() and text.isdigit() and len(text) < 12 else None


def _number(text: str) -> float:
    try:
        value = float(text or 0)
    except ValueError:
        return 0.0
    return value if 0 <= value < math.inf else 0.0


def _answer_key(text: str) -> bytes:
    if len(text) != ANSWER_KEY_CHARACTERS:
        return b""
    try:
        return bytes.fromhex(text)
    except ValueError:
        return b""
