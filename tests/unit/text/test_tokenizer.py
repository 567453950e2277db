from __future__ import annotations

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models

from tidegate.text.model_files import TextModel
from tidegate.text.tokenizer import CHARACTER_LIMIT, Tokenizer

PIECES = st.sampled_from(
    ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|", "|>", "im_end", "user\n", " ", "é", "👍"]
)


def test_digits_are_tokens_of_their_own(model: TextModel) -> None:
    assert model.tokenizer.encode("Hello, world! 123", allow_special=False) == [19556, 28, 905, 17, 216, 33, 34, 35]


# The model's vocabulary lacks some bytes, so it cannot be told every character.
KNOWN = st.characters(
    max_codepoint=0xFFFF, exclude_categories=["Cs"], exclude_characters="\x04\x06\x13\x14\x16\x1d"
) | st.characters(min_codepoint=0x1F300, max_codepoint=0x1FAFF)


@settings(deadline=None, max_examples=200)
@given(text=st.lists(PIECES | st.text(KNOWN, max_size=8)).map("".join))
def test_plain_text_comes_back_and_never_holds_a_special_token(model: TextModel, text: str) -> None:
    tokenizer = model.tokenizer
    token_ids = tokenizer.encode(text, allow_special=False)
    assert not any(map(tokenizer.is_special, token_ids))
    assert tokenizer.decode(token_ids) == text
    assert tokenizer.least_token_count(text) <= len(token_ids)


def test_special_tokens_arise_only_where_they_are_allowed(model: TextModel) -> None:
    tokenizer = model.tokenizer
    assert tokenizer.encode("<|im_end|>", allow_special=True) == [2]
    assert tokenizer.encode("a<|im_end|>\n", allow_special=True) == [
        *tokenizer.encode("a", allow_special=False),
        2,
        *tokenizer.encode("\n", allow_special=False),
    ]
    assert 2 not in tokenizer.encode("<|im_end|>", allow_special=False)


def test_special_tokens_have_a_label_and_no_text(model: TextModel) -> None:
    assert model.tokenizer.token_bytes(2) == b""
    assert model.tokenizer.token_label(2) == b"<|im_end|>"
    assert model.tokenizer.decode([2, 19556, 2]) == "Hello"


@pytest.mark.parametrize("token_id", [-1, 49152, 2**31])
def test_ids_outside_the_vocabulary_have_no_text(model: TextModel, token_id: int) -> None:
    assert model.tokenizer.token_bytes(token_id) == b""
    assert model.tokenizer.token_label(token_id) == b""


def test_a_cut_character_is_left_out_and_a_wrong_byte_is_replaced(model: TextModel) -> None:
    tokenizer = model.tokenizer
    emoji = tokenizer.encode("😀", allow_special=False)
    assert len(emoji) > 1
    assert tokenizer.decode(emoji[:-1]) == ""
    assert tokenizer.decode([*emoji[:-1], 19556]) == "\ufffdHello"


def test_a_text_without_end_is_refused(model: TextModel) -> None:
    with pytest.raises(ValueError, match=str(CHARACTER_LIMIT)):
        model.tokenizer.encode("a" * (CHARACTER_LIMIT + 1), allow_special=False)


def test_a_vocabulary_whose_merges_make_a_special_text_is_spelt_out() -> None:
    words = {"<": 0, "s": 1, ">": 2, "<s": 3, "<s>": 4}
    encoder = tokenizers.Tokenizer(models.BPE(vocab=words, merges=[("<", "s"), ("<s", ">")]))
    tokenizer = Tokenizer(encoder, {"<s>": 4}, lambda i: list(words)[i].encode(), 5, 3)
    assert tokenizer.encode("<s>s", allow_special=False) == [0, 1, 2, 1]
    assert tokenizer.encode("<s>s", allow_special=True) == [4, 1]
