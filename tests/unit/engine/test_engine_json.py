"""Output that a JSON Schema describes, over a tiny model that writes letters at random."""

import json
import math

import pytest
from letters import BYTES, LETTERS

from llm_engine import RequestRefused, SamplingParams, SequenceRequest
from llm_engine.errors import SCHEMA_TOO_COMPLEX
from llm_engine.grammars import GRAMMAR_BYTE_BOUND, OutputMatcher

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "kind": {"enum": ["a", "b"]},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


def request(name: str, seed: int, *, schema: object = SCHEMA, **fields) -> SequenceRequest:
    sampling = {"temperature": 1.0, "seed": seed, "json_schema": json.dumps(schema), **fields.pop("sampling", {})}
    defaults = {"token_ids": [5, 6, 7], "max_tokens": 90}
    return SequenceRequest(request_id=name, sampling=SamplingParams(**sampling), **{**defaults, **fields})


def finish(engine, *requests) -> dict[str, tuple[list[int], str]]:
    """Each request's tokens, and why it ended."""
    said: dict[str, tuple[list[int], str]] = {each.request_id: ([], "") for each in requests}
    for each in requests:
        engine.add(each)
    while engine.has_work:
        for output in engine.step():
            tokens, _ = said[output.request_id]
            assert not output.error_message, output.error_message
            said[output.request_id] = ([*tokens, *output.token_ids], output.finish_reason)
    assert not engine._matchers
    return said


def text_of(tokens: list[int]) -> str:
    return b"".join(BYTES[token] for token in tokens).decode()


def test_whatever_is_drawn_follows_the_schema(lettered):
    wild = {"frequency_penalty": 1.0, "logit_bias": {20: 100.0}, "min_p": 0.01}
    requests = [request(str(seed), seed, sampling=wild if seed % 2 else {}) for seed in range(8)]
    requests += [request("greedy", 0, sampling={"temperature": 0.0})]
    for tokens, reason in finish(lettered(max_sequences=16), *requests).values():
        assert reason == "stop"
        found = json.loads(text_of(tokens))
        assert {"name", "age"} <= set(found) <= {"name", "age", "kind"}
        assert len(found["name"]) <= 8 and 0 <= found["age"] <= 120 and found.get("kind", "a") in ("a", "b")


def test_others_in_the_batch_say_what_they_say_alone(lettered):
    plain = [request(f"plain {seed}", seed, sampling={"json_schema": ""}, max_tokens=30) for seed in range(3)]
    alone = {name: said for each in plain for name, said in finish(lettered(), each).items()}
    together = finish(lettered(), *plain, *(request(str(seed), seed) for seed in range(3)))
    assert {name: together[name] for name in alone} == alone


def test_a_request_that_is_paused_or_resumed_says_the_same(lettered):
    requests = [request(str(seed), seed) for seed in range(4)]
    alone = {name: said for each in requests for name, said in finish(lettered(), each).items()}
    engine = lettered(kv_cache_bytes=22 * 4 * 2 * 2 * 2 * 8 * 4)
    assert finish(engine, *requests) == alone and engine.load.preemption_count
    tokens, reason = alone["2"]
    for count in (1, len(tokens) // 2, len(tokens) - 1):
        resumed = request("2", 2, token_ids=[5, 6, 7, *tokens[:count]], prior_output_count=count)
        assert finish(lettered(), resumed)["2"] == (tokens[count:], reason)


def test_json_that_is_whole_already_ends_at_once(lettered):
    tokens, _ = finish(lettered(), request("a", 1))["a"]
    whole = request("a", 1, token_ids=[5, 6, 7, *tokens], prior_output_count=len(tokens))
    assert finish(lettered(), whole)["a"] == ([], "stop")


def test_any_object_may_be_asked_for_and_max_tokens_cuts_it(lettered):
    whole, _ = finish(lettered(), request("a", 3, schema={"type": "object"}))["a"]
    assert json.loads(text_of(whole)) == {}
    cut, reason = finish(lettered(), request("a", 3, max_tokens=4))["a"]
    assert (text_of(cut), reason) == ('{"na', "length")


def test_a_folders_vocabulary_is_its_tokenizer_json(make_folder, make_engine):
    folder = make_folder()
    specials = [{"id": place, "content": text, "special": True} for place, text in enumerate(LETTERS[:3])]
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    levels = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    tokenizer = {
        "version": "1.0", "added_tokens": [{**token, **plain} for token in specials], "normalizer": None,
        "pre_tokenizer": levels, "post_processor": None, "decoder": levels,
        "model": {"type": "BPE", "vocab": {text: place for place, text in enumerate(LETTERS)}, "merges": []},
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    tokens, reason = finish(make_engine(folder), request("a", 1))["a"]
    assert reason == "stop" and set(json.loads(text_of(tokens))) >= {"name", "age"}


def pattern(number: int) -> dict:
    return {"type": "string", "pattern": f"a{number}"}


def in_each_other(count: int) -> dict:
    found = pattern(0)
    for number in range(1, count):
        found = {**pattern(number), "anyOf": [found]}
    return found


def in_a_row(count: int) -> dict:
    names = {f"d{number}": {**pattern(number), "$ref": f"#/$defs/d{number + 1}"} for number in range(count - 1)}
    return {"$ref": "#/$defs/d0", "$defs": {**names, f"d{count - 1}": pattern(count)}}


@pytest.mark.parametrize(
    "schema",
    [
        {"allOf": [pattern(number) for number in range(30)]},
        {"allOf": [{"type": "object", "properties": {"a": pattern(number)}} for number in range(30)]},
        in_each_other(30),
        in_a_row(30),
    ],
    ids=["allOf", "properties", "anyOf", "$ref"],
)
def test_a_schema_whose_compilation_nothing_would_end_is_refused(lettered, schema):
    with pytest.raises(RequestRefused, match="30 expressions where schemas are put together, expected at most 12"):
        lettered().add(request("a", 1, schema=schema))


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "integer", "multipleOf": 10_001},
        {"type": "number", "multipleOf": 1.00001},
        {"type": "number", "multipleOf": 1e300},
        {"type": "integer", "multipleOf": 10**400},
        {"type": "number", "multipleOf": math.inf},
        {"allOf": [{"type": "integer", "multipleOf": 103}, {"type": "integer", "multipleOf": 101}]},
    ],
)
def test_a_multiple_that_would_take_long_to_compile_is_refused(lettered, schema):
    with pytest.raises(RequestRefused, match="multipleOf is more than 10000"):
        lettered().add(request("a", 1, schema=schema))


def test_a_multiple_is_what_is_said(lettered):
    for multiple in (9_973, 0.25):
        said, reason = finish(lettered(), request("a", 1, schema={"type": "number", "multipleOf": multiple}))["a"]
        assert float(text_of(said)) % multiple == 0 or reason == "length"


def test_many_patterns_that_nothing_puts_together_are_taken(lettered):
    parts = {f"p{number}": {"anyOf": [pattern(number), {"type": "null"}], "title": "P"} for number in range(30)}
    engine = lettered()
    engine.add(request("a", 1, schema={"type": "object", "properties": parts}))
    assert engine.has_work


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ("{", "json_schema is not JSON"),
        ("[]", "json_schema is not an object"),
        ('{"type": "thing"}', "json_schema is not supported: Invalid type: thing"),
        ('{"not": {}}', 'json_schema is not supported: Unimplemented keys: ["not"]'),
        ('{"type": "string", "pattern": "("}', "json_schema is not supported: regex parse error"),
        (json.dumps({"title": "x" * GRAMMAR_BYTE_BOUND}), f"expected at most {GRAMMAR_BYTE_BOUND}"),
    ],
)
def test_a_schema_that_cannot_be_followed_is_refused(lettered, schema, words):
    engine = lettered()
    with pytest.raises(RequestRefused) as caught:
        engine.add(request("a", 1, sampling={"json_schema": schema}))
    assert caught.value.reason == "INVALID_VALUE" and words in caught.value.message
    assert not engine.has_work and not engine._matchers


def test_what_does_not_go_with_a_schema_is_refused(lettered, make_engine):
    with pytest.raises(RequestRefused, match="ignore_eos is True"):
        lettered().add(request("a", 1, ignore_eos=True))
    with pytest.raises(RequestRefused, match="does not describe the output"):
        lettered().add(request("a", 1, prior_output_count=1))
    with pytest.raises(RequestRefused, match=r"json_schema cannot be used with this model: .*tokenizer\.json"):
        make_engine().add(request("a", 1))


def test_cancelling_forgets_the_schema(lettered):
    engine = lettered()
    engine.add(request("a", 1))
    engine.step()
    assert engine.cancel("a") and not engine._matchers


class TooComplex:
    """llguidance where a schema takes more than it allows itself."""

    def compute_bitmask(self) -> bytes:
        return bytes(12)

    def consume_token(self, token_id: int) -> bool:
        return False

    def is_error(self) -> bool:
        return True

    def is_stopped(self) -> bool:
        return True

    def get_error(self) -> str:
        return "too many items\n<state>much\nmore</state>"


def test_a_schema_that_turns_out_too_complex_ends_its_own_sequence_alone(lettered):
    engine = lettered()
    for each in (request("a", 1), request("b", 2)):
        engine.add(each)
    bound = engine._matchers["a"]
    engine._matchers["a"] = OutputMatcher(TooComplex(), bound._size, bound._eos, bound._ends)
    outputs = []
    while engine.has_work:
        outputs += engine.step()
    (failed,) = [output for output in outputs if output.error_reason]
    assert (failed.request_id, failed.error_reason) == ("a", SCHEMA_TOO_COMPLEX)
    assert failed.error_message == "json_schema: too many items at output token 0"
    assert outputs[-1].finish_reason == "stop"
