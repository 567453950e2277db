"""Output that a grammar describes, be it a JSON Schema, one of Lark or a regular expression: which tokens may follow.

Owns the vocabulary as llguidance (Microsoft) wants it, and a matcher for each sequence, which follows what is said and
tells what may follow. Invariants: what is allowed depends on the grammar and the output alone, so an output goes on
elsewhere as it would have here; a grammar that asks for what is not supported is refused, never ignored.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .errors import INVALID_VALUE, ModelLoadError, RequestRefused
from .gguf_reader import GgufFile
from .request import ModelInfo
from .schema_bounds import schema_fault

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

GRAMMAR_BYTE_BOUND = 16_384
"""A schema of this size is compiled in up to a tenth of a second, and the slowest of other grammars in half of one."""

ROW_ITEM_BOUND = 300
"""How many ways to read the output a Lark grammar may keep open at once. The time of a step grows with their square or
cube: 25 ms with so many, seconds with the 2,000 that llguidance allows."""

# One way to write JSON: small models lose themselves in white space where any is allowed.
_WRITING = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_CONTROL_KIND = 3
_SPECIAL_MARK = b"\xff"

_LITERALS = re.compile(r'"(?:\\.|[^"\\\n])*"|/(?:\\.|[^/\\])+/|(?://|#)[^\n]*|<[^<>\s]+>')
"""What of a Lark grammar is text, expressions, comments and special tokens, as llguidance tells them apart."""
_REFUSED = re.compile(r"&|~(?!\s*\d)|%json")
"""Intersections and complements of expressions, and schemas, which have some: twenty of them take seconds to compile,
and each one more takes twice as long, which no limit of llguidance ends. A ~ before a number repeats."""

_FAULT_CHARACTER_BOUND = 300
_SOURCE_LINES = re.compile(r"^ *\d+ \| .*\n?(?: +\^ *\n?)?", re.MULTILINE)
"""The lines of a grammar that llguidance shows with a fault."""
_REGEX_FAULT = re.compile(r"^error: (.*)", re.MULTILINE)


@dataclass(frozen=True)
class Grammar:
    """What an output must follow."""

    kind: str
    """json_schema, or one of GRAMMAR_KINDS."""
    text: str

    @property
    def field(self) -> str:
        """The field of SamplingParams that asks for it."""
        return "json_schema" if self.kind == "json_schema" else "grammar"


class Grammars:
    """A model's vocabulary, ready for grammars; ModelLoadError where its files do not tell it."""

    def __init__(self, model_path: Path, model: ModelInfo) -> None:
        if not model.eos_token_ids:
            raise ModelLoadError(f"{model_path}: no token ends an output")
        # Only here, since a simulator has no use for it.
        from llguidance import LLMatcher, LLParserLimits

        self._matcher_class = LLMatcher
        self._lark_limits = LLParserLimits(max_items_in_row=ROW_ITEM_BOUND)
        self._size = model.vocabulary_size
        self._eos = np.array(model.eos_token_ids)
        self._tokenizer = _tokenizer(model_path, model)

    def matcher(self, grammar: Grammar, stop_token_ids: frozenset[int], output: list[int]) -> "OutputMatcher":
        """For a sequence that has said `output`; RequestRefused where the grammar or the output cannot be."""
        _check(grammar)
        try:
            matcher = self._compiled(grammar)
        except ValueError as error:
            raise _refused(grammar, str(error)) from error
        if matcher.is_error():
            raise _refused(grammar, matcher.get_error())
        if not matcher.consume_tokens(output):
            raise RequestRefused(INVALID_VALUE, f"{grammar.field} does not describe the output that is to go on")
        ends = np.array(sorted(stop_token_ids or self._eos.tolist()))
        return OutputMatcher(matcher, self._size, self._eos, ends[ends < self._size])

    def _compiled(self, grammar: Grammar) -> "LLMatcher":
        new = self._matcher_class
        if grammar.kind == "json_schema":
            compiled = new.grammar_from_json_schema(grammar.text, defaults=_WRITING)
            return new(self._tokenizer, compiled, log_level=0)
        if grammar.kind == "regex":
            return new(self._tokenizer, new.grammar_from_regex(grammar.text), log_level=0)
        assert grammar.kind == "lark", grammar.kind
        compiled = new.grammar_from_lark(grammar.text)
        return new(self._tokenizer, compiled, log_level=0, limits=self._lark_limits)


class OutputMatcher:
    """What one sequence has said of its grammar."""

    def __init__(self, matcher: "LLMatcher", size: int, eos: np.ndarray, ends: np.ndarray) -> None:
        self._matcher, self._size, self._eos, self._ends = matcher, size, eos, ends
        self.fault = ""
        """Why nothing more can be said; empty while all is well."""

    def allowed(self) -> np.ndarray:
        """[vocabulary_size] bool: the tokens that may come next, one at least."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        mask = np.zeros(self._size, bool)
        known = np.unpackbits(bits, bitorder="little")[: self._size]
        mask[: len(known)] = known
        may_end = mask[self._eos].any()
        mask[self._eos] = False
        if may_end:
            mask[self._ends] = True
        if self._matcher.is_error() or not mask.any():
            self.fault = self._fault()
            mask[:] = True
        return mask

    def follow(self, token_id: int) -> bool:
        """Take in the token that was said; True where the output is whole and nothing can follow."""
        if not self._matcher.consume_token(token_id):
            self.fault = self._fault()
        return not self.fault and self._matcher.is_stopped()

    def _fault(self) -> str:
        return _short(self._matcher.get_error() or "no token can follow")


class _Vocabulary:
    """A vocabulary as llguidance asks for it."""

    def __init__(self, tokens: list[bytes], model: ModelInfo) -> None:
        self.eos_token_id, self.bos_token_id = model.eos_token_ids[0], model.bos_token_id
        self.tokens = tokens
        self.special_token_ids: list[int] = []
        self._ids = {token: token_id for token_id, token in reversed(list(enumerate(tokens))) if token}
        self._longest = max(map(len, tokens))

    def __call__(self, text: bytes) -> list[int]:
        """What a grammar leaves no choice about is said in the longest tokens there are.

        It ends before a byte that no token writes: llguidance then finds that nothing can follow.
        """
        found, start = [], 0
        while start < len(text):
            pieces = (text[start : start + length] for length in range(self._longest, 0, -1))
            piece = next((piece for piece in pieces if piece in self._ids), None)
            if piece is None:
                return found
            found.append(self._ids[piece])
            start += len(piece)
        return found


def _tokenizer(model_path: Path, model: ModelInfo) -> "LLTokenizer":
    from llguidance import LLTokenizer
    from llguidance._tokenizer import TokenizerWrapper

    eos = list(model.eos_token_ids)
    if not model_path.is_dir():
        tokens = _gguf_tokens(GgufFile(model_path))
        tokens += [b""] * (model.vocabulary_size - len(tokens))
        return LLTokenizer(TokenizerWrapper(_Vocabulary(tokens, model)), eos_token=eos)
    path = model_path / "tokenizer.json"
    try:
        return LLTokenizer(path.read_text(encoding="utf-8"), n_vocab=model.vocabulary_size, eos_token=eos)
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"{path}: cannot be read: {error}") from error


def _gguf_tokens(file: GgufFile) -> list[bytes]:
    family = file.metadata.get("tokenizer.ggml.model")
    if family != "gpt2":
        raise ModelLoadError(f"{file.path}: tokenizer.ggml.model is {family!r}, expected 'gpt2'")
    texts, kinds = file.strings("tokenizer.ggml.tokens"), file.integers("tokenizer.ggml.token_type")
    alphabet = _byte_level_alphabet()
    tokens = []
    for text, kind in zip(texts, kinds, strict=True):
        if kind == _CONTROL_KIND:
            tokens.append(_SPECIAL_MARK + text.encode())
        elif all(letter in alphabet for letter in text):
            tokens.append(bytes(alphabet[letter] for letter in text))
        else:
            tokens.append(text.encode())
    return tokens


def _byte_level_alphabet() -> dict[str, int]:
    """The letters that stand for bytes in GPT-2's vocabulary: printable ones for themselves, others from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = [chr(byte) for byte in printable] + [chr(256 + place) for place in range(len(others))]
    return dict(zip(letters, [*printable, *others], strict=True))


def _check(grammar: Grammar) -> None:
    """RequestRefused where the text is too long, or no object where it should be a JSON Schema."""
    field, count = grammar.field, len(grammar.text.encode())
    if count > GRAMMAR_BYTE_BOUND:
        raise RequestRefused(INVALID_VALUE, f"{field} has {count} bytes, expected at most {GRAMMAR_BYTE_BOUND}")
    if grammar.kind == "lark" and (found := _REFUSED.search(_LITERALS.sub(" ", grammar.text))):
        raise _refused(grammar, f"{found[0]} cannot be used")
    if grammar.kind != "json_schema":
        return
    try:
        found = json.loads(grammar.text)
    except (ValueError, RecursionError) as error:
        raise RequestRefused(INVALID_VALUE, f"{field} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise RequestRefused(INVALID_VALUE, f"{field} is not an object")
    if fault := schema_fault(found):
        raise _refused(grammar, fault)


def _refused(grammar: Grammar, fault: str) -> RequestRefused:
    return RequestRefused(INVALID_VALUE, f"{grammar.field} is not supported: {_short(fault)}")


def _short(text: str) -> str:
    """One line of llguidance's own words, without the state that it adds for its authors."""
    if text.startswith("panic"):
        # What follows are the places of files.
        return "it cannot be followed"
    text = _SOURCE_LINES.sub("", text.split("<state>")[0])
    if len(text) > _FAULT_CHARACTER_BOUND and (error := _REGEX_FAULT.search(text)):
        # A long expression is repeated before it is said what is wrong with it.
        text = f"regex parse error: {error[1]}"
    return " ".join(text.split())[:_FAULT_CHARACTER_BOUND]
