"""tidegate.v1's messages as the typed clients send and read them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from tidegate.bench.clients.answer import Answer, Ask
from tidegate.client import failure_of_status
from tidegate.v1 import inference_pb2 as pb

METHOD: Final = "/tidegate.v1.Inference/Generate"

_CLASSES: Final = {
    "realtime": pb.SERVICE_CLASS_REALTIME,
    "standard": pb.SERVICE_CLASS_STANDARD,
    "batch": pb.SERVICE_CLASS_BATCH,
}

# Sampled without a seed, so that no cache of answers may know it.
_SAMPLING: Final = pb.SamplingParameters(temperature=1.0)


def encoded(ask: Ask, model: str) -> bytes:
    """The request on the wire."""
    return pb.GenerateRequest(
        model=model,
        tokens=pb.TokenIds(token_ids=ask.prompt.tolist()),
        max_tokens=ask.max_tokens,
        sampling=_SAMPLING,
        service_class=_CLASSES[ask.service_class],
        ignore_eos=True,
    ).SerializeToString()


def note(message: bytes, answer: Answer, clock: Callable[[], float]) -> None:
    """Notes one event of an answer."""
    event = pb.GenerateEvent.FromString(message)
    kind = event.WhichOneof("event")
    if kind == "delta":
        delta = event.delta
        answer.texts.append(delta.text)
        token_ids = delta.token_ids
        if token_ids:
            now = clock()
            if answer.first_token is None:
                answer.first_token = now
            answer.last_token = now
            answer.token_count += len(token_ids)
            answer.token_ids.extend(token_ids)
    elif kind == "started":
        answer.accepted = clock()
    elif kind == "finished":
        _finish(event.finished, answer)


def _finish(finished: pb.Finished, answer: Answer) -> None:
    if finished.reason == pb.FINISH_REASON_ERROR:
        failure = failure_of_status(finished.error)
        answer.refuse(failure.reason or "INTERNAL_ERROR", failure.retry_after_seconds, failure.message)
    else:
        answer.complete(finished.usage.completion_token_count)
