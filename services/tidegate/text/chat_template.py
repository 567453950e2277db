"""A model's own chat template: from messages to the text, and to the tokens, that the model was trained on.

Templates are Jinja and come with the model. They run in an immutable sandbox, without a clock (so the same chat
always has the same tokens) and with bounds on what they write and count through. Only the template's own words may
become special tokens: inside what a client wrote, the text of a special token is broken up with a character that
occurs nowhere else, the template is rendered, and the character is taken away again after the cut at special tokens.
So a template may trim, split or test contents as it likes, and harmless contents give exactly the reference tokens.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any, Final, NoReturn

import jinja2
import jinja2.ext
import jinja2.sandbox

from tidegate.common.errors import Reason, TidegateError
from tidegate.text.tokenizer import CHARACTER_LIMIT, Tokenizer, special_pattern
from tidegate.v1 import inference_pb2

RENDERED_CHARACTER_LIMIT: Final = CHARACTER_LIMIT
"""The most characters a rendered chat may have."""

STEP_COUNT_LIMIT: Final = 250_000
"""The most pieces a template may write, and the most numbers it may count through."""

FAULT_CHARACTER_LIMIT: Final = 256
"""How much of a template's own complaint is passed on."""

_MARKS: Final = (*map(chr, range(0xFDD0, 0xFDF0)), *map(chr, range(0xE000, 0xF900)))
"""Characters to break up special texts with, the ones that no text should contain first."""


class ChatTemplateError(ValueError):
    """The template itself is broken; the message says where."""


class ChatTemplate:
    """One compiled template; safe to share between threads.

    Args:
        source: the Jinja source, as in the model's files.
        special_texts: the texts of the special tokens.
        bos_text: the beginning-of-sequence token's text, as templates name it; empty for none.
        eos_text: the end-of-sequence token's text.

    Raises:
        ChatTemplateError: the source is not a Jinja template.
    """

    def __init__(
        self, source: str, *, special_texts: Iterable[str] = (), bos_text: str = "", eos_text: str = ""
    ) -> None:
        self.source: Final = source
        special_texts = [text for text in special_texts if text]
        self._pattern = special_pattern(special_texts)
        self._beginnings = frozenset(text[:size] for text in special_texts for size in range(1, len(text)))
        self._longest = max(map(len, special_texts), default=1)
        self._variables = {"bos_token": bos_text, "eos_token": eos_text, "add_generation_prompt": True}
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateError as error:
            raise ChatTemplateError(f"the chat template cannot be compiled: {error}") from error

    def render(self, messages: Sequence[inference_pb2.ChatMessage]) -> str:
        """The chat as one text that ends where the model's answer begins.

        Raises:
            TidegateError: INVALID_VALUE when the template refuses the messages, or writes too much.
        """
        return self._render([_variables_of(message) for message in messages])

    def encode(self, messages: Sequence[inference_pb2.ChatMessage], tokenizer: Tokenizer) -> list[int]:
        """The chat's tokens; special ones only where the template wrote them.

        Raises:
            TidegateError: as render.
        """
        values = [_variables_of(message) for message in messages]
        mark = self._break_up_special_texts(values)
        rendered = self._render(values)
        if not mark:
            return tokenizer.encode(rendered, allow_special=True)
        token_ids: list[int] = []
        for piece in tokenizer.split_special(rendered):
            if isinstance(piece, int):
                token_ids.append(piece)
            else:
                token_ids += tokenizer.encode(piece.replace(mark, ""), allow_special=False)
        return token_ids

    def _break_up_special_texts(self, values: list[dict[str, str]]) -> str:
        """Puts a mark into every special text that the messages contain; the mark, or nothing if none was needed."""
        dangerous = [value for value in values if any(map(self._could_be_special, value.values()))]
        if not dangerous:
            return ""
        used = set().union(*(text for value in values for text in value.values()))
        mark = next((mark for mark in _MARKS if mark not in used), None)
        if mark is None:
            raise TidegateError(
                Reason.INVALID_VALUE, "The messages use every private-use character there is.", field="chat.messages"
            )
        for value in dangerous:
            value.update({name: self._break_up(text, mark) for name, text in value.items()})
        return mark

    def _could_be_special(self, text: str) -> bool:
        if self._pattern is None:
            return False
        return self._pattern.search(text) is not None or self._open_end(text) > 0

    def _break_up(self, text: str, mark: str) -> str:
        assert self._pattern is not None
        open_end = self._open_end(text)
        if open_end:
            # The template may trim the text and put another one right behind it.
            first = len(text.rstrip()) - open_end + 1
            text = text[:first] + mark + text[first:]
        return self._pattern.sub(lambda match: match[0][0] + mark + match[0][1:], text)

    def _open_end(self, text: str) -> int:
        """How many characters at the text's end (trimmed) are the beginning of a special text."""
        end = text[-4 * self._longest :].rstrip()
        sizes = range(min(self._longest - 1, len(end)), 0, -1)
        return next((size for size in sizes if end[-size:] in self._beginnings), 0)

    def _render(self, values: list[dict[str, str]]) -> str:
        pieces: list[str] = []
        character_count = 0
        try:
            for piece in self._template.generate(messages=values, range=_BoundedRange(), **self._variables):
                pieces.append(piece)
                character_count += len(piece)
                if character_count > RENDERED_CHARACTER_LIMIT or len(pieces) > STEP_COUNT_LIMIT:
                    raise _Refused(f"it writes more than {RENDERED_CHARACTER_LIMIT} characters")
        except Exception as error:
            # A template is foreign code: whatever it raises means that it does not take these messages.
            fault = f"The model's chat template refuses these messages: {str(error)[:FAULT_CHARACTER_LIMIT]}"
            raise TidegateError(Reason.INVALID_VALUE, fault, field="chat.messages") from error
        return "".join(pieces)


class _Refused(jinja2.TemplateError):
    """The template, or a bound on it, says no."""


class _BoundedRange:
    """Jinja's `range` for one rendering, with a bound on all of its loops together."""

    def __init__(self) -> None:
        self._left = STEP_COUNT_LIMIT

    def __call__(self, *bounds: int) -> range:
        numbers = range(*bounds)
        self._left -= len(numbers)
        if self._left < 0:
            raise _Refused(f"it counts through more than {STEP_COUNT_LIMIT} numbers")
        return numbers


def _environment() -> jinja2.Environment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    return environment


def _to_json(value: Any, indent: int | None = None) -> str:
    """As the reference implementation has it: Jinja's own filter would escape for HTML."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise_exception(message: str) -> NoReturn:
    raise _Refused(message)


def _variables_of(message: inference_pb2.ChatMessage) -> dict[str, str]:
    """The message as templates know it; they have no developer, which is OpenAI's newer word for system."""
    role = "system" if message.role == "developer" else message.role
    values = {"role": role, "content": message.content}
    if message.name:
        values["name"] = message.name
    return values
