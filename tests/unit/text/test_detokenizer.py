from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tidegate.text.detokenizer import DetokenizerStep, IncrementalDetokenizer
from tidegate.text.model_files import TextModel
from tidegate.text.tokenizer import Tokenizer

FAMILY = "👩\u200d👩\u200d👧"

TOKENS: list[bytes] = [
    b"",
    b"a",
    b"b",
    b"ab",
    b"ba",
    b"<",
    b"<end>",
    "é".encode(),
    b"\xc3",
    b"\xa9",
    b"\xf0\x9f",
    b"\x98",
    b"\x80",
]
TOKENS += [FAMILY.encode()[:5], FAMILY.encode()[5:], b"\xff", b"\n", b" stop", b"st", b"op"]
END_TOKEN = len(TOKENS)


class NoEncoder:
    """Nothing is encoded here."""


def toy_tokenizer() -> Tokenizer:
    return Tokenizer(NoEncoder(), {"<|end|>": END_TOKEN}, TOKENS.__getitem__, len(TOKENS) + 1, 30)  # type: ignore[arg-type]


def run(tokenizer: Tokenizer, chunks: Sequence[Sequence[int]], stop: Sequence[str] = ()) -> tuple[str, int, list[str]]:
    """The whole text, the tokens used, and every piece."""
    detokenizer = IncrementalDetokenizer(tokenizer, stop)
    pieces: list[str] = []
    used = 0
    for chunk in chunks:
        step = detokenizer.push(chunk)
        pieces.append(step.text)
        used += step.token_count_used
        if step.stopped:
            break
    pieces.append(detokenizer.finish())
    return "".join(pieces), used, pieces


def cut_at_first_stop(text: str, stop: Sequence[str]) -> str:
    """Letter by letter, as the definition says."""
    for end in range(len(text) + 1):
        starts = [end - len(one) for one in stop if text[:end].endswith(one)]
        if starts:
            return text[: min(starts)]
    return text


def divided(draw: st.DrawFn, token_ids: list[int]) -> list[list[int]]:
    chunks: list[list[int]] = []
    while token_ids:
        size = draw(st.integers(0, 4))
        chunks.append(token_ids[:size])
        token_ids = token_ids[size:]
    return chunks


@st.composite
def toy_chunks(draw: st.DrawFn) -> list[list[int]]:
    return divided(draw, draw(st.lists(st.integers(0, END_TOKEN), max_size=40)))


STOPS = st.lists(st.text("ab<end>é stop\n", min_size=1, max_size=5), max_size=4)


@settings(deadline=None, max_examples=200)
@given(chunks=toy_chunks())
def test_pieces_put_together_are_the_whole_text(chunks: list[list[int]]) -> None:
    tokenizer = toy_tokenizer()
    whole = [token_id for chunk in chunks for token_id in chunk]
    text, used, _ = run(tokenizer, chunks)
    assert text == tokenizer.decode(whole)
    assert used == len(whole)


@settings(deadline=None, max_examples=300)
@given(chunks=toy_chunks(), stop=STOPS)
def test_with_stops_the_text_is_cut_before_the_first(chunks: list[list[int]], stop: list[str]) -> None:
    tokenizer = toy_tokenizer()
    whole = [token_id for chunk in chunks for token_id in chunk]
    text, used, _ = run(tokenizer, chunks, stop)
    decoded = tokenizer.decode(whole)
    assert text == cut_at_first_stop(decoded, stop)
    stopped = any(one in decoded for one in stop)
    if stopped:
        assert not any(one in tokenizer.decode(whole[: used - 1]) for one in stop)
        assert any(one in tokenizer.decode(whole[:used]) for one in stop)
    else:
        assert used == len(whole)


@settings(deadline=None, max_examples=150)
@given(chunks=toy_chunks(), stop=STOPS)
def test_what_is_out_is_never_part_of_a_stop_and_no_more_is_held_than_needed(
    chunks: list[list[int]], stop: list[str]
) -> None:
    tokenizer = toy_tokenizer()
    detokenizer = IncrementalDetokenizer(tokenizer, stop)
    out, seen = "", []
    for chunk in chunks:
        step = detokenizer.push(chunk)
        out, seen = out + step.text, seen + list(chunk)
        if step.stopped:
            return
        held = tokenizer.decode(seen)[len(out) :]
        assert not held or any(one.startswith(held) and one != held for one in stop)


@st.composite
def model_text(draw: st.DrawFn) -> tuple[str, list[int]]:
    alphabet = st.sampled_from([*"ab \n.,;1é你👍🏽\u200d", "👩\u200d👩\u200d👧", "\u2028", "naïve", "<|im_end|>"])
    text = "".join(draw(st.lists(alphabet, max_size=30)))
    return text, draw(st.lists(st.integers(1, 5), min_size=1, max_size=8))


@settings(deadline=None, max_examples=200)
@given(sample=model_text(), stop=st.lists(st.sampled_from(["a", "b ", "\n\n", "👩", "<|im_end|>", "é你"]), max_size=3))
def test_real_tokens_in_random_pieces_give_the_text(
    model: TextModel, sample: tuple[str, list[int]], stop: list[str]
) -> None:
    text, sizes = sample
    token_ids = model.tokenizer.encode(text, allow_special=False)
    chunks, place, turn = [], 0, 0
    while place < len(token_ids):
        size = sizes[turn % len(sizes)]
        chunks.append(token_ids[place : place + size])
        place, turn = place + size, turn + 1
    assert run(model.tokenizer, chunks, stop)[0] == cut_at_first_stop(text, stop)


def test_a_character_comes_when_it_is_whole(model: TextModel) -> None:
    token_ids = model.tokenizer.encode("😀", allow_special=False)
    detokenizer = IncrementalDetokenizer(model.tokenizer)
    pieces = [detokenizer.push([token_id]).text for token_id in token_ids]
    assert pieces == [""] * (len(token_ids) - 1) + ["😀"]


def test_an_answer_cut_within_a_character_ends_before_it() -> None:
    assert run(toy_tokenizer(), [[1], [10]])[0] == "a"


def test_a_stop_over_three_tokens_ends_the_answer_at_the_third() -> None:
    detokenizer = IncrementalDetokenizer(toy_tokenizer(), ["b<end>"])
    assert detokenizer.push([1, 3]) == DetokenizerStep("aa", False, 2)
    assert detokenizer.push([6, 1, 1]) == DetokenizerStep("", True, 1)
    assert detokenizer.push([1]) == DetokenizerStep("", True, 0)
    assert detokenizer.finish() == ""


def test_text_held_for_a_stop_that_does_not_come_is_given_out() -> None:
    detokenizer = IncrementalDetokenizer(toy_tokenizer(), [" stop!"])
    assert detokenizer.push([1, 17]).text == "a"
    assert detokenizer.push([1]).text == " stopa"
    assert detokenizer.push([17]).text == ""
    assert detokenizer.finish() == " stop"


def test_of_two_stops_that_end_together_the_longer_counts() -> None:
    assert run(toy_tokenizer(), [[1], [2], [1]], ["ba", "aba", "a b"])[0] == ""


@pytest.mark.parametrize("sent_count", range(6))
def test_a_resumed_answer_goes_on_where_the_client_was_left(sent_count: int) -> None:
    token_ids = [1, 8, 9, 5, 10, 11, 12, 1]
    tokenizer = toy_tokenizer()
    before = IncrementalDetokenizer(tokenizer, ["<end>"])
    sent = before.push(token_ids[:sent_count]).text
    after = IncrementalDetokenizer(tokenizer, ["<end>"])
    after.push(token_ids[:sent_count])
    rest = after.push(token_ids[sent_count:]).text + after.finish()
    assert sent + rest == tokenizer.decode(token_ids)
