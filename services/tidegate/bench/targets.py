"""Where a load goes and how it is spoken to: data that a worker process can be given."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

import msgspec

from tidegate.bench.prompts import HIGHEST_TOKEN, LOWEST_TOKEN

Protocol = Literal["grpc", "grpc-web", "http"]
"""grpc: HTTP/2 by grpc.aio. grpc-web: the same messages over HTTP/1.1, at a fifth of the generator's CPU time, for what
has Envoy in front. http: OpenAI's API with server-sent events, for any server."""


class Target(msgspec.Struct, frozen=True, kw_only=True):
    """One server under load."""

    name: str = "tidegate"
    address: str
    """host:port."""
    protocol: Protocol = "grpc"
    model: str = ""
    """The model's id; empty for the server's default (HTTP servers other than Tidegate need one)."""
    api_keys: Mapping[str, str] = {}
    """By tenant. A tenant without one is sent without, and is then the server's default tenant."""
    connection_count: Annotated[int, msgspec.Meta(ge=1, le=256)] = 4
    """HTTP/2 connections a process; HTTP/1.1 opens one a stream."""
    http_path: str = "/v1/chat/completions"
    """Or /v1/completions, which takes prompts as tokens."""
    is_plain_openai: bool = False
    """Over HTTP: leaves out what only Tidegate and vLLM understand (the class, ignore_eos)."""
    class_headers: Mapping[str, Mapping[str, str]] = {}
    """Over HTTP, by class: more headers, for servers that know classes by other names."""
    lowest_token: int = LOWEST_TOKEN
    highest_token: int = HIGHEST_TOKEN
    """Prompts are made of the tokens of [lowest, highest)."""
    scheduler_addresses: tuple[str, ...] = ()
    """host:port of each tidegate.v1.Scheduler, for Watch; empty: they are not watched."""
    model_metrics_addresses: tuple[str, ...] = ()
    """host:port of the model services' metrics pages, to compare the counts; empty: they are not read."""
    envoy_admin_address: str = ""
    """host:port of Envoy's admin page, for what it refused by itself; empty: it is not read."""
    engine: str = ""
    """The engine's name (llm, llm_sim); where its answers are known beforehand they are checked (known_answers.py)."""
    model_path: str = ""
    """The model's files, for the vocabulary that such answers are made of."""
