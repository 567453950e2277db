"""What an answer must follow, in all the names that there are for it.

OpenAI's `response_format`, vLLM's `structured_outputs` and its older `guided_*` become a JSON Schema or a grammar; at
most one of them may ask. A choice is a regular expression of its texts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, Final, NamedTuple

from tidegate.openai import json_fields, unsupported
from tidegate.openai.json_fields import Fields
from tidegate.text import request_rules as rules
from tidegate.v1 import inference_pb2

RESPONSE_TYPES: Final = ("text", "json_object", "json_schema")
ANY_OBJECT: Final = '{"type":"object"}'

CONSTRAINTS: Final = ("json", "regex", "choice", "grammar")
"""vLLM's, in `structured_outputs` as they are and outside of it after `guided_`; a grammar is one of Lark's."""


class _Wanted(NamedTuple):
    path: str
    """The field that asks."""
    json_schema: str = ""
    grammar: str = ""
    grammar_kind: inference_pb2.GrammarKind.ValueType = inference_pb2.GRAMMAR_KIND_UNSPECIFIED


def read_output_grammar(fields: Fields, sampling: inference_pb2.SamplingParameters) -> str:
    """Reads what the answer must follow; gives the field that asks for it, empty where none does."""
    wanted = [*_response_format(fields), *_structured_outputs(fields), *_constraints(fields, "guided_")]
    if not wanted:
        return ""
    if len(wanted) > 1:
        json_fields.refuse_value(wanted[1].path, f"cannot be combined with '{wanted[0].path}'")
    (one,) = wanted
    sampling.json_schema, sampling.grammar, sampling.grammar_kind = one.json_schema, one.grammar, one.grammar_kind
    return one.path


def _response_format(fields: Fields) -> Iterator[_Wanted]:
    response = fields.fields("response_format")
    if response is None:
        return
    kind = response.string("type", rules.NAME_CHARACTER_LIMIT)
    if kind is None:
        json_fields.refuse_missing("response_format.type")
    if kind not in RESPONSE_TYPES:
        known = ", ".join(RESPONSE_TYPES)
        json_fields.refuse_value("response_format.type", f"must be one of {known}, is {json_fields.shown(kind)}")
    if kind == "json_object":
        yield _Wanted("response_format", ANY_OBJECT)
    elif kind == "json_schema":
        named = response.fields("json_schema")
        if named is None:
            json_fields.refuse_missing("response_format.json_schema")
        yield _Wanted("response_format", _named_schema(named))
    response.finish()


def _named_schema(named: Fields) -> str:
    if named.string("name", rules.NAME_CHARACTER_LIMIT, may_be_empty=False) is None:
        json_fields.refuse_missing(named.path("name"))
    named.string("description", rules.STOP_CHARACTER_LIMIT)
    named.boolean("strict")
    schema = named.take("schema")
    named.finish()
    if schema is None:
        # OpenAI's clients may leave it out.
        return ANY_OBJECT
    return _schema_text(json_fields.checked_object(schema, named.path("schema")), named.path("schema"))


def _structured_outputs(fields: Fields) -> Iterator[_Wanted]:
    options = fields.fields("structured_outputs")
    if options is None:
        return
    wanted = list(_constraints(options, ""))
    options.finish(unsupported.STRUCTURED_OUTPUTS)
    if not wanted:
        json_fields.refuse_value("structured_outputs", f"must have one of {', '.join(CONSTRAINTS)}")
    yield from wanted


def _constraints(fields: Fields, prefix: str) -> Iterator[_Wanted]:
    """What the four fields with a prefix before their names ask for."""
    for name in CONSTRAINTS:
        value, path = fields.take(prefix + name), fields.path(prefix + name)
        if value is None:
            continue
        if name == "json":
            yield _Wanted(path, _schema(value, path))
        elif name == "regex":
            yield _Wanted(path, "", _grammar(value, path), inference_pb2.GRAMMAR_KIND_REGEX)
        elif name == "choice":
            yield _Wanted(path, "", _choice(value, path), inference_pb2.GRAMMAR_KIND_REGEX)
        else:
            yield _Wanted(path, "", _grammar(value, path), inference_pb2.GRAMMAR_KIND_LARK)


def _schema(value: Any, path: str) -> str:
    """A schema as an object, or as the text of one."""
    if isinstance(value, str):
        text = json_fields.checked_text(value, path)
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            json_fields.refuse_value(path, "must be a JSON object")
        if not isinstance(value, dict):
            json_fields.refuse_value(path, "must be a JSON object")
    if not isinstance(value, dict):
        json_fields.refuse_type(path, "an object or a string", value)
    return _schema_text(value, path)


def _schema_text(schema: dict[str, Any], path: str) -> str:
    text = json.dumps(schema, separators=(",", ":"))
    _check_length(text, path, rules.JSON_SCHEMA_BYTE_LIMIT)
    return text


def _grammar(value: Any, path: str) -> str:
    text = json_fields.checked_text(value, path, may_be_empty=False)
    _check_length(text, path, rules.GRAMMAR_BYTE_LIMIT)
    return text


def _choice(value: Any, path: str) -> str:
    """The expression that is one of the texts, and nothing else."""
    if not isinstance(value, list):
        json_fields.refuse_type(path, "an array of strings", value)
    if not value:
        json_fields.refuse_value(path, "must not be empty")
    texts = [json_fields.checked_text(text, f"{path}[{place}]", may_be_empty=False) for place, text in enumerate(value)]
    expression = "|".join(map(re.escape, texts))
    _check_length(expression, path, rules.GRAMMAR_BYTE_LIMIT)
    return expression


def _check_length(text: str, path: str, limit: int) -> None:
    if len(text.encode()) > limit:
        json_fields.refuse_value(path, f"must have at most {limit} bytes, has {len(text.encode())}")
