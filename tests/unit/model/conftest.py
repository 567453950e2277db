"""A model whose tokens are bytes, an engine that says a given text, and a service made of both."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager

import numpy as np
import pytest
import tokenizers
from prometheus_client import CollectorRegistry
from tokenizers import models, pre_tokenizers

from tidegate.common.grpc_clients import open_channel
from tidegate.model.__main__ import ModelService
from tidegate.model.config import Settings
from tidegate.model.triton_client import EngineLoad, EngineOutput, EngineRequest, TritonGone
from tidegate.text.chat_template import ChatTemplate
from tidegate.text.model_files import PLAIN_CHAT_TEMPLATE, TextModel
from tidegate.text.tokenizer import Tokenizer, byte_level_alphabet

EOS = 256


@pytest.fixture(scope="session")
def byte_model() -> TextModel:
    encoder = tokenizers.Tokenizer(models.BPE(vocab=byte_level_alphabet(), merges=[]))
    encoder.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special_tokens = {"<|end|>": EOS}
    return TextModel(
        name="bytes",
        context_token_count=4096,
        vocabulary_size=257,
        eos_token_ids=(EOS,),
        bos_token_id=None,
        tokenizer=Tokenizer(encoder, special_tokens, lambda token_id: bytes([token_id]), 257, longest_token_bytes=7),
        chat_template=ChatTemplate(PLAIN_CHAT_TEMPLATE, special_texts=special_tokens, bos_text="", eos_text=""),
    )


class FakeTriton:
    """Says `answer` whatever is asked, `pace` seconds between tokens.

    `break_after`: the output tokens (prior ones included) at which its stream breaks, once.
    `wait_after`: the output tokens after which it waits for `go`.
    """

    def __init__(
        self,
        answer: str,
        *,
        pace: float = 0.0,
        break_after: int | None = None,
        wait_after: int | None = None,
        slots: int = 4,
        cached_token_count: int = 0,
    ) -> None:
        self.answer = answer.encode()
        self.pace = pace
        self.break_after = break_after
        self.wait_after = wait_after
        self.go = asyncio.Event()
        self.ready = False
        self.latest_load: EngineLoad | None = None
        self.on_load: list[Callable[[EngineLoad], None]] = []
        self.on_ready: list[Callable[[bool], None]] = []
        self.on_fault: list[Callable[[BaseException], None]] = []
        self.requests: list[EngineRequest] = []
        self.live: set[str] = set()
        self.cancelled: list[str] = []
        self.registered: list[str] = []
        self.slots = slots
        self.cached_token_count = cached_token_count

    async def start(self) -> None:
        self.show_load()
        self.set_ready(True)

    async def close(self) -> None:
        self.ready = False

    def set_ready(self, ready: bool) -> None:
        self.ready = ready
        for listener in self.on_ready:
            listener(ready)

    def show_load(self) -> None:
        self.latest_load = EngineLoad(len(self.live), 0, self.slots, 64, 100, 128, 16, 0)
        for listener in self.on_load:
            listener(self.latest_load)

    async def register_arena(self, region: str, byte_count: int) -> None:
        self.registered.append(region)

    def arena_is_registered(self, region: str) -> bool:
        return region in self.registered

    async def generate(self, request: EngineRequest) -> AsyncGenerator[EngineOutput, None]:
        self.requests.append(request)
        self.live.add(request.request_id)
        done = False
        try:
            for place in range(request.prior_output_count, request.max_tokens):
                if place == self.break_after:
                    self.break_after = None
                    raise TritonGone("killed")
                if place == self.wait_after:
                    await self.go.wait()
                await asyncio.sleep(self.pace)
                if place == len(self.answer):
                    done = True
                    yield EngineOutput(token_ids=[], finish_reason="stop", cached_token_count=self.cached_token_count)
                    return
                last = place + 1 == request.max_tokens
                done = last
                wanted = request.logprobs is not None
                yield EngineOutput(
                    token_ids=[self.answer[place]],
                    logprobs=[-0.5] if wanted else None,
                    top_token_ids=[[self.answer[place], 65]] if request.logprobs else None,
                    top_logprobs=[[-0.5, -1.5]] if request.logprobs else None,
                    finish_reason="length" if last else "",
                    cached_token_count=self.cached_token_count,
                )
                if last:
                    return
        finally:
            self.live.discard(request.request_id)
            if not done:
                self.cancelled.append(request.request_id)

    def prompt_of(self, place: int) -> list[int]:
        tokens = self.requests[place].tokens
        assert isinstance(tokens, np.ndarray)
        return tokens.tolist()


@pytest.fixture
def fake_triton():
    return FakeTriton


@pytest.fixture
def start_service(byte_model):
    """Starts model services on free ports: `async with start_service(triton, **settings) as service`.

    `before_start` gets the service before it runs; `on_fault` is told of the faults of its parts.
    """

    @asynccontextmanager
    async def start(
        triton: FakeTriton,
        mesh_address: str = "127.0.0.1:1",
        before_start: Callable[[ModelService], None] = lambda service: None,
        on_fault: Callable[[BaseException], None] = lambda fault: None,
        **changes: object,
    ) -> AsyncIterator[ModelService]:
        settings = Settings(
            **{
                "model_path": "",
                "model_name": "bytes",
                "port": 0,
                "metrics_port": 0,
                "arena_region": "tidegate-test-none",
                "load_poll_seconds": 0.05,
                "mesh_address": mesh_address,
                **changes,
            }
        )
        mesh = open_channel(mesh_address)
        service = ModelService(settings, byte_model, triton, mesh, registry=CollectorRegistry(), on_fault=on_fault)
        before_start(service)
        await service.start()
        try:
            yield service
        finally:
            await service.server.grpc.stop(None)
            await service.close()
            await mesh.close()

    return start


@pytest.fixture
def channel_to():
    """Channels that are closed after the test."""
    channels = []

    def connect(service: ModelService):
        channel = open_channel(f"127.0.0.1:{service.server.port}")
        channels.append(channel)
        return channel

    return connect
