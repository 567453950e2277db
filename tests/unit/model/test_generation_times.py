"""What a generation tells of the time that its tokens took."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tidegate.model.call import CallHeaders, Job, Record
from tidegate.model.generation import Generation
from tidegate.model.prompts import HeldPrompt
from tidegate.model.tokens import Chunk
from tidegate.v1 import inference_pb2


class Observer:
    def __init__(self) -> None:
        self.gaps: list[tuple[int, float | None]] = []

    def add_tokens(self, count: int, gap_seconds: float | None) -> None:
        self.gaps.append((count, gap_seconds))

    def add_first_token(self, seconds: float) -> None:
        pass


class TimedSource:
    """Gives texts of bytes as chunks, each at a time of its own."""

    def __init__(self, *chunks: tuple[float, str]) -> None:
        self.now = 0.0
        self._chunks = chunks

    async def chunks(self, job: Job, answer_token_ids: list[int]) -> AsyncIterator[Chunk]:
        for now, text in self._chunks:
            self.now = now
            yield Chunk(token_ids=list(text.encode()))


@pytest.fixture
def job() -> Job:
    return Job(
        request=inference_pb2.GenerateRequest(stop=["STOP"]),
        request_id="r1",
        call=CallHeaders(),
        service_class="standard",
        prompt=HeldPrompt(prompt_token_count=1, truncated_token_count=0, max_tokens=100),
        record=Record(operation="chat", request_id="r1", tenant="t", arrived_at=0.0, deadline=60.0),
    )


async def test_tokens_behind_a_stop_text_had_their_part_of_the_time(byte_model, job):
    source, observer = TimedSource((1.0, "a"), (2.0, "bSTOPthen")), Observer()
    generation = Generation(
        job, source, byte_model.tokenizer, observer, buffer_token_limit=100, clock=lambda: source.now
    )
    texts = [event.delta.text async for event in generation.events()]
    assert "".join(texts) == "ab"
    assert observer.gaps == [(1, None), (5, pytest.approx(5 / 9))]
    assert job.record.last_token_at == pytest.approx(1 + 5 / 9)
