"""`tidegate chat`: a conversation over gRPC through the ingress, streamed as it comes.

The answer is data (stdout); everything else is talk (stderr). Ctrl-C cancels the answer that is running and nothing
else; the mesh stops working on it at once. What was said of a cancelled answer stays in the history.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

import grpc
from rich.text import Text

from tidegate import client
from tidegate.cli import config, ports, state, talk
from tidegate.v1 import inference_pb2 as pb

DEFAULT_ADDRESS: Final = "127.0.0.1:8080"


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the command line asks for."""

    address: str
    api_key: str | None = None
    model: str = ""
    system: str = ""
    max_tokens: int | None = None
    temperature: float | None = None
    seed: int | None = None


@dataclass
class History:
    """The conversation so far: (role, content), oldest first."""

    messages: list[tuple[str, str]] = field(default_factory=list)

    def request(self, options: Options, question: str) -> pb.GenerateRequest:
        """The whole conversation with the next question, as one request."""
        head = [("system", options.system)] if options.system else []
        sampling = pb.SamplingParameters(temperature=options.temperature, seed=options.seed)
        return client.chat_request(
            [*head, *self.messages, ("user", question)],
            model=options.model,
            max_tokens=options.max_tokens,
            sampling=sampling,
        )

    def add(self, question: str, answer: str) -> None:
        """A question and what was said to it."""
        self.messages += [("user", question), ("assistant", answer)]


def default_address() -> str:
    """The ingress of the mesh that runs here, else the default one."""
    mesh = state.Home(config.home()).read()
    if mesh is None or not mesh.is_running:
        return DEFAULT_ADDRESS
    return ports.reachable(mesh.addresses["ingress"])


def run(options: Options, prompt: str | None) -> int:
    """One question, or a conversation; answers the exit code."""
    history = History()
    if prompt is None and talk.is_interactive():
        return _converse(options, history)
    question = prompt if prompt is not None else talk.standard_input().strip()
    if not question.strip():
        talk.fail("nothing to ask: give a PROMPT, or text on standard input")
        return talk.EXIT_USAGE
    code, _ = _answer(options, history, question)
    return code


def _converse(options: Options, history: History) -> int:
    console = talk.err()
    console.print(f"{options.address} · Ctrl-C ends the answer, Ctrl-D the chat", style="dim")
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - gives input() its line editing.
    while True:
        try:
            question = input("> ")
        except EOFError:
            console.print()
            return 0
        except KeyboardInterrupt:
            console.print()
            continue
        if question.strip():
            code, text = _answer(options, history, question)
            if code in {0, talk.EXIT_INTERRUPTED}:
                history.add(question, text)


def _answer(options: Options, history: History, question: str) -> tuple[int, str]:
    """Streams one answer to stdout; answers the exit code and the text."""
    parts: list[str] = []
    request = history.request(options, question)
    code = asyncio.run(_stream(options, request, parts))
    text = "".join(parts)
    if text and not text.endswith("\n"):
        sys.stdout.write("\n")
        sys.stdout.flush()
    if code == talk.EXIT_INTERRUPTED:
        talk.err().print("(cancelled)", style="dim")
    return code, text


async def _stream(options: Options, request: pb.GenerateRequest, parts: list[str]) -> int:
    current = asyncio.current_task()
    assert current is not None
    place = _PlaceLine()
    with _cancelled_by_ctrl_c(current), contextlib.closing(place):
        try:
            async with client.AsyncClient(options.address, api_key=options.api_key, retries=False) as mesh:
                async for event in mesh.generate(request, queue_status=True):
                    if event.HasField("queued"):
                        place.show(event.queued)
                        continue
                    place.close()
                    if event.HasField("delta"):
                        parts.append(event.delta.text)
                        sys.stdout.write(event.delta.text)
                        sys.stdout.flush()
                    elif event.HasField("finished") and event.finished.reason == pb.FINISH_REASON_ERROR:
                        talk.fail(f"the answer broke off: {event.finished.error.message}")
                        return talk.EXIT_STATUS_BASE + int(event.finished.error.code)
        except client.RequestFailed as failure:
            place.close()
            _say_failure(failure, options)
            return talk.EXIT_STATUS_BASE + int(failure.status.value[0])
        except asyncio.CancelledError:
            return talk.EXIT_INTERRUPTED
    return 0


@contextlib.contextmanager
def _cancelled_by_ctrl_c(task: asyncio.Task[object]) -> Iterator[None]:
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGINT, task.cancel)
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGINT)


class _PlaceLine:
    """The place in the queue: one line that changes in place on a terminal, else a line a change."""

    def __init__(self) -> None:
        console = talk.err()
        self._console = console
        self._status = console.status("") if console.is_terminal else None
        self._shown = ""

    def show(self, queued: pb.Queued) -> None:
        """Says the place."""
        text = queue_words(queued)
        if self._status is not None:
            self._status.update(Text(text, style="dim"))
            self._status.start()
        elif text != self._shown:
            self._console.print(text)
        self._shown = text

    def close(self) -> None:
        """Takes the line away."""
        if self._status is not None and self._shown:
            self._status.stop()
            self._shown = ""


def queue_words(queued: pb.Queued) -> str:
    """A place in the queue in words."""
    words = f"queued, position {queued.position}"
    if queued.HasField("expected_wait"):
        words += f", about {math.ceil(queued.expected_wait.ToMilliseconds() / 1000)} s"
    return words


def _say_failure(failure: client.RequestFailed, options: Options) -> None:
    unreachable = failure.status is grpc.StatusCode.UNAVAILABLE and not failure.reason
    if unreachable:
        talk.fail(f"no mesh answers at {options.address}: start one with `tidegate up`, or give --address")
    else:
        talk.fail(failure.message or failure.reason)
    if failure.retry_after_seconds is not None:
        talk.err().print(Text(f"try again in {failure.retry_after_seconds:.0f} s", style="yellow"))
