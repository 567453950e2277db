"""The names under which an answer's form is asked for, on both endpoints."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from tidegate.common.errors import Reason, TidegateError
from tidegate.openai.request import OpenAIRequest, parse_chat_completions, parse_completions
from tidegate.v1 import inference_pb2 as pb

PROMPTS: dict[Any, dict[str, Any]] = {
    parse_chat_completions: {"messages": [{"role": "user", "content": "Hi"}]},
    parse_completions: {"prompt": "Hi"},
}
ANY_JSON = {"response_format": {"type": "json_object"}}
LARK = 'start: "a" | "b"'


def parse(endpoint: Any, **fields: Any) -> OpenAIRequest:
    request: OpenAIRequest = endpoint(json.dumps({**PROMPTS[endpoint], **fields}).encode())
    return request


def structured(**options: Any) -> dict[str, Any]:
    return {"structured_outputs": options}


@pytest.mark.parametrize("endpoint", PROMPTS)
@pytest.mark.parametrize("older", [False, True], ids=["structured_outputs", "guided"])
@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("json", {"type": "object"}, {"json_schema": '{"type":"object"}'}),
        ("json", ' {"type": "object"}', {"json_schema": '{"type":"object"}'}),
        ("regex", "[a-z]+é", {"grammar": "[a-z]+é", "grammar_kind": pb.GRAMMAR_KIND_REGEX}),
        ("choice", ["a.b", "(c)"], {"grammar": r"a\.b|\(c\)", "grammar_kind": pb.GRAMMAR_KIND_REGEX}),
        ("grammar", LARK, {"grammar": LARK, "grammar_kind": pb.GRAMMAR_KIND_LARK}),
    ],
)
def test_each_constraint_arrives_by_both_names(
    endpoint: Any, older: bool, name: str, value: Any, expected: dict[str, Any]
) -> None:
    request = parse(endpoint, **({f"guided_{name}": value} if older else structured(**{name: value})))
    assert request.generate.sampling == pb.SamplingParameters(**expected)
    assert request.grammar_field == (f"guided_{name}" if older else f"structured_outputs.{name}")


@pytest.mark.parametrize("endpoint", PROMPTS)
def test_a_response_format_is_taken_on_both_endpoints(endpoint: Any) -> None:
    request = parse(endpoint, **ANY_JSON)
    assert request.generate.sampling.json_schema == '{"type":"object"}'
    assert request.grammar_field == "response_format"


def test_a_choice_is_the_expression_of_its_texts_alone() -> None:
    texts = ["a b", "x|y", "new\nline", "^$", "\\d", "Zürich 👍", "#-&~"]
    expression = parse(parse_completions, guided_choice=texts).generate.sampling.grammar
    assert all(re.fullmatch(expression, text) for text in texts)
    assert not re.fullmatch(expression, "7")


@pytest.mark.parametrize(
    "neutral",
    [
        structured(regex="a", json=None, disable_fallback=True, disable_any_whitespace=False, json_object=False),
        {"structured_outputs": None, "guided_json": None, "guided_regex": "a"},
        {**structured(regex="a"), "response_format": {"type": "text"}},
    ],
)
def test_what_asks_for_nothing_may_stand_beside_it(neutral: dict[str, Any]) -> None:
    assert parse(parse_completions, **neutral).generate.sampling.grammar == "a"


@pytest.mark.parametrize(
    ("fields", "reason", "field"),
    [
        (structured(regex="a", choice=["a"]), Reason.INVALID_VALUE, "structured_outputs.choice"),
        (structured(json={}, grammar=LARK), Reason.INVALID_VALUE, "structured_outputs.grammar"),
        ({"guided_json": {}, "guided_grammar": LARK}, Reason.INVALID_VALUE, "guided_grammar"),
        ({**structured(regex="a"), "guided_regex": "a"}, Reason.INVALID_VALUE, "guided_regex"),
        ({**structured(regex="a"), **ANY_JSON}, Reason.INVALID_VALUE, "structured_outputs.regex"),
        (
            {
                "guided_choice": ["a"],
                "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {}}},
            },
            Reason.INVALID_VALUE,
            "guided_choice",
        ),
        (structured(), Reason.INVALID_VALUE, "structured_outputs"),
        (structured(regex=None), Reason.INVALID_VALUE, "structured_outputs"),
        ({"structured_outputs": "a"}, Reason.INVALID_TYPE, "structured_outputs"),
        (structured(regex="a", colour=1), Reason.UNKNOWN_PARAMETER, "structured_outputs.colour"),
        (structured(structural_tag="{}"), Reason.UNSUPPORTED_PARAMETER, "structured_outputs.structural_tag"),
        (structured(json_object=True), Reason.UNSUPPORTED_PARAMETER, "structured_outputs.json_object"),
        (structured(regex=""), Reason.INVALID_VALUE, "structured_outputs.regex"),
        (structured(regex=1), Reason.INVALID_TYPE, "structured_outputs.regex"),
        (structured(regex="\ud800"), Reason.INVALID_VALUE, "structured_outputs.regex"),
        (structured(regex="é" * 8193), Reason.INVALID_VALUE, "structured_outputs.regex"),
        (structured(grammar=["a"]), Reason.INVALID_TYPE, "structured_outputs.grammar"),
        (structured(grammar="x" * 16385), Reason.INVALID_VALUE, "structured_outputs.grammar"),
        (structured(choice="a"), Reason.INVALID_TYPE, "structured_outputs.choice"),
        (structured(choice=[]), Reason.INVALID_VALUE, "structured_outputs.choice"),
        (structured(choice=["a", 1]), Reason.INVALID_TYPE, "structured_outputs.choice[1]"),
        (structured(choice=[""]), Reason.INVALID_VALUE, "structured_outputs.choice[0]"),
        (structured(choice=["word"] * 4000), Reason.INVALID_VALUE, "structured_outputs.choice"),
        (structured(json="[1]"), Reason.INVALID_VALUE, "structured_outputs.json"),
        (structured(json="{"), Reason.INVALID_VALUE, "structured_outputs.json"),
        (structured(json=[1]), Reason.INVALID_TYPE, "structured_outputs.json"),
        (structured(json={"title": "x" * 16384}), Reason.INVALID_VALUE, "structured_outputs.json"),
        ({"guided_json": True}, Reason.INVALID_TYPE, "guided_json"),
    ],
)
@pytest.mark.parametrize("endpoint", PROMPTS)
def test_refusals_name_the_reason_and_the_field(
    endpoint: Any, fields: dict[str, Any], reason: Reason, field: str
) -> None:
    with pytest.raises(TidegateError) as caught:
        parse(endpoint, **fields)
    assert (caught.value.reason, caught.value.field) == (reason, field)
    assert field in caught.value.message


def test_two_that_ask_are_both_named() -> None:
    with pytest.raises(TidegateError, match=r"'guided_regex': cannot be combined with 'response_format'"):
        parse(parse_completions, guided_regex="a", **ANY_JSON)
