"""Output of a Lark grammar or a regular expression, over a tiny model that writes letters at random."""

import json
import re

import pytest
from letters import BYTES, LETTERS

from llm_engine import RequestRefused, SamplingParams, SequenceRequest
from llm_engine.errors import SCHEMA_TOO_COMPLEX
from llm_engine.grammars import GRAMMAR_BYTE_BOUND

SUMS = 'start: N ("+" N)* "="\nN: /[0-9]{1,3}/'
AMBIGUOUS = 'start: s "#"\ns: s s s | s "a" s | "a" s "b" | "b" s | '


def request(name: str, seed: int, kind: str, grammar: str, **fields) -> SequenceRequest:
    sampling = {"temperature": 1.0, "seed": seed, "grammar": grammar, "grammar_kind": kind}
    defaults = {"token_ids": [5, 6, 7], "max_tokens": 90}
    sampling |= fields.pop("sampling", {})
    return SequenceRequest(request_id=name, sampling=SamplingParams(**sampling), **{**defaults, **fields})


def finish(engine, *requests) -> dict[str, tuple[str, str]]:
    """What each request said, and why it ended."""
    said = {each.request_id: ("", "") for each in requests}
    for each in requests:
        engine.add(each)
    while engine.has_work:
        for output in engine.step():
            text, _ = said[output.request_id]
            text += b"".join(BYTES[token] for token in output.token_ids).decode()
            said[output.request_id] = (text, output.error_reason or output.finish_reason)
    assert not engine._matchers
    return said


@pytest.mark.parametrize(
    ("kind", "grammar", "expected"),
    [
        ("regex", "[a-z]{3,5}-[0-9]{2}", "[a-z]{3,5}-[0-9]{2}"),
        ("regex", "^x{4}$", "x{4}"),
        ("regex", r"one\ or\ two|three|a\.b", r"one or two|three|a\.b"),
        ("lark", 'start: "yes" | "no" | "perhaps"', "yes|no|perhaps"),
        ("lark", SUMS, r"[0-9]{1,3}(\+[0-9]{1,3})*="),
        ("lark", 'start: "a&" /&%json/ "x"~3 // &\n# ~', "a&&%jsonxxx"),
        ("lark", 'start: "{" start "}" | "x"', r"\{*x\}*"),
    ],
)
def test_whatever_is_drawn_is_what_the_grammar_describes(lettered, kind, grammar, expected):
    requests = [request(str(seed), seed, kind, grammar) for seed in range(6)]
    for text, reason in finish(lettered(max_sequences=8), *requests).values():
        assert reason == "stop" and re.fullmatch(expected, text), text


def test_all_kinds_run_beside_each_other_and_beside_plain_text(lettered):
    requests = [
        request("regex", 1, "regex", "[ab]{5}"),
        request("lark", 2, "lark", SUMS),
        request("json", 3, "", "", sampling={"json_schema": '{"type": "array", "items": {"enum": [1, 2]}}'}),
        request("plain", 4, "", "", max_tokens=20),
    ]
    alone = {name: said for each in requests for name, said in finish(lettered(), each).items()}
    together = finish(lettered(), *requests)
    assert together == alone
    assert re.fullmatch("[ab]{5}", together["regex"][0]) and isinstance(json.loads(together["json"][0]), list)


def test_an_answer_goes_on_where_it_was(lettered):
    whole, _ = finish(lettered(), request("a", 5, "regex", "[a-z]{12}"))["a"]
    said = [BYTES.index(letter.encode()) for letter in whole[:5]]
    rest = request("a", 5, "regex", "[a-z]{12}", token_ids=[5, 6, 7, *said], prior_output_count=5)
    assert finish(lettered(), rest)["a"] == (whole[5:], "stop")
    with pytest.raises(RequestRefused, match="grammar does not describe the output"):
        lettered().add(request("a", 5, "regex", "[0-9]+", token_ids=[5, 6, 7, *said], prior_output_count=5))


@pytest.mark.parametrize(
    ("kind", "grammar", "words"),
    [
        ("regex", "a(", "regex parse error: a( ^ error: unclosed group"),
        ("regex", "x" * 400 + "(", "grammar is not supported: regex parse error: unclosed group"),
        ("regex", r"(a)\1", "backreferences are not supported"),
        ("regex", "a(?=b)", "look-around, including look-ahead and look-behind, is not supported"),
        ("regex", "(" * 1000 + "a" + ")" * 1000, "grammar is not supported"),
        ("lark", 'root ::= "a"', "1(7): Expected token '_', found '='"),
        ("lark", "start: word", 'unknown name: "word"'),
        ("lark", "start: /a(/", "unclosed group"),
        ("lark", "start: " + "(" * 1000 + '"a"' + ")" * 1000, "nested"),
        ("lark", 'start: "' + "x" * GRAMMAR_BYTE_BOUND + '"', f"expected at most {GRAMMAR_BYTE_BOUND}"),
        ("lark", "start: T\nT: " + " & ".join(f"/.*a{place}.*/" for place in range(40)), "& cannot be used"),
        ("lark", "start: T\nT: ~(~/.*a.*/ | ~/.*b.*/)", "~ cannot be used"),
        ("lark", 'start: T <a"b> T\nT: /a/ & "b"', "& cannot be used"),
        ("lark", 'start: T\nT: /\n"/ & "b"', "& cannot be used"),
        ("lark", 'start: T # "\nT: /a/ & "b"', "& cannot be used"),
        ("lark", 'start: T // "\nT: /a/ & "b"', "& cannot be used"),
        ("lark", 'start: T\nT: "\\\\" & /"/', "& cannot be used"),
        ("lark", 'start: %json {"type": "string"}', "%json cannot be used"),
        ("ebnf", 'start: "a"', "grammar_kind is 'ebnf', expected one of lark, regex"),
        ("", 'start: "a"', "grammar_kind is '', expected one of lark, regex"),
        ("lark", "", "grammar_kind is 'lark', but grammar is empty"),
    ],
)
def test_a_grammar_that_cannot_be_followed_is_refused(lettered, kind, grammar, words):
    engine = lettered()
    with pytest.raises(RequestRefused) as caught:
        engine.add(request("a", 1, kind, grammar))
    assert caught.value.reason == "INVALID_VALUE" and words in caught.value.message
    assert "\n" not in caught.value.message and len(caught.value.message) < 400
    assert not engine.has_work and not engine._matchers


def test_what_does_not_go_with_a_grammar_is_refused(lettered, make_engine):
    with pytest.raises(RequestRefused, match="ignore_eos is True"):
        lettered().add(request("a", 1, "regex", "a", ignore_eos=True))
    with pytest.raises(RequestRefused, match="grammar and json_schema are both given"):
        lettered().add(request("a", 1, "regex", "a", sampling={"json_schema": "{}"}))
    with pytest.raises(RequestRefused, match="grammar cannot be used with this model"):
        make_engine().add(request("a", 1, "regex", "a"))


@pytest.mark.parametrize(
    ("kind", "grammar"),
    [("lark", AMBIGUOUS), ("regex", r"a\x04b"), ("regex", r"\x04"), ("regex", "é")],
    ids=["ambiguous", "unwritable", "unwritable at once", "not in the vocabulary"],
)
def test_what_cannot_go_on_ends_its_own_sequence_alone(lettered, kind, grammar, capfd):
    # Since it may never say its end, the ambiguous grammar goes on until it is too much.
    bias = {"logit_bias": {LETTERS.index("#"): -100}}
    both = [request("a", 1, kind, grammar, sampling=bias), request("b", 2, "regex", "[a-z]{8}")]
    said = finish(lettered(), *both)
    assert said["a"][1] == SCHEMA_TOO_COMPLEX
    assert re.fullmatch("[a-z]{8}", said["b"][0]) and said["b"][1] == "stop"
    assert "panic" not in capfd.readouterr().err
