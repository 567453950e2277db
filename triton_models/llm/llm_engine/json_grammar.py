"""Output that is JSON of a schema: which tokens may come next.

Owns the vocabulary as llguidance (Microsoft) wants it, and a matcher for each sequence, which follows what is said and
tells what may follow. Invariants: what is allowed depends on the schema and the output alone, so an output goes on
elsewhere as it would have here; a schema that asks for what is not supported is refused, never ignored.
"""

import json
from pathlib import Path

import numpy as np

from .errors import INVALID_VALUE, ModelLoadError, RequestRefused
from .gguf_reader import GgufFile
from .request import ModelInfo

SCHEMA_BYTE_BOUND = 16_384
"""A schema is compiled between two steps; one of this size in up to a tenth of a second."""

# One way to write JSON: small models lose themselves in white space where any is allowed.
_WRITING = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_CONTROL_KIND = 3
_SPECIAL_MARK = b"\xff"


class JsonGrammars:
    """A model's vocabulary, ready for schemas; ModelLoadError where its files do not tell it."""

    def __init__(self, model_path: Path, model: ModelInfo) -> None:
        if not model.eos_token_ids:
            raise ModelLoadError(f"{model_path}: no token ends an output")
        # Only here, since a simulator has no use for it.
        from llguidance import LLMatcher

        self._matcher_class = LLMatcher
        self._size = model.vocabulary_size
        self._eos = np.array(model.eos_token_ids)
        self._tokenizer = _tokenizer(model_path, model)

    def matcher(self, schema: str, stop_token_ids: frozenset[int], output: list[int]) -> "JsonMatcher":
        """For a sequence that has said `output`; RequestRefused where the schema or the output cannot be."""
        try:
            grammar = self._matcher_class.grammar_from_json_schema(schema, defaults=_WRITING)
            matcher = self._matcher_class(self._tokenizer, grammar, log_level=0)
        except ValueError as error:
            raise _refused(str(error)) from error
        if matcher.is_error():
            raise _refused(matcher.get_error())
        if not matcher.consume_tokens(output):
            raise RequestRefused(INVALID_VALUE, "json_schema does not describe the output that is to go on")
        ends = np.array(sorted(stop_token_ids or self._eos.tolist()))
        return JsonMatcher(matcher, self._size, self._eos, ends[ends < self._size])


class JsonMatcher:
    """What one sequence has said of its JSON."""

    def __init__(self, matcher, size: int, eos: np.ndarray, ends: np.ndarray) -> None:  # noqa: ANN001 (llguidance's)
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
        """Take in the token that was said; True where the JSON is whole and nothing can follow."""
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
        """What the schema leaves no choice about is said in the longest tokens there are."""
        found, start = [], 0
        while start < len(text):
            pieces = (text[start : start + length] for length in range(self._longest, 0, -1))
            piece = next((piece for piece in pieces if piece in self._ids), None)
            if piece is None:
                raise ValueError(f"no token writes the byte {text[start]}")
            found.append(self._ids[piece])
            start += len(piece)
        return found


def _tokenizer(model_path: Path, model: ModelInfo):  # noqa: ANN202 (llguidance's)
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


def _refused(fault: str) -> RequestRefused:
    return RequestRefused(INVALID_VALUE, f"json_schema is not supported: {_short(fault)}")


def _short(text: str) -> str:
    """One line of llguidance's own words, without the state that it adds for its authors."""
    return " ".join(text.split("<state>")[0].split())[:300]


def checked_schema(schema: str) -> str:
    """The schema; RequestRefused where it is not JSON of an object, or too long."""
    if len(schema.encode()) > SCHEMA_BYTE_BOUND:
        count = len(schema.encode())
        raise RequestRefused(INVALID_VALUE, f"json_schema has {count} bytes, expected at most {SCHEMA_BYTE_BOUND}")
    try:
        found = json.loads(schema)
    except (ValueError, RecursionError) as error:
        raise RequestRefused(INVALID_VALUE, f"json_schema is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise RequestRefused(INVALID_VALUE, "json_schema is not an object")
    return schema
