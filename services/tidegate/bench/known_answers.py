"""The checkers of engines whose answers are known beforehand: today the simulated one, `triton_models/llm_sim`.

Its rule stands in one file that needs nothing but Python, and is read from there: the generator checks against the
engine's own promise and not against a copy of it.
"""

from __future__ import annotations

import functools
import importlib.util
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from tidegate.bench.checkers import AnswerChecker
from tidegate.text.gguf_metadata import read_metadata
from tidegate.v1 import inference_pb2

if TYPE_CHECKING:
    from tidegate.text.model_files import TextModel

SIMULATED_ENGINE: Final = "llm_sim"

_RULE: Final = Path(__file__).resolve().parents[3] / "triton_models" / SIMULATED_ENGINE / "answer.py"


@functools.lru_cache(maxsize=1)
def checker_of(engine: str, model_path: str) -> AnswerChecker | None:
    """The checker of an engine by its name; None where its answers cannot be known.

    Raises:
        OSError: the engine's rule is not there.
        ModelFileError, OSError, ValueError: the model's vocabulary is not there, or cannot be used.
    """
    if engine != SIMULATED_ENGINE or not model_path:
        return None
    rule = _load_rule()
    texts = token_texts(Path(model_path))
    table = rule.answer_table(texts)
    # Answers are made of tokens that are a space, in the vocabulary's own writing, and a lower-case word.
    return SimulatedAnswers(
        rule.expected_token_ids, table, {token_id: f" {texts[token_id][1:]}" for token_id in table}, model_path
    )


class SimulatedAnswers:
    """The simulated engine's answers.

    Args:
        expected: (prompt's token ids, count, table) to the answer's first tokens.
        table: what answers are made of.
        texts: each of the table's tokens as text.
        model_path: the model's files, for the prompts of chats.
    """

    def __init__(
        self,
        expected: Callable[[Sequence[int], int, Sequence[int]], list[int]],
        table: Sequence[int],
        texts: Mapping[int, str],
        model_path: str,
    ) -> None:
        self._expected = expected
        self._table = table
        self._texts = texts
        self._model_path = model_path

    def expected_tokens(self, prompt_token_ids: Sequence[int], count: int) -> Sequence[int]:
        """The first `count` tokens of the answer to a prompt."""
        return self._expected(prompt_token_ids, count, self._table)

    def text_of(self, token_ids: Sequence[int]) -> str:
        """The text of an answer's tokens."""
        return "".join(map(self._texts.__getitem__, token_ids))

    def chat_token_ids(self, text: str) -> Sequence[int]:
        """The prompt of a chat of one message, a user's, by the model's own template and tokenizer.

        Raises:
            ModelFileError: the model's files do not have them.
        """
        model = self._text_model
        return model.chat_template.encode([inference_pb2.ChatMessage(role="user", content=text)], model.tokenizer)

    @functools.cached_property
    def _text_model(self) -> TextModel:
        # Most runs send tokens, and need neither the tokenizer nor the time that it takes to load.
        from tidegate.text.model_files import load_text_model

        return load_text_model(self._model_path, "")


def token_texts(model: Path) -> list[str]:
    """The vocabulary as the model's files write it, by id: of a GGUF file, or of a Hugging Face folder.

    Raises:
        ModelFileError, OSError, ValueError: the files are not there, or not as they must be.
    """
    if not model.is_dir():
        texts: list[str] = read_metadata(model).get("tokenizer.ggml.tokens", [])
        return texts
    vocabulary: dict[str, int] = json.loads((model / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    by_id = {token_id: text for text, token_id in vocabulary.items()}
    return [by_id.get(token_id, "") for token_id in range(max(by_id) + 1)]


def _load_rule() -> Any:
    specification = importlib.util.spec_from_file_location("tidegate_llm_sim_answer", _RULE)
    if specification is None or specification.loader is None or not _RULE.exists():
        raise FileNotFoundError(f"{_RULE} is not there, so the answers of {SIMULATED_ENGINE} cannot be checked")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module
