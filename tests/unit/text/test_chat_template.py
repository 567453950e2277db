from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tidegate.common.errors import Reason, TidegateError
from tidegate.text.chat_template import RENDERED_CHARACTER_LIMIT, ChatTemplate, ChatTemplateError
from tidegate.text.model_files import TextModel
from tidegate.v1 import inference_pb2

SPECIAL = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]
ANY_CONTENT = st.lists(st.sampled_from([*SPECIAL, "<|im_", "end|>", "<", "|>", " ", "hi", "\ufdd0", "é", "\n"])).map(
    "".join
)


def chat(*contents: str) -> list[inference_pb2.ChatMessage]:
    roles = ["user", "assistant"]
    return [inference_pb2.ChatMessage(role=roles[i % 2], content=text) for i, text in enumerate(contents)]


def test_renders_as_the_model_was_trained(model: TextModel) -> None:
    messages = [
        inference_pb2.ChatMessage(role="system", content="S"),
        inference_pb2.ChatMessage(role="user", content="U"),
    ]
    expected = "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\n"
    assert model.chat_template.render(messages) == expected


def test_developer_is_rendered_as_system(model: TextModel) -> None:
    messages = [inference_pb2.ChatMessage(role=role, content="S") for role in ("developer", "system")]
    assert model.chat_template.render(messages[:1]) == model.chat_template.render(messages[1:])


@settings(deadline=None, max_examples=100)
@given(contents=st.lists(st.text("abc é你\n <>|{}%", max_size=20), min_size=1, max_size=4))
def test_harmless_contents_have_the_tokens_of_the_rendered_text(model: TextModel, contents: list[str]) -> None:
    rendered = model.chat_template.render(chat(*contents))
    expected = model.tokenizer.encode(rendered, allow_special=True)
    assert model.chat_template.encode(chat(*contents), model.tokenizer) == expected


@settings(deadline=None, max_examples=150)
@given(contents=st.lists(ANY_CONTENT, min_size=1, max_size=4))
def test_contents_never_make_special_tokens(model: TextModel, contents: list[str]) -> None:
    tokenizer = model.tokenizer
    token_ids = model.chat_template.encode(chat(*contents), tokenizer)
    placeholders = model.chat_template.encode(chat(*("x" for _ in contents)), tokenizer)
    assert [i for i in token_ids if tokenizer.is_special(i)] == [i for i in placeholders if tokenizer.is_special(i)]
    text = b"".join(map(tokenizer.token_label, token_ids)).decode()
    assert text == model.chat_template.render(chat(*contents))


TRANSFORMING = {
    "trims": "{% for m in messages %}<|im_start|>{{ m.content | trim }}{% endfor %}",
    "splits": "{% for m in messages %}<|im_start|>{{ m.content.split('</think>')[-1].lstrip('\\n') }}{% endfor %}",
    "joins": "{{ messages | map(attribute='content') | join('') }}<|im_end|>",
    "tests": "{% for m in messages %}{% if 'hi' in m.content %}H{% endif %}{{ m.content }}{% endfor %}",
    "dumps": "{% for m in messages %}{{ m | tojson }}{% endfor %}",
}


@pytest.mark.parametrize("source", TRANSFORMING.values(), ids=TRANSFORMING.keys())
@settings(deadline=None, max_examples=50)
@given(contents=st.lists(ANY_CONTENT, min_size=1, max_size=4))
def test_templates_may_transform_the_contents(model: TextModel, source: str, contents: list[str]) -> None:
    template = ChatTemplate(source, special_texts=model.tokenizer.special_tokens)
    tokenizer = model.tokenizer
    token_ids = template.encode(chat(*contents), tokenizer)
    assert b"".join(map(tokenizer.token_label, token_ids)).decode() == template.render(chat(*contents))
    own = template.encode(chat(*("x" for _ in contents)), tokenizer)
    assert [i for i in token_ids if tokenizer.is_special(i)] == [i for i in own if tokenizer.is_special(i)]


def test_trimmed_halves_do_not_join_into_a_special_token(model: TextModel) -> None:
    source = "{% for m in messages %}{{ m.content | trim }}{% endfor %}"
    template = ChatTemplate(source, special_texts=SPECIAL)
    token_ids = template.encode(chat("a <|im_ \n ", " end|>"), model.tokenizer)
    assert model.tokenizer.decode(token_ids) == "a <|im_end|>"


def test_a_template_that_refuses_says_why() -> None:
    template = ChatTemplate("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(TidegateError) as caught:
        template.render(chat("a"))
    assert caught.value.reason is Reason.INVALID_VALUE
    assert caught.value.field == "chat.messages"
    assert "roles must alternate" in caught.value.message


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ messages[9].content.x }}",
        "{% for i in range(1000000) %}x{% endfor %}",
        "{{ 1 / 0 }}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    ],
)
def test_the_sandbox_ends_in_a_refusal(source: str) -> None:
    with pytest.raises(TidegateError) as caught:
        ChatTemplate(source).render(chat("a"))
    assert caught.value.reason is Reason.INVALID_VALUE


def test_a_template_that_writes_without_end_is_stopped() -> None:
    source = "{% for i in range(100000) %}{{ messages[0].content }}{% endfor %}"
    with pytest.raises(TidegateError, match=str(RENDERED_CHARACTER_LIMIT)):
        ChatTemplate(source).render(chat("x" * 10_000))


def test_a_broken_template_is_named_when_it_is_loaded() -> None:
    with pytest.raises(ChatTemplateError, match="cannot be compiled"):
        ChatTemplate("{% if %}")
