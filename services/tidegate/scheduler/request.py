"""A request as the scheduler knows it, from its headers to its dispatch. Pure data; times are monotonic seconds."""

from __future__ import annotations

import enum
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from tidegate.common import headers
from tidegate.v1 import tensor_pb2


class ServiceClass(enum.IntEnum):
    """The classes, most urgent first. The numbers are those of tidegate.v1.ServiceClass."""

    REALTIME = 1
    STANDARD = 2
    BATCH = 3

    @property
    def label(self) -> str:
        """As it stands in headers, logs and metrics."""
        return self.name.lower()


CLASSES_BY_LABEL: Final = {service_class.label: service_class for service_class in ServiceClass}

DEADLINE_MARGIN_SHARE: Final = 0.05
LONGEST_DEADLINE_MARGIN_SECONDS: Final = 0.02
"""A client's deadline is kept so much early, so that the refusal still reaches it before it gives up."""

LARGEST_RETRY_COUNT: Final = 100
"""More tries than this count as many."""

LONGEST_CLIENT_REQUEST_ID: Final = 128
"""Characters; what a client names its request with is cut there."""

_MILLISECONDS: Final = re.compile(r"[0-9]{1,10}")
_GRPC_TIMEOUT: Final = re.compile(r"([0-9]{1,8})([HMSmun])")
_GRPC_TIMEOUT_SECONDS: Final = {"H": 3600.0, "M": 60.0, "S": 1.0, "m": 1e-3, "u": 1e-6, "n": 1e-9}


@dataclass(slots=True, eq=False)
class Request:
    """One request.

    `arrived_at` is when it began to reach the mesh, `whole_at` when all of it had. `client_deadline` is when the
    client gives up, absent where it did not say. `deadline` is when the scheduler does: the client's, or a bound of
    the class on the wait alone, absent until that is known. `named_class` is the class that stands in the headers;
    it wins over what the body asks for. `header_fault` is the header that makes no sense, and what is wrong with
    it. `is_portable` is whether a model with another vocabulary can read its prompt. `offered_count` is how many
    like it came, those that Envoy refused for the scheduler included. `cost` is what the request counts between
    tenants, in tokens; `work` is what it is expected to take of replicas, in prompt tokens, and `expected_seconds`
    how long it is expected to run on one.
    """

    request_id: str
    path: str
    content_type: str
    is_encoded: bool
    tenant: str
    arrived_at: float
    whole_at: float
    client_deadline: float | None = None
    deadline: float | None = None
    body_arrived_at: float | None = None
    header_fault: tuple[str, str] | None = None
    named_class: ServiceClass | None = None
    service_class: ServiceClass = ServiceClass.STANDARD
    body_byte_count: int = 0
    prompt_token_count: int = 0
    answer_token_count: int = 0
    max_tokens: int = 0
    answer_key: bytes = b""
    block_hashes: tuple[int, ...] = ()
    tokens: tensor_pb2.Tensor | None = None
    queue_seconds: float = 0.0
    retry_count: int = 0
    offered_count: float = 1.0
    cost: float = 1.0
    work: float = 1.0
    expected_seconds: float = 0.0
    client_request_id: str = ""
    model: str = ""
    is_portable: bool = False

    @property
    def is_grpc(self) -> bool:
        """Whether the client speaks gRPC (or gRPC-Web), so that refusals must too."""
        return self.content_type.startswith("application/grpc")

    @property
    def token_count(self) -> int:
        """Prompt and expected answer tokens."""
        return self.prompt_token_count + self.answer_token_count


def request_from_headers(fields: Mapping[str, str], now: float) -> Request:
    """The request that these headers announce (names in lower case)."""
    timeout_seconds = parse_grpc_timeout(fields.get("grpc-timeout", ""))
    if timeout_seconds is None:
        timeout_seconds = parse_milliseconds(fields.get(headers.ASKED_TIMEOUT_MS, ""))
    deadline = None if timeout_seconds is None else now + timeout_seconds - _margin_seconds(timeout_seconds)
    named_class = CLASSES_BY_LABEL.get(fields.get(headers.SERVICE_CLASS, ""))
    return Request(
        request_id=fields.get(headers.REQUEST_ID, ""),
        path=fields.get(":path", "").partition("?")[0],
        content_type=fields.get("content-type", "").partition(";")[0].strip().lower(),
        is_encoded=fields.get("content-encoding", "identity") != "identity",
        tenant=fields.get(headers.TENANT, headers.DEFAULT_TENANT),
        arrived_at=now,
        whole_at=now,
        client_deadline=deadline,
        deadline=deadline,
        retry_count=_retry_count(fields),
        header_fault=_header_fault(fields),
        client_request_id=fields.get(headers.CLIENT_REQUEST_ID, "")[:LONGEST_CLIENT_REQUEST_ID],
        named_class=named_class,
        service_class=named_class or ServiceClass.STANDARD,
    )


def parse_grpc_timeout(text: str) -> float | None:
    """The seconds of a grpc-timeout header (gRPC over HTTP/2, "Timeout"); None when there is none, or no such thing."""
    match = _GRPC_TIMEOUT.fullmatch(text)
    if match is None:
        return None
    return int(match[1]) * _GRPC_TIMEOUT_SECONDS[match[2]]


def parse_milliseconds(text: str) -> float | None:
    """The seconds of a whole number of milliseconds; None when there is none, or no such thing."""
    return int(text) / 1000 if _MILLISECONDS.fullmatch(text) else None


def _header_fault(fields: Mapping[str, str]) -> tuple[str, str] | None:
    """The client's header that makes no sense, and what is wrong with it."""
    asked_class = fields.get(headers.SERVICE_CLASS, "")
    if asked_class and asked_class not in CLASSES_BY_LABEL:
        expected = ", ".join(CLASSES_BY_LABEL)
        return headers.ASKED_CLASS, f"{headers.ASKED_CLASS} is {asked_class!r}, expected one of {expected}"
    timeout = fields.get(headers.ASKED_TIMEOUT_MS, "")
    if timeout and parse_milliseconds(timeout) is None:
        name = headers.ASKED_TIMEOUT_MS
        return name, f"{name} is {timeout!r}, expected a whole number of milliseconds of at most ten digits"
    return None


def _retry_count(fields: Mapping[str, str]) -> int:
    """How often the client says that it has tried before: OpenAI's clients, and gRPC's own retries."""
    for name in ("x-stainless-retry-count", "grpc-previous-rpc-attempts"):
        text = fields.get(name, "")
        if text.isascii() and text.isdigit():
            return min(int(text[:4]), LARGEST_RETRY_COUNT)
    return 0


def _margin_seconds(timeout_seconds: float) -> float:
    return min(LONGEST_DEADLINE_MARGIN_SECONDS, timeout_seconds * DEADLINE_MARGIN_SHARE)
