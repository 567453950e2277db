"""The modules beside model.py, as Triton finds them, with an engine that the test plays."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

LLM = Path(__file__).resolve().parents[3] / "triton_models" / "llm"
sys.path[:0] = [str(LLM / "1"), str(LLM)]

from engine_thread import EngineThread  # noqa: E402, Triton's folders are on the path only now

from llm_engine import EngineLoad, RequestRefused, SamplingParams, SequenceOutput, SequenceRequest  # noqa: E402


class FakeEngine:
    """Gives each sequence the tokens 0, 1, 2, ... up to its max_tokens, a token a step; fails when told to."""

    def __init__(self) -> None:
        self.sequences: dict[str, int] = {}
        self.requests: dict[str, SequenceRequest] = {}
        self.max_sequences = 4
        self.step_failures: list[Exception] = []
        self.cancel_failure: Exception | None = None
        self.cancelled: list[str] = []
        self.step_gate = threading.Event()
        self.step_gate.set()
        self.step_count = 0
        self.grammar_failures: dict[str, Exception] = {}
        self.grammar_gate = threading.Event()
        self.grammar_gate.set()
        self.matchers: dict[str, object] = {}

    def matcher(self, request: SequenceRequest) -> object:
        self.grammar_gate.wait(5)
        if failure := self.grammar_failures.get(request.sampling.grammar):
            raise failure
        return f"matcher of {request.sampling.grammar}"

    def add(self, request: SequenceRequest, matcher: object = None) -> None:
        self.matchers[request.request_id] = matcher
        if len(self.sequences) >= self.max_sequences:
            raise RequestRefused("QUEUE_FULL", "all places are taken")
        self.sequences[request.request_id] = 0
        self.requests[request.request_id] = request

    def cancel(self, request_id: str) -> bool:
        if self.cancel_failure is not None:
            raise self.cancel_failure
        self.cancelled.append(request_id)
        return self.sequences.pop(request_id, None) is not None

    @property
    def has_work(self) -> bool:
        return bool(self.sequences)

    def step(self, is_unwanted: Callable[[str], bool]) -> list[SequenceOutput]:
        self.step_gate.wait(5)
        self.step_count += 1
        if self.step_failures:
            raise self.step_failures.pop(0)
        outputs = []
        for name, count in list(self.sequences.items()):
            ended = count + 1 >= self.requests[name].max_tokens
            self.sequences[name] = count + 1
            if ended:
                del self.sequences[name]
            outputs.append(SequenceOutput(request_id=name, token_ids=[count], finish_reason="length" if ended else ""))
        return outputs

    @property
    def load(self) -> EngineLoad:
        return EngineLoad(
            running=len(self.sequences),
            waiting=0,
            max_sequences=self.max_sequences,
            max_waiting=0,
            free_block_count=8,
            total_block_count=8,
            block_token_count=16,
            step_count=self.step_count,
            preemption_count=0,
            prompt_token_total=0,
            generated_token_total=0,
            step_seconds_last=0.0,
            step_token_count_last=0,
        )


class FakeChannel:
    """A client that keeps what it is sent."""

    def __init__(self) -> None:
        self.outputs: list[SequenceOutput] = []
        self.gone = False
        self.changed = threading.Condition()

    def send(self, outputs: list[SequenceOutput], load: EngineLoad) -> None:
        if self.gone:
            raise RuntimeError("the stream is closed")
        with self.changed:
            self.outputs += outputs
            self.changed.notify_all()

    def is_cancelled(self) -> bool:
        return self.gone

    def ends(self) -> dict[str, str]:
        """Finish reasons by sequence."""
        return {output.request_id: output.finish_reason for output in self.outputs if output.finish_reason}

    def wait_for_ends(self, count: int) -> dict[str, str]:
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.ends()) >= count, 5), self.outputs
        return self.ends()


def sequence(request_id: str = "a", max_tokens: int = 3, grammar: str = "") -> SequenceRequest:
    sampling = SamplingParams(grammar=grammar, grammar_kind="regex" if grammar else "")
    return SequenceRequest(request_id=request_id, token_ids=[1, 2], max_tokens=max_tokens, sampling=sampling)


def wait_until(condition) -> None:
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.001)


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def broken() -> list[str]:
    """What the thread says when its engine is broken."""
    return []


@pytest.fixture
def engine_thread(engine, broken):
    thread = EngineThread(
        engine,
        on_broken=broken.append,
        log=lambda message: None,
        stream_interval_seconds=0.0,
        max_inbox_count=2,
    )
    yield thread
    engine.step_gate.set()
    engine.grammar_gate.set()
    thread.close(5)


@pytest.fixture
def make_channel():
    return FakeChannel


@pytest.fixture
def make_sequence():
    return sequence


@pytest.fixture
def until():
    return wait_until
