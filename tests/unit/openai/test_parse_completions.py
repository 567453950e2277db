from __future__ import annotations

import json
from typing import Any

import pytest

from tidegate.common.errors import Reason, TidegateError
from tidegate.openai.request import OpenAIRequest, parse_completions
from tidegate.v1 import inference_pb2 as pb


def parse(**fields: Any) -> OpenAIRequest:
    return parse_completions(json.dumps({"model": "m", "prompt": "Hi", **fields}).encode())


def test_a_bare_request_takes_the_defaults() -> None:
    request = parse()
    assert request.kind == "completion"
    assert request.generate.text == "Hi"
    assert request.generate.max_tokens == 16
    assert not request.generate.HasField("logprobs")


@pytest.mark.parametrize("prompt", ["Hi", ["Hi"]])
def test_a_prompt_may_be_a_text_or_a_list_of_one(prompt: Any) -> None:
    assert parse(prompt=prompt).generate.text == "Hi"


@pytest.mark.parametrize("prompt", [[1, 2, 3], [[1, 2, 3]]])
def test_a_prompt_may_be_tokens(prompt: Any) -> None:
    assert parse(prompt=prompt).generate.tokens == pb.TokenIds(token_ids=[1, 2, 3])


def test_what_completions_have_of_their_own_arrives() -> None:
    request = parse(logprobs=5, max_tokens=3, echo=False, best_of=1, suffix=None, stop="x", seed=4)
    assert (request.generate.logprobs, request.generate.max_tokens) == (5, 3)
    assert list(request.generate.stop) == ["x"]
    assert request.generate.sampling.seed == 4


def test_what_routers_add_for_other_engines_is_accepted_while_it_asks_for_nothing() -> None:
    assert parse(no_stop_trim=False, return_hidden_states=False).generate.text == "Hi"


@pytest.mark.parametrize(
    ("fields", "reason", "field"),
    [
        ({"return_hidden_states": True}, Reason.UNSUPPORTED_PARAMETER, "return_hidden_states"),
        ({"prompt": None}, Reason.MISSING_REQUIRED_PARAMETER, "prompt"),
        ({"prompt": ""}, Reason.INVALID_VALUE, "prompt"),
        ({"prompt": [""]}, Reason.INVALID_VALUE, "prompt[0]"),
        ({"prompt": []}, Reason.INVALID_VALUE, "prompt"),
        ({"prompt": [[]]}, Reason.INVALID_VALUE, "prompt[0]"),
        ({"prompt": 5}, Reason.INVALID_TYPE, "prompt"),
        ({"prompt": {}}, Reason.INVALID_TYPE, "prompt"),
        ({"prompt": "\ud800"}, Reason.INVALID_VALUE, "prompt"),
        ({"prompt": ["a", "b"]}, Reason.UNSUPPORTED_PARAMETER, "prompt"),
        ({"prompt": [[1], [2]]}, Reason.UNSUPPORTED_PARAMETER, "prompt"),
        ({"prompt": [1, "b"]}, Reason.INVALID_TYPE, "prompt[1]"),
        ({"prompt": [1, -1]}, Reason.INVALID_VALUE, "prompt[1]"),
        ({"prompt": [2**31]}, Reason.INVALID_VALUE, "prompt[0]"),
        ({"prompt": [True]}, Reason.INVALID_TYPE, "prompt[0]"),
        ({"prompt": [1.0]}, Reason.INVALID_TYPE, "prompt[0]"),
        ({"prompt": [[1, None]]}, Reason.INVALID_TYPE, "prompt[0][1]"),
        ({"echo": True}, Reason.UNSUPPORTED_PARAMETER, "echo"),
        ({"best_of": 2}, Reason.UNSUPPORTED_PARAMETER, "best_of"),
        ({"suffix": "x"}, Reason.UNSUPPORTED_PARAMETER, "suffix"),
        ({"logprobs": True}, Reason.INVALID_TYPE, "logprobs"),
        ({"logprobs": 21}, Reason.INVALID_VALUE, "logprobs"),
        ({"max_tokens": 0}, Reason.INVALID_VALUE, "max_tokens"),
        ({"max_completion_tokens": 5}, Reason.UNKNOWN_PARAMETER, "max_completion_tokens"),
        ({"messages": []}, Reason.UNKNOWN_PARAMETER, "messages"),
    ],
)
def test_refusals_name_the_reason_and_the_field(fields: dict[str, Any], reason: Reason, field: str) -> None:
    with pytest.raises(TidegateError) as caught:
        parse(**fields)
    assert (caught.value.reason, caught.value.field) == (reason, field)
