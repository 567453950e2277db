"""From a body to a prompt: which parser a body needs, and how every fault becomes a TidegateError. Pure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NamedTuple

from google.protobuf.message import DecodeError

from tidegate.common.errors import Reason, TidegateError
from tidegate.common.headers import DEFAULT_TENANT
from tidegate.openai.request import OpenAIRequest, parse_chat_completions, parse_completions
from tidegate.text.model_files import TextModel
from tidegate.text.prompt import Prompt, prepare_prompt
from tidegate.v1 import inference_pb2, preprocess_pb2

_OPENAI_PARSERS: Final[dict[int, Callable[[bytes], OpenAIRequest]]] = {
    preprocess_pb2.BODY_KIND_CHAT_COMPLETIONS: parse_chat_completions,
    preprocess_pb2.BODY_KIND_COMPLETIONS: parse_completions,
}


class Preparation(NamedTuple):
    """A prompt, and what else the scheduler must know of its request."""

    prompt: Prompt
    stream: bool
    """True when the client asked for a stream."""
    is_portable: bool
    """True when a model with another vocabulary can read the prompt: it is text, from its beginning."""


def prepare(
    request: preprocess_pb2.PrepareRequest, model: TextModel, lite_model: TextModel | None = None
) -> Preparation:
    """Prepares one request for the model that it asks for; raises TidegateError for what a client can get wrong.

    Args:
        model: the mesh's own, for what asks for none.
        lite_model: the lite one, if there is one.
    """
    parse = _OPENAI_PARSERS.get(request.body_kind)
    if parse is not None:
        parsed = parse(request.body)
        return _prepare(request, parsed.generate, model, lite_model, stream=parsed.stream, openai_names=True)
    if request.body_kind != preprocess_pb2.BODY_KIND_GENERATE:
        raise TidegateError(Reason.INVALID_VALUE, f"{request.body_kind} is not a kind of body", field="body_kind")
    try:
        generate = inference_pb2.GenerateRequest.FromString(request.body)
    except DecodeError as error:
        raise TidegateError(Reason.INVALID_VALUE, "the body is not a tidegate.v1.GenerateRequest") from error
    return _prepare(request, generate, model, lite_model, stream=True, openai_names=False)


def _prepare(
    request: preprocess_pb2.PrepareRequest,
    generate: inference_pb2.GenerateRequest,
    model: TextModel,
    lite_model: TextModel | None,
    *,
    stream: bool,
    openai_names: bool,
) -> Preparation:
    asked = lite_model if lite_model is not None and generate.model == lite_model.name else model
    prompt = prepare_prompt(generate, asked, request.tenant or DEFAULT_TENANT, openai_names=openai_names)
    is_portable = generate.WhichOneof("prompt") != "tokens" and not generate.resume.token_ids
    return Preparation(prompt, stream, is_portable)


def body_kind_name(kind: int) -> str:
    """The kind as metrics and logs say it: chat_completions, completions, generate or unknown."""
    if kind not in preprocess_pb2.BodyKind.values() or kind == preprocess_pb2.BODY_KIND_UNSPECIFIED:
        return "unknown"
    return preprocess_pb2.BodyKind.Name(preprocess_pb2.BodyKind.ValueType(kind)).removeprefix("BODY_KIND_").lower()
